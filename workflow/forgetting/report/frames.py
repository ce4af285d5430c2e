"""The tables that the report reads, and the frames its figures draw: pandas in, pandas out.

Studies with durations: the branches of a trunk are drawn as one run with a point for each.

Tasks to which several answers were drawn: pass@k, and how many of the answers differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.benchmarks.scores import FAILING, PASSING
from forgetting.errors import InputError
from forgetting.io import read_json, read_table


def per_duration(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The same tables where branches of a trunk are one run, measured at the end of each duration.

    That run is named and described as its longest branch without the duration. What was measured
    before the end of a branch, and benchmarks of ends that are not selected, are left out.
    """
    runs = frames["runs"]
    if "duration" not in runs or runs["duration"].isna().all():
        return frames
    branches = runs.dropna(subset=["duration"])
    trunk = {run: run.rsplit("/", 1)[0] for run in branches["run"]}
    ends = dict(zip(branches["run"], branches["steps"], strict=True))
    trajectory, selection = frames["trajectory"], frames["selection"]
    at_end = [
        run not in ends or ends[run] == step
        for run, step in zip(trajectory["run"], trajectory["step"], strict=True)
    ]
    # Two durations may be so near that they have as many steps, and then they end alike.
    points = _renamed(trajectory[at_end], trunk)
    points = points.drop_duplicates(["run", "step", "probe", "metric"])
    benchmarks = frames["benchmarks"]
    shown = {"base", *selection.dropna(subset=["step"])["run"]}
    return frames | {
        "runs": pd.concat([runs[runs["duration"].isna()], _merged_methods(branches, trunk)]),
        "trajectory": points.reset_index(drop=True),
        "selection": _renamed(selection, trunk),
        "benchmarks": _renamed(benchmarks[benchmarks["run"].isin(shown)], trunk),
    }


def _renamed(table: pd.DataFrame, trunk: dict[str, str]) -> pd.DataFrame:
    named = table.assign(run=[trunk.get(run, run) for run in table["run"]])
    return named.reset_index(drop=True)


def _merged_methods(branches: pd.DataFrame, trunk: dict[str, str]) -> pd.DataFrame:
    """One row for the branches of a trunk."""
    rows = []
    renamed = _renamed(branches.sort_values("duration", kind="stable"), trunk)
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


@dataclass(frozen=True)
class SampledTask:
    """One task: its pass@k by name, and a line per method with mean and interval of each metric,
    the last two of which count the different answers to an item that pass and that fail."""

    task: str
    drawn: str
    rates: list[str]
    lines: list[tuple[str, list[tuple[float, float, float] | None]]]


def sampled_tasks(tables: ReportTables) -> list[SampledTask]:
    """Every task of which answers were drawn; seeds are averaged."""
    scores = tables.benchmarks
    if scores.empty:
        return []
    names = scores["metric"].str.partition(",")[0]
    drawn = scores[names == PASSING]["task"].drop_duplicates()
    return [_sampled_task(tables, str(task), scores[scores["task"] == task]) for task in drawn]


def _sampled_task(tables: ReportTables, task: str, scores: pd.DataFrame) -> SampledTask:
    scores = scores.assign(name=scores["metric"].str.partition(",")[0])
    rates = [str(name) for name in scores["name"].unique() if name.startswith("pass@")]
    settings = tables.config.get("benchmarks", {}).get("tasks", {}).get(task) or {}
    count = settings.get("samples")
    means = scores.groupby(["label", "name"])[["value", "low", "high"]].mean()
    lines = []
    for label in ["base", *method_labels(tables)]:
        cells: list[tuple[float, float, float] | None] = []
        for name in [*rates, PASSING, FAILING]:
            found = means.loc[label, name].tolist() if (label, name) in means.index else None
            cells.append(tuple(found) if found else None)
        if any(cells):
            lines.append((label, cells))
    return SampledTask(humanize(task), f"{count} answers" if count else "answers", rates, lines)


ROUGE = "rougeL_recall"
F1 = "rougeL_f1"
SCORES = {"ROUGE-L recall": ROUGE, "ROUGE-L F1": F1}
TRUTH_RATIOS = {
    "arithmetic": "truth_ratio_arithmetic",
    "geometric": "truth_ratio_geometric",
}
COLUMNS = {
    "runs": "run method kind rank label learning_rate weight_decay seed status chosen "
    "selected_step steps epochs trainable_parameters seconds",
    "trajectory": "run step epoch tokens probe knowledge metric value low high n "
    "change_low change_high",
    "selection": "method seed run step epoch status reason",
    "comparisons": "probe metric label other difference low high low_all high_all n",
    "benchmarks": "run method label seed step task metric main value low high n chance num_fewshot",
}

