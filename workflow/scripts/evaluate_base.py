"""Score the base model on every probe: the zero point of forgetting."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from forgetting.benchmarks.during_training import TrainingBenchmarks
from forgetting.data.checks import SourceLocator
from forgetting.data.tables import joined_text, read_prepared
from forgetting.data.tokenize import encode_pair
from forgetting.errors import InputError, reports_input_errors
from forgetting.evaluation.divergence import (
    append_divergence,
    compute_base_predictions,
    cut_blocks,
    save_base_predictions,
)
from forgetting.evaluation.metrics import mean_score
from forgetting.evaluation.probes import check_context_length, evaluate_probes
from forgetting.evaluation.rouge import check_references, length_notes, unknown_probe_warnings
from forgetting.io import write_table
from forgetting.models.loading import (
    autocast,
    check_causal,
    get_device,
    load_base,
    load_tokenizer,
    read_base,
    resolve_precision,
    silence_libraries,
)
from forgetting.pipeline.params import EvaluateBaseParams
from forgetting.system import describe_computation


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of the base, what it predicts on the general text, and what it answers to
    the benchmarks that trainings ask at every evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--probes", type=Path, nargs="+", required=True, help="NAME.jsonl")
    parser.add_argument("--text", type=Path, nargs="?", help="table of the general text")
    parser.add_argument(
        "--targets", type=Path, nargs="?", help="output: the base's predictions on the text"
    )
    parser.add_argument(
        "--benchmarks", type=Path, nargs="?", help="output: items of benchmarks (parquet)"
    )
    parser.add_argument("--output", type=Path, required=True, help="items (parquet)")
    options = parser.parse_args(argv)
    silence_libraries()
    spec = EvaluateBaseParams.read(options.params)
    device = get_device()
    base = read_base(options.base)
    folder = Path(base["path"])
    probes = {path.stem: read_prepared(path) for path in options.probes}
    model, tokenizer = load_base(folder, device, base["parameters"]), load_tokenizer(folder)
    check_causal(model, folder)
    where = SourceLocator(options.probes[0].parents[1])
    check_context_length(model, tokenizer, probes, spec.prompt, spec.evaluation, where)
    # One of the targets is the end of the sequence, which nobody has to generate.
    lengths = {
        name: [
            encode_pair(tokenizer, spec.prompt, row["question"], row["answer"]).targets - 1
            for row in rows
        ]
        for name, rows in probes.items()
    }
    if spec.must_reach and spec.metric.startswith("rouge"):
        check_references(lengths[spec.watched], spec.watched, spec.evaluation.max_new_tokens)
    targets, text, along = (
        None,
        spec.general_text,
        TrainingBenchmarks.of(spec.training_benchmarks, spec.benchmark_rows, tokenizer),
    )
    precision = resolve_precision(spec.precision, device)
    with autocast(device, precision):
        items = evaluate_probes(model, tokenizer, probes, spec.prompt, spec.evaluation)
        items["reference_tokens"] = [length for name in probes for length in lengths[name]]
        if text is not None:
            blocks = cut_blocks(
                tokenizer,
                joined_text(options.text, spec.columns[text.table]),
                text.block,
                text.limit,
            )
            targets = compute_base_predictions(model, blocks, text.batch_size)
            save_base_predictions(targets, options.targets)
        items = append_divergence(items, model, targets)
        if along:
            write_table(options.benchmarks, along(model))
    if not math.isfinite(mean_score(items, spec.watched, spec.metric)):
        raise InputError(
            f"selection.metric: {spec.metric} of the base on {spec.watched} is no finite number; "
            "choose another metric or probe"
        )
    items.attrs["computed"] = describe_computation(device, precision)
    write_table(options.output, items)
    notes = length_notes(items, spec.evaluation.max_new_tokens)
    for note in [*notes, *unknown_probe_warnings(items, spec.knowledge)]:
        print(f"warning: {note}")
    for name in probes:
        group = items[items["probe"] == name]
        print(f"base, {name}: ROUGE-L recall {group['rougeL_recall'].mean():.3f}, n={len(group)}")


if __name__ == "__main__":
    main()
