"""The tables that the report reads, and the frames its figures draw: pandas in, pandas out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from forgetting.records import InputError, read_json, read_table
from forgetting.report.durations import by_duration

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

COURSE = "run step epoch task metric value low high n chance"


@dataclass(frozen=True)
class Tables:
    """One finished study; every frame is long (tidy), `study` is study.json as it was written."""

    runs: pd.DataFrame
    trajectory: pd.DataFrame
    selection: pd.DataFrame
    comparisons: pd.DataFrame
    benchmarks: pd.DataFrame
    study: dict[str, Any]
    course: pd.DataFrame = field(default_factory=pd.DataFrame)
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
        return str(self.config.get("measurement", {}).get("rouge_tokenizer", "rouge_score"))

    @property
    def tuned(self) -> pd.DataFrame:
        """The runs without the base."""
        return self.runs[self.runs["kind"] != "base"]


def read_tables(folder: Path) -> Tables:
    """Read a study's tables, branches of a trunk as one run (`durations.by_duration`).

    A missing file or column is an `InputError` that names it.
    """
    frames = {name: _read(folder / f"{name}.parquet", COLUMNS[name].split()) for name in COLUMNS}
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it holds the study and its provenance")
    course = folder / "benchmark_course.parquet"
    return Tables(
        **by_duration(frames),
        study=read_json(path),
        course=_read(course, COURSE.split()) if course.is_file() else pd.DataFrame(),
    )


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it is one of the study's tables")
    frame = read_table(path)
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{path}: column `{missing[0]}` is missing; expected {', '.join(columns)}")
    return frame


def methods(tables: Tables) -> pd.DataFrame:
    """Columns method, label, kind, one row per tuning: adapters by rank, hybrids, full."""
    order = tables.tuned.drop_duplicates("method").copy()
    order["last"] = order["kind"].map({"lora": 0, "hybrid": 1, "full": 2})
    order = order.sort_values(["last", "rank", "method"], na_position="last", kind="stable")
    return order[["method", "label", "kind"]].reset_index(drop=True)


def labels(tables: Tables) -> list[str]:
    """What the methods are called, in the order in which they are drawn."""
    return [str(label) for label in methods(tables)["label"]]


def probes(tables: Tables, knowledge: str) -> list[str]:
    """The probes of new or old knowledge, in the order of the table."""
    known = tables.trajectory[tables.trajectory["knowledge"] == knowledge]
    return [str(name) for name in known["probe"].drop_duplicates()]


def watched(tables: Tables) -> str | None:
    """The probe that the selection rule watches, or else the first of new knowledge."""
    known = probes(tables, "new")
    named = tables.config.get("selection", {}).get("probe")
    return named if named in known else next(iter(known), None)


def human(name: str) -> str:
    """A key of the configuration as words."""
    return name.replace("_", " ").strip()


def measured(tables: Tables, metric: str, probe: str, extra: Sequence[str] = ()) -> pd.DataFrame:
    """One metric on one probe: a row per run and step, the base as step 0 of every run.

    Values that are not finite are left out, so that a diverged run ends where it broke.
    """
    rows = tables.trajectory
    rows = rows[(rows["metric"] == metric) & (rows["probe"] == probe)]
    return _from_the_base_on(tables, rows, extra)


def asked_along(tables: Tables, task: str) -> pd.DataFrame:
    """A benchmark at every evaluation, like `measured`."""
    return _from_the_base_on(tables, tables.course[tables.course["task"] == task], ("chance",))


def _from_the_base_on(tables: Tables, rows: pd.DataFrame, extra: Sequence[str]) -> pd.DataFrame:
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
    return _rounded(joined.sort_values(["method", "run", "step"], kind="stable"))


def base_row(tables: Tables, metric: str, probe: str) -> pd.DataFrame:
    """The base's one row of a metric on a probe (none, if it was not measured)."""
    rows = tables.trajectory
    found = rows[(rows["run"] == "base") & (rows["metric"] == metric) & (rows["probe"] == probe)]
    found = found.dropna(subset=["value"])[["run", "value", "low", "high", "n"]]
    return _rounded(found.assign(label="base").head(1))


def selected(tables: Tables) -> pd.DataFrame:
    """One row per method and seed that has a checkpoint: run, step, status."""
    rows = tables.selection.dropna(subset=["step"])
    return rows[["run", "step", "status"]].rename(columns={"status": "selection"})


def at_selected(tables: Tables, metric: str, probe: str, extra: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of `measured` at the selected checkpoints."""
    rows = measured(tables, metric, probe, extra)
    return rows.merge(selected(tables), on=["run", "step"], how="inner")


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
    return _rounded(grouped[whole].drop(columns="measured"))


def last_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Where diverged and failed runs ended."""
    broken = rows[rows["status"] != "ok"]
    apart = ["run", *(name for name in ("score",) if name in broken)]
    return broken.sort_values("step").groupby(apart, as_index=False).tail(1)


def old_versus_new(tables: Tables, metric: str, new: str, old: str) -> pd.DataFrame:
    """A metric on the new knowledge (suffix _new) beside that on one old probe (suffix _old)."""
    key = ["run", "step"]
    fresh = measured(tables, metric, new)
    kept = measured(tables, metric, old)[[*key, "value", "low", "high", "n"]]
    return fresh.merge(kept, on=key, suffixes=("_new", "_old"))


def difference(tables: Tables, probe: str, label: str, other: str) -> pd.Series | None:
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


def truth_ratios(tables: Tables, probe: str) -> pd.DataFrame:
    """Both truth ratios of one probe at the base and the selected checkpoints, long."""
    parts = []
    for definition, metric in TRUTH_RATIOS.items():
        rows = pd.concat([base_row(tables, metric, probe), at_selected(tables, metric, probe)])
        parts.append(rows.assign(definition=definition))
    return pd.concat(parts, ignore_index=True)


def scores(tables: Tables) -> pd.DataFrame:
    """The main metric of each benchmark, scored models only."""
    rows = tables.benchmarks
    rows = rows[rows["main"].astype(bool)].dropna(subset=["value"])
    return _rounded(rows)


def _rounded(rows: pd.DataFrame) -> pd.DataFrame:
    """Five decimals are more than any figure shows, and keep the page small."""
    return rows.round(dict.fromkeys(rows.columns.intersection(_MEASURES), 5)).reset_index(drop=True)


_MEASURES = ["value", "low", "high", "epoch", "chance"]
