"""The tables that the report reads, and the data frames that its figures draw.

Cooldown branches of a trunk are drawn as one run with a point for each duration.
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

ROUGE = "rougeL_recall"
F1 = "rougeL_f1"
SCORES = {"ROUGE-L recall": ROUGE, "ROUGE-L F1": F1}
TRUTH_RATIOS = {
    "arithmetic": "truth_ratio_arithmetic",
    "geometric": "truth_ratio_geometric",
}
TABLE_COLUMNS = {
    "runs": "run method kind rank label learning_rate weight_decay seed status chosen "
    "selected_step steps epochs trainable_parameters seconds",
    "trajectory": "run step epoch tokens probe knowledge metric value low high n "
    "change_low change_high",
    "selection": "method seed run step epoch status reason",
    "comparisons": "probe metric label other difference low high low_all high_all scope n",
    "matched_differences": "probe metric level label other difference low_all high_all",
    "matched_values": "probe metric level range_low range_high label value low high scope seeds "
    "reached diverged missing",
    "benchmarks": "run method label seed step task metric main value low high n chance num_fewshot",
}
OPTIONAL_COLUMNS = {
    "benchmark_trajectory": "run step epoch task metric value low high n chance",
    "durations": "run step duration tokens task metric value low high n chance",
}
"""Columns of the tables that only some studies have."""
_MEASURES = ["value", "low", "high", "epoch", "chance"]


@dataclass(frozen=True)
class ReportTables:
    """One finished study. Every frame is long (tidy); `study` is the content of study.json."""

    runs: pd.DataFrame
    trajectory: pd.DataFrame
    selection: pd.DataFrame
    comparisons: pd.DataFrame
    matched_differences: pd.DataFrame
    matched_values: pd.DataFrame
    benchmarks: pd.DataFrame
    study: dict[str, Any]
    benchmark_trajectory: pd.DataFrame = field(default_factory=pd.DataFrame)
    """In-training benchmarks; empty in a study without them."""
    durations: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Benchmarks of the ends of all durations; empty in a study of one duration."""

    @property
    def config(self) -> dict[str, Any]:
        """Return the resolved study file."""
        config: dict[str, Any] = self.study.get("study", {})
        return config

    @property
    def threshold(self) -> float | None:
        """Return the threshold of the selection rule, if the rule is about ROUGE-L recall."""
        rule = self.config.get("selection", {})
        if rule.get("metric", ROUGE) != ROUGE or rule.get("threshold") is None:
            return None
        return float(rule["threshold"])

    @property
    def rouge_tokenizer(self) -> str:
        """Return the name of the tokenizer that ROUGE uses."""
        return str(self.config.get("evaluation", {}).get("rouge_tokenizer", "rouge_score"))

    @property
    def tuned(self) -> pd.DataFrame:
        """Return the runs without the base."""
        return self.runs[self.runs["kind"] != "base"]


def read_tables(folder: Path) -> ReportTables:
    """Read a study's tables, with the branches of a trunk as one run (`per_duration`).

    Raises:
        InputError: if a file or a column is missing; the message names it.
    """
    tables = {
        name: _read(folder / f"{name}.parquet", TABLE_COLUMNS[name].split())
        for name in TABLE_COLUMNS
    }
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it holds the study and its provenance")
    tables |= {
        name: _read(folder / f"{name}.parquet", columns.split())
        for name, columns in OPTIONAL_COLUMNS.items()
        if (folder / f"{name}.parquet").is_file()
    }
    return ReportTables(**per_duration(tables), study=read_json(path))


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it is one of the study's tables")
    frame = read_table(path)
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{path}: column `{missing[0]}` is missing; expected {', '.join(columns)}")
    return frame


