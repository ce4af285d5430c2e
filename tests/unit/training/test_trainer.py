"""One training: the plain algorithm's losses, and the same end however often it was killed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, get_scheduler

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters, RankBudgetConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example, encode_pair
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.evaluation.probes import evaluate_probes
from forgetting.models.adapters import attach_adapter, cast_frozen_weights
from forgetting.models.forward import target_logits
from forgetting.models.loading import Model, load_base
from forgetting.models.tuned import load_tuned, trained_state
from forgetting.schedule import LrSchedule, learning_rate
from forgetting.training import checkpoints, microbatches, train_step
from forgetting.training import trainer as module
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import build_mitigations
from forgetting.training.run_config import RunConfig, batch_indices
from forgetting.training.stages import RunFactory, train_stages
from forgetting.training.trainer import train_run
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.run_groups import examples_in

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
TRAINING = TrainingConfig(
    epochs=4.0, batch_size=4, micro_batch_size=3, schedule="cosine", warmup_epochs=0.5
)
# New knowledge on the selection metric, by evaluation: of the first run the rule picks the third,
# and of the second nothing, so that only the newest checkpoint stays.
REACHES = [0.2, 0.5, 0.8, 0.95]
NEVER_REACHES = [0.2, 0.5, 0.8, 0.85]
FULL = Method(
    name="full", kind="full", label="full", hyperparameters=[Hyperparameters(learning_rate=1e-3)]
)


@dataclass
class Bench:
    """A run that can be started again and again in its folder."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    rows: Rows
    tuning: Method
    folder: Path
    recipe: RunConfig
    examples: list[Example]
    values: list[float] = field(default_factory=lambda: REACHES)
    told: list[int] = field(default_factory=list)

    def start(self, evaluate: Callable[..., Any] | None = None) -> tuple[TrainState, Model]:
        """Train in a process of its own, as it were: the base is loaded afresh."""

        def fit(model: Model, recipe: RunConfig, begun: TrainState | None) -> TrainState:
            return train_run(
                model,
                self.examples,
                recipe,
                0.1,
                evaluate or self.evaluate,
                self.folder,
                self.tell,
                begun,
            )

        means = RunFactory(
            load_base=lambda: load_base(self.base, torch.device("cpu")),
            build_mitigations=lambda model: build_mitigations(
                model, self.tuning.mitigation, {}, self.recipe.seed
            ),
            train=fit,
        )
        return train_stages(self.tuning, self.recipe, means, self.folder)

    def evaluate(self, model: Model) -> tuple[pd.DataFrame, float]:
        """Real items, and a value that depends only on how many evaluations there were."""
        settings = EvaluationConfig(max_new_tokens=2)
        items = evaluate_probes(model, self.tokenizer, {"p": self.rows[:2]}, self.prompt, settings)
        newest = max(self.folder.glob("step-*/progress.json"), default=None)
        done = len(json.loads(newest.read_text())["evaluations"]) if newest else 0
        return items, self.values[done]

    def tell(self, progress: TrainState, schedule: LrSchedule) -> None:
        """Note the steps that were told."""
        self.told.append(progress.step)

    def kept(self) -> list[str]:
        """Checkpoints on disk, unfinished ones among them."""
        return sorted(path.name for path in self.folder.iterdir() if "step-" in path.name)


@pytest.fixture
def bench(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    rows: Rows,
    tuning: Method,
    tmp_path: Path,
) -> Bench:
    """Ten rows in batches of four for four epochs: twelve steps, four evaluations."""
    examples = [encode_pair(tokenizer, prompt, row["question"], row["answer"]) for row in rows]
    recipe = RunConfig(
        hyperparameters=Hyperparameters(learning_rate=0.01, weight_decay=0.1),
        seed=5,
        training=TRAINING,
        schedule=LrSchedule.plan(len(examples), TRAINING, 1.0),
        threshold=0.9,
        stop_after_evaluations=None,
        precision=torch.float32,
        pad=tokenizer.pad_token_id,
    )
    return Bench(base_folder, tokenizer, prompt, rows, tuning, tmp_path / "run", recipe, examples)


