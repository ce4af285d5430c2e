"""Score the base model on every probe: the zero point of forgetting."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from forgetting.benchmarks.during_training import (
    add_training_benchmark_options,
    training_benchmarks_from_args,
)
from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.evaluation import EvaluationConfig, GeneralTextConfig
from forgetting.config.types import ConfigModel
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
from forgetting.system import describe_computation


class Spec(ConfigModel):
    """What the study says of measuring."""

    prompt: PromptConfig
    evaluation: EvaluationConfig
    precision: str
    knowledge: dict[str, str]
    watched: str
    metric: str
    must_reach: bool
    general_text: GeneralTextConfig | None
    columns: dict[str, ColumnsConfig]


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of the base, what it predicts on the general text, and what it answers to
    the benchmarks that trainings ask at every evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: prompt, evaluation, precision")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--probes", type=Path, required=True, help="folder of NAME.jsonl")
    parser.add_argument("--text", type=Path, help="table of the general text")
    parser.add_argument("--targets", type=Path, help="output: the base's predictions on the text")
    parser.add_argument("--output", type=Path, required=True, help="items (parquet)")
    add_training_benchmark_options(parser)
    options = parser.parse_args(argv)
    silence_libraries()
    spec = Spec.model_validate_json(options.spec)
    device = get_device()
    base = read_base(options.base)
    folder = Path(base["path"])
    probes = {name: read_prepared(options.probes / f"{name}.jsonl") for name in spec.knowledge}
    model, tokenizer = load_base(folder, device, base["parameters"]), load_tokenizer(folder)
    check_causal(model, folder)
    where = SourceLocator(options.probes.parent)
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
        training_benchmarks_from_args(options, tokenizer),
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
