"""Tests of the sentences of the page and of its summary."""

from __future__ import annotations

from typing import Any

import pytest

from forgetting.report import summary
from forgetting.report.frames import ReportTables
from forgetting.report.narrative import narrative
from support.result_tables import report_tables
from support.result_tables import tables as make_tables


def test_narrative_compares_the_best_and_worst_method() -> None:
    """The difference on the same questions decides their order, not two intervals."""
    tables = report_tables()
    answer, qualified = narrative(tables)
    cells = {line.label: line.cells["real_authors"] for line in summary.summary(tables)[1:]}
    most, least = cells["full"], cells["rank 2"]
    assert most.value == max(cell.value for cell in cells.values())
    assert least.value == min(cell.value for cell in cells.values())
    assert "ROUGE-L recall on new authors reaches 0.9" in answer[0]
    assert f"full fine-tuning keeps most, {most.value:.2f}" in answer[1]
    assert f"rank 2 least, {least.value:.2f} ({least.interval})" in answer[1]
    assert "on the same questions 0.20 more (0.10 to 0.30)." in answer[1]
    assert answer[-1] == "There the methods have learnt new authors to between 0.85 and 0.90."
    assert not qualified


def test_narrative_marks_differences_that_may_be_chance() -> None:
    made = make_tables()
    made["comparisons"]["high_all"] = 0.05
    assert (
        "0.20 more (\u22120.05 to 0.30), which may be chance."
        in (narrative(ReportTables(**made))[0][1])
    )


def test_narrative_does_not_rank_what_the_base_does_not_know() -> None:
    """The best of methods that keep nothing is a matter of chance."""
    made = make_tables()
    rows = made["trajectory"]
    rows.loc[(rows["run"] == "base") & (rows["probe"] == "real_authors"), "value"] = 0.03
    answer = narrative(ReportTables(**made))[0]
    assert not [one for one in answer if one.startswith("On real authors, where")]
    assert [one for one in answer if one.startswith("On world facts, where")]
    assert (
        "On real authors the base itself has only 0.03: there is next to nothing to forget, and no "
        "method is ranked by it."
    ) in answer


def test_narrative_names_benchmarks_at_chance() -> None:
    """A base that guesses has nothing to forget there."""
    made = make_tables()
    rows = made["benchmarks"]
    main = rows["main"].astype(bool) & (rows["run"] == "base")
    rows.loc[main, "low"] = rows.loc[main, "chance"] + 0.01
    assert "chance at" not in " ".join(narrative(ReportTables(**made))[0])
    rows.loc[main & rows["task"].isin(["gsm8k", "winogrande"]), "low"] -= 0.01
    assert "The base is not surely better than chance at gsm8k and winogrande" in " ".join(
        narrative(ReportTables(**made))[0]
    )


def test_narrative_does_not_call_a_gain_kept() -> None:
    """Fine-tuning can also teach old questions, which is a gain."""
    made = make_tables()
    rows = made["trajectory"]
    rows.loc[(rows["run"] == "base") & (rows["probe"] == "real_authors"), "value"] = 0.15
    answer = next(
        one for one in narrative(ReportTables(**made))[0] if one.startswith("On real authors")
    )
    assert " has most, " in answer
    assert " keeps " not in answer


def test_narrative_names_methods_without_a_checkpoint() -> None:
    answer, qualified = narrative(report_tables(never=("lora-r2",)))
    assert "rank 8 least" in answer[1]
    assert qualified == ["Rank 2 has no selected checkpoint: ROUGE never reached 0.9."]


def test_narrative_claims_nothing_without_selection() -> None:
    answer, qualified = narrative(report_tables(ranks=(2,), never=("lora-r2", "full")))
    assert answer == [
        "No run has a checkpoint selected at ROUGE-L recall 0.9 on new authors: nothing to compare."
    ]
    assert len(qualified) == 2


def _at_last(methods: tuple[str, ...], learnt: dict[str, float] | None = None) -> dict[str, Any]:
    """Return tables in which methods do not reach the threshold, with their last checkpoints."""
    made = make_tables()
    selection, rows = made["selection"], made["trajectory"]
    selection.loc[selection["method"].isin(methods), "status"] = "last"
    for method, value in (learnt or {}).items():
        run, step = selection.set_index("method").loc[method, ["run", "step"]]
        there = (rows["run"] == run) & (rows["step"] == step) & (rows["knowledge"] == "new")
        rows.loc[there, "value"] = value
    return made


def test_narrative_ranks_only_methods_that_reach_the_threshold() -> None:
    answer, qualified = narrative(ReportTables(**_at_last(("lora-r2", "lora-r8"))))
    assert answer[0].endswith(
        "reaches 0.9; rank 2 and rank 8 never reach it and are compared at their last checkpoints."
    )
    assert "full fine-tuning keeps most" in answer[1]
    assert "rank 32 least" in answer[1]
    assert not qualified


def test_narrative_does_not_rank_unequal_learning() -> None:
    every = ("lora-r2", "lora-r8", "lora-r32", "lora-r128", "full")
    answer, _ = narrative(ReportTables(**_at_last(every, {"lora-r2": 0.21, "full": 0.87})))
    assert answer == [
        "No method reaches ROUGE-L recall 0.9 on new authors: all are compared at their last "
        "checkpoints.",
        "The methods have learnt new authors to between 0.21 (rank 2) and 0.87 (full fine-tuning), "
        "too unequally to say which keeps more of the old: what learns less has less to forget.",
    ]
    answer, _ = narrative(ReportTables(**_at_last(every)))
    assert answer[0].startswith("No method reaches")
    assert "keeps most" in answer[1]