def _same_end(
    bench: Bench, ended: tuple[TrainState, Model], reference: tuple[TrainState, Model], folder: Path
) -> None:
    """Weights, losses, points, items and kept checkpoints are equal bit for bit."""
    (progress, model), (expected, other) = ended, reference
    assert progress.losses == expected.losses
    assert progress.evaluations == expected.evaluations
    assert (progress.step, progress.tokens, progress.status) == (
        expected.step,
        expected.tokens,
        expected.status,
    )
    theirs = trained_state(other)
    for name, tensor in trained_state(model).items():
        assert torch.equal(tensor, theirs[name]), name
    files = sorted(path.name for path in folder.glob("items-*"))
    assert files == sorted(path.name for path in bench.folder.glob("items-*"))
    for name in files:
        pd.testing.assert_frame_equal(
            pd.read_parquet(bench.folder / name), pd.read_parquet(folder / name), check_exact=True
        )
    kept = sorted(path.name for path in folder.iterdir() if "step-" in path.name)
    assert bench.kept() == kept
    for name in kept:
        for file in (folder / name).glob("*.safetensors"):
            assert file.read_bytes() == (bench.folder / name / file.name).read_bytes()


def _uninterrupted(bench: Bench, folder: Path) -> tuple[TrainState, Model]:
    return replace(bench, folder=folder).start()


# --- schedule -----------------------------------------------------------------------------------


def test_a_plan_counts_epochs_in_whole_batches_and_evaluates_the_end() -> None:
    plan = LrSchedule.plan(10, TRAINING, 1.0)
    assert (plan.steps, plan.steps_per_epoch, plan.warmup) == (12, 3, 2)
    assert plan.evaluations == {3, 6, 9, 12}
    half = LrSchedule.plan(10, TRAINING.model_copy(update={"epochs": 2.5}), 2.0)
    assert (half.steps, half.evaluations) == (8, {6, 8})
    often = LrSchedule.plan(10, TRAINING.model_copy(update={"epochs": 1.0}), 0.01)
    assert often.evaluations == {1, 2, 3}
    assert LrSchedule.plan(1, TRAINING.model_copy(update={"epochs": 0.1}), 1.0).steps == 1


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
)
def test_learning_rates_are_those_of_transformers(
    schedule: str, theirs: str, warmup_epochs: float
) -> None:
    training = TrainingConfig.model_validate(
        TRAINING.model_dump() | {"schedule": schedule, "warmup_epochs": warmup_epochs}
    )
    plan = LrSchedule.plan(10, training, 1.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = get_scheduler(theirs, optimizer, plan.warmup, plan.steps)
    for step in range(plan.steps):
        assert learning_rate(step, 0.01, training, plan) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-15
        )
        optimizer.step()
        scheduler.step()


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    epochs = []
    for epoch in range(3):
        parts = [batch_indices(10, 4, 7, epoch * 3 + step) for step in range(3)]
        assert [len(part) for part in parts] == [4, 4, 2]
        order = [index for part in parts for index in part]
        assert sorted(order) == list(range(10))
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(10, 4, 7, 1) == batch_indices(10, 4, 7, 1)
    assert batch_indices(100, 100, 7, 0) != batch_indices(100, 100, 8, 0)


# --- the same as a plain loop -------------------------------------------------------------------


def _plain_loop(bench: Bench, steps: int) -> tuple[list[float], torch.nn.Module]:
    """peft, torch's AdamW, transformers' schedule and transformers' own loss, and nothing else."""
    model: Any = AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    if bench.tuning.kind == "lora":
        torch.manual_seed(bench.recipe.seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=bench.tuning.rank,
            lora_alpha=bench.tuning.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        model = get_peft_model(model, config)
    model.train()
    training, setting = bench.recipe.training, bench.recipe.hyperparameters
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    norms = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": setting.weight_decay}, norms],
        lr=setting.learning_rate,
        betas=training.resolved_betas,
    )
    plan = bench.recipe.schedule
    scheduler = get_scheduler(training.schedule, optimizer, plan.warmup, plan.steps)
    losses = []
    for step in range(steps):
        batch = [
            bench.examples[index]
            for index in batch_indices(
                len(bench.examples), training.batch_size, bench.recipe.seed, step
            )
        ]
        length = max(len(example.ids) for example in batch)
        ids = torch.full((len(batch), length), bench.recipe.pad)
        labels = torch.full((len(batch), length), -100)
        for row, example in enumerate(batch):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, example.prompt_length : len(example.ids)] = torch.tensor(
                example.ids[example.prompt_length :]
            )
        mask = (torch.arange(length) < torch.tensor([[len(e.ids)] for e in batch])).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_twenty_losses_equal_a_plain_loop(bench: Bench, kind: str) -> None:
    """The same batches through peft, AdamW and transformers' loss: losses and weights agree."""
    training = TRAINING.model_copy(update={"epochs": 20 / 3})
    bench.tuning = bench.tuning.model_copy(update={"dropout": 0.0}) if kind == "lora" else FULL
    bench.recipe = replace(
        bench.recipe,
        training=training,
        hyperparameters=Hyperparameters(
            learning_rate=0.01 if kind == "lora" else 1e-3, weight_decay=0.1
        ),
        schedule=replace(LrSchedule.plan(10, training, 1.0), evaluations=frozenset()),
    )
    progress, model = bench.start()
    losses, plain = _plain_loop(bench, 20)
    assert len(progress.losses) == 20
    assert progress.losses == pytest.approx(losses, rel=2e-5)
    assert losses[-1] < 0.8 * losses[0]
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, theirs[name], atol=2e-4), name


