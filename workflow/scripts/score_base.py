"""Score the base model on every probe: the zero point of forgetting."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from forgetting.benchmarks.along import add_along_options, read_along
from forgetting.data.origins import Origins
from forgetting.data.rows import joined_text, read_prepared
from forgetting.encoding.encode import encode_pair
from forgetting.models.base import read_base
from forgetting.models.loading import (
    autocast,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    quieten_libraries,
)
from forgetting.records import InputError, tells_input_errors, write_table
from forgetting.scoring.drift import base_targets, cut_blocks, save_targets, with_text
from forgetting.scoring.probes import check_room, measure
from forgetting.scoring.references import check_references, length_notes, unknown_probe_warnings
from forgetting.scoring.scores import metric_value
from forgetting.sections.columns import Columns
from forgetting.sections.fields import Strict
from forgetting.sections.measurement import GeneralText, Measurement
from forgetting.sections.prompt import Prompt


class Spec(Strict):
    """What the study says of measuring."""

    prompt: Prompt
    measurement: Measurement
    precision: str
    knowledge: dict[str, str]
    watched: str
    metric: str
    must_reach: bool
    general_text: GeneralText | None
    columns: dict[str, Columns]


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the items of the base, what it predicts on the general text, and what it answers to
    the benchmarks that trainings ask at every evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: prompt, measurement, precision")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument("--probes", type=Path, required=True, help="folder of NAME.jsonl")
    parser.add_argument("--text", type=Path, help="table of the general text")
    parser.add_argument("--targets", type=Path, help="output: the base's predictions on the text")
    parser.add_argument("--output", type=Path, required=True, help="items (parquet)")
    add_along_options(parser)
    options = parser.parse_args(argv)
    quieten_libraries()
    spec = Spec.model_validate_json(options.spec)
    device = pick_device()
    base = read_base(options.base)
    folder = Path(base["path"])
    probes = {name: read_prepared(options.probes / f"{name}.jsonl") for name in spec.knowledge}
    model, tokenizer = load_base(folder, device, base["parameters"]), load_tokenizer(folder)
    where = Origins(options.probes.parent)
    check_room(model, tokenizer, probes, spec.prompt, spec.measurement, where)
    # One of the targets is the end of the sequence, which nobody has to generate.
    lengths = {
        name: [
            encode_pair(tokenizer, spec.prompt, row["question"], row["answer"]).targets - 1
            for row in rows
        ]
        for name, rows in probes.items()
    }
    if spec.must_reach and spec.metric.startswith("rouge"):
        check_references(lengths[spec.watched], spec.watched, spec.measurement.max_new_tokens)
    targets, text, along = None, spec.general_text, read_along(options, tokenizer)
    with autocast(device, pick_precision(spec.precision, device)):
        items = measure(model, tokenizer, probes, spec.prompt, spec.measurement)
        items["reference_tokens"] = [length for name in probes for length in lengths[name]]
        if text is not None:
            blocks = cut_blocks(
                tokenizer,
                joined_text(options.text, spec.columns[text.table]),
                text.block,
                text.limit,
            )
            targets = base_targets(model, blocks, text.batch_size)
            save_targets(targets, options.targets)
        items = with_text(items, model, targets)
        if along:
            write_table(options.benchmarks, along(model))
    if not math.isfinite(metric_value(items, spec.watched, spec.metric)):
        raise InputError(
            f"selection.metric: {spec.metric} of the base on {spec.watched} is no finite number; "
            "choose another metric or probe"
        )
    write_table(options.output, items)
    notes = length_notes(items, spec.measurement.max_new_tokens)
    for note in [*notes, *unknown_probe_warnings(items, spec.knowledge)]:
        print(f"warning: {note}")
    for name in probes:
        group = items[items["probe"] == name]
        print(f"base, {name}: ROUGE-L recall {group['rougeL_recall'].mean():.3f}, n={len(group)}")


if __name__ == "__main__":
    main()
