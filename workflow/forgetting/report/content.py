"""What the page says in numbers and sentences, derived from the tables alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from forgetting.report import tables as data
from forgetting.report.tables import Tables


@dataclass(frozen=True)
class Cell:
    """A method's value on a probe: mean over its seeds of value and of 95 % interval bounds."""

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
        """The bounds as text."""
        return f"{self.low:.2f}–{self.high:.2f}"


@dataclass(frozen=True)
class Row:
    """A line of the summary: the base, or a method at its selected checkpoints."""

    label: str
    cells: dict[str, Cell]
    name: str = "the base"
    learning_rate: float | None = None
    weight_decay: float | None = None
    steps: tuple[int, ...] = ()
    seeds: int = 1
    statuses: tuple[str, ...] = ()
    reason: str = ""


def summary(tables: Tables) -> list[Row]:
    """The base, then every method in the order of the figures."""
    names = data.probes(tables, "new") + data.probes(tables, "old")
    paired = ("change_low", "change_high")
    frames = {name: data.at_selected(tables, data.ROUGE, name, paired) for name in names}
    bases = {name: data.base_row(tables, data.ROUGE, name) for name in names}
    base = {name: _cell(rows, None) for name, rows in bases.items() if len(rows)}
    lines = [Row("base", base)]
    for method in data.methods(tables).to_dict("records"):
        mine = {name: rows[rows["method"] == method["method"]] for name, rows in frames.items()}
        cells = {name: _cell(rows, base.get(name)) for name, rows in mine.items() if len(rows)}
        lines.append(_row(tables, method, cells))
    return lines


def _cell(rows: pd.DataFrame, base: Cell | None) -> Cell:
    value = float(rows["value"].mean())
    return Cell(
        value=value,
        low=float(rows["low"].mean()),
        high=float(rows["high"].mean()),
        lowest=float(rows["value"].min()),
        highest=float(rows["value"].max()),
        change=None if base is None else value - base.value,
        change_low=math.nan if base is None else float(rows["change_low"].mean()),
        change_high=math.nan if base is None else float(rows["change_high"].mean()),
    )


def _row(tables: Tables, method: dict[Any, Any], cells: dict[str, Cell]) -> Row:
    picked = tables.selection[tables.selection["method"] == method["method"]]
    runs = tables.tuned[tables.tuned["chosen"].astype(bool)]
    runs = runs[runs["method"] == method["method"]]
    first = runs.iloc[0] if len(runs) else None
    return Row(
        label=str(method["label"]),
        name="full fine-tuning" if method["label"] == "full" else str(method["label"]),
        cells=cells,
        learning_rate=None if first is None else float(first["learning_rate"]),
        weight_decay=None if first is None else float(first["weight_decay"]),
        steps=tuple(int(step) for step in picked["step"].dropna()),
        seeds=max(len(picked), 1),
        statuses=tuple(str(status) for status in picked["status"]),
        reason=" ".join(dict.fromkeys(str(reason) for reason in picked["reason"].dropna())),
    )


def answer(tables: Tables) -> tuple[list[str], list[str]]:
    """The result in a few sentences, each supported by the tables, and what qualifies it."""
    lines = summary(tables)
    found = [line for line in lines[1:] if line.steps and line.cells]
    old = data.probes(tables, "old")
    said = [_moment(tables, found)]
    if len(found) > 1:
        said += [_compare(tables, name, found, lines[0]) for name in old]
        said += _learnt(tables, found)
    elif found:
        said += [_alone(name, found[0], lines[0]) for name in old]
    qualified = [
        f"{_capital(line.name)} has no selected checkpoint: {_sentence(line.reason)}"
        for line in lines[1:]
        if not line.steps
    ]
    qualified += [
        f"{_capital(line.name)} stands apart: {_sentence(line.reason)}"
        for line in found
        if set(line.statuses) - {"selected", "not_reached"}
    ]
    if any(line.seeds > 1 for line in found):
        qualified.append("Values and interval bounds are means over seeds.")
    return [sentence for sentence in said if sentence], qualified


def _moment(tables: Tables, found: list[Row]) -> str:
    rule = tables.config.get("selection", {})
    what = _metric_words(rule.get("metric", data.ROUGE))
    probe = data.human(str(rule.get("probe", "the new knowledge")))
    goal = rule.get("threshold")
    if not found:
        return f"No run has a checkpoint selected at {what} {goal} on {probe}: nothing to compare."
    return f"Methods are compared at the last checkpoint before {what} on {probe} reaches {goal}."