def test_how_a_batch_is_split_does_not_change_the_run(bench: Bench, tmp_path: Path) -> None:
    bench.tuning = bench.tuning.model_copy(update={"dropout": 0.0})
    ended = []
    for size in (1, 3, 32):
        training = TRAINING.model_copy(update={"micro_batch_size": size})
        recipe = replace(bench.recipe, training=training)
        ended.append(replace(bench, recipe=recipe, folder=tmp_path / str(size)).start()[0])
    for other in ended[1:]:
        assert other.losses == pytest.approx(ended[0].losses, rel=1e-4)
        assert other.tokens == ended[0].tokens


def test_a_seed_decides_everything_and_another_seed_differs(bench: Bench, tmp_path: Path) -> None:
    first, second = (_uninterrupted(bench, tmp_path / name) for name in "ab")
    assert first[0].losses == second[0].losses
    bench.recipe = replace(bench.recipe, seed=6)
    assert _uninterrupted(bench, tmp_path / "c")[0].losses != first[0].losses


def test_tokens_are_counted_without_padding(bench: Bench) -> None:
    progress, _ = bench.start()
    assert progress.tokens == 4 * sum(len(example.ids) for example in bench.examples)
    assert bench.told == list(range(1, 13))


# --- killed and started again -------------------------------------------------------------------


