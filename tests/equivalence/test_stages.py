"""Test that the outputs of every stage equal those recorded for its version.

golden/make_stages.py computes the outputs and writes them to golden/stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from forgetting.benchmarks import scores
from forgetting.config.data import ColumnsConfig
from forgetting.config.evaluation import SelectionConfig
from forgetting.config.expand import Method
from forgetting.config.training import TrainingConfig
from forgetting.evaluation import metrics
from forgetting.report import summary
from forgetting.results import trajectories
from forgetting.training import pretrain
from forgetting.versions import VERSIONS
from golden import invented_results, make_stages
from golden.make_stages import STAGES, computed, differences, mistake, recorded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_stage_has_golden_outputs() -> None:
    assert list(STAGES) == list(VERSIONS)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_outputs_equal_the_golden_ones(stage: str) -> None:
    assert mistake(stage, computed(stage)) is None


@pytest.mark.parametrize("stage", STAGES)
def test_raised_version_needs_new_golden_outputs(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VERSIONS, stage, VERSIONS[stage] + 1)
    assert "run tests/golden/make_stages.py" in str(mistake(stage, recorded(stage)["outputs"]))


CHANGES: dict[str, tuple[str, Any, str, Callable[[Any], Any]]] = {
    "columns that have other names": (
        *("prepare", ColumnsConfig, "renamed"),
        lambda _: property(lambda self: {}),
    ),
    "schedule of the pretraining": (
        *("pretrain", pretrain, "pretraining_config"),
        lambda old: lambda spec: old(spec).model_copy(update={"min_lr_ratio": 0.2}),
    ),
    "embeddings that full fine-tuning trains": (
        *("train full", Method, "trains_embeddings"),
        lambda _: property(lambda self: False),
    ),
    "default betas of AdamW": (
        *("train lora", TrainingConfig, "resolved_betas"),
        lambda _: property(lambda self: (0.9, 0.95)),
    ),
    "default decay ratio": (
        *("train cooldown", TrainingConfig, "resolved_decay_ratio"),
        lambda _: property(lambda self: 0.5),
    ),
    "truth ratio": (
        *("evaluate", metrics, "truth_ratio_geometric"),
        lambda old: lambda *given: 1.001 * old(*given),
    ),
    "pass@k": (*("benchmark", scores, "pass_at_k"), lambda _: lambda n, right, k: right / n),
    "default threshold": ("select", SelectionConfig, "__init__", lambda old: _with_threshold(old)),
    "level of an interval": (
        *("tables", trajectories, "wilson_interval"),
        lambda old: lambda values: old(values, 0.9),
    ),
    "a word of the page": (
        *("report rule", summary, "metric_words"),
        lambda old: lambda metric: f"mean {old(metric)}",
    ),
}
"""A change of each stage: the stage and the part of its outputs, the owner of the changed
attribute, its name, and the change."""


def _with_threshold(old: Callable[..., None]) -> Callable[..., None]:
    return lambda self, **given: old(self, **{"threshold": 0.8, **given})


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_numbers_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_and_part, owner, attribute, change = CHANGES[name]
    stage, _, part = stage_and_part.partition(" ")
    # Other parts need not be computed.
    if stage == "train":
        monkeypatch.setattr(make_stages, "TRAININGS", {part: make_stages.TRAININGS[part]})
    if stage == "report":
        monkeypatch.setattr(invented_results, "FIGURES", {})
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    outputs = computed(stage)
    message = str(mistake(stage, outputs))
    assert message.startswith(f"numbers of stage {stage} changed: raise its version in versions.py")
    if part:
        assert any(differences(recorded(stage)["outputs"][part], outputs[part]))


def test_rounding_is_no_difference() -> None:
    assert not [*differences({"a": [1.0, None, "x"]}, {"a": [1.00001, None, "x"]})]
    for other in ([1.001, None, "x"], [1.0, 0.0, "x"], [1.0, None, "y"], [1.0, None]):
        assert [*differences({"a": [1.0, None, "x"]}, {"a": other})]
    assert [*differences({"a": 1}, {"a": 1, "b": 2})]
