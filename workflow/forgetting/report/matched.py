"""The comparison at matched learning, as the page shows it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from forgetting.report import frames
from forgetting.report.frames import ReportTables
from forgetting.report.summary import join_words, metric_words

Estimate = tuple[float, float, float]
"""Value, and lower and upper bound."""


@dataclass(frozen=True)
class MatchedCell:
    """A method's ROUGE-L recall on an old probe at equal new knowledge, with 95 % intervals.

    Attributes:
        top: at the top of the common range.
        mean: over the range.
        difference: of the mean to that of the best method, None for the best one. Its bounds hold
            for all pairs of methods simultaneously.
    """

    top: Estimate
    mean: Estimate
    difference: Estimate | None


def matched_rows(tables: ReportTables) -> list[tuple[str, dict[str, MatchedCell]]]:
    """Return the compared methods in the order of the figures, with a cell for each old probe."""
    values = tables.matched_values
    values = values[values["metric"] == frames.ROUGE].dropna(subset=["value"])
    means, tops = values[values["level"].isna()], values[values["level"] == values["range_high"]]
    rows = []
    for label in frames.method_labels(tables):
        cells = {}
        for probe, of_probe in means.groupby("probe", sort=False):
            own, top = of_probe[of_probe["label"] == label], tops[tops["probe"] == probe]
            top = top[top["label"] == label]
            if len(own) and len(top):
                best = str(of_probe.loc[of_probe["value"].idxmax(), "label"])
                cells[str(probe)] = MatchedCell(
                    _estimate(top), _estimate(own), _difference(tables, str(probe), label, best)
                )
        if cells:
            rows.append((label, cells))
    return rows


def _estimate(row: pd.DataFrame) -> Estimate:
    value, low, high = (float(row[name].iloc[0]) for name in ("value", "low", "high"))
    return value, max(low, 0.0), min(high, 1.0)


def _difference(tables: ReportTables, probe: str, label: str, best: str) -> Estimate | None:
    """Return the mean of a method minus that of the best one."""
    rows = tables.matched_differences
    rows = rows[(rows["probe"] == probe) & (rows["metric"] == frames.ROUGE) & rows["level"].isna()]
    pair = frames.pair_difference(rows, label, best)
    return None if pair is None else (pair["difference"], pair["low"], pair["high"])


def matched_sentence(tables: ReportTables) -> str:
    """Return the range of the comparison, the runs that do not get far, and what it compares."""
    values = tables.matched_values
    values = values[values["metric"] == frames.ROUGE]
    if not values["value"].notna().any():
        return ""
    rule = tables.config.get("selection", {})
    metric = metric_words(rule.get("metric", frames.ROUGE))
    probe = frames.humanize(str(rule.get("probe", "the new knowledge")))
    low, high = values["range_low"].iloc[0], values["range_high"].iloc[0]
    sentence = (
        f"At equal new knowledge, {metric} from {low:.2f} to {high:.2f} on {probe}, which all "
        "compared runs reach, the methods keep this much of the old"
    )
    is_single = (values["scope"] == "models").any()
    single = "; these are single runs, which do not rank the methods" if is_single else ""
    end = values[values["level"] == values["level"].max()].drop_duplicates("label")
    names = {
        str(row["label"]): [
            *(
                [f"{row['reached']} of {row['seeds']} runs"]
                if row["reached"] < row["seeds"]
                else []
            ),
            *([f"{row['diverged']} diverged"] if row["diverged"] else []),
            *([f"{row['missing']} missing"] if row["missing"] else []),
        ]
        for row in end.to_dict("records")
    }
    short = [f"{label} ({', '.join(why)})" for label, why in names.items() if why]
    reached = (
        f" Not all runs reach {end['level'].iloc[0]:.2f}: {join_words(short)}." if short else ""
    )
    return f"{sentence}{single}.{reached}"