MOMENTS = {
    "in a step": (module, "_train_step", (2, 12)),
    "in an evaluation": (Bench, "evaluate", (1, 4)),
    "at the items": (module, "write_table", (1, 3)),
    "at the weights": (checkpoints, "save_checkpoint", (1, 3)),
    "at the optimizer's state": (checkpoints, "save_tensors", (2, 4)),
    "at the record of progress": (checkpoints, "write_json", (1, 4)),
    "at the name of the checkpoint": (Path, "rename", (1, 4)),
    "when old checkpoints go": (module, "prune_checkpoints", (2, 4)),
    "when telling": (Bench, "tell", (6, 12)),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_like_one_that_was_not(
    bench: Bench,
    moment: str,
    kind: str,
    after: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any moment, before or after a file is written: the same bits at the end."""
    if kind == "full":
        bench.tuning, bench.values = FULL, NEVER_REACHES
    reference = _uninterrupted(bench, tmp_path / "reference")
    owner, name, calls = MOMENTS[moment]
    for call in calls:
        shutil.rmtree(bench.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, after)
            with pytest.raises(Killed):
                bench.start()
        _same_end(bench, bench.start(), reference, tmp_path / "reference")


def test_a_run_killed_after_every_evaluation_still_ends(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a partition whose jobs are preempted again and again."""
    reference = _uninterrupted(bench, tmp_path / "reference")
    for _ in range(4):
        with monkeypatch.context() as patch:
            kill_at(patch, Bench, "tell", 3, after=True)
            with pytest.raises(Killed):
                bench.start()
    _same_end(bench, bench.start(), reference, tmp_path / "reference")


def test_only_the_newest_checkpoint_has_moments(bench: Bench) -> None:
    """The one that is kept for the rule has weights alone, two thirds less, and still loads."""

    def stop(model: Model) -> tuple[pd.DataFrame, float]:
        if len(bench.told) == 11:
            raise Killed
        return bench.evaluate(model)

    bench.recipe = replace(bench.recipe, threshold=0.7)  # passed at the third evaluation
    with pytest.raises(Killed):
        bench.start(stop)
    assert bench.kept() == ["step-0000006", "step-0000009"]
    picked, newest = (
        {path.name for path in visible_files(bench.folder / name)} for name in bench.kept()
    )
    assert newest - picked == {"optimizer.safetensors"}
    load_tuned(bench.base, bench.folder / "step-0000006", torch.device("cpu"))
    assert bench.start()[0].status == "ok"


@pytest.mark.parametrize("left", ["nothing", "weights", "half a file", "all but the record"])
def test_the_ruins_of_a_checkpoint_are_not_resumed_from(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Killed within the writing of the second checkpoint, whatever of it is on the disk."""
    reference = _uninterrupted(bench, tmp_path / "reference")
    with monkeypatch.context() as patch:
        kill_at(patch, Path, "rename", 2, after=False)
        with pytest.raises(Killed):
            bench.start()
    ruin = bench.folder / ".step-0000006"
    assert bench.kept() == [".step-0000006", "step-0000003"]
    (ruin / "progress.json").unlink()
    if left != "all but the record":
        (ruin / "optimizer.safetensors").unlink()
    if left == "half a file":
        file = ruin / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    if left == "nothing":
        shutil.rmtree(ruin)
    _same_end(bench, bench.start(), reference, tmp_path / "reference")


def test_a_half_removed_old_checkpoint_does_no_harm(bench: Bench, tmp_path: Path) -> None:
    """Killed while an old checkpoint was being removed: its record is there, its weights not."""
    reference = _uninterrupted(bench, tmp_path / "reference")
    calls = 0

    def stop(model: Model) -> tuple[pd.DataFrame, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return bench.evaluate(model)

    with pytest.raises(Killed):
        bench.start(stop)
    old = bench.folder / "step-0000003"
    old.mkdir()
    (old / "progress.json").write_text((bench.folder / "step-0000006/progress.json").read_text())
    _same_end(bench, bench.start(), reference, tmp_path / "reference")


def test_a_finished_run_started_again_trains_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, model = bench.start()
    monkeypatch.setattr(module, "_train_step", None)
    again, same = bench.start()
    assert again == progress
    theirs = trained_state(same)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trained_state(model).items())


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa", "adalora"])
def test_every_variant_resumes(
    bench: Bench, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.tuning = _as_variant(bench.tuning, variant)
    reference = _uninterrupted(bench, tmp_path / "reference")
    with monkeypatch.context() as patch:
        kill_at(patch, module, "_train_step", 8, after=False)
        with pytest.raises(Killed):
            bench.start()
    _same_end(bench, bench.start(), reference, tmp_path / "reference")


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["lionw", "adafactor"])
def test_every_optimizer_resumes(
    bench: Bench, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state, factored or not, comes back from the disk bit by bit."""
    training = TRAINING.model_copy(update={"optimizer": optimizer})
    bench.recipe = replace(bench.recipe, training=training)
    reference = _uninterrupted(bench, tmp_path / "reference")
    with monkeypatch.context() as patch:
        kill_at(patch, module, "_train_step", 8, after=False)
        with pytest.raises(Killed):
            bench.start()
    _same_end(bench, bench.start(), reference, tmp_path / "reference")


def test_only_checkpoints_that_the_rule_can_pick_stay(bench: Bench) -> None:
    """The third of four evaluations is the last below 0.9; the newest stays to resume from."""
    seen = []

    def evaluate(model: Model) -> tuple[pd.DataFrame, float]:
        seen.append(bench.kept() if bench.folder.exists() else [])
        return bench.evaluate(model)

    bench.start(evaluate)
    assert seen == [[], ["step-0000003"], ["step-0000006"], ["step-0000009"]]
    assert bench.kept() == ["step-0000009", "step-0000012"]
    assert sorted(path.name for path in bench.folder.glob("items-*")) == [
        f"items-{step:07d}.parquet" for step in (3, 6, 9, 12)
    ]


def _logits(model: Any, bench: Bench) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([bench.examples[0].ids])).logits


def _as_variant(tuning: Method, variant: str) -> Method:
    budget = RankBudgetConfig() if variant == "adalora" else None
    more = {"name": f"{variant}-r4", "budget": budget, "initial_rank": 6 if budget else None}
    return tuning.model_copy(update={"variant": variant, **more})


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "adalora"])
def test_a_saved_adapter_is_an_adapter_to_peft(bench: Bench, variant: str) -> None:
    bench.tuning = _as_variant(bench.tuning, variant)
    _, model = bench.start()
    base = AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    untouched = _logits(base, bench)
    loaded = PeftModel.from_pretrained(base, bench.folder / "step-0000012")
    # PiSSA's is written as the update of the original weights, and AdaLoRA's without what it has
    # pruned: the sums round otherwise.
    tolerance = 1e-5 if variant in ("pissa", "adalora") else 0.0
    _assert_close(_logits(loaded, bench), _logits(model, bench), tolerance)
    assert not torch.allclose(_logits(loaded, bench), untouched, atol=1e-2)
    ours = load_tuned(bench.base, bench.folder / "step-0000012", torch.device("cpu"))
    _assert_close(_logits(ours, bench), _logits(model, bench), tolerance)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "adalora"])
