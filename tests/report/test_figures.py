"""Tests of the figures: encodings, numbers of marks, and missing data."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forgetting.report import frames
from forgetting.report.chart_parts import MAX_OTHER_RUNS, MODES, grid, palette, theme
from forgetting.report.charts import FIGURES
from forgetting.report.frames import ReportTables
from forgetting.report.page import chart_spec, static_svg
from support.result_tables import report_tables
from support.result_tables import tables as make_tables


def _spec(name: str, tables: ReportTables) -> dict[str, Any]:
    return chart_spec(FIGURES[name](tables))


@cache
def _usual(name: str) -> dict[str, Any]:
    """Return the figure of the default tables; it takes seconds to make."""
    return _spec(name, report_tables())


def _layers(spec: dict[str, Any], panel: int, mark: str, style: str | None = None) -> list[Any]:
    layers = spec["concat"][panel]["layer"]
    layers = [layer for layer in layers if layer["mark"]["type"] == mark]
    return [layer for layer in layers if style is None or layer["mark"].get("style") == style]


def _rows(
    spec: dict[str, Any], layer: dict[str, Any], score: str = "ROUGE-L recall"
) -> list[dict[str, Any]]:
    """Return the rows that a layer shows, with a menu of scores those of this score."""
    rows: list[dict[str, Any]] = spec["datasets"][layer["data"]["name"]]
    if not any("score" in row for row in rows):
        return rows
    assert layer["transform"] == [{"filter": "datum.score === score"}]
    return [row for row in rows if row["score"] == score]


def _field(layer: dict[str, Any], channel: str) -> Any:
    return layer["encoding"][channel].get("field")


def test_trajectories_have_a_panel_per_probe() -> None:
    spec = _usual("trajectories")
    assert [" ".join(panel["title"]["text"]) for panel in spec["concat"]] == [
        "new authors",
        "real authors",
        "world facts",
    ]
    for panel in range(3):
        faint, chosen = _layers(spec, panel, "line")
        assert (_field(chosen, "x"), _field(chosen, "y")) == ("epoch", "value")
        assert _field(chosen, "color") == "label"
        # Five methods, one chosen and two other rates each; 12 evaluations and the base's zero.
        assert len(_rows(spec, chosen)) == 5 * 13
        assert len(_rows(spec, faint)) == 10 * 13
        (rings,) = _layers(spec, panel, "point", "ring")
        assert len(_rows(spec, rings)) == 5


@pytest.mark.parametrize(
    "name", ["trajectories", pytest.param("old_versus_new", marks=pytest.mark.slow)]
)
def test_large_sweep_is_drawn_in_part(name: str) -> None:
    """Altair's limit of 5,000 rows is passed at 114 other runs of 21 evaluations."""
    tables = report_tables(rates=tuple(np.geomspace(1e-4, 1e-2, 61)), epochs=21)
    spec = _spec(name, tables)
    runs = {row["run"] for rows in spec["datasets"].values() for row in rows if "run" in row}
    chosen = set(tables.runs[tables.runs["chosen"].astype(bool)]["run"])
    assert chosen <= runs
    assert len(runs - chosen - {"base"}) == MAX_OTHER_RUNS
    (box,) = (each["bind"]["name"] for each in spec["params"] if each["name"] == "sweep")
    assert box == "200 of 300 other runs of the sweep"


@pytest.mark.parametrize("name", ["trajectories", "old_versus_new"])
def test_score_menu_switches_to_f1(name: str) -> None:
    """The marks are the same with other values and axis titles; the threshold is of recall."""
    made = make_tables()
    f1 = made["trajectory"]["metric"] == "rougeL_f1"
    made["trajectory"].loc[f1, ["value", "low", "high"]] *= 0.5
    spec = _spec(name, ReportTables(**made))
    (menu,) = [param for param in spec["params"] if param["name"] == "score"]
    assert menu["value"] == "ROUGE-L recall"
    assert menu["bind"]["options"] == ["ROUGE-L recall", "ROUGE-L F1"]
    value = "value" if name == "trajectories" else "value_old"
    for layer in spec["concat"][-1]["layer"]:
        recall, other = _rows(spec, layer), _rows(spec, layer, "ROUGE-L F1")
        if any("goal" in row for row in recall):
            assert not other
            continue
        assert len(recall) == len(other) > 0
        drawn = value if value in recall[0] else "value"
        assert [row[drawn] for row in other] == [
            pytest.approx(row[drawn] / 2, abs=1e-5) for row in recall
        ]
    for choice, shown in (("ROUGE-L recall", "ROUGE-L F1"), ("ROUGE-L F1", "ROUGE-L recall")):
        menu["value"] = choice
        svg = static_svg(spec, ["lora"] * 4 + ["full"])
        assert f">{choice}</text>" in svg
        assert shown not in svg


