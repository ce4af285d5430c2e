"""Compare the scoring speed of this project, the lm-evaluation-harness and TOFU's generation.

    make bench-score BENCH="--data path/to/data"

The folder holds hellaswag, winogrande, arc_challenge and tofu in their published columns. A small
Llama first learns TOFU's answers for a minute, so that some of its answers end. Then the contenders
alternate in rounds in one process. Answers are generated again after more training, when most of
them end. The harness has its best batch size. Times are processor seconds, which other load on the
machine does not change. This prints a table and, with --record, appends it to a file such as
bench/results/scoring.md.
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
from forgetting.evaluation.rouge import rouge_l, rouge_words
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
    target: float,
    ours: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    rounds: int,
) -> dict[str, object]:
    """Return a row of the table: our seconds, the fastest other contender's, and their ratio."""
    times: dict[str, list[float]] = {**{name: [] for name in others}, "ours": []}
    for _ in range(rounds):
        for name, run in {**others, "ours": ours}.items():
            times[name].append(seconds(run))
            print(f"{work}, {name}: {times[name][-1]:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(others, key=medians.__getitem__)
    ratios = [other / own for other, own in zip(times[best], times["ours"], strict=True)]
    return {
        "work": work,
        "against": best,
        "theirs, s": f"{medians[best]:.2f}",
        "ours, s": f"{medians['ours']:.2f}",
        "faster by": f"{statistics.median(ratios):.1f}",
        "range": f"{min(ratios):.1f}-{max(ratios):.1f}",
        "target": f"{target:g}",
    }


def rows_of(bench: Bench, rounds: int) -> list[dict[str, object]]:
    """Return the rows of all comparisons."""
    rows = []
    for task in bench.requests:  # computed here, before anything is timed
        others = {
            f"harness, batch {size}": partial(choices_by_harness, bench, task, size)
            for size in SIZES
        }
        target = 1.6 if task == "winogrande" else 2.2
        rows.append(compare(task, target, partial(choices_once, bench, task), others, rounds))
    others = {f"harness, batch {size}": partial(logprobs_by_harness, bench, size) for size in SIZES}
    work = "truth ratio, real authors and world facts"
    rows.append(compare(work, 2.0, partial(logprobs_once, bench), others, rounds))
    rows += answer_rows(bench, rounds)
    rows.append(rouge_row(bench, rounds))
    return rows


def answer_rows(bench: Bench, rounds: int) -> list[dict[str, object]]:
    """Return the rows of generation, named by the fraction of answers that end."""
    lengths = [len(answer) for answer in generate_ended(bench)]
    ended = sum(length < TOFU_LENGTH for length in lengths) / len(lengths)
    work = f"answers to TOFU's probes, {ended:.0%} end, {statistics.mean(lengths):.0f} tokens"
    return [
        compare(
            work,
            4.0,
            partial(generate_ended, bench),
            {name: partial(generate_as_tofu, bench, min_new_tokens)},
            rounds,
        )
        # TOFU's Phi generates 200 tokens for every answer; other models end.
        for name, min_new_tokens in (
            ("generate, batch 30, 200 tokens", TOFU_LENGTH),
            (UNTIL_ALL_END, 0),
        )
    ]


def rouge_row(bench: Bench, rounds: int) -> dict[str, object]:
    """Return the row of ROUGE on 4,000 different answers."""
    texts = [row["answer"] for row in bench.rows]
    pairs = [
        (
            f"{texts[n % len(texts)]} {n}",
            f"{texts[n % len(texts)]} {texts[(n + 1) % len(texts)]} {n}",
        )
        for n in range(4000)
    ]

    def ours() -> None:
        rouge_words.cache_clear()
        for reference, generated in pairs:
            rouge_l(reference, generated)

    others = {"rouge_score": partial(rouge_score, pairs)}
    return compare("ROUGE of 4,000 answers (at most 2 s)", 1.0, ours, others, rounds)


def describe(options: argparse.Namespace, bench: Bench) -> str:
    """Return the heading of the record: date, machine, model, data, versions."""
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
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--shape", default="mini", help="model of random weights")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--questions", type=int, default=60, help="questions of each TOFU set")
    parser.add_argument("--epochs", type=int, default=12, help="epochs on TOFU's answers")
    parser.add_argument(
        "--more-epochs", type=int, default=28, help="further epochs, after which more answers end"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=8, help="0: skip this comparison")
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