def test_an_adapter_starts_as_nothing(bench: Bench, variant: str) -> None:
    """Before training every variant is the base; PiSSA, though its base alone is not."""
    base = load_base(bench.base, torch.device("cpu"))
    untouched = _logits(base, bench)
    model = attach_adapter(base, _as_variant(bench.tuning, variant), 0).eval()
    _assert_close(_logits(model, bench), untouched, 1e-5)
    with model.disable_adapter():
        is_base = torch.allclose(_logits(model, bench), untouched, atol=1e-3)
    assert is_base == (variant != "pissa")


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_a_part_of_the_model_is_adapted(bench: Bench, words: str, layers: set[str]) -> None:
    tuning = bench.tuning.model_copy(update={"target_modules": words})
    model = attach_adapter(load_base(bench.base, torch.device("cpu")), tuning, 0)
    adapted = {
        name.rsplit(".", 1)[1]
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer)
    }
    assert adapted == layers


def test_a_full_checkpoint_is_a_model_to_transformers(bench: Bench) -> None:
    bench.tuning = FULL
    _, model = bench.start()
    checkpoint = bench.folder / "step-0000012"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(_logits(loaded, bench), _logits(model, bench))
    ours = load_tuned(bench.base, checkpoint, torch.device("cpu"))
    assert torch.equal(_logits(ours, bench), _logits(model, bench))


def test_only_safetensors_and_json_are_written(bench: Bench) -> None:
    """Nothing that runs code when it is read; a record of progress beside every checkpoint."""
    bench.start()
    for checkpoint in bench.folder.glob("step-*"):
        assert {path.suffix for path in visible_files(checkpoint)} <= {".safetensors", ".json"}
        assert json.loads((checkpoint / "progress.json").read_text())["status"] == "running"


