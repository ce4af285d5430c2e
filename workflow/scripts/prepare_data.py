"""Check the study's tables and write what the later stages read, with its provenance."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from forgetting.data.checks import (
    conflict_note,
    conflicting_answer_notes,
    conflicting_answers,
    reject_leaked_questions,
    track_conflicting_answers,
)
from forgetting.data.table_files import Row, source_line, unused_columns
from forgetting.data.tables import (
    PROBE_COLUMNS,
    LazyRows,
    content_columns,
    document_texts,
    evenly_spaced,
    read_probe_rows,
    read_training_rows,
)
from forgetting.digests import sha256
from forgetting.errors import reports_input_errors
from forgetting.evaluation.rouge import check_letters, long_answer_warnings
from forgetting.io import write_json, write_jsonl
from forgetting.pipeline.params import PrepareDataParams


@dataclass(frozen=True)
class Tables:
    """The study's tables, checked as they are read."""

    spec: PrepareDataParams
    files: dict[str, Path]

    def probe(self, name: str, notes: list[str]) -> list[Row]:
        """The rows of a probe; what is to be said of them is added to `notes`."""
        probe = self.spec.probes[name]
        without: Row = (
            {} if probe.truth_ratio else {"paraphrased_answer": None, "wrong_answers": []}
        )
        rows = [
            row | without
            for table in probe.table
            for row in read_probe_rows(
                self.files[table],
                table,
                wrong_answers=probe.truth_ratio,
                probe=name,
                columns=self.spec.columns[table],
            )
        ]
        found: list[Row] = []
        kept = list(track_conflicting_answers(evenly_spaced(rows, probe.limit), found))
        notes += conflict_note(f"probe {name}", found, self.where)
        notes += check_letters(kept, name, self.spec.rouge_tokenizer, self.where)
        return kept

    def train(self, probes: Mapping[str, list[Row]], notes: list[str]) -> Iterator[Row]:
        """The rows that are trained on; what is to be said of them is added to `notes`."""
        knowledge = {name: probe.knowledge for name, probe in self.spec.probes.items()}
        old, new = (
            {name: rows for name, rows in probes.items() if knowledge[name] == kind}
            for kind in ("old", "new")
        )
        rows = LazyRows(
            lambda: chain.from_iterable(
                read_training_rows(self.files[table], table, self.spec.columns[table])
                for table in self.spec.train
            )
        )
        found: list[Row] = []
        other: dict[str, list[Row]] = {}
        kept = reject_leaked_questions(rows.evenly_spaced(self.spec.train_limit), old, self.where)
        yield from track_conflicting_answers(conflicting_answers(kept, new, other), found)
        notes += conflict_note("training", found, self.where)
        notes += conflicting_answer_notes(other, self.where)

    def documents(self) -> Iterator[Row]:
        """The documents on which a base is pretrained here."""
        documents = LazyRows(
            lambda: (
                {"text": text}
                for table in self.spec.documents
                for text in document_texts(
                    self.files[table], self.spec.prompt, self.spec.columns[table]
                )
            )
        )
        return documents.evenly_spaced(self.spec.documents_limit)

    def unused(self) -> list[str]:
        """Return a note on each table with columns of text that are not read."""
        probes = [table for probe in self.spec.probes.values() for table in probe.table]
        uses: list[tuple[str, Callable[[Row], set[str]]]]
        uses = [(table, lambda row: PROBE_COLUMNS) for table in probes]
        uses += [(table, content_columns) for table in [*self.spec.train, *self.spec.documents]]
        notes = []
        for table, used in uses:
            path = self.files[table]
            names = unused_columns(path, self.spec.columns[table], used)
            if names:
                listed = " and ".join(f"`{name}`" for name in names)
                notes.append(
                    f"{path}: the text of {listed} is not read. If answers depend on it, join it "
                    "with the question, or name the column in `columns` of the dataset."
                )
        return list(dict.fromkeys(notes))

    def where(self, row_id: str) -> str:
        """The file and the line of a row."""
        return source_line(self.files[row_id.rpartition("/")[0]], row_id)


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl, probes/NAME.jsonl, documents.jsonl and data.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    spec = PrepareDataParams.read(options.params)
    files = spec.tables
    tables = Tables(spec, files)
    notes = tables.unused()
    probes = {name: tables.probe(name, notes) for name in spec.probes}
    # All of them before any row is trained on, since none of them may be.
    for name, rows in probes.items():
        write_jsonl(options.output / "probes" / f"{name}.jsonl", rows)
    counts = {
        "train": write_jsonl(options.output / "train.jsonl", tables.train(probes, notes)),
        **{name: len(rows) for name, rows in probes.items()},
        "documents": write_jsonl(options.output / "documents.jsonl", tables.documents()),
    }
    origins = {table: {"path": str(path), "sha256": sha256(path)} for table, path in files.items()}
    write_json(options.output / "data.json", {"tables": origins, "rows": counts, "notes": notes})
    # Not among the notes: the page has the number of tokens, known when the base is scored.
    warnings = [
        note
        for name, rows in probes.items()
        for note in long_answer_warnings(rows, name, spec.max_new_tokens)
    ]
    for note in [*notes, *warnings]:
        print(f"warning: {note}")
    print(", ".join(f"{name}: {count:,} rows" for name, count in counts.items()))


if __name__ == "__main__":
    main()