def _compare(tables: Tables, name: str, found: list[Row], base: Row) -> str:
    """The methods that keep the most and the least of a probe, and how sure their order is."""
    able = [line for line in found if name in line.cells]
    if len(able) < 2:
        return ""
    most = max(able, key=lambda line: line.cells[name].value)
    least = min(able, key=lambda line: line.cells[name].value)
    first, second = most.cells[name], least.cells[name]
    said = (
        f"On {data.human(name)}{_where_base(name, base)}, {most.name} keeps most, "
        f"{first.value:.2f} (95\u00a0% interval {first.interval}), and {least.name} least, "
        f"{second.value:.2f} ({second.interval})"
    )
    paired = data.difference(tables, name, most.label, least.label)
    if paired is None:
        return f"{said}."
    verdict = "" if paired["low"] > 0 else ", which may be chance"
    return (
        f"{said}: on the same questions {paired['difference']:.2f} more "
        f"({_number(paired['low'])} to {_number(paired['high'])}){verdict}."
    )


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def _alone(name: str, one: Row, base: Row) -> str:
    cell = one.cells.get(name)
    if cell is None:
        return ""
    return (
        f"On {data.human(name)}{_where_base(name, base)}, {one.name} keeps {cell.value:.2f} "
        f"(95\u00a0% interval {cell.interval})."
    )


def _where_base(name: str, base: Row) -> str:
    cell = base.cells.get(name)
    return "" if cell is None else f", where the base has {cell.value:.2f}"


def _learnt(tables: Tables, found: list[Row]) -> list[str]:
    """How equal the learning is at which the methods are compared."""
    said = []
    for name in data.probes(tables, "new")[:1]:
        values = [line.cells[name].value for line in found if name in line.cells]
        if values:
            extent = f"between {min(values):.2f} and {max(values):.2f}"
            said.append(f"There the methods have learnt {data.human(name)} to {extent}.")
    return said


def selection_rule(tables: Tables) -> list[str]:
    """The rule of the study in sentences."""
    rule = tables.config.get("selection", {})
    what, probe = _metric_words(rule.get("metric", data.ROUGE)), rule.get("probe", "new knowledge")
    chosen = str(rule.get("hyperparameters", ""))
    within = rule.get("within_epochs")
    deadline = f" within {within:g} epochs" if within else ""
    choice = {
        "earliest": "Of a method's settings, the one that reaches it at the earliest step stands "
        "for the method.",
        "smallest-lr": f"Of a method's settings, the smallest learning rate that reaches it"
        f"{deadline} stands for the method.",
        "fixed": "The setting that stands for a method is named in the study.",
    }
    fallback = {
        "none": "A run that never reaches it has no selected checkpoint.",
        "last": "A run that never reaches it is represented by its last checkpoint, marked so.",
    }
    return [
        f"The last evaluation before {what} on {data.human(str(probe))} first reaches "
        f"{rule.get('threshold', 'its threshold')} is selected.",
        choice.get(chosen, ""),
        fallback.get(str(rule.get("if_not_reached", "")), ""),
    ]


def run_rows(tables: Tables) -> list[dict[str, Any]]:
    """The table of runs, each with its ROUGE at the last evaluation on every probe."""
    names = data.probes(tables, "new") + data.probes(tables, "old")
    rows = tables.trajectory
    rouge = rows[rows["metric"] == data.ROUGE].sort_values("step")
    last = rouge.groupby(["run", "probe"])["value"].last()
    order = {label: place for place, label in enumerate(data.labels(tables))}
    keys = ["method_order", "learning_rate", "weight_decay", "seed"]
    table = tables.tuned.assign(method_order=tables.tuned["label"].map(order)).sort_values(keys)
    return [
        {
            **{str(key): None if pd.isna(value) else value for key, value in row.items()},
            "last": [_finite(last.get((row["run"], name))) for name in names],
        }
        for row in table.to_dict("records")
    ]


def summary_frame(tables: Tables) -> pd.DataFrame:
    """The summary as a table to download: a row per method and probe."""
    return pd.DataFrame(
        [
            {
                "method": line.label,
                "learning_rate": line.learning_rate,
                "weight_decay": line.weight_decay,
                "selected_steps": " ".join(map(str, line.steps)),
                "seeds": len(line.steps) if line.label != "base" else None,
                "probe": name,
                "rougeL_recall": round(cell.value, 5),
                "low_95": round(cell.low, 5),
                "high_95": round(cell.high, 5),
                "change_against_base": None if cell.change is None else round(cell.change, 5),
            }
            for line in summary(tables)
            for name, cell in line.cells.items()
        ]
    )


def _finite(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _metric_words(metric: str) -> str:
    words = {
        "rougeL_recall": "ROUGE-L recall",
        "rougeL_f1": "ROUGE-L F1",
        "rouge1_recall": "ROUGE-1 recall",
    }
    return words.get(metric, data.human(metric))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    text = text.strip() or "the table of selections gives no reason"
    return text if text.endswith(".") else text + "."
