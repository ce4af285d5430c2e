"""From items to the trajectory: the mean of every metric on every probe, with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from forgetting.results.statistics import difference_interval, mean_interval, share_interval
from forgetting.results.utility import UTILITIES, utility_row
from forgetting.scoring.scores import PROBE_SCORES, TEXT_SCORES, UNBOUNDED, summands
from forgetting.sections.measurement import ALL_PROBES


def aggregate(
    items: pd.DataFrame, knowledge: Mapping[str, str], base: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row per probe and metric of one evaluation.

    Args:
        items: what `probes.measure` returned.
        knowledge: `new` or `old` for each probe, `text` for the general text.
        base: the same of the base model; without it the changes are NaN.

    Returns:
        probe, knowledge, metric, value (mean over items), low and high (95 % interval), n, and the
        change against the base with its interval, change_low and change_high: of the
        differences of the two models on the same question, which is narrower than what two separate
        intervals suggest (Tango's, or Student's of what is no share). A metric that was
        not measured on a probe has no row. Over all probes, knowledge `all`, TOFU's model utility
        with either truth ratio, if every probe has one.
    """
    rows = []
    for probe, group in items.groupby("probe", sort=False):
        before = None if base is None else base[base["probe"] == probe].set_index("item")
        for metric in (name for name in (*PROBE_SCORES, *TEXT_SCORES) if name in group):
            values = summands(group, metric).dropna()
            if values.empty:
                continue
            interval = mean_interval if metric in UNBOUNDED else share_interval
            low, high = interval(values.to_numpy())
            rows.append(
                {
                    "probe": probe,
                    "knowledge": knowledge[str(probe)],
                    "metric": metric,
                    "value": float(values.mean()),
                    "low": low,
                    "high": high,
                    "n": len(values),
                    **_change(values.set_axis(group.loc[values.index, "item"]), metric, before),
                }
            )
    for metric in UTILITIES:
        utility = utility_row(items, knowledge, metric, base)
        if utility is not None:
            about = {"probe": ALL_PROBES, "knowledge": "all", "metric": metric}
            rows.append(about | utility)
    return pd.DataFrame(rows)


def _change(values: pd.Series, metric: str, base: pd.DataFrame | None) -> dict[str, float]:
    """Mean difference to the base over the same questions, with its interval."""
    if base is None:
        return {"change": math.nan, "change_low": math.nan, "change_high": math.nan}
    differences = (values - summands(base, metric)).dropna().to_numpy()
    interval = mean_interval if metric in UNBOUNDED else difference_interval
    low, high = interval(differences)
    return {"change": float(differences.mean()), "change_low": low, "change_high": high}