# --- divergence ---------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_records(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before stays; the weights are not touched by the fatal step."""
    original = train_step.logprobs_of

    def poisoned(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        result = original(logits, batch)
        return result * math.nan if len(bench.told) == 7 else result

    monkeypatch.setattr(train_step, "logprobs_of", poisoned)
    progress, model = bench.start()
    assert (progress.status, progress.step) == ("diverged", 7)
    assert len(progress.losses) == 7
    assert [point[0] for point in progress.evaluations] == [3, 6]
    assert bench.kept() == ["step-0000006"]
    assert len(list(bench.folder.glob("items-*"))) == 2
    assert all(torch.isfinite(tensor).all() for tensor in trained_state(model).values())


def test_a_loss_that_explodes_ends_the_run_though_it_is_a_number(bench: Bench) -> None:
    """A rate far too high: the loss is thrice that of a guess long before it is no number."""
    bench.tuning = FULL
    bench.recipe = replace(bench.recipe, hyperparameters=Hyperparameters(learning_rate=100.0))
    progress, model = bench.start()
    guess = math.log(model.config.vocab_size)
    assert progress.status == "diverged"
    assert 0 < progress.step < bench.recipe.schedule.steps
    assert max(progress.losses) <= 3.0 * max(progress.losses[0], guess)
    assert all(math.isfinite(loss) for loss in progress.losses)
    again, _ = bench.start()
    assert (again.status, again.losses) == (progress.status, progress.losses)


def test_a_penalty_is_no_loss_and_explodes_nothing(bench: Bench) -> None:
    """It stands apart, so that the curves of methods can be compared: here it is a thousandfold."""
    plain = replace(bench.recipe, hyperparameters=Hyperparameters(learning_rate=1e-5))
    bench.recipe = plain
    alone, _ = bench.start()
    bench.folder = bench.folder.parent / "penalized"
    bench.tuning = bench.tuning.model_copy(
        update={"mitigation": MitigationConfig.model_validate({"l2_sp": {"weight": 1e12}})}
    )
    kept, _ = bench.start()
    assert kept.status == "ok"
    assert kept.losses[0] == alone.losses[0]
    assert max(kept.penalties) > 100.0
    assert alone.penalties == [0.0] * len(alone.losses)
    assert kept.losses[-1] == pytest.approx(alone.losses[-1], rel=0.2)


def test_a_diverged_run_started_again_diverges_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.recipe = replace(
        bench.recipe,
        hyperparameters=Hyperparameters(learning_rate=1e30),
        training=TRAINING.model_copy(
            update={"warmup_epochs": 0.0, "schedule": "constant", "max_grad_norm": None}
        ),
    )
    first, second = bench.start()[0], bench.start()[0]
    assert first.status == second.status == "diverged"
    assert first.losses == second.losses


@pytest.mark.parametrize("rate", [1e6, 1e30])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_weights_that_are_no_numbers_never_pass_for_a_good_end(
    bench: Bench, rate: float, steps: int
) -> None:
    """Far too high a rate: wherever the run ends, `ok` means finite weights and a finite loss."""
    training = TRAINING.model_copy(
        update={"epochs": steps / 3, "warmup_epochs": 0.0, "schedule": "constant"}
    )
    bench.tuning = FULL
    bench.recipe = replace(
        bench.recipe,
        hyperparameters=Hyperparameters(learning_rate=rate),
        training=training,
        schedule=LrSchedule.plan(len(bench.examples), training, 1.0),
    )
    progress, model = bench.start()
    assert progress.status in ("ok", "diverged")
    assert all(math.isfinite(loss) for loss in progress.losses)
    if progress.status == "ok":
        assert _logits(model, bench).isfinite().all()


def test_rounding_the_frozen_weights_once_changes_no_bit(bench: Bench) -> None:
    """Autocast rounds them at every pass; stored rounded, losses and adapters are the same."""
    recipe = replace(bench.recipe, precision=torch.bfloat16)
    tuning = bench.tuning.model_copy(update={"dropout": 0.0})
    outcomes = []
    for rounded in (False, True):
        model = attach_adapter(load_base(bench.base, torch.device("cpu")), tuning, recipe.seed)
        if rounded:
            cast_frozen_weights(model, recipe.precision)
        folder = bench.folder / str(rounded)
        progress = train_run(
            model,
            bench.examples,
            recipe,
            0.1,
            lambda _: (pd.DataFrame({"value": [0.5]}), 0.5),
            folder,
            bench.tell,
        )
        outcomes.append((progress.losses, trained_state(model)))
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert {layer.get_base_layer().weight.dtype for layer in adapted} == {torch.bfloat16}
    (plain, weights), (again, same) = outcomes
    assert plain == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def _limit_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A machine whose memory holds so many rows; the rows of all attempts are noted."""
    attempts: list[int] = []

    def limited(model: Model, batch: Any) -> torch.Tensor:
        attempts.append(examples_in(batch))
        if attempts[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return target_logits(model, batch)

    monkeypatch.setattr(train_step, "target_logits", limited)
    monkeypatch.setitem(
        microbatches.FORWARD_OVERHEAD_TOKENS, "cpu", 10_000
    )  # never split for padding's sake
    return attempts


def test_out_of_memory_halves_the_pass_and_keeps_the_result(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is repeated, not skipped, and the rest of the run does not try in vain again."""
    bench.tuning = bench.tuning.model_copy(update={"dropout": 0.0})
    roomy, _ = replace(bench, folder=tmp_path / "roomy").start()
    attempts = _limit_rows(monkeypatch, 1)
    tight, _ = replace(bench, folder=tmp_path / "tight").start()
    assert tight.losses == pytest.approx(roomy.losses, rel=1e-4)
    assert tight.micro_batch_size == 1
    assert sum(size > 1 for size in attempts) == 1


def test_an_example_that_fits_no_memory_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit_rows(monkeypatch, 0)
    with pytest.raises(InputError, match="single example"):
        bench.start()


def test_other_errors_are_not_taken_for_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Model, batch: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train_step, "target_logits", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        bench.start()
