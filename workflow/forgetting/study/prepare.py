"""Check the tables of a study and write what training, pretraining and evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from forgetting.config.job_params import PrepareDataParams
from forgetting.data.checks import (
    conflict_note,
    conflicting_answer_notes,
    conflicting_answers,
    reject_leaked_questions,
    track_conflicting_answers,
)
from forgetting.data.table_files import Row, source_line, table_of_row, unused_columns
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
from forgetting.evaluation.rouge import check_letters, long_answer_warnings
from forgetting.io import write_json, write_jsonl


@dataclass(frozen=True)
class PreparedData:
    """What was written.

    Attributes:
        counts: number of rows by file.
        notes: shown on the page.
        warnings: only printed. The page has the number of tokens, known when the base is scored.
    """

    counts: dict[str, int]
    notes: list[str]
    warnings: list[str]


def prepare_data(params: PrepareDataParams, folder: Path) -> PreparedData:
    """Write probes/NAME.jsonl, train.jsonl, documents.jsonl and data.json, the provenance.

    Args:
        params: tables, probes and limits of the study.
        folder: receives the files.

    Raises:
        InputError: names file, line and column of a row that cannot be used.
    """
    tables = StudyTables(params)
    notes = tables.unused_column_notes()
    probes = {name: tables.probe(name, notes) for name in params.probes}
    # All of them before any row is trained on, since none of them may be.
    for name, rows in probes.items():
        write_jsonl(folder / "probes" / f"{name}.jsonl", rows)
    counts = {
        "train": write_jsonl(folder / "train.jsonl", tables.train(probes, notes)),
        **{name: len(rows) for name, rows in probes.items()},
        "documents": write_jsonl(folder / "documents.jsonl", tables.documents()),
    }
    origins = {
        table: {"path": str(path), "sha256": sha256(path)} for table, path in params.tables.items()
    }
    write_json(folder / "data.json", {"tables": origins, "rows": counts, "notes": notes})
    warnings = [
        note
        for name, rows in probes.items()
        for note in long_answer_warnings(rows, name, params.max_new_tokens)
    ]
    return PreparedData(counts, notes, warnings)


@dataclass(frozen=True)
class StudyTables:
    """The tables of a study, which are checked while they are read."""

    params: PrepareDataParams

    def probe(self, name: str, notes: list[str]) -> list[Row]:
        """Return the rows of a probe, and append notes on them to `notes`."""
        probe = self.params.probes[name]
        without: Row = (
            {} if probe.truth_ratio else {"paraphrased_answer": None, "wrong_answers": []}
        )
        rows = [
            row | without
            for table in probe.table
            for row in read_probe_rows(
                self.params.tables[table],
                table,
                wrong_answers=probe.truth_ratio,
                probe=name,
                columns=self.params.columns[table],
            )
        ]
        found: list[Row] = []
        kept = list(track_conflicting_answers(evenly_spaced(rows, probe.limit), found))
        notes += conflict_note(f"probe {name}", found, self.where)
        notes += check_letters(kept, name, self.params.rouge_tokenizer, self.where)
        return kept

    def train(self, probes: Mapping[str, list[Row]], notes: list[str]) -> Iterator[Row]:
        """Yield the rows that are trained on, and append notes on them to `notes`."""
        knowledge = {name: probe.knowledge for name, probe in self.params.probes.items()}
        old, new = (
            {name: rows for name, rows in probes.items() if knowledge[name] == kind}
            for kind in ("old", "new")
        )
        rows = LazyRows(
            lambda: chain.from_iterable(
                read_training_rows(self.params.tables[table], table, self.params.columns[table])
                for table in self.params.train
            )
        )
        found: list[Row] = []
        other: dict[str, list[Row]] = {}
        kept = reject_leaked_questions(rows.evenly_spaced(self.params.train_limit), old, self.where)
        yield from track_conflicting_answers(conflicting_answers(kept, new, other), found)
        notes += conflict_note("training", found, self.where)
        notes += conflicting_answer_notes(other, self.where)

    def documents(self) -> Iterator[Row]:
        """Yield the documents on which the base is pretrained, if it is."""
        documents = LazyRows(
            lambda: (
                {"text": text}
                for table in self.params.documents
                for text in document_texts(
                    self.params.tables[table], self.params.prompt, self.params.columns[table]
                )
            )
        )
        return documents.evenly_spaced(self.params.documents_limit)

    def unused_column_notes(self) -> list[str]:
        """Return a note on each table with columns of text that are not read."""
        probes = [table for probe in self.params.probes.values() for table in probe.table]
        uses: list[tuple[str, Callable[[Row], set[str]]]]
        uses = [(table, lambda row: PROBE_COLUMNS) for table in probes]
        uses += [(table, content_columns) for table in [*self.params.train, *self.params.documents]]
        notes = []
        for table, used in uses:
            path = self.params.tables[table]
            names = unused_columns(path, self.params.columns[table], used)
            if names:
                listed = " and ".join(f"`{name}`" for name in names)
                notes.append(
                    f"{path}: the text of {listed} is not read. If answers depend on it, join it "
                    "with the question, or name the column in `columns` of the dataset."
                )
        return list(dict.fromkeys(notes))

    def where(self, row_id: str) -> str:
        """Return file and line of a row by its id."""
        return source_line(self.params.tables[table_of_row(row_id)], row_id)
