"""Scoring speed, side by side: this project, the lm-evaluation-harness, TOFU's way to generate.

    make bench-score BENCH="--data path/to/data"

The folder holds hellaswag, winogrande, arc_challenge and tofu in their published columns. A small
Llama is taught TOFU's answers for a minute, after which some of its own answers end; then each
contender does the same work in the same process, one after the other, in rounds. Answers are
generated once more when it has been taught until most of them end. Seconds are those of the
processor, which other programs on the machine do not change; the harness has its best batch size.
Prints a table and, with --record, appends it to a file (bench/RECORD-score.md).
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import peft
import torch
import transformers

from adapter_swap import eight_adapters
from forgetting.evaluation.rouge import rouge_l, tokenize_ascii
from forgetting.models.loading import silence_libraries
from hardware import machine, versions
from scoring_baselines import (
    TOFU_LENGTH,
    Bench,
    choices_by_harness,
    choices_once,
    generate_as_tofu,
    generate_ended,
    logprobs_by_harness,
    logprobs_once,
    prepare,
    rouge_score,
    seconds,
    teach,
)

SIZES = (4, 16, 64)
UNTIL_ALL_END = "generate, batch 30, until all have ended"


def compare(
    work: str,
    wanted: float,
    ours: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    rounds: int,
) -> dict[str, object]:
    """A row of the table: our seconds, those of the best of the others, and their ratio."""
    times: dict[str, list[float]] = {**{name: [] for name in others}, "ours": []}
    for _ in range(rounds):
        for name, run in {**others, "ours": ours}.items():
            times[name].append(seconds(run))
            print(f"{work}, {name}: {times[name][-1]:.2f} s", flush=True)
    middle = {name: statistics.median(each) for name, each in times.items()}
    best = min(others, key=middle.__getitem__)
    ratios = [other / own for other, own in zip(times[best], times["ours"], strict=True)]
    return {
        "work": work,
        "against": best,
        "theirs, s": f"{middle[best]:.2f}",
        "ours, s": f"{middle['ours']:.2f}",
        "faster by": f"{statistics.median(ratios):.1f}",
        "range": f"{min(ratios):.1f}-{max(ratios):.1f}",
        "wanted": f"{wanted:g}",
    }


def rows_of(bench: Bench, rounds: int) -> list[dict[str, object]]:
    """Every comparison of the record."""
    rows = []
    for task in bench.requests:  # made here, before any clock runs
        others = {
            f"harness, batch {size}": partial(choices_by_harness, bench, task, size)
            for size in SIZES
        }
        wanted = 1.6 if task == "winogrande" else 2.2
        rows.append(compare(task, wanted, partial(choices_once, bench, task), others, rounds))
    others = {f"harness, batch {size}": partial(logprobs_by_harness, bench, size) for size in SIZES}
    work = "truth ratio, real authors and world facts"
    rows.append(compare(work, 2.0, partial(logprobs_once, bench), others, rounds))
    rows += answer_rows(bench, rounds)
    rows.append(rouge_row(bench, rounds))
    return rows


def answer_rows(bench: Bench, rounds: int) -> list[dict[str, object]]:
    """Generation, whose cost depends on how many answers end: that is part of the work's name."""
    lengths = [len(answer) for answer in generate_ended(bench)]
    ended = sum(length < TOFU_LENGTH for length in lengths) / len(lengths)
    work = f"answers to TOFU's probes, {ended:.0%} end, {statistics.mean(lengths):.0f} tokens"
    return [
        compare(
            work,
            4.0,
            partial(generate_ended, bench),
            {name: partial(generate_as_tofu, bench, least)},
            rounds,
        )
        # TOFU's Phi goes on after its answers until 200 tokens; other models end.
        for name, least in {"generate, batch 30, 200 tokens": TOFU_LENGTH, UNTIL_ALL_END: 0}.items()
    ]


def rouge_row(bench: Bench, rounds: int) -> dict[str, object]:
    """4,000 answers, no two texts of which are the same."""
    texts = [row["answer"] for row in bench.rows]
    pairs = [
        (
            f"{texts[n % len(texts)]} {n}",
            f"{texts[n % len(texts)]} {texts[(n + 1) % len(texts)]} {n}",
        )
        for n in range(4000)
    ]

    def ours() -> None:
        tokenize_ascii.cache_clear()
        for reference, generated in pairs:
            rouge_l(reference, generated)

    others = {"rouge_score": partial(rouge_score, pairs)}
    return compare("ROUGE of 4,000 answers (at most 2 s)", 1.0, ours, others, rounds)


def describe(options: argparse.Namespace, bench: Bench) -> str:
    """The head of the record: date, machine, model, data, versions, and that nothing else moved."""
    parameters = sum(p.numel() for p in bench.model.parameters()) / 1e6
    return (
        f"## {datetime.date.today()}, {machine()}\n\n"
        f"Llama of {parameters:.1f} million weights, float32; {options.limit} items of each task, "
        f"{len(bench.rows)} questions of TOFU; processor seconds, medians of {options.rounds} "
        f"rounds; {versions(torch=torch, transformers=transformers, peft=peft)}.\n\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run every comparison and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--shape", default="mini", help="model of random weights")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--questions", type=int, default=60, help="questions of each TOFU set")
    parser.add_argument("--epochs", type=int, default=12, help="of teaching TOFU's answers")
    parser.add_argument("--more-epochs", type=int, default=28, help="after which more answers end")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=8, help="0: leave this comparison out")
    parser.add_argument("--record", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    silence_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(options, Path(folder))
        rows = rows_of(bench, options.rounds)
        if options.more_epochs:
            teach(bench.model, bench.tokenizer, bench.rows, options.more_epochs)
            rows += answer_rows(bench, options.rounds)
        if options.adapters:
            rows.append(eight_adapters(bench, options, Path(folder)))
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    text = describe(options, bench) + table + "\n\n" + json.dumps(bench.differences) + "\n"
    print("\n" + text)
    if options.record:
        with options.record.open("a", encoding="utf-8") as record:
            record.write("\n" + text)


if __name__ == "__main__":
    main()