def test_trajectories_start_at_the_base() -> None:
    rows = frames.measured_probes(report_tables(), frames.ROUGE, "real_authors")
    starts = rows[rows["step"] == 0]
    assert sorted(starts["run"]) == sorted(set(rows["run"]))
    assert set(starts["value"]) == {0.85}


def test_measured_probes_keep_a_measured_step_zero() -> None:
    made = make_tables(ranks=(2,), full=False, rates=(1e-3,))
    rows = made["trajectory"]
    run = made["selection"]["run"].iloc[0]
    zero = rows[rows["run"] == "base"].assign(run=run, value=0.5)
    made["trajectory"] = pd.concat([rows, zero], ignore_index=True)
    measured = frames.measured_probes(ReportTables(**made), frames.ROUGE, "real_authors")
    assert list(measured[measured["step"] == 0]["value"]) == [0.5]


def test_trajectories_draw_threshold_on_new_and_base_on_old() -> None:
    spec = _usual("trajectories")
    levels = [
        [_rows(spec, layer)[0] for layer in _layers(spec, panel, "rule", "reference")]
        for panel in range(3)
    ]
    assert [row.get("goal") for (row,) in levels] == [0.9, None, None]
    assert [row.get("value") for (row,) in levels] == [None, 0.85, 0.85]


def test_trajectories_draw_no_threshold_of_another_metric() -> None:
    made = make_tables()
    made["study"]["study"]["selection"]["metric"] = "probability"
    spec = _spec("trajectories", ReportTables(**made))
    assert not _layers(spec, 0, "rule", "reference")


def test_trajectories_draw_seeds_thin_and_their_mean() -> None:
    tables = report_tables(seeds=(0, 1, 2))
    spec = _spec("trajectories", tables)
    _, chosen, means = _layers(spec, 1, "line")
    assert len(_rows(spec, chosen)) == 3 * 5 * 13
    assert len(_rows(spec, means)) == 5 * 13
    last = frames.measured_probes(tables, frames.ROUGE, "real_authors").query(
        "chosen and step == 480 and method == 'full'"
    )
    mean = frames.mean_over_seeds(frames.measured_probes(tables, frames.ROUGE, "real_authors"))
    mean = mean[(mean["method"] == "full") & (mean["step"] == 480)]["value"].item()
    assert mean == pytest.approx(last["value"].mean(), abs=1e-4)


def test_mean_over_seeds_stops_where_a_seed_is_missing() -> None:
    rows = pd.DataFrame(
        {
            "method": "full",
            "label": "full",
            "chosen": True,
            "seed": [0, 1, 0],
            "step": [40, 40, 80],
            "epoch": [1.0, 1.0, 2.0],
            "value": [0.2, 0.4, 0.9],
        }
    )
    means = frames.mean_over_seeds(rows)
    assert list(means["step"]) == [40]
    assert list(means["value"]) == [pytest.approx(0.3)]


def test_diverged_run_ends_in_a_cross() -> None:
    spec = _spec("trajectories", report_tables(diverged=("full",)))
    (cross,) = _layers(spec, 1, "point", "broken")
    (row,) = _rows(spec, cross)
    assert (row["label"], row["status"], row["epoch"]) == ("full", "diverged", 4.0)


def test_trajectories_leave_out_nan() -> None:
    made = make_tables(diverged=("full",))
    rows = made["trajectory"]
    broken = rows["run"].isin(made["runs"].query("status == 'diverged'")["run"])
    rows.loc[broken & (rows["step"] > 80), ["value", "low", "high"]] = np.nan
    spec = _spec("trajectories", ReportTables(**made))
    (cross,) = _layers(spec, 1, "point", "broken")
    assert _rows(spec, cross)[0]["epoch"] == 2.0


