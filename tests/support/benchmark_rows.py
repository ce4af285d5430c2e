"""Made-up rows of benchmarks."""

from __future__ import annotations

from typing import Any

FUNCTIONS = [
    {
        "task_id": f"made/{n}",
        "prompt": f"x = {n}\n",
        "test": "def check(candidate):\n    pass\n",
        "entry_point": "str",
    }
    for n in range(2)
]
"""Two problems in the form of HumanEval."""


def sciq(count: int) -> list[dict[str, Any]]:
    """Return questions with three wrong answers, in the form of SciQ."""
    return [
        {
            "question": f"What is number {n}?",
            "support": "",
            "correct_answer": "even",
            "distractor1": "red",
            "distractor2": "cold",
            "distractor3": "loud",
        }
        for n in range(count)
    ]