def test_narrative_warns_of_significantly_unequal_learning() -> None:
    """Methods at their last checkpoints are not ranked then; others are, with a warning."""
    every = ("lora-r2", "lora-r8", "lora-r32", "lora-r128", "full")
    for methods, ranked in ((every, False), ((), True)):
        made = _at_last(methods, {"lora-r2": 0.75})
        pairs = made["comparisons"]
        columns = ["difference", "low_all", "high_all"]
        pairs.loc[pairs["probe"] == "new_authors", columns] = 0.0
        first = (pairs["label"] == "rank 2") & (pairs["other"] == "full")
        first &= pairs["probe"] == "new_authors"
        pairs.loc[first, columns] = [-0.11, -0.17, -0.05]
        text = " ".join(narrative(ReportTables(**made))[0])
        assert ("keeps most" in text) is ranked
        assert ("too unequally to say which keeps more" in text) is not ranked
        assert (
            ", which is not equal: full fine-tuning has 0.11 more than rank 2 (0.05 to 0.17 on the "
            "same questions), and may have forgotten more for that reason." in text
        ) is ranked


def test_narrative_uses_simultaneous_bounds() -> None:
    """In many studies of equal methods, the interval of one of ten pairs excludes 0."""
    made = make_tables()
    pairs = made["comparisons"]
    pairs[["difference", "low", "high", "low_all", "high_all"]] = -0.11, -0.17, -0.05, -0.23, 0.01
    answer, _ = narrative(ReportTables(**made))
    assert "0.11 more (\u22120.01 to 0.23), which may be chance." in answer[1]
    assert "not equal" not in " ".join(answer)


def test_narrative_reports_overlong_answers() -> None:
    made = make_tables()
    rows = made["trajectory"]
    tuned = rows["run"].str.startswith("full/") & (rows["probe"] == "world_facts")
    rows.loc[tuned & (rows["metric"] == "rougeL_f1"), "value"] *= 0.5
    rows.loc[tuned & (rows["metric"] == "generated_tokens"), "value"] = 31.0
    tables = ReportTables(**made)
    full = summary.summary(tables)[-1]
    recall, f1 = full.cells["world_facts"].value, full.f1["world_facts"].value
    assert f1 == pytest.approx(recall / 2)
    assert narrative(tables)[0][-1] == (
        "Recall does not see that answers go on: F1 falls much further than recall with 1 of 5 "
        f"methods, most with full fine-tuning on world facts, to {f1:.2f} from 0.85 (recall to "
        f"{recall:.2f} from 0.85), at 31.0 tokens an answer against 14.0."
    )
    assert "go on" not in " ".join(narrative(report_tables())[0])
    text = summary.summary_frame(tables).set_index(["method", "probe"]).loc[("full", "world_facts")]
    assert text["rougeL_f1"] == pytest.approx(f1, abs=1e-5)
    assert text["rougeL_f1_change_against_base"] == pytest.approx(f1 - 0.85, abs=1e-5)


def test_narrative_does_not_report_a_rise_as_a_fall() -> None:
    """If the base knows nothing of a probe, F1 rises less than recall and does not fall."""
    made = make_tables()
    rows = made["trajectory"]
    for metric, before, after in (("rougeL_recall", 0.03, 0.33), ("rougeL_f1", 0.01, 0.15)):
        is_metric = (rows["metric"] == metric) & rows["probe"].isin(["world_facts", "real_authors"])
        rows.loc[is_metric, "value"] = after
        rows.loc[is_metric, "change"] = after - before
        rows.loc[is_metric & (rows["run"] == "base"), "value"] = before
    assert "falls" not in " ".join(narrative(ReportTables(**made))[0])


def test_summary_averages_seeds() -> None:
    tables = report_tables(seeds=(0, 1, 2))
    base, *lines = summary.summary(tables)
    assert base.cells["real_authors"].change is None
    for line in lines:
        cell = line.cells["real_authors"]
        assert len(line.steps) == 3
        assert cell.low < cell.value < cell.high
        assert cell.lowest <= cell.value <= cell.highest
        assert cell.change == pytest.approx(cell.value - base.cells["real_authors"].value)
    assert narrative(tables)[1] == ["Values and interval bounds are means over seeds."]


def test_selection_rule_follows_the_study() -> None:
    made = make_tables()
    made["study"]["study"]["selection"].update(
        threshold=0.75, hyperparameters="smallest-lr", deadline_epochs=6, if_not_reached="last"
    )
    text = " ".join(summary.selection_rule(ReportTables(**made)))
    assert "first reaches 0.75" in text
    assert "represented by the smallest learning rate that reaches it within 6 epochs." in text
    assert "last checkpoint" in text


def test_narrative_does_not_rank_methods_that_learnt_nothing() -> None:
    """At smoke test size, the method that keeps most is the one that changed least."""
    made = make_tables()
    rows = made["trajectory"]
    rows.loc[rows["probe"] == "new_authors", "value"] = 0.001
    answer = narrative(ReportTables(**made))[0]
    assert "None of the methods has learnt new authors: there is nothing to rank." in answer
    assert not [one for one in answer if "most" in one and "least" in one]