BENCHMARK_TRAJECTORY_COLUMNS = "run step epoch task metric value low high n chance"


@dataclass(frozen=True)
class ReportTables:
    """One finished study; every frame is long (tidy), `study` is study.json as it was written."""

    runs: pd.DataFrame
    trajectory: pd.DataFrame
    selection: pd.DataFrame
    comparisons: pd.DataFrame
    benchmarks: pd.DataFrame
    study: dict[str, Any]
    benchmark_trajectory: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Benchmarks at every evaluation, where the study asks for them."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved study file."""
        config: dict[str, Any] = self.study.get("study", {})
        return config

    @property
    def threshold(self) -> float | None:
        """Where the selection rule stops, if it is a rule about ROUGE-L recall."""
        rule = self.config.get("selection", {})
        if rule.get("metric", ROUGE) != ROUGE or rule.get("threshold") is None:
            return None
        return float(rule["threshold"])

    @property
    def rouge_tokenizer(self) -> str:
        """What ROUGE takes for words."""
        return str(self.config.get("evaluation", {}).get("rouge_tokenizer", "rouge_score"))

    @property
    def tuned(self) -> pd.DataFrame:
        """The runs without the base."""
        return self.runs[self.runs["kind"] != "base"]


def read_tables(folder: Path) -> ReportTables:
    """Read a study's tables, branches of a trunk as one run (`durations.by_duration`).

    A missing file or column is an `InputError` that names it.
    """
    frames = {name: _read(folder / f"{name}.parquet", COLUMNS[name].split()) for name in COLUMNS}
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it holds the study and its provenance")
    course = folder / "benchmark_course.parquet"
    return ReportTables(
        **per_duration(frames),
        study=read_json(path),
        benchmark_trajectory=_read(course, BENCHMARK_TRAJECTORY_COLUMNS.split())
        if course.is_file()
        else pd.DataFrame(),
    )


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it is one of the study's tables")
    frame = read_table(path)
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{path}: column `{missing[0]}` is missing; expected {', '.join(columns)}")
    return frame


def methods_in_order(tables: ReportTables) -> pd.DataFrame:
    """Columns method, label, kind, one row per tuning: adapters by rank, hybrids, full."""
    order = tables.tuned.drop_duplicates("method").copy()
    order["last"] = order["kind"].map({"lora": 0, "hybrid": 1, "full": 2})
    order = order.sort_values(["last", "rank", "method"], na_position="last", kind="stable")
    return order[["method", "label", "kind"]].reset_index(drop=True)


def method_labels(tables: ReportTables) -> list[str]:
    """What the methods are called, in the order in which they are drawn."""
    return [str(label) for label in methods_in_order(tables)["label"]]


def probes_in_order(tables: ReportTables, knowledge: str) -> list[str]:
    """The probes of new or old knowledge, in the order of the table."""
    known = tables.trajectory[tables.trajectory["knowledge"] == knowledge]
    return [str(name) for name in known["probe"].drop_duplicates()]


def watched_tasks(tables: ReportTables) -> str | None:
    """The probe that the selection rule watches, or else the first of new knowledge."""
    known = probes_in_order(tables, "new")
    named = tables.config.get("selection", {}).get("probe")
    return named if named in known else next(iter(known), None)


def humanize(name: str) -> str:
    """A key of the configuration as words."""
    return name.replace("_", " ").strip()


def measured_probes(
    tables: ReportTables, metric: str, probe: str, extra: Sequence[str] = ()
) -> pd.DataFrame:
    """One metric on one probe: a row per run and step, the base as step 0 of every run.

    Values that are not finite are left out, so that a diverged run ends where it broke.
    """
    rows = tables.trajectory
    rows = rows[(rows["metric"] == metric) & (rows["probe"] == probe)]
    return _with_base_row(tables, rows, extra)


def training_benchmarks(tables: ReportTables, task: str) -> pd.DataFrame:
    """A benchmark at every evaluation, like `measured_probes`."""
    return _with_base_row(
        tables,
        tables.benchmark_trajectory[tables.benchmark_trajectory["task"] == task],
        ("chance",),
    )


def _with_base_row(tables: ReportTables, rows: pd.DataFrame, extra: Sequence[str]) -> pd.DataFrame:
    rows = rows[["run", "step", "epoch", "value", "low", "high", "n", *extra]]
    rows = rows.dropna(subset=["value"])
    base = rows[rows["run"] == "base"].assign(step=0, epoch=0.0)
    tuned = rows[rows["run"] != "base"]
    starts = tuned.groupby("run")["step"].min()
    lacking = starts.index[starts > 0]
    zero = [base.assign(run=name) for name in lacking] if len(base) else []
    joined = pd.concat([*zero, tuned], ignore_index=True)
    about = ["run", "method", "label", "learning_rate", "weight_decay", "seed", "status", "chosen"]
    joined = joined.merge(tables.tuned[about], on="run", how="inner")
    return _rounded_values(joined.sort_values(["method", "run", "step"], kind="stable"))


