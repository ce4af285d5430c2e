"""Tests of churn on small tables made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from forgetting.results.churn import CORRECTED, POSSIBLE, chance_corrected, churn_table

NOTHING = pd.DataFrame()


def _item(run: str, item: str, generated: str, recall: float, right: float, wrong: Any) -> Any:
    return {
        "run": run,
        "step": 0 if run == "base" else 4,
        "epoch": 0.0 if run == "base" else 2.0,
        "probe": "p",
        "item": item,
        "generated": generated,
        "rougeL_recall": recall,
        "logprob_right": right,
        "logprobs_wrong": wrong,
    }


@pytest.fixture
def items() -> pd.DataFrame:
    """Return items of which one is unchanged, one better, one worse, and one wrong otherwise."""
    return pd.DataFrame(
        [
            _item("base", "a", "In Oslo.", 1.0, -1.0, [-2.0, -3.0]),
            _item("base", "b", "In Lima.", 0.2, -3.0, [-1.0, -2.0]),
            _item("base", "c", "In Rome.", 0.8, -1.0, [-2.0, -2.0]),
            _item("base", "d", "In Bonn.", 0.0, -5.0, [-1.0, -2.0]),
            _item("run", "d", "", 0.0, -5.0, [-2.0, -1.0]),
            _item("run", "c", "Somewhere.", 0.3, -3.0, [-2.0, -1.0]),
            _item("run", "b", "In Kyoto.", 0.7, -1.0, [-1.5, -2.0]),
            _item("run", "a", " In  Oslo. ", 1.0, -1.0, [-2.0, -3.0]),
        ]
    )


def test_churn_gains_and_losses_do_not_cancel(items: pd.DataFrame) -> None:
    """The mean score of `choice` is unchanged, while two of four answers changed."""
    table = churn_table(items, NOTHING, NOTHING).set_index("answer")
    generated, choice = table.loc["generated"], table.loc["choice"]
    assert (generated["n"], generated["agreement"]) == (4, 0.25)
    assert generated["gained"] == pytest.approx(0.5 / 4)
    assert generated["lost"] == pytest.approx(0.5 / 4)
    assert (choice["gained"], choice["lost"], choice["agreement"]) == (0.25, 0.25, 0.25)
    assert choice["value"] == choice["base_value"] == 0.5
    for row in (generated, choice):
        assert row["value"] - row["base_value"] == pytest.approx(row["gained"] - row["lost"])
        assert row["agreement_low"] <= row["agreement"] <= row["agreement_high"]


def test_churn_of_a_copy_of_the_base_is_zero(items: pd.DataFrame) -> None:
    base = items[items["run"] == "base"]
    table = churn_table(pd.concat([base, base.assign(run="copy", step=4)]), NOTHING, NOTHING)
    assert (table["agreement"] == 1.0).all()
    assert (table[["gained", "lost"]] == 0.0).all(axis=None)


def test_churn_ignores_the_general_text(items: pd.DataFrame) -> None:
    text = {
        "run": "run",
        "step": 4,
        "epoch": 2.0,
        "probe": "general_text",
        "item": "general_text/0",
    }
    both = pd.concat([items, pd.DataFrame([text, text | {"run": "base", "step": 0}])])
    pd.testing.assert_frame_equal(
        churn_table(both, NOTHING, NOTHING), churn_table(items, NOTHING, NOTHING)
    )


def _answers(answers: dict[tuple[str, int], Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return responses and scores of base and run.

    Args:
        answers: by (task, item), the answers of base and run (text, or text and choice), then their
            scores.
    """
    responses, scores = [], []
    for (task, item), (before, after, base, tuned) in answers.items():
        for run, step, answer, value in (("base", 0, before, base), ("run", 4, after, tuned)):
            key = {"run": run, "step": step, "task": task, "item": item}
            text, choice = answer if isinstance(answer, tuple) else (answer, None)
            responses.append({**key, "response": text, "choice": choice})
            scores.append({**key, "value": value})
    return pd.DataFrame(responses).astype({"choice": "Int64"}), pd.DataFrame(scores)


def test_churn_of_benchmarks_by_choice_and_by_text(items: pd.DataFrame) -> None:
    """The choice is the metric's, which need not have the highest total likelihood."""
    answers = {
        ("arc", 0): (("[-1.0, -2.0]", 0), ("[-1.5, -2.5]", 0), 1.0, 1.0),
        ("arc", 1): (("[-1.0, -2.0]", 0), ("[-1.5, -2.5]", 1), 1.0, 0.0),
        ("gsm8k", 0): ("#### 4", "#### 4", 1.0, 1.0),
        ("gsm8k", 1): ("17", "#### 5", 0.0, 1.0),
    }
    table = churn_table(items, *_answers(answers))
    rows = table[table["evaluated_by"] == "job"].set_index("probe")
    assert (rows["epoch"] == 2.0).all()  # that of the same checkpoint's evaluation
    assert rows.loc["arc", ["answer", "agreement", "gained", "lost"]].tolist() == [
        "choice", 0.5, 0.0, 0.5,
    ]  # fmt: skip
    assert rows.loc["gsm8k", ["answer", "agreement", "gained", "lost"]].tolist() == [
        "generated", 0.5, 0.5, 0.0,
    ]  # fmt: skip
    # Two options; the base is right in all: nothing is lost by luck, and all may be lost.
    assert rows.loc["arc", [*CORRECTED, *POSSIBLE]].tolist() == [0.0, 0.5, 0.0, 1.0]
    assert rows.loc["gsm8k", [*CORRECTED, *POSSIBLE]].isna().all()


