"""Check the study's tables and write what the later stages read, with its provenance."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

from forgetting.columns import Columns
from forgetting.data import Rows, document_texts, evenly_spaced, general_rows, prepare_rows
from forgetting.fields import Strict
from forgetting.records import read_json, sha256, tells_input_errors, write_json, write_jsonl
from forgetting.study import Probe, Prompt


class Spec(Strict):
    """What the study says of its data."""

    prompt: Prompt
    train: list[str]
    train_limit: int | None
    probes: dict[str, Probe]
    documents: list[str]
    documents_limit: int | None
    columns: dict[str, Columns]


@tells_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl, probes/NAME.jsonl, documents.jsonl and data.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON: prompt, tables and limits")
    parser.add_argument("--tables", type=Path, required=True, help="JSON: file of each table")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    spec = Spec.model_validate_json(options.spec)
    files = {table: Path(path) for table, path in read_json(options.tables).items()}

    train = Rows(
        lambda: chain.from_iterable(
            general_rows(files[table], table, spec.columns[table]) for table in spec.train
        )
    )
    kept = train.evenly_spaced(spec.train_limit)
    counts = {"train": write_jsonl(options.output / "train.jsonl", kept)}
    for name, probe in spec.probes.items():
        rows = [
            row if probe.truth_ratio else row | {"paraphrased_answer": None, "wrong_answers": []}
            for table in probe.table
            for row in prepare_rows(
                files[table],
                table,
                wrong_answers=probe.truth_ratio,
                probe=name,
                columns=spec.columns[table],
            )
        ]
        kept_rows = evenly_spaced(rows, probe.limit)
        counts[name] = write_jsonl(options.output / "probes" / f"{name}.jsonl", kept_rows)
    documents = Rows(
        lambda: (
            {"text": text}
            for table in spec.documents
            for text in document_texts(files[table], spec.prompt, spec.columns[table])
        )
    )
    kept = documents.evenly_spaced(spec.documents_limit)
    counts["documents"] = write_jsonl(options.output / "documents.jsonl", kept)

    origins = {table: {"path": str(p), "sha256": sha256(p)} for table, p in files.items()}
    write_json(options.output / "data.json", {"tables": origins, "rows": counts})
    print(", ".join(f"{name}: {count:,} rows" for name, count in counts.items()))


if __name__ == "__main__":
    main()
