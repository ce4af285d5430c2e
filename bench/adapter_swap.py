"""Compare scoring of several adapters in one process with one process per adapter and task.

score.py calls `eight_adapters`, which runs this file as each of these processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model

from forgetting.benchmarks import hflm
from forgetting.benchmarks.evaluate import evaluate_tasks, load_tasks, run_benchmarks
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.data.tables import read_probe_rows
from forgetting.evaluation.probes import evaluate_probes
from forgetting.models.loading import get_device, load_base, load_tokenizer, silence_libraries
from forgetting.models.tuned import AdapterSwapper, merged_adapter
from scoring_baselines import SETS, TASKS, TOFU_LENGTH, Bench, generate_as_tofu, logprobs_by_harness


def eight_adapters(bench: Bench, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return a row of the table; separate processes run for one adapter and are extrapolated."""
    save_adapters(folder, options.adapters)
    limit = max(1, options.limit // 4)
    shared = [f"--data={options.data}", f"--folder={folder}", f"--limit={limit}"]
    start = _child([*shared, "--adapters=0"])
    ours = _child([*shared, f"--adapters={options.adapters}"])
    separate = sum(_child([*shared, f"--task={task}"]) for task in (*SETS, *TASKS))
    theirs, sets = options.adapters * separate, len(SETS) + len(TASKS)
    start_fraction = options.adapters * sets * start / theirs
    return {
        "work": f"{options.adapters} adapters, {limit} items of each of {sets} sets",
        "against": f"a process per adapter and set, {start_fraction:.0%} of it starts of Python",
        "theirs, s": f"{theirs:.2f}",
        "ours, s": f"{ours:.2f}",
        "faster by": f"{theirs / ours:.1f}",
        "range": "",
        "target": "5",
    }


def save_adapters(folder: Path, count: int) -> None:
    """Save random adapters of rank 8 on all linear layers."""
    for number in range(count):
        torch.manual_seed(number)
        base = load_base(folder, torch.device("cpu"))
        config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / f"adapter{number}")


def _child(arguments: Sequence[str]) -> float:
    """Return the processor seconds of a process, with its start and imports."""
    before = os.times()
    subprocess.run([sys.executable, __file__, *arguments], check=True)
    after = os.times()
    total = after.children_user + after.children_system
    return total - before.children_user - before.children_system


def score_all(data: Path, folder: Path, limit: int, adapters: int) -> None:
    """Score as a job does: base, rows and prompts are loaded once, and adapters are swapped."""
    if not adapters:
        return
    tokenizer, models = load_tokenizer(folder), AdapterSwapper(folder, get_device())
    probes = {name: _rows(data, name, limit) for name in SETS}
    tasks = load_tasks(tokenizer, [TaskSpec(name, limit=limit) for name in TASKS], data)
    settings = EvaluationConfig(max_new_tokens=TOFU_LENGTH, batch_size=64)
    for number in range(adapters):
        with (
            models.load(folder / f"adapter{number}") as model,
            merged_adapter(model, torch.float32),
        ):
            evaluate_probes(model, tokenizer, probes, PromptConfig(), settings)
            evaluate_tasks(model, tasks)


def score_one(data: Path, folder: Path, limit: int, task: str) -> None:
    """Score one adapter on one set, as a separate script would."""
    tokenizer = load_tokenizer(folder)
    base = load_base(folder, get_device())
    model: Any = PeftModel.from_pretrained(base, folder / "adapter0").eval()
    if task in TASKS:
        hflm.SharedPrefixLM = HFLM  # type: ignore[misc]
        run_benchmarks(model, tokenizer, [TaskSpec(task, limit=limit)], data)
        return
    rows = _rows(data, task, limit)
    bench = Bench(model, tokenizer, data, limit, rows, rows)
    generate_as_tofu(bench)
    logprobs_by_harness(bench, 16)


def _rows(data: Path, name: str, limit: int) -> list[dict[str, Any]]:
    path = data / "tofu" / f"{name}.jsonl"
    return read_probe_rows(path, f"tofu/{name}", wrong_answers=True)[:limit]


def main() -> None:
    """Score the adapters and sets of the command line, without output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="base and adapters")
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument(
        "--adapters", type=int, help="number of adapters to score on all sets; 0: only start"
    )
    parser.add_argument("--task", help="score the first adapter on this set only")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    if options.task:
        score_one(options.data, options.folder, options.limit, options.task)
    else:
        score_all(options.data, options.folder, options.limit, options.adapters)


if __name__ == "__main__":
    main()
