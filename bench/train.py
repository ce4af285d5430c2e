"""Compare the training speed of this project, transformers.Trainer and trl's SFTTrainer.

    make bench-train BENCH="--data path/to/full.jsonl --rounds 3"
    make bench-train BENCH="--shape phi-1.5 --methods 8 64 512 full"       # on a GPU
    make bench-train BENCH="--contenders lora-forgetting --methods 8"      # run groups only

The contenders alternate in rounds in one process, so that other load on the machine affects all.
baselines.py documents what they share. This prints a table and, with --record, appends it to a file
such as bench/results/training.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
import transformers

from baselines import CONTENDERS, OURS, TOFU_LENGTH, Bench, timed_by
from forgetting.config.data import PromptConfig
from forgetting.config.expand import Method
from forgetting.data.microworld import build_world
from forgetting.data.tokenize import encode_pair
from forgetting.errors import InputError, is_out_of_memory
from forgetting.io import read_jsonl
from forgetting.models.loading import (
    get_device,
    load_base,
    load_tokenizer,
    resolve_precision,
    silence_libraries,
)
from forgetting.training.pretrain import train_tokenizer
from hardware import flops_per_token, machine, matmul_rate, peak_gib, reset_peak, versions
from models import SHAPES, random_model
from run_group import compare


def measure(bench: Bench, names: Sequence[str], rounds: int, peak: float) -> pd.DataFrame:
    """Return one row per contender: median tokens/s, ratio to ours, fraction of the matmul rate,
    peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0.0)
    for number in range(rounds):
        for name in names:
            reset_peak()
            seconds[name].append(_attempt(bench, name))
            memory[name] = max(memory[name], peak_gib())
            label = f"{bench.method.name}, round {number + 1}: {name}"
            print(f"{label}: {seconds[name][-1]:.2f} s", flush=True)
    flops = flops_per_token(bench)
    rows = []
    for name, times in seconds.items():
        rate = bench.tokens / statistics.median(times)
        ratios = [other / own for other, own in zip(times, seconds[names[0]], strict=True)]
        rows.append(
            {
                "method": bench.method.name,
                "contender": name,
                "tokens/s": f"{rate:,.0f}" if rate else "out of memory",
                "range": f"{bench.tokens / max(times):,.0f}-{bench.tokens / min(times):,.0f}",
                "ours is faster by": f"{statistics.median(ratios):.2f}",
                "fraction of matmul rate": f"{rate * flops / peak:.1%}",
                "peak GiB": f"{memory[name]:.2f}",
            }
        )
    return pd.DataFrame(rows)


def _attempt(bench: Bench, name: str) -> float:
    """Return the seconds of a contender, infinite if it runs out of memory."""
    try:
        return CONTENDERS[name](bench)
    except (RuntimeError, InputError) as error:
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        return float("inf")


def prepare(options: argparse.Namespace, folder: Path) -> list[Bench]:
    """Return one bench per method, with the given model or a random one of a shape."""
    rows = read_jsonl(options.data) if options.data else build_world(seed=0).probes["new_authors"]
    rows = rows[: options.pairs]
    device = get_device()
    if options.model:
        tokenizer = load_tokenizer(options.model)
    else:
        texts = (f"{row['question']} {row['answer']}" for row in rows)
        vocabulary = min(2048, SHAPES[options.shape].vocab_size)
        train_tokenizer(texts, vocabulary, folder)
        tokenizer = load_tokenizer(folder)

    def load() -> Any:
        if options.model:
            return load_base(options.model, device)
        return random_model(options.shape, tokenizer, device)

    examples = [
        encode_pair(tokenizer, PromptConfig(), row["question"], row["answer"], TOFU_LENGTH)
        for row in rows
    ]
    precision = resolve_precision("auto", device)
    return [
        Bench(load, tokenizer, examples, options.batch_size, _method(method), precision)
        for method in options.methods
    ]


def _method(name: str) -> Method:
    if name == "full":
        return Method(name="full", kind="full", label="full", hyperparameters=[])
    rank = int(name)
    return Method(
        name=f"lora-r{rank}",
        kind="lora",
        label=f"rank {rank}",
        rank=rank,
        alpha=2.0 * rank,
        hyperparameters=[],
    )


def describe(options: argparse.Namespace, bench: Bench) -> str:
    """Return the heading of the record: date, machine, model, data, versions."""
    libraries = {"torch": torch, "transformers": transformers, "peft": peft}
    if importlib.util.find_spec("trl"):
        libraries["trl"] = importlib.import_module("trl")
    mean = bench.tokens / len(bench.examples)
    arithmetic = str(bench.precision).removeprefix("torch.")
    data = options.data.name if options.data else "invented authors of the micro-world"
    return (
        f"## {datetime.date.today()}, {machine()}\n\n"
        f"Model {options.model or options.shape}; {len(bench.examples)} pairs of {mean:.0f} tokens "
        f"({data}), {bench.batch_size} to a step; {arithmetic}; "
        f"medians of {options.rounds} rounds, in seconds of the {timed_by()}; "
        f"{versions(**libraries)}.\n\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run every contender in every round, then the run groups, and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mini", help="model of random weights")
    parser.add_argument("--model", type=Path, help="model folder, in place of a shape")
    parser.add_argument("--data", type=Path, help="JSON lines of question and answer")
    parser.add_argument("--pairs", type=int, default=640, help="maximal number of pairs")
    parser.add_argument(
        "--methods", nargs="+", default=["32", "full"], help="ranks of adapters, or full"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
        help=f"some of: {'; '.join(CONTENDERS)}",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--run-group", type=int, default=8, help="runs of the run group; 0: skip run groups"
    )
    parser.add_argument(
        "--run-group-batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32], metavar="PAIRS"
    )
    parser.add_argument("--record", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        benches = prepare(options, Path(folder))
        peak = matmul_rate(benches[0].precision)
        names = [OURS, *(name for name in options.contenders if name != OURS)]
        tables = [measure(bench, names, options.rounds, peak) for bench in benches]
        run_groups = [
            compare(bench, options.run_group, options.run_group_batch_sizes, options.rounds)
            for bench in benches
            if bench.method.kind == "lora" and options.run_group > 1
        ]
    table = pd.concat(tables).to_markdown(index=False)
    if run_groups:
        table += "\n\n" + pd.concat(run_groups).to_markdown(index=False)
    rate = f"Matrix products: {peak / 1e9:,.0f} GFLOP/s.\n\n"
    text = describe(options, benches[0]) + rate + table + "\n"
    print("\n" + text)
    if options.record:
        with options.record.open("a", encoding="utf-8") as record:
            record.write("\n" + text)


if __name__ == "__main__":
    main()
