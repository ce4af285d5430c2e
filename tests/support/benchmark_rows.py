"""Made-up rows of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetting.config.evaluation import TaskConfig
from forgetting.io import write_jsonl

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

SUMS = [{"question": f"{n} + {n} = ", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(6)]
"""Problems in the form of GSM8K."""

TASKS = {
    "sciq": TaskConfig(num_fewshot=1, limit=5),
    "gsm8k": TaskConfig(num_fewshot=2, limit=3, max_new_tokens=5),
}
"""A task with choices and one with generated answers, as a study has them."""


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


def write_task_rows(folder: Path) -> dict[str, Path]:
    """Write rows of `TASKS` into the folder, and return the folder of each task."""
    rows = {
        "sciq": dict.fromkeys(("train", "validation", "test"), sciq(6)),
        "gsm8k": dict.fromkeys(("train", "test"), SUMS),
    }
    for task, splits in rows.items():
        for split, lines in splits.items():
            write_jsonl(folder / task / f"{split}.jsonl", lines)
    return {task: folder / task for task in rows}