def test_old_versus_new_is_a_path_over_time_with_intervals() -> None:
    spec = _usual("old_versus_new")
    assert len(spec["concat"]) == 2
    _, path = _layers(spec, 0, "line")
    assert (_field(path, "x"), _field(path, "y")) == ("value_new", "value_old")
    assert _field(path, "order") == "step"
    bars = [layer for layer in _layers(spec, 0, "rule") if "style" not in layer["mark"]]
    assert [(_field(b, "x"), _field(b, "y")) for b in bars] == [
        ("low_new", "value_old"),
        ("value_new", "low_old"),
    ]
    assert [len(_rows(spec, bar)) for bar in bars] == [5, 5]
    (base,) = _layers(spec, 0, "point", "base")
    (row,) = _rows(spec, base)
    assert (row["value_new"], row["value_old"]) == (0.12, 0.85)


def test_truth_ratio_has_a_menu_of_definitions() -> None:
    spec = _usual("truth_ratio")
    (menu,) = [param for param in spec["params"] if param["name"] == "definition"]
    assert menu["value"] == "arithmetic"
    assert menu["bind"]["options"] == ["arithmetic", "geometric"]
    (dots,) = [layer for layer in _layers(spec, 0, "point") if "style" not in layer["mark"]]
    rows = _rows(spec, dots)
    assert len(rows) == 2 * 5
    assert {row["definition"] for row in rows} == {"arithmetic", "geometric"}
    assert dots["transform"] == [{"filter": "datum.definition === definition"}]


def test_benchmarks_draw_every_task_with_intervals_and_chance() -> None:
    spec = _usual("benchmarks")
    names = [" ".join(panel["title"]["text"]) for panel in spec["concat"]]
    assert names == ["gsm8k", "humaneval", "hellaswag", "winogrande", "arc challenge"]
    (chance,) = _layers(spec, 3, "rule", "chance")
    assert _rows(spec, chance) == [{"chance": 0.5}]
    (bars,) = [layer for layer in _layers(spec, 3, "rule") if "style" not in layer["mark"]]
    assert bars["encoding"]["x2"]["field"] == "high"
    assert len(_rows(spec, bars)) == 5
    assert bars["encoding"]["y"]["scale"]["domain"][0] == "base"


@pytest.mark.parametrize(
    ("base", "chance", "names"),
    [
        (0.004, 0.0, ["base, above chance"]),
        (0.25, 0.25, ["base and chance"]),
        (0.24, 0.25, ["chance, above base"]),
        (0.6, 0.25, ["base", "chance"]),
        (0.6, None, ["base"]),
    ],
)
def test_level_names_do_not_overlap(base: float, chance: float | None, names: list[str]) -> None:
    """In the SVG a name is 11 pixels high and about six pixels wide per letter."""
    tables = report_tables()
    rows = tables.benchmark_trajectory
    rows = rows[rows["task"] == "arc_challenge"].assign(chance=chance)
    first = rows["step"] == 0
    rows.loc[first, ["value", "low", "high"]] = [base, max(base - 0.05, 0.0), base + 0.05]
    rows.loc[~first, ["value", "low", "high"]] = [0.1, 0.05, 0.15]
    spec = _spec(
        "benchmark_trajectory",
        replace(tables, benchmark_trajectory=rows.astype({"chance": float})),
    )
    drawn = re.findall(
        r'translate\(([\d.-]+),([\d.-]+)\)"[^>]*>((?:base|chance)[a-z, ]*)<',
        static_svg(spec, ["lora"]),
    )
    assert sorted(text for *_, text in drawn) == names
    for one in range(len(drawn)):
        for other in range(one):
            (x, y, text), (right, below, _) = drawn[one], drawn[other]
            assert abs(float(y) - float(below)) > 11 or abs(float(x) - float(right)) > 6 * len(text)


def test_score_without_interval_has_no_bar() -> None:
    made = make_tables(tasks=("gsm8k",))
    made["benchmarks"][["stderr", "low", "high"]] = np.nan
    spec = _spec("benchmarks", ReportTables(**made))
    assert not [layer for layer in _layers(spec, 0, "rule") if "style" not in layer["mark"]]
    (dots,) = [layer for layer in _layers(spec, 0, "point") if "style" not in layer["mark"]]
    assert len(_rows(spec, dots)) == 5


def test_available_scores_are_main_metrics() -> None:
    made = make_tables(tasks=("gsm8k",))
    second = made["benchmarks"].assign(metric="exact_match,flexible-extract", main=False)
    made["benchmarks"] = pd.concat([made["benchmarks"], second], ignore_index=True)
    assert set(frames.available_scores(ReportTables(**made))["metric"]) == {
        "exact_match,strict-match"
    }


