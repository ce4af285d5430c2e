"""The numbers of the page, derived from the tables, and the selection rule in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from forgetting.evaluation.rouge import KNOWS_FRACTION
from forgetting.report import frames
from forgetting.report.frames import ReportTables


def is_known(base: SummaryRow, probe: str) -> bool:
    """Return whether the base knows a probe of old knowledge well enough to forget it.

    A probe without the base's value counts as known.
    """
    cell = base.cells.get(probe)
    return cell is None or cell.value >= KNOWS_FRACTION


def unknown_probes(tables: ReportTables, base: SummaryRow) -> list[str]:
    """Return a sentence for each probe of old knowledge that the base does not know."""
    return [
        f"On {frames.humanize(name)} the base itself has only {base.cells[name].value:.2f}: "
        "there is next to nothing to forget, and no method is ranked by it."
        for name in frames.probes_in_order(tables, "old")
        if not is_known(base, name)
    ]


def unknown_benchmarks(tables: ReportTables) -> str:
    """Return a sentence on the benchmarks at which the base's 95 % interval includes chance."""
    rows = frames.available_scores(tables)
    rows = rows[(rows["run"] == "base") & (rows["low"] <= rows["chance"])]
    names = [frames.humanize(str(task)) for task in rows["task"]]
    if not names:
        return ""
    return (
        f"The base is not surely better than chance at {join_words(names)}: such a score "
        "cannot show what a method forgets."
    )


@dataclass(frozen=True)
class SummaryCell:
    """A method's value on a probe: means over its seeds of the value and its 95 % bounds."""

    value: float
    low: float
    high: float
    lowest: float
    highest: float
    change: float | None
    change_low: float = math.nan
    change_high: float = math.nan

    @property
    def interval(self) -> str:
        """Return the bounds as text."""
        return f"{self.low:.2f}–{self.high:.2f}"


@dataclass(frozen=True)
class SummaryRow:
    """A row of the summary: the base, or a method at its selected checkpoints."""

    label: str
    cells: dict[str, SummaryCell]
    f1: dict[str, SummaryCell]
    name: str = "the base"
    learning_rate: float | None = None
    weight_decay: float | None = None
    steps: tuple[int, ...] = ()
    seeds: int = 1
    statuses: tuple[str, ...] = ()
    reason: str = ""


def summary(tables: ReportTables) -> list[SummaryRow]:
    """Return the base and every method in the order of the figures, with ROUGE-L recall and F1."""
    recall, f1 = _summary_cells(tables, frames.ROUGE), _summary_cells(tables, frames.F1)
    rows = [SummaryRow("base", recall["base"], f1["base"])]
    for method in frames.methods_in_order(tables).to_dict("records"):
        name = method["method"]
        rows.append(_summary_row(tables, method, recall[name], f1[name]))
    return rows


def _summary_cells(tables: ReportTables, metric: str) -> dict[str, dict[str, SummaryCell]]:
    """Return the cells of a metric by method (and `base`) and probe, where it was measured."""
    names = frames.all_probes(tables)
    changes = ("change_low", "change_high")
    by_probe = {name: frames.at_selected(tables, metric, name, changes) for name in names}
    base_rows = {name: frames.base_row(tables, metric, name) for name in names}
    base = {name: _summary_cell(rows, None) for name, rows in base_rows.items() if len(rows)}
    cells = {"base": base}
    for method in frames.methods_in_order(tables)["method"]:
        of_method = {name: rows[rows["method"] == method] for name, rows in by_probe.items()}
        cells[str(method)] = {
            name: _summary_cell(rows, base.get(name))
            for name, rows in of_method.items()
            if len(rows)
        }
    return cells


def _summary_cell(rows: pd.DataFrame, base: SummaryCell | None) -> SummaryCell:
    value = float(rows["value"].mean())
    return SummaryCell(
        value=value,
        low=float(rows["low"].mean()),
        high=float(rows["high"].mean()),
        lowest=float(rows["value"].min()),
        highest=float(rows["value"].max()),
        change=None if base is None else value - base.value,
        change_low=math.nan if base is None else float(rows["change_low"].mean()),
        change_high=math.nan if base is None else float(rows["change_high"].mean()),
    )


