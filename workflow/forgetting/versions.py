"""Versions of the stages: raise one when the numbers or texts that its stage writes change.

A version is a parameter of the stage's rules and part of the keys of its results. Raising it reruns
the stage and all that depends on it. Renaming and reformatting code rerun nothing.
tests/golden/stages holds small outputs of every stage. tests/equivalence/test_stages.py fails when
they change while the version does not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

VERSIONS = {
    # The generated micro-world; checks, selection and rendering of rows, probes and documents.
    "prepare": 1,
    # The base model: training from scratch, or the record of a model from elsewhere.
    "pretrain": 2,
    # Tokens, batches, adapters, optimizers, schedules and mitigations, which decide the weights.
    "train": 2,
    # Answers and scores of probe questions, and the divergence from the base on general text.
    "evaluate": 1,
    # Prompts, answers and scores of benchmarks and refusals; the execution of programs.
    "benchmark": 2,
    # The choice of hyperparameters and checkpoints from the evaluations of the runs.
    "select": 1,
    # The aggregated tables: means, intervals, comparisons, churn, notes.
    "tables": 2,
    # The page: its figures, tables and sentences.
    "report": 2,
}


def stage_versions(*stages: str, code: str | None = None) -> str:
    """Return the versions of stages as one text, such as `train 1, evaluate 1`.

    Args:
        stages: names of the stages.
        code: digest of the library's source files, for people who edit it.
    """
    named = [f"{stage} {VERSIONS[stage]}" for stage in stages]
    return ", ".join([*named, *([f"code {code}"] if code else [])])


def source_digest(library: Path) -> str:
    """Return a digest of every Python file and page template in the folder of the library."""
    digest = hashlib.sha256()
    for path in sorted(path for path in library.rglob("*") if path.is_file()):
        if path.suffix in {".py", ".j2", ".css", ".js"}:
            digest.update(f"{path.relative_to(library).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
