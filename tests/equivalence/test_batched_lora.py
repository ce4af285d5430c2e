"""Runs trained together: each as if alone, and the same bits however often it is killed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example, encode_pair
from forgetting.evaluation.metrics import mean_score
from forgetting.evaluation.probes import evaluate_probes
from forgetting.io import write_json
from forgetting.models.adapters import attach_adapter
from forgetting.models.forward import target_logits
from forgetting.models.loading import Model, load_base
from forgetting.schedule import LrSchedule
from forgetting.study import run_groups
from forgetting.training import checkpoints, train_step
from forgetting.training import microbatches as passes_module
from forgetting.training import trainer as module
from forgetting.training.checkpoints import ResumePoints, TrainState, resume_groups
from forgetting.training.mitigations import Mitigations
from forgetting.training.run_config import RunConfig
from forgetting.training.run_group import RunContext, run_key, train_run_group
from forgetting.training.trainer import train_batched, train_run
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.run_groups import examples_in, materials_of, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
SETTINGS = (
    Hyperparameters(learning_rate=0.01),
    Hyperparameters(learning_rate=0.003, weight_decay=0.1),
    Hyperparameters(learning_rate=0.02, weight_decay=0.01),
)


@dataclass
class Gym:
    """Runs that differ in their setting, in folders numbered from 0."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    rows: Rows
    tuning: Method
    folder: Path
    recipe: RunConfig
    examples: list[Example]
    settings: Sequence[Hyperparameters] = SETTINGS
    told: list[tuple[int, int]] = field(default_factory=list)
    numbers: torch.dtype = torch.float32

    def model(self) -> Model:
        """As in a process of its own: the base is loaded afresh."""
        model = attach_adapter(
            load_base(self.base, torch.device("cpu")), self.tuning, self.recipe.seed
        )
        return model.to(self.numbers)

    def plans(self) -> list[tuple[RunConfig, Path]]:
        return [
            (replace(self.recipe, hyperparameters=setting), self.folder / str(number))
            for number, setting in enumerate(self.settings)
        ]

    def together(self) -> list[TrainState]:
        return train_batched(
            self.model(), self.examples, self.plans(), 0.001, self.evaluate, self.tell
        )

    def alone(self) -> list[TrainState]:
        return [
            train_run(
                self.model(), self.examples, recipe, 0.001, self.evaluate, folder, _say_nothing
            )
            for recipe, folder in self.plans()
        ]

    def evaluate(self, model: Model) -> tuple[pd.DataFrame, float]:
        items = evaluate_probes(
            model,
            self.tokenizer,
            {"p": self.rows[:2]},
            self.prompt,
            EvaluationConfig(max_new_tokens=2),
        )
        return items, mean_score(items, "p", "probability")

    def tell(self, number: int, progress: TrainState, schedule: LrSchedule) -> None:
        self.told.append((number, progress.step))

    def at(self, folder: Path) -> Gym:
        return replace(self, folder=folder, told=[])

    def longer(self, epochs: float, every: float, **changes: Any) -> None:
        """Train for so many epochs, with so many between two evaluations."""
        training = self.recipe.training.model_copy(update={"epochs": epochs, **changes})
        schedule = LrSchedule.plan(len(self.examples), training, every)
        self.recipe = replace(self.recipe, training=training, schedule=schedule)


def _say_nothing(*_: Any) -> None:
    pass


@pytest.fixture
def gym(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
    tuning: Method,
    tmp_path: Path,
) -> Gym:
    """Ten rows in batches of four for four epochs: twelve steps, four evaluations, dropout."""
    examples = [encode_pair(tokenizer, prompt, row["question"], row["answer"]) for row in rows]
    recipe = RunConfig(
        hyperparameters=SETTINGS[0],
        seed=5,
        training=TrainingConfig(
            batch_size=4, micro_batch_size=3, schedule="constant", warmup_epochs=0.5
        ),
        schedule=LrSchedule(1, 1, 0, frozenset()),
        threshold=1.0,
        stop_after_evaluations=None,
        precision=torch.float32,
        pad=tokenizer.pad_token_id,
    )
    gym = Gym(base_folder, tokenizer, prompt, rows, tuning, tmp_path / "runs", recipe, examples)
    gym.longer(4.0, 1.0)
    return gym