def _summary_row(
    tables: ReportTables,
    method: dict[Any, Any],
    cells: dict[str, SummaryCell],
    f1: dict[str, SummaryCell],
) -> SummaryRow:
    selection = tables.selection[tables.selection["method"] == method["method"]]
    runs = tables.tuned[tables.tuned["chosen"].astype(bool)]
    runs = runs[runs["method"] == method["method"]]
    first = runs.iloc[0] if len(runs) else None
    return SummaryRow(
        label=str(method["label"]),
        name="full fine-tuning" if method["label"] == "full" else str(method["label"]),
        cells=cells,
        f1=f1,
        learning_rate=None if first is None else float(first["learning_rate"]),
        weight_decay=None if first is None else float(first["weight_decay"]),
        steps=tuple(int(step) for step in selection["step"].dropna()),
        seeds=max(len(selection), 1),
        statuses=tuple(str(status) for status in selection["status"]),
        reason=" ".join(dict.fromkeys(str(reason) for reason in selection["reason"].dropna())),
    )


def selection_rule(tables: ReportTables) -> list[str]:
    """Return the selection rule of the study in sentences."""
    rule = tables.config.get("selection", {})
    metric = metric_words(rule.get("metric", frames.ROUGE))
    probe = frames.humanize(str(rule.get("probe", "new knowledge")))
    deadline = rule.get("deadline_epochs")
    within = f" within {deadline:g} epochs" if deadline else ""
    choice = {
        "earliest": "Each method is represented by the hyperparameters that reach it at the "
        "earliest step.",
        "smallest-lr": "Each method is represented by the smallest learning rate that reaches it"
        f"{within}.",
        "fixed": "The study names the hyperparameters that represent each method.",
    }
    fallback = {
        "none": "A run that never reaches it has no selected checkpoint.",
        "last": "A run that never reaches it is represented by its last checkpoint, marked so.",
    }
    return [
        f"The last evaluation before {metric} on {probe} first reaches "
        f"{rule.get('threshold', 'its threshold')} is selected.",
        choice.get(str(rule.get("hyperparameters", "")), ""),
        fallback.get(str(rule.get("if_not_reached", "")), ""),
    ]


def computed_on(tables: ReportTables) -> str:
    """Return a sentence on the processor, thread count and precision that made the numbers."""
    hardware = tables.study.get("provenance", {}).get("hardware", {})
    keys = ("precision", "device", "processor")
    if not all(hardware.get(key) for key in keys):
        return ""
    precision, device, processor = (join_words(hardware[key]) for key in keys)
    return (
        f"The numbers were computed in {precision} on {device} ({processor}); with another "
        "processor, thread count or precision they can differ."
    )


def run_rows(tables: ReportTables) -> list[dict[str, Any]]:
    """Return the table of runs, with the ROUGE of the last evaluation on every probe."""
    names = frames.all_probes(tables)
    rows = tables.trajectory
    rouge = rows[rows["metric"] == frames.ROUGE].sort_values("step")
    last = rouge.groupby(["run", "probe"])["value"].last()
    order = {label: index for index, label in enumerate(frames.method_labels(tables))}
    keys = ["method_order", "learning_rate", "weight_decay", "seed"]
    table = tables.tuned.assign(method_order=tables.tuned["label"].map(order)).sort_values(keys)
    return [
        {
            **{str(key): None if pd.isna(value) else value for key, value in row.items()},
            "last": [_finite(last.get((row["run"], name))) for name in names],
        }
        for row in table.to_dict("records")
    ]


def summary_frame(tables: ReportTables) -> pd.DataFrame:
    """Return the summary as a table to download, with a row per method and probe."""
    return pd.DataFrame(
        [
            {
                "method": row.label,
                "learning_rate": row.learning_rate,
                "weight_decay": row.weight_decay,
                "selected_steps": " ".join(map(str, row.steps)),
                "seeds": len(row.steps) if row.label != "base" else None,
                "probe": name,
                **_columns("rougeL_recall", cell),
                **_columns("rougeL_f1", row.f1.get(name)),
            }
            for row in summary(tables)
            for name, cell in row.cells.items()
        ]
    )


def _columns(metric: str, cell: SummaryCell | None) -> dict[str, float | None]:
    """Return the columns of a cell, named after its metric."""
    if cell is None:
        return {}
    change = None if cell.change is None else round(cell.change, 5)
    return {
        metric: round(cell.value, 5),
        f"{metric}_low_95": round(cell.low, 5),
        f"{metric}_high_95": round(cell.high, 5),
        f"{metric}_change_against_base": change,
    }


def _finite(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def metric_words(metric: str) -> str:
    """Return the name of a probe metric as words."""
    words = {
        "rougeL_recall": "ROUGE-L recall",
        "rougeL_f1": "ROUGE-L F1",
        "rouge1_recall": "ROUGE-1 recall",
    }
    return words.get(metric, frames.humanize(metric))


def join_words(names: list[str]) -> str:
    """Return one name or several as part of a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
