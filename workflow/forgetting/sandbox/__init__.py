"""Where programs that a model wrote are run: found, tried and then trusted, or not used at all."""

from forgetting.sandbox.runner import Limits, Outcome, Sandbox, SandboxError
from forgetting.sandbox.search import find_sandbox, search_sandbox, unsafe_runner

__all__ = [
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxError",
    "find_sandbox",
    "search_sandbox",
    "unsafe_runner",
]