def _assert_close(together: Gym, alone: Gym, rel: float = 1e-4, atol: float = 2e-4) -> None:
    """Items and checkpoints of all runs agree, up to rounding."""
    for number in range(len(together.settings)):
        ours, theirs = (gym.folder / str(number) for gym in (together, alone))
        # What tells how a run of a group ended is needed by the others of the group alone.
        names = {path.name for path in ours.glob("[!.]*")} - {"end.json"}
        assert names == {path.name for path in theirs.glob("[!.]*")}
        for path in theirs.glob("items-*"):
            pd.testing.assert_frame_equal(
                pd.read_parquet(ours / path.name), pd.read_parquet(path), rtol=rel
            )
        for path in theirs.glob("step-*/*.safetensors"):
            found = load_file(ours / path.parent.name / path.name)
            for name, tensor in load_file(path).items():
                torch.testing.assert_close(found[name], tensor, rtol=rel, atol=atol)


# --- each run as if alone -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_fused_run_is_the_run_alone(
    gym: Gym, tmp_path: Path, variant: str, dropout: float
) -> None:
    """36 steps at three rates and decays, the same masks of dropout: the same losses and weights.

    In float64, where AdamW makes nothing of rounding: in float32 it moves a weight whose gradient
    is nearly nothing by a part of a step, and the losses agree to 1e-4.
    """
    gym.numbers = torch.float64
    gym.tuning = gym.tuning.model_copy(update={"variant": variant, "dropout": dropout})
    gym.longer(12.0, 6.0, schedule="linear")
    alone = gym.at(tmp_path / "alone")
    for ours, theirs in zip(gym.together(), alone.alone(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
        assert ours.losses[-1] < ours.losses[0]
        assert [point[:2] for point in ours.evaluations] == [
            point[:2] for point in theirs.evaluations
        ]
        assert (ours.step, ours.tokens, ours.status) == (36, theirs.tokens, "ok")
    _assert_close(gym, alone, rel=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["lionw", "adafactor"])
def test_every_run_has_an_optimizer_of_its_own(gym: Gym, tmp_path: Path, optimizer: str) -> None:
    """Whatever it keeps: moments, momentum or factors. LoRA+ as well."""
    gym.recipe = replace(gym.recipe, loraplus_lr_ratio=4.0)
    gym.longer(4.0, 2.0, optimizer=optimizer)
    gym.settings = [
        setting.model_copy(update={"learning_rate": setting.learning_rate / 10})
        for setting in SETTINGS
    ]
    alone = gym.at(tmp_path / "alone")
    for ours, theirs in zip(gym.together(), alone.alone(), strict=True):
        # LionW steps by signs: where a momentum is nearly nothing, rounding decides.
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)


def test_replayed_text_is_in_the_fused_batch(gym: Gym, tmp_path: Path) -> None:
    mitigations = Mitigations(replay=gym.examples[6:], replay_ratio=0.4)
    gym.examples = gym.examples[:6]
    gym.recipe = replace(gym.recipe, mitigations=mitigations)
    gym.longer(4.0, 2.0)
    alone = gym.at(tmp_path / "alone")
    for ours, theirs in zip(gym.together(), alone.alone(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        assert ours.tokens == theirs.tokens > 4 * sum(len(e.ids) for e in gym.examples)


def test_a_part_of_the_model_is_fused_too(gym: Gym, tmp_path: Path) -> None:
    gym.tuning = gym.tuning.model_copy(update={"target_modules": ["q_proj", "down_proj"]})
    alone = gym.at(tmp_path / "alone")
    for ours, theirs in zip(gym.together(), alone.alone(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_the_gradients_of_runs_are_clipped_apart(gym: Gym, tmp_path: Path) -> None:
    """With a clip that always bites: a common norm would make the runs depend on each other."""
    gym.longer(4.0, 4.0, max_grad_norm=1e-3)
    alone = gym.at(tmp_path / "alone")
    for ours, theirs in zip(gym.together(), alone.alone(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_bfloat16_is_fused_within_its_rounding(gym: Gym, tmp_path: Path) -> None:
    gym.recipe = replace(gym.recipe, precision=torch.bfloat16)
    alone = gym.at(tmp_path / "alone")
    for ours, theirs in zip(gym.together(), alone.alone(), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_runs_that_read_the_same_rows_are_not_padded(
    gym: Gym, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout all their documents stand side by side: as many tokens as they have seen."""
    gym.tuning = gym.tuning.model_copy(update={"dropout": dropout})
    passed = []

    def noted(model: Model, batch: Any) -> torch.Tensor:
        passed.append(batch.ids.numel())
        return target_logits(model, batch)

    monkeypatch.setattr(train_step, "target_logits", noted)
    tokens = sum(progress.tokens for progress in gym.together())
    assert sum(passed) == tokens if dropout == 0.0 else sum(passed) > tokens


# --- runs that leave ----------------------------------------------------------------------------


def _poison(monkeypatch: pytest.MonkeyPatch, rate: float, step: int) -> None:
    """Let the loss of the run with this rate cease to be a number at a step."""
    original = module._train_step

    def poisoned(model: Model, examples: Any, runs: Any, stack: Any) -> Any:
        for run in runs:
            if (run.config.hyperparameters.learning_rate, run.state.step) == (rate, step):
                next(iter(run.own.weights.values())).data.fill_(math.nan)
        return original(model, examples, runs, stack)

    monkeypatch.setattr(module, "_train_step", poisoned)


@pytest.fixture
def mixed(gym: Gym, monkeypatch: pytest.MonkeyPatch) -> Gym:
    """The second run diverges at step 7; the third reaches the threshold at step 9 and ends."""
    gym.recipe = replace(gym.recipe, threshold=0.022, stop_after_evaluations=0)
    _poison(monkeypatch, 0.003, 7)
    return gym


def test_a_run_that_ends_or_diverges_leaves_and_the_others_go_on(
    mixed: Gym, tmp_path: Path
) -> None:
    alone = mixed.at(tmp_path / "alone")
    ended, expected = mixed.together(), alone.alone()
    assert [(p.status, p.step) for p in ended] == [("ok", 12), ("diverged", 7), ("ok", 9)]
    for ours, theirs in zip(ended, expected, strict=True):
        assert (ours.status, ours.step, ours.tokens) == (theirs.status, theirs.step, theirs.tokens)
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    _assert_close(mixed, alone)
    assert mixed.told == [
        *[(number, step) for step in range(1, 8) for number in range(3)],
        *[(number, step) for step in (8, 9) for number in (0, 2)],
        *[(0, step) for step in (10, 11, 12)],
    ]


def test_a_rate_far_too_high_harms_no_other_run(gym: Gym, tmp_path: Path) -> None:
    """Infinite products of one run stay in its own rows."""
    gym.settings = [SETTINGS[0], Hyperparameters(learning_rate=1e30), SETTINGS[1]]
    alone = gym.at(tmp_path / "alone")
    ended, expected = gym.together(), alone.alone()
    assert [progress.status for progress in ended] == ["ok", "diverged", "ok"]
    for ours, theirs in zip(ended, expected, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_all_may_diverge(gym: Gym) -> None:
    gym.settings = [Hyperparameters(learning_rate=1e30), Hyperparameters(learning_rate=1e25)]
    first = gym.together()
    assert [progress.status for progress in first] == ["diverged", "diverged"]
    assert gym.together() == first


def test_the_time_of_a_step_is_shared(gym: Gym, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert [progress.seconds for progress in gym.together()] == pytest.approx([4.0] * 3)


# --- killed and started again -------------------------------------------------------------------


# Evaluations: of runs 0, 1, 2 at steps 3 and 6, of 0 and 2 at 9, of 0 at 12.
MOMENTS = {
    "in a step": (module, "_train_step", (2, 5, 8, 9, 11)),
    "in an evaluation": (Gym, "evaluate", (2, 5, 8)),
    "at the items": (module, "write_table", (3, 7)),
    "at the weights": (checkpoints, "save_checkpoint", (2, 6)),
    "at the record of progress": (checkpoints, "write_json", (1, 5, 7, 9)),
    "when an end is told": (module, "write_end", (1, 2, 3)),
    "when old checkpoints go": (module, "prune_checkpoints", (2, 5, 7, 8, 10, 11)),
    "when telling": (Gym, "tell", (9, 16, 24)),
}


def _assert_same_bits(
    gym: Gym, ended: list[TrainState], other: Gym, expected: list[TrainState]
) -> None:
    for ours, theirs in zip(ended, expected, strict=True):
        assert replace(ours, seconds=0.0) == replace(theirs, seconds=0.0)
    files = {path.relative_to(other.folder) for path in other.folder.rglob("*.*")}
    assert {path.relative_to(gym.folder) for path in gym.folder.rglob("*.*")} == files
    for path in files:
        if path.suffix == ".safetensors":
            assert (gym.folder / path).read_bytes() == (other.folder / path).read_bytes(), path
        if path.suffix == ".parquet":
            pd.testing.assert_frame_equal(
                pd.read_parquet(gym.folder / path),
                pd.read_parquet(other.folder / path),
                check_exact=True,
            )


@BEFORE_AND_AFTER
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_group_ends_like_one_that_was_not(
    mixed: Gym, moment: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment, also between the checkpoints of two runs, the same bits at the end.

    The bits of a step depend on the runs that are in it, so the same runs must be in it again.
    """
    reference = mixed.at(tmp_path / "reference")
    expected = reference.together()
    owner, name, calls = MOMENTS[moment]
    for call in calls:
        shutil.rmtree(mixed.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, after)
            with pytest.raises(Killed):
                mixed.together()
        _assert_same_bits(mixed, mixed.together(), reference, expected)


def test_a_group_killed_again_and_again_still_ends(
    mixed: Gym, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a partition whose jobs are preempted: each time a little further on."""
    reference = mixed.at(tmp_path / "reference")
    expected = reference.together()
    for _ in range(3):
        with monkeypatch.context() as patch:
            kill_at(patch, module, "_train_step", 4, after=True)
            with pytest.raises(Killed):
                mixed.together()
    _assert_same_bits(mixed, mixed.together(), reference, expected)


def test_a_finished_group_started_again_trains_nothing(
    mixed: Gym, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = mixed.together()
    monkeypatch.setattr(module, "_train_step", None)
    assert mixed.together() == ended


def _stand(folder: Path, *steps: int, points: int = 2, ended: int | None = None) -> Path:
    for step in steps:
        checkpoint = folder / f"step-{step:07d}"
        checkpoint.mkdir(parents=True)
        write_json(checkpoint / "progress.json", {"evaluations": [[]] * points})
        (checkpoint / "optimizer.safetensors").touch()
    folder.mkdir(exist_ok=True)
    if ended is not None:
        write_json(folder / "end.json", {"step": ended, "progress": {}})
    return folder


def test_runs_at_other_steps_are_trained_in_groups_of_their_own(tmp_path: Path) -> None:
    """A rate that is added to a sweep which was killed does not send the others back."""
    old = [_stand(tmp_path / "a", 6, 9), _stand(tmp_path / "b", 6)]
    ended = [_stand(tmp_path / "c", 3, ended=6), _stand(tmp_path / "d", 6, ended=9)]
    new = _stand(tmp_path / "e")
    assert resume_groups([*old, *ended, new]) == [[new], [*old, *ended]]
    assert resume_groups(old[:1]) == [old[:1]]
    assert resume_groups(ended) == [ended]


def test_before_the_second_evaluation_a_group_may_begin_again(tmp_path: Path) -> None:
    """Killed between the first checkpoints of two runs: both start from the beginning."""
    first, second = _stand(tmp_path / "a", 3, points=1), _stand(tmp_path / "b")
    assert ResumePoints.of(first).checkpoints == {0, 3}
    assert resume_groups([first, second]) == [[first, second]]


def test_nothing_goes_on_from_a_checkpoint_without_moments(tmp_path: Path) -> None:
    """One that is kept to be picked: runs that wait at its step are trained by themselves."""
    ahead, behind = _stand(tmp_path / "a", 3, 9), _stand(tmp_path / "b", 3)
    assert resume_groups([ahead, behind]) == [[ahead, behind]]
    (ahead / "step-0000003" / "optimizer.safetensors").unlink()
    assert ResumePoints.of(ahead).checkpoints == {9}
    assert resume_groups([ahead, behind]) == [[behind], [ahead]]


# --- memory -------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_pass_of_all_runs(
    gym: Gym, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gym.tuning = gym.tuning.model_copy(update={"dropout": 0.0})
    roomy = gym.at(tmp_path / "roomy").together()
    attempts = []

    def limited(model: Model, batch: Any) -> torch.Tensor:
        attempts.append(examples_in(batch))
        if attempts[-1] > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return target_logits(model, batch)

    monkeypatch.setattr(train_step, "target_logits", limited)
    monkeypatch.setitem(passes_module.FORWARD_OVERHEAD_TOKENS, "cpu", 10_000)
    for ours, theirs in zip(gym.together(), roomy, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        assert ours.micro_batch_size == 1
    assert sum(rows > 5 for rows in attempts) == 1


@pytest.mark.parametrize(("dropout", "passes"), [(0.0, 2), (0.1, 1)])
def test_the_rows_of_many_runs_are_passed_in_turns(
    gym: Gym, dropout: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But with dropout, whose masks would be other ones than those of a run alone."""
    gym.tuning = gym.tuning.model_copy(update={"dropout": dropout})
    gym.recipe = replace(
        gym.recipe, training=gym.recipe.training.model_copy(update={"micro_batch_size": 4})
    )
    monkeypatch.setattr(run_groups, "TOKENS_PER_PASS", 3 * 2 * 40)
    monkeypatch.setitem(passes_module.FORWARD_OVERHEAD_TOKENS, "cpu", 10**6)
    counted: list[int] = []
    original = passes_module.split_batch

    def counting(*given: Any) -> Any:
        found = original(*given)
        counted.append(len(found[0]))
        return found

    monkeypatch.setattr(train_step, "split_batch", counting)
    gym.together()
    assert max(counted) == passes


# --- in a run group
# --------------------------------------------------------------------------------


@pytest.fixture
def context(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> RunContext:
    """Eight rows to learn; also two runs are worth to be fused."""
    monkeypatch.setattr(run_groups, "MIN_RUNS", 2)
    return materials_of(base_folder, tokenizer, rows, base_value=0.001)


@dataclass
class Trainer:
    """Trains run groups in one folder; notes how many runs each pass had."""

    context: RunContext
    state: Path
    told: list[str] = field(default_factory=list)

    def __call__(
        self, spec: RunGroupConfig, tell: Callable[..., None] | None = None
    ) -> list[dict[str, Any]]:
        self.told.clear()
        return train_run_group(
            [spec],
            self.context,
            {"versions": "c"},
            self.state,
            tell or (lambda run, *_: self.told.append(run)),
        )


def test_a_run_group_is_fused_by_default_and_not_if_told_so(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """The same records but for the last digits; checkpoints that plain peft reads."""
    fused_runs = Trainer(context, tmp_path / "batched_lora")(spec_of(tuning, SETTINGS, "auto"))
    single = Trainer(context, tmp_path / "single")(spec_of(tuning, SETTINGS, "never"))
    assert [record["trained_together"] for record in fused_runs + single] == [3, 3, 3, 1, 1, 1]
    for ours, theirs in zip(fused_runs, single, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours.keys() == theirs.keys()
        same = ("run", "status", "steps", "tokens", "trainable_parameters", "key", "cut_rows")
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert 0 < ours["training_seconds"] <= ours["wall_seconds"]
        base = AutoModelForCausalLM.from_pretrained(context.base, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, Path(ours["folder"]) / "step-0000004")
        weights = {n: w for n, w in loaded.named_parameters() if "lora_B" in n}
        assert all(weight.abs().max() > 0 for weight in weights.values())
        left = {path.name for path in Path(ours["folder"]).rglob("*")}
        assert not left & {"end.json", "optimizer.safetensors"}


def test_a_fused_run_group_trains_only_what_is_missing(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    train_missing = Trainer(context, tmp_path)
    first = train_missing(spec_of(tuning, SETTINGS[:2], "auto"))
    records = train_missing(spec_of(tuning, SETTINGS, "auto"))
    assert records[:2] == first
    assert set(train_missing.told) == {records[2]["run"]}
    assert train_missing(spec_of(tuning, SETTINGS, "never")) == records
    assert train_missing.told == []


def test_a_rate_added_to_a_killed_sweep_loses_no_work(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """The new run trains by itself up to its end, the others go on from their checkpoints."""

    def stop(run: str, progress: TrainState, schedule: LrSchedule) -> None:
        if progress.step == 7:
            raise Killed

    def long(settings: Sequence[Hyperparameters]) -> RunGroupConfig:
        spec = spec_of(tuning, settings, "auto")
        return spec.model_copy(
            update={"training": spec.training.model_copy(update={"epochs": 4.0})}
        )

    train_missing = Trainer(context, tmp_path)
    with pytest.raises(Killed):
        train_missing(long(SETTINGS[:2]), stop)
    records = train_missing(long(SETTINGS))
    steps = {record["run"]: train_missing.told.count(record["run"]) for record in records}
    assert list(steps.values()) == [2, 2, 8]
    assert [record["status"] for record in records] == ["ok"] * 3


@pytest.mark.parametrize(
    "changes", [{"variant": "dora"}, {"mitigation": MitigationConfig(l2_sp={"weight": 0.1})}]
)
def test_what_is_not_fused_trains_one_after_the_other(
    context: RunContext, tuning: Method, tmp_path: Path, changes: dict[str, Any]
) -> None:
    records = Trainer(context, tmp_path)(spec_of(tuning, SETTINGS[:2], "auto", **changes))
    assert [record["trained_together"] for record in records] == [1, 1]
    assert [record["status"] for record in records] == ["ok", "ok"]


def test_fusing_makes_no_other_run(tuning: Method) -> None:
    keys: set[str] = {
        run_key(spec_of(tuning, SETTINGS, fused), SETTINGS[0], {}) for fused in ("never", "auto")
    }
    assert len(keys) == 1


@pytest.mark.parametrize(("dropout", "keys"), [(0.0, 1), (0.1, 2)])
def test_smaller_passes_are_another_run_only_with_dropout(
    tuning: Method, dropout: float, keys: int
) -> None:
    """Its masks are drawn for each pass; nothing else depends on how a batch is split."""
    spec = spec_of(tuning, SETTINGS, "auto", dropout=dropout)
    changed = [
        spec.model_copy(
            update={"training": spec.training.model_copy(update={"micro_batch_size": n})}
        )
        for n in (2, 4)
    ]
    assert len({run_key(each, SETTINGS[0], {}) for each in changed}) == keys


def test_the_seconds_of_all_runs_are_those_of_the_group(
    context: RunContext, tuning: Method, tmp_path: Path
) -> None:
    """Neither counted once per run nor left out."""
    records: Sequence[Mapping[str, Any]] = Trainer(context, tmp_path)(
        spec_of(tuning, SETTINGS, "auto")
    )
    shares = {record["wall_seconds"] for record in records}
    assert len(shares) == 1
    assert sum(record["training_seconds"] for record in records) < sum(
        record["wall_seconds"] for record in records
    )
    for record in records:
        rate = record["tokens"] / record["training_seconds"]
        assert record["tokens_per_second"] == pytest.approx(rate)