def base_row(tables: ReportTables, metric: str, probe: str) -> pd.DataFrame:
    """The base's one row of a metric on a probe (none, if it was not measured)."""
    rows = tables.trajectory
    found = rows[(rows["run"] == "base") & (rows["metric"] == metric) & (rows["probe"] == probe)]
    found = found.dropna(subset=["value"])[["run", "value", "low", "high", "n"]]
    return _rounded_values(found.assign(label="base").head(1))


def selected_runs(tables: ReportTables) -> pd.DataFrame:
    """One row per method and seed that has a checkpoint: run, step, status."""
    rows = tables.selection.dropna(subset=["step"])
    return rows[["run", "step", "status"]].rename(columns={"status": "selection"})


def at_selected(
    tables: ReportTables, metric: str, probe: str, extra: Sequence[str] = ()
) -> pd.DataFrame:
    """The rows of `measured_probes` at the selected checkpoints."""
    rows = measured_probes(tables, metric, probe, extra)
    return rows.merge(selected_runs(tables), on=["run", "step"], how="inner")


def mean_over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean value of the chosen runs of a method, at steps at which each of its seeds was measured.

    Empty where no method has several seeds: one run is its own mean.
    """
    chosen = rows[rows["chosen"].astype(bool)]
    seeds = chosen.groupby("method")["seed"].nunique().rename("seeds")
    kept = [name for name in ("score",) if name in chosen]
    grouped = chosen.groupby(["method", "label", "step", "epoch", *kept], as_index=False).agg(
        value=("value", "mean"), measured=("seed", "nunique")
    )
    grouped = grouped.merge(seeds, on="method")
    whole = (grouped["measured"] == grouped["seeds"]) & (grouped["seeds"] > 1)
    return _rounded_values(grouped[whole].drop(columns="measured"))


def last_evaluations(rows: pd.DataFrame) -> pd.DataFrame:
    """Where diverged and failed runs ended."""
    broken = rows[rows["status"] != "ok"]
    apart = ["run", *(name for name in ("score",) if name in broken)]
    return broken.sort_values("step").groupby(apart, as_index=False).tail(1)


def old_versus_new(tables: ReportTables, metric: str, new: str, old: str) -> pd.DataFrame:
    """A metric on the new knowledge (suffix _new) beside that on one old probe (suffix _old)."""
    key = ["run", "step"]
    fresh = measured_probes(tables, metric, new)
    kept = measured_probes(tables, metric, old)[[*key, "value", "low", "high", "n"]]
    return fresh.merge(kept, on=key, suffixes=("_new", "_old"))


def difference(tables: ReportTables, probe: str, label: str, other: str) -> pd.Series | None:
    """ROUGE of one method minus that of another on the same questions, with low and high.

    The bounds hold for all pairs of methods on the probe at once: the largest of them is told.
    """
    rows = tables.comparisons
    rows = rows[(rows["probe"] == probe) & (rows["metric"] == ROUGE)]
    for one, two, sign in ((label, other, 1), (other, label, -1)):
        found = rows[(rows["label"] == one) & (rows["other"] == two)]
        if len(found):
            bounds = found.iloc[0][["difference", "low_all", "high_all"]].astype(float)
            bounds = bounds.set_axis(["difference", "low", "high"])
            return bounds if sign == 1 else (-bounds).set_axis(["difference", "high", "low"])
    return None


def truth_ratios(tables: ReportTables, probe: str) -> pd.DataFrame:
    """Both truth ratios of one probe at the base and the selected checkpoints, long."""
    parts = []
    for definition, metric in TRUTH_RATIOS.items():
        rows = pd.concat([base_row(tables, metric, probe), at_selected(tables, metric, probe)])
        parts.append(rows.assign(definition=definition))
    return pd.concat(parts, ignore_index=True)


def available_scores(tables: ReportTables) -> pd.DataFrame:
    """The main metric of each benchmark, scored models only."""
    rows = tables.benchmarks
    rows = rows[rows["main"].astype(bool)].dropna(subset=["value"])
    return _rounded_values(rows)


def _rounded_values(rows: pd.DataFrame) -> pd.DataFrame:
    """Five decimals are more than any figure shows, and keep the page small."""
    return rows.round(dict.fromkeys(rows.columns.intersection(_MEASURES), 5)).reset_index(drop=True)


_MEASURES = ["value", "low", "high", "epoch", "chance"]