def test_churn_compares_generated_numbers_as_text(items: pd.DataFrame) -> None:
    """`[0.5, 1.5]` and `[0.6, 1.6]` have the same largest entry, but are two answers."""
    table = churn_table(items, *_answers({("sums", 0): ("[0.5, 1.5]", "[0.6, 1.6]", 0.0, 0.0)}))
    (row,) = table[table["probe"] == "sums"].to_dict("records")
    assert (row["answer"], row["agreement"]) == ("generated", 0.0)


def test_churn_leaves_out_unbounded_scores(items: pd.DataFrame) -> None:
    """BLEU is left out; other in-training benchmarks stay."""
    trajectory_items = pd.DataFrame(
        [
            {"run": run, "step": step, "epoch": step / 2, "task": task, "metric": "m", "item": item,
             "value": value, "response": "x", "choice": None}
            for run, step, by_task in [
                ("base", 0, {"bleu": (0.5, 20.0), "exact": (0.0, 1.0)}),
                ("run", 4, {"bleu": (0.2, 0.7), "exact": (1.0, 1.0)}),
            ]
            for task, values in by_task.items()
            for item, value in zip("ab", values, strict=True)
        ]
    )  # fmt: skip
    table = churn_table(items, NOTHING, NOTHING, trajectory_items).set_index("probe")
    assert set(table.index) == {"p", "exact"}
    assert (table.loc["exact", "gained"], table.loc["exact", "lost"]) == (0.5, 0.0)


def _outcomes(right: int, lost: int, gained: int, wrong: int, options: int) -> list[np.ndarray]:
    """Return scores before and after, and options, of items that these numbers describe."""
    before = [1.0] * (right + lost) + [0.0] * (gained + wrong)
    after = [1.0] * right + [0.0] * lost + [1.0] * gained + [0.0] * wrong
    return [np.array(before), np.array(after), np.full(len(before), float(options))]


def _corrected(columns: list[np.ndarray]) -> dict[str, float]:
    gained, gained_low, gained_high, lost, lost_low, lost_high, *possible = chance_corrected(
        *columns
    )
    assert gained_low <= gained <= gained_high
    assert lost_low <= lost <= lost_high
    values = {"gained": gained, "lost": lost, "gained_possible": possible[0]}
    return values | {"lost_possible": possible[1]}


def test_correction_for_chance_by_hand() -> None:
    """Of 20 items .60 are right before and .50 after; luck among 4 explains .40 * .50 / 3."""
    values = _corrected(_outcomes(8, 4, 2, 6, 4))
    assert values["lost"] == pytest.approx(0.20 - 0.40 * 0.50 / 3)
    assert values["gained"] == pytest.approx(0.10 - 0.40 * 0.50 / 3)
    assert values["lost"] - values["gained"] == pytest.approx(0.60 - 0.50)
    assert values["lost_possible"] == pytest.approx(0.4667, abs=1e-4)
    assert values["gained_possible"] == pytest.approx(0.3333, abs=1e-4)


def test_correction_below_zero_is_kept() -> None:
    """Luck explains .1008 of each, more than the .05 that changed; the paper reports 0."""
    values = _corrected(_outcomes(8, 1, 1, 10, 4))
    assert values["lost"] == values["gained"] == pytest.approx(0.05 - 0.55**2 / 3)
    assert max(values["lost"], 0.0) == 0.0


def test_items_with_different_options_are_corrected_apart() -> None:
    parts = [_outcomes(8, 4, 2, 6, 4), _outcomes(5, 3, 1, 11, 2)]
    both = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    values, apart = _corrected(both), [_corrected(part) for part in parts]
    for name, value in values.items():
        assert value == pytest.approx(np.mean([part[name] for part in apart])), name


def test_redrawn_guesses_are_no_forgetting() -> None:
    """Nobody knows anything: a quarter is right by luck, before and after."""
    random = np.random.default_rng(1)
    before, after = (random.random((2, 20000)) < 0.25).astype(float)
    lost, low, high = chance_corrected(before, after, np.full(20000, 4.0))[3:6]
    assert float(np.mean((before == 1) & (after == 0))) > 0.18
    assert low < 0 < high
    assert high - low < 0.02
    assert abs(lost) < 0.005


@pytest.mark.parametrize(("score", "options"), [(0.5, 4.0), (1.0, 1.0), (1.0, float("nan"))])
def test_no_correction_without_options_or_of_partial_scores(score: float, options: float) -> None:
    scores, kinds = np.array([score, 0.0]), np.array([4.0, options])
    assert np.isnan(chance_corrected(scores, scores, kinds)).all()
