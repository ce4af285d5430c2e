"""What the base itself cannot do: there no method can be said to keep more than another."""

from __future__ import annotations

from forgetting.report import tables as data
from forgetting.report.content import Row, listed
from forgetting.report.tables import Tables
from forgetting.scoring.references import KNOWN


def is_known(base: Row, probe: str) -> bool:
    """Does the base answer a probe of old knowledge well enough for forgetting to show?

    A probe without the base's value is not judged.
    """
    cell = base.cells.get(probe)
    return cell is None or cell.value >= KNOWN


def unknown_probes(tables: Tables, base: Row) -> list[str]:
    """A sentence for each probe of old knowledge that the base does not know."""
    return [
        f"On {data.human(name)} the base itself has only {base.cells[name].value:.2f}: there is "
        "next to nothing to forget, and no method is ranked by it."
        for name in data.probes(tables, "old")
        if not is_known(base, name)
    ]


def unknown_benchmarks(tables: Tables) -> str:
    """Names the benchmarks at which the base's 95 % interval reaches down to chance."""
    rows = data.scores(tables)
    rows = rows[(rows["run"] == "base") & (rows["low"] <= rows["chance"])]
    names = [data.human(str(task)) for task in rows["task"]]
    if not names:
        return ""
    return (
        f"The base is not surely better than chance at {listed(names)}: such a score cannot show "
        "what a method forgets."
    )
