"""Studies with budgets: the branches of a trunk are drawn as one run with a point for each."""

from __future__ import annotations

import pandas as pd


def by_duration(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The same tables where branches of a trunk are one run, measured at the end of each budget.

    That run is named and described as its longest branch without the budget. What was measured
    before the end of a branch, and benchmarks of ends that are not selected, are left out.
    """
    runs = frames["runs"]
    if "budget" not in runs or runs["budget"].isna().all():
        return frames
    branches = runs.dropna(subset=["budget"])
    trunk = {run: run.rsplit("/", 1)[0] for run in branches["run"]}
    ends = dict(zip(branches["run"], branches["steps"], strict=True))
    trajectory, selection = frames["trajectory"], frames["selection"]
    at_end = [
        run not in ends or ends[run] == step
        for run, step in zip(trajectory["run"], trajectory["step"], strict=True)
    ]
    # Two budgets may be so near that they have as many steps, and then they end alike.
    points = _renamed(trajectory[at_end], trunk)
    points = points.drop_duplicates(["run", "step", "probe", "metric"])
    benchmarks = frames["benchmarks"]
    shown = {"base", *selection.dropna(subset=["step"])["run"]}
    return frames | {
        "runs": pd.concat([runs[runs["budget"].isna()], _folded(branches, trunk)]),
        "trajectory": points.reset_index(drop=True),
        "selection": _renamed(selection, trunk),
        "benchmarks": _renamed(benchmarks[benchmarks["run"].isin(shown)], trunk),
    }


def _renamed(table: pd.DataFrame, trunk: dict[str, str]) -> pd.DataFrame:
    named = table.assign(run=[trunk.get(run, run) for run in table["run"]])
    return named.reset_index(drop=True)


def _folded(branches: pd.DataFrame, trunk: dict[str, str]) -> pd.DataFrame:
    """One row for the branches of a trunk."""
    rows = []
    renamed = _renamed(branches.sort_values("budget", kind="stable"), trunk)
    for _, group in renamed.groupby("run", sort=False):
        diverged = (group["status"] == "diverged").any()
        rows.append(
            group.iloc[-1:].assign(
                chosen=bool(group["chosen"].any()),
                selected_step=group["selected_step"].max(),
                status="diverged" if diverged else group["status"].iloc[-1],
                seconds=group["seconds"].sum(),
            )
        )
    return pd.concat(rows)