def per_duration(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables with the branches of a trunk as one run, measured at the end of each.

    That run has the name and description of its longest branch, without the duration. Evaluations
    before the end of a branch are left out.
    """
    runs = tables["runs"]
    if "duration" not in runs or runs["duration"].isna().all():
        return tables
    branches = runs.dropna(subset=["duration"])
    trunk = {run: run.rsplit("/", 1)[0] for run in branches["run"]}
    last_step = dict(zip(branches["run"], branches["steps"], strict=True))
    trajectory, selection = tables["trajectory"], tables["selection"]
    is_end = [
        run not in last_step or last_step[run] == step
        for run, step in zip(trajectory["run"], trajectory["step"], strict=True)
    ]
    # Two durations may round to the same number of steps. Their ends are then equal.
    ends = _renamed(trajectory[is_end], trunk)
    ends = ends.drop_duplicates(["run", "step", "probe", "metric"])
    scores = {
        name: _renamed(tables[name], trunk)
        for name in ("benchmarks", "durations")
        if name in tables
    }
    merged = {
        "runs": pd.concat([runs[runs["duration"].isna()], _merged_branches(branches, trunk)]),
        "trajectory": ends.reset_index(drop=True),
        "selection": _renamed(selection, trunk),
    }
    return tables | scores | merged


def _renamed(table: pd.DataFrame, trunk: dict[str, str]) -> pd.DataFrame:
    named = table.assign(run=[trunk.get(run, run) for run in table["run"]])
    return named.reset_index(drop=True)


def _merged_branches(branches: pd.DataFrame, trunk: dict[str, str]) -> pd.DataFrame:
    """Return one row for the branches of each trunk."""
    rows = []
    renamed = _renamed(branches.sort_values("duration", kind="stable"), trunk)
    for _, group in renamed.groupby("run", sort=False):
        has_diverged = (group["status"] == "diverged").any()
        rows.append(
            group.iloc[-1:].assign(
                chosen=bool(group["chosen"].any()),
                selected_step=group["selected_step"].max(),
                status="diverged" if has_diverged else group["status"].iloc[-1],
                seconds=group["seconds"].sum(),
            )
        )
    return pd.concat(rows)


def methods_in_order(tables: ReportTables) -> pd.DataFrame:
    """Return method, label and kind of every method: adapters by rank, hybrids, full."""
    order = tables.tuned.drop_duplicates("method").copy()
    order["kind_order"] = order["kind"].map({"lora": 0, "hybrid": 1, "full": 2})
    order = order.sort_values(["kind_order", "rank", "method"], na_position="last", kind="stable")
    return order[["method", "label", "kind"]].reset_index(drop=True)


def method_labels(tables: ReportTables) -> list[str]:
    """Return the labels of the methods, in the order of `methods_in_order`."""
    return [str(label) for label in methods_in_order(tables)["label"]]


def probes_in_order(tables: ReportTables, knowledge: str) -> list[str]:
    """Return the probes of new or old knowledge, in the order of the table."""
    rows = tables.trajectory[tables.trajectory["knowledge"] == knowledge]
    return [str(name) for name in rows["probe"].drop_duplicates()]


def all_probes(tables: ReportTables) -> list[str]:
    """Return the probes of new knowledge, then those of old."""
    return probes_in_order(tables, "new") + probes_in_order(tables, "old")


def watched_probe(tables: ReportTables) -> str | None:
    """Return the probe of the selection rule, or the first of new knowledge."""
    probes = probes_in_order(tables, "new")
    watched = tables.config.get("selection", {}).get("probe")
    return watched if watched in probes else next(iter(probes), None)


def humanize(name: str) -> str:
    """Return a key of the configuration as words."""
    return name.replace("_", " ").strip()


def measured_probes(
    tables: ReportTables, metric: str, probe: str, extra: Sequence[str] = ()
) -> pd.DataFrame:
    """Return one metric on one probe: a row per run and step, with the base as step 0 of every run.

    Values that are not finite are left out, so that a diverged run ends where it diverged.
    """
    rows = tables.trajectory
    rows = rows[(rows["metric"] == metric) & (rows["probe"] == probe)]
    return _with_base_row(tables, rows, extra)


def training_benchmark_rows(tables: ReportTables, task: str) -> pd.DataFrame:
    """Return an in-training benchmark at every evaluation, with columns as `measured_probes`."""
    rows = tables.benchmark_trajectory
    return _with_base_row(tables, rows[rows["task"] == task], ("chance",))


def duration_rows(tables: ReportTables, task: str) -> pd.DataFrame:
    """Return a benchmark at the end of every duration, with columns as `measured_probes`."""
    rows = tables.durations.rename(columns={"duration": "epoch"})
    # Two durations may round to the same number of steps. Their ends are then equal.
    rows = rows[rows["task"] == task].drop_duplicates(["run", "step"])
    return _with_base_row(tables, rows, ("chance", "tokens"))


def _with_base_row(tables: ReportTables, rows: pd.DataFrame, extra: Sequence[str]) -> pd.DataFrame:
    rows = rows[["run", "step", "epoch", "value", "low", "high", "n", *extra]]
    rows = rows.dropna(subset=["value"])
    base = rows[rows["run"] == "base"].assign(step=0, epoch=0.0)
    tuned = rows[rows["run"] != "base"]
    first_steps = tuned.groupby("run")["step"].min()
    without_zero = first_steps.index[first_steps > 0]
    zero = [base.assign(run=name) for name in without_zero] if len(base) else []
    joined = pd.concat([*zero, tuned], ignore_index=True)
    columns = ["run", "method", "label", "learning_rate", "weight_decay", "seed"]
    columns += ["status", "chosen"]
    joined = joined.merge(tables.tuned[columns], on="run", how="inner")
    return _rounded_values(joined.sort_values(["method", "run", "step"], kind="stable"))


def base_row(tables: ReportTables, metric: str, probe: str) -> pd.DataFrame:
    """Return the base's row of a metric on a probe, or no row if it was not measured."""
    rows = tables.trajectory
    rows = rows[(rows["run"] == "base") & (rows["metric"] == metric) & (rows["probe"] == probe)]
    rows = rows.dropna(subset=["value"])[["run", "value", "low", "high", "n"]]
    return _rounded_values(rows.assign(label="base").head(1))


def selected_runs(tables: ReportTables) -> pd.DataFrame:
    """Return run, step and status of every method and seed that has a checkpoint."""
    rows = tables.selection.dropna(subset=["step"])
    return rows[["run", "step", "status"]].rename(columns={"status": "selection"})


def at_selected(
    tables: ReportTables, metric: str, probe: str, extra: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the rows of `measured_probes` at the selected checkpoints."""
    rows = measured_probes(tables, metric, probe, extra)
    return rows.merge(selected_runs(tables), on=["run", "step"], how="inner")


def mean_over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over seeds of a method's chosen runs, at steps that every seed has.

    The result is empty where no method has several seeds.
    """
    chosen = rows[rows["chosen"].astype(bool)]
    seeds = chosen.groupby("method")["seed"].nunique().rename("seeds")
    score = [name for name in ("score",) if name in chosen]
    grouped = chosen.groupby(["method", "label", "step", "epoch", *score], as_index=False).agg(
        value=("value", "mean"), measured=("seed", "nunique")
    )
    grouped = grouped.merge(seeds, on="method")
    is_complete = (grouped["measured"] == grouped["seeds"]) & (grouped["seeds"] > 1)
    return _rounded_values(grouped[is_complete].drop(columns="measured"))


def last_evaluations(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluations of diverged and failed runs."""
    failed = rows[rows["status"] != "ok"]
    key = ["run", *(name for name in ("score",) if name in failed)]
    return failed.sort_values("step").groupby(key, as_index=False).tail(1)


def old_versus_new_rows(tables: ReportTables, metric: str, new: str, old: str) -> pd.DataFrame:
    """Return a metric on the new knowledge (suffix _new) and on one old probe (suffix _old)."""
    key = ["run", "step"]
    on_new = measured_probes(tables, metric, new)
    on_old = measured_probes(tables, metric, old)[[*key, "value", "low", "high", "n"]]
    return on_new.merge(on_old, on=key, suffixes=("_new", "_old"))


def difference(tables: ReportTables, probe: str, label: str, other: str) -> pd.Series | None:
    """Return the ROUGE of a method minus another's on the same questions, with low and high.

    The bounds hold for all pairs of methods on the probe simultaneously, because the page reports
    the largest of the differences.
    """
    rows = tables.comparisons
    return pair_difference(rows[(rows["probe"] == probe) & (rows["metric"] == ROUGE)], label, other)


def pair_difference(rows: pd.DataFrame, label: str, other: str) -> pd.Series | None:
    """Return the difference of a pair, label minus other, with low and high; None without a row.

    Args:
        rows: label, other, difference, low_all and high_all, each pair once in either order.
    """
    for first, second, sign in ((label, other, 1), (other, label, -1)):
        pair = rows[(rows["label"] == first) & (rows["other"] == second)]
        if len(pair):
            bounds = pair.iloc[0][["difference", "low_all", "high_all"]].astype(float)
            bounds = bounds.set_axis(["difference", "low", "high"])
            return bounds if sign == 1 else (-bounds).set_axis(["difference", "high", "low"])
    return None


def truth_ratios(tables: ReportTables, probe: str) -> pd.DataFrame:
    """Return both truth ratios of a probe at the base and the selected checkpoints (long)."""
    parts = []
    for definition, metric in TRUTH_RATIOS.items():
        rows = pd.concat([base_row(tables, metric, probe), at_selected(tables, metric, probe)])
        parts.append(rows.assign(definition=definition))
    return pd.concat(parts, ignore_index=True)


def selected_scores(tables: ReportTables) -> pd.DataFrame:
    """Return the benchmarks of the base and of the selected checkpoints.

    A study with several durations may have scored the ends of all.
    """
    rows = tables.benchmarks
    selected = selected_runs(tables)
    shown = {("base", 0), *zip(selected["run"], selected["step"].astype(int), strict=True)}
    is_shown = [model in shown for model in zip(rows["run"], rows["step"], strict=True)]
    return rows.loc[is_shown].drop_duplicates(["run", "task", "metric"])


def available_scores(tables: ReportTables) -> pd.DataFrame:
    """Return the main metric of each benchmark for the base and the selected checkpoints."""
    rows = selected_scores(tables)
    rows = rows[rows["main"].astype(bool)].dropna(subset=["value"])
    return _rounded_values(rows)


def _rounded_values(rows: pd.DataFrame) -> pd.DataFrame:
    """Round to five decimals: more than any figure shows, and the page stays small."""
    return rows.round(dict.fromkeys(rows.columns.intersection(_MEASURES), 5)).reset_index(drop=True)


@dataclass(frozen=True)
class SampledTask:
    """A benchmark with several sampled answers to each item.

    Attributes:
        task: the name in words.
        samples: the number of answers to an item, as text.
        rates: the names of its pass@k.
        rows: for each model its label, and mean and interval of every rate, then of the numbers of
            different answers to an item that pass and that fail.
    """

    task: str
    samples: str
    rates: list[str]
    rows: list[tuple[str, list[tuple[float, float, float] | None]]]


def sampled_tasks(tables: ReportTables) -> list[SampledTask]:
    """Return every task with sampled answers; values are means over seeds."""
    scores = selected_scores(tables)
    if scores.empty:
        return []
    names = scores["metric"].str.partition(",")[0]
    tasks = scores[names == PASSING]["task"].drop_duplicates()
    return [_sampled_task(tables, str(task), scores[scores["task"] == task]) for task in tasks]


def _sampled_task(tables: ReportTables, task: str, scores: pd.DataFrame) -> SampledTask:
    scores = scores.assign(name=scores["metric"].str.partition(",")[0])
    rates = [str(name) for name in scores["name"].unique() if name.startswith("pass@")]
    settings = tables.config.get("benchmarks", {}).get("tasks", {}).get(task) or {}
    count = settings.get("samples")
    means = scores.groupby(["label", "name"])[["value", "low", "high"]].mean()
    rows = []
    for label in ["base", *method_labels(tables)]:
        cells: list[tuple[float, float, float] | None] = []
        for name in [*rates, PASSING, FAILING]:
            is_measured = (label, name) in means.index
            cells.append(tuple(means.loc[label, name].tolist()) if is_measured else None)
        if any(cells):
            rows.append((label, cells))
    return SampledTask(humanize(task), f"{count} answers" if count else "answers", rates, rows)