def test_method_without_checkpoint_keeps_its_row() -> None:
    spec = _spec("truth_ratio", report_tables(never=("lora-r8",)))
    (words,) = _layers(spec, 0, "text", "absent")
    assert _rows(spec, words) == [{"label": "rank 8"}]


def test_methods_are_ordered_by_rank_with_full_last() -> None:
    tables = report_tables(ranks=(128, 2, 32))
    assert frames.method_labels(tables) == ["rank 2", "rank 32", "rank 128", "full"]
    domain = _layers(_spec("trajectories", tables), 0, "line")[0]["encoding"]["color"]["scale"]
    assert domain["domain"] == frames.method_labels(tables)


# Each study combines several unusual properties, since a figure takes a second to make.
CASES = {
    "one of each": {"ranks": (), "rates": (1e-5,), "old": ("kept",), "tasks": ("winogrande",)},
    "no full, no old probe, no benchmark": {"full": False, "old": (), "tasks": ()},
    "nothing selected": {"never": ("lora-r2", "lora-r128", "full")},
    "many": {"ranks": (1, 2, 4, 8, 16, 32, 64, 128), "rates": tuple(10.0**-n for n in range(6))},
    "diverged, three seeds, odd names": {
        "diverged": ("full", "lora-r2"),
        "seeds": (0, 1, 2),
        "new": 'it\'s "new".[x]',
        "old": ("a.b[c]", "</script><b>", "a_probe_with_an_exceedingly_long_name_on_no_line"),
    },
}


SLOW = {"nothing selected", "many"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_figures_render_unusual_studies(case: str) -> None:
    """Figures render with missing data, many methods and odd names."""
    small = {"ranks": (2, 128), "rates": (1e-3, 5e-3), "epochs": 5}
    tables = report_tables(**{**small, **CASES[case]})
    kinds = [str(kind) for kind in frames.methods_in_order(tables)["kind"]]
    for name in FIGURES:
        svg = static_svg(_spec(name, tables), kinds)
        assert svg.startswith("<svg")
        assert "NaN" not in svg


def test_hybrids_are_drawn_between_adapters_and_full() -> None:
    tables = report_tables(ranks=(2, 8, 32))
    tables.runs.loc[tables.runs["method"] == "lora-r2", "kind"] = "hybrid"
    order = list(frames.methods_in_order(tables)["method"])
    assert order == ["lora-r8", "lora-r32", "lora-r2", "full"]


def test_figure_without_data_says_why() -> None:
    tables = report_tables(old=(), tasks=())
    for name in ("old_versus_new", "truth_ratio", "benchmarks"):
        spec = _spec(name, tables)
        (rows,) = spec["datasets"].values()
        assert "No " in rows[0]["text"]


def test_figures_render_without_finished_runs() -> None:
    made = make_tables()
    base = made["runs"]["kind"] == "base"
    made["trajectory"] = made["trajectory"][made["trajectory"]["run"] == "base"]
    made["runs"] = made["runs"][base | made["runs"]["chosen"]].assign(status="failed")
    made["selection"] = made["selection"].assign(step=pd.NA, status="not_reached")
    made["benchmarks"] = made["benchmarks"].query("run == 'base'")
    tables = ReportTables(**made)
    for name in FIGURES:
        assert static_svg(_spec(name, tables), ["lora"] * 4 + ["full"]).startswith("<svg")


def test_grid_encloses_values_in_round_ticks() -> None:
    assert grid([pd.Series([0.31, 0.62])]) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert grid([pd.Series([0.12, 0.97])], 0.9) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert grid([pd.Series([0.9])]) == [0.9, 1.0]
    assert grid([pd.Series([1.0])]) == [0.9, 1.0]
    assert grid([]) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 10])
@pytest.mark.parametrize(("mode", "paper"), [("light", "#ffffff"), ("dark", "#1a1e25")])
def test_palette_has_contrast_and_orders_ranks_by_lightness(
    ranks: int, mode: str, paper: str
) -> None:
    """WCAG demands 3:1 for graphics, and the order must not depend on hue."""
    colours = palette(["lora"] * ranks + ["full"], mode)
    assert len(set(colours)) == ranks + 2
    assert min(_contrast(colour, paper) for colour in colours) >= 3
    lightness = [_luminance(colour) for colour in colours[:ranks]]
    assert lightness == sorted(lightness, reverse=mode == "light")


def test_themes_have_a_colour_per_method() -> None:
    for mode in MODES:
        assert len(theme(["lora", "lora", "full"], mode)["range"]["category"]) == 4
