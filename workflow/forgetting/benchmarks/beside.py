"""Items of benchmarks in the table of an evaluation, beside those of the probes."""

from __future__ import annotations

import pandas as pd

COLUMNS = ("task", "item", "metric", "value", "response", "choice")
TYPES = {"item": int, "choice": "Int64"}
MARK = "benchmark_"
"""What these columns are called beside other items begins with this."""


def beside(items: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """One table of the probes' items and of the benchmarks'."""
    return pd.concat([items, more.add_prefix(MARK)], ignore_index=True)


def apart(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The items of the probes, and those of the benchmarks with what else stands in their rows."""
    marked = [MARK + name for name in COLUMNS]
    if marked[0] not in table:
        return table, pd.DataFrame(columns=list(COLUMNS))
    of_benchmarks = table[marked[0]].notna()
    where = [name for name in ("run", "step", "epoch") if name in table]
    found = table[of_benchmarks][[*where, *marked]]
    found = found.rename(columns=lambda name: name.removeprefix(MARK)).astype(TYPES)
    probes = table[~of_benchmarks].drop(columns=marked)
    return probes.reset_index(drop=True), found.reset_index(drop=True)
