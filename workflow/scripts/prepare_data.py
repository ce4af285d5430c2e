"""Check the study's tables and write what the later stages read, with its provenance."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.data import document_texts, evenly_spaced, prepare_rows
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

    train = [
        {key: row[key] for key in ("id", "question", "answer")}
        for table in spec.train
        for row in prepare_rows(files[table], table, wrong_answers=False)
    ]
    write_jsonl(options.output / "train.jsonl", evenly_spaced(train, spec.train_limit))
    counts = {"train": len(evenly_spaced(train, spec.train_limit))}
    for name, probe in spec.probes.items():
        rows = [
            row if probe.truth_ratio else row | {"paraphrased_answer": None, "wrong_answers": []}
            for table in probe.table
            for row in prepare_rows(
                files[table], table, wrong_answers=probe.truth_ratio, probe=name
            )
        ]
        rows = evenly_spaced(rows, probe.limit)
        write_jsonl(options.output / "probes" / f"{name}.jsonl", rows)
        counts[name] = len(rows)
    texts = [text for table in spec.documents for text in document_texts(files[table], spec.prompt)]
    texts = evenly_spaced(texts, spec.documents_limit)
    write_jsonl(options.output / "documents.jsonl", ({"text": text} for text in texts))
    counts["documents"] = len(texts)

    origins = {table: {"path": str(p), "sha256": sha256(p)} for table, p in files.items()}
    write_json(options.output / "data.json", {"tables": origins, "rows": counts})
    print(", ".join(f"{name}: {count:,} rows" for name, count in counts.items()))


if __name__ == "__main__":
    main()
