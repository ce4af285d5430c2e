"""AdaLoRA, hybrids and trained embeddings: trained weights, scales, ranks, stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters, RankBudgetConfig, SecondStageConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.errors import InputError
from forgetting.models.adapters import (
    attach_adapter,
    cast_frozen_weights,
    embedding_weights,
    set_rank_schedule,
)
from forgetting.models.tuned import load_tuned, save_weights
from forgetting.schedule import LrSchedule, learning_rate
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import Mitigations, build_mitigations
from forgetting.training.run_config import RunConfig
from forgetting.training.stages import (
    RunFactory,
    second_stage_step,
    select_trainable_layers,
    train_stages,
)
from support.run_groups import RunGroupHarness, run_context, run_group_config
from support.training import (
    CPU,
    TRAINING,
    VARIANTS,
    TrainingHarness,
    adapter_method,
    assert_close,
    hybrid_method,
    no_items,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]


# --- every variant ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
def test_trainable_parameters_match_the_formula(
    harness: TrainingHarness, variant: str, embeddings: str
) -> None:
    """r (in + out) per matrix; dora adds a magnitude per output, adalora r values."""
    model = attach_adapter(harness.load(), adapter_method(variant, embeddings=embeddings), 0)
    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    shapes |= {"gate": (64, 32), "up": (64, 32), "down": (32, 64)}
    rank = 6 if variant == "adalora" else 4
    expected = 2 * sum(
        rank * (outer + inner)
        + (outer if variant == "dora" else 0)
        + (rank if variant == "adalora" else 0)
        for outer, inner in shapes.values()
    )
    if embeddings == "trained":
        expected += model.config.vocab_size * 32  # tied: one matrix for both
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_matches_peft(harness: TrainingHarness, variant: str) -> None:
    """The factor of the product of the matrices, measured by merging."""
    method = adapter_method(variant)
    model = attach_adapter(harness.load(), method, 0)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    if variant == "adalora":
        first, second = layer.lora_A["default"], layer.lora_B["default"]
        values = torch.nn.init.ones_(layer.lora_E["default"])
    else:
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        values = torch.ones(len(first), 1)
    torch.nn.init.normal_(second)
    product = second @ (values * first)
    assert torch.allclose(layer.get_delta_weight("default"), method.scale * product, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adalora", "hybrid"])
def test_run_group_keeps_only_weights(harness: TrainingHarness, kind: str, tmp_path: Path) -> None:
    """From JSON, with mitigations; the training state of a finished run is removed."""
    mitigation = MitigationConfig.model_validate(
        {"kl": {"weight": 0.1}, "replay": {"table": "a/b"}}
    )
    settings = [Hyperparameters(learning_rate=rate) for rate in (1e-2, 5e-3)]
    method = adapter_method("adalora") if kind == "adalora" else hybrid_method("last 1")
    config = run_group_config(method, settings, "auto", mitigation=mitigation)
    context = run_context(
        harness.base, harness.tokenizer, harness.rows, general_text={"a/b": harness.rows[7:]}
    )
    config = RunGroupConfig.model_validate_json(config.model_dump_json())
    records = RunGroupHarness(context, tmp_path)(config)
    assert [record["status"] for record in records] == ["ok", "ok"]
    assert records[0]["losses"][0] == records[1]["losses"][0]
    for record in records:
        folder = Path(record["folder"]) / "step-0000004"
        names = {path.name for path in folder.iterdir()}
        weights = "adapter_model" if kind == "adalora" else "model"
        assert f"{weights}.safetensors" in names
        assert not names & {"optimizer.safetensors", "method.safetensors"}
        model = load_tuned(harness.base, folder, CPU)
        assert harness.logits(model).isfinite().all()
        # AdaLoRA's initial matrices and their values; a block of attention, MLP and two norms.
        expected = 2 * 6 * (64 + 48 + 48 + 64 + 96 + 96 + 96) + 2 * 7 * 6
        if kind == "hybrid":
            expected = 2 * 1024 + 2 * 512 + 3 * 2048 + 2 * 32
        assert record["trainable_parameters"] == expected


# --- AdaLoRA ------------------------------------------------------------------------------------


def test_adalora_ranks_end_at_their_budget(harness: TrainingHarness) -> None:
    """The mean of the saved ranks is `rank`, they differ, and peft loads them."""
    harness.method = adapter_method("adalora")
    harness.run()
    config = json.loads((harness.folder / "step-0000012/adapter_config.json").read_text())
    ranks = [sum(mask) for mask in config["rank_pattern"].values()]
    assert (config["init_r"], config["target_r"], config["total_step"]) == (6, 4, 12)
    assert (config["tinit"], config["tfinal"], config["deltaT"]) == (1, 6, 1)
    assert len(ranks) == 14
    assert sum(ranks) == 4 * 14
    assert len(set(ranks)) > 1
    plain = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, harness.folder / "step-0000012")
    found = [len(p) for n, p in loaded.named_parameters() if ".lora_E." in n]
    assert sorted(found) == sorted(ranks)


def test_matrix_without_ranks_is_loaded(harness: TrainingHarness, tmp_path: Path) -> None:
    model = attach_adapter(harness.load(), adapter_method("adalora"), 0).eval()
    masks = {}
    with torch.no_grad():
        for name, values in model.base_model.model.named_parameters():
            if ".lora_E." in name:
                values.fill_(0.0 if "layers.0.mlp" in name else 1.0)
                masks[name] = (values != 0).flatten().tolist()
    model.peft_config["default"].rank_pattern = masks
    save_weights(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert_close(harness.logits(loaded), harness.logits(model), 1e-5)
    assert loaded.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].shape == (0, 32)


def test_rank_budget_has_whole_steps_to_fall(harness: TrainingHarness) -> None:
    for steps in (1, 2, 3, 10, 1000):
        model = attach_adapter(harness.load(), adapter_method("adalora"), 0)
        set_rank_schedule(model, RankBudgetConfig(), steps)
        config = model.peft_config["default"]
        assert (config.tinit, config.tfinal) == (steps // 10, steps // 2)
        assert config.tinit < config.total_step - config.tfinal


def test_initial_rank_must_fit_the_matrix(harness: TrainingHarness) -> None:
    method = adapter_method("adalora").model_copy(update={"initial_rank": 18})
    with pytest.raises(InputError, match="initial rank 18 is larger than the smallest"):
        attach_adapter(harness.load(), method, 0)


# --- embeddings ---------------------------------------------------------------------------------


def test_frozen_embeddings_of_full_fine_tuning_stay(any_head: TrainingHarness) -> None:
    any_head.method = Method(
        name="full", kind="full", label="", embeddings="frozen", hyperparameters=[]
    )
    any_head.set_rate(1e-3)
    _, model = any_head.run(no_items)
    base = any_head.load()
    names = embedding_weights(base)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)) == (name in names), name
        assert parameter.requires_grad == (name not in names)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_embedding_lr_ratio_scales_the_first_step(any_head: TrainingHarness, kind: str) -> None:
    """A first step of Adam moves each weight that has a gradient by its rate."""
    any_head.method = adapter_method(
        "lora", embeddings="trained", embedding_lr_ratio=0.1, dropout=0.0
    )
    if kind == "full":
        any_head.method = Method(
            name="full", kind="full", label="", embedding_lr_ratio=0.1, hyperparameters=[]
        )
    any_head.set_rate(0.01)
    any_head.set_training(epochs=1 / 3, warmup_epochs=0.0, schedule="constant")
    before = any_head.model()
    progress, model = any_head.run(no_items)
    assert progress.step == 1
    embeddings = embedding_weights(model)
    assert embeddings
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (parameter - before.get_parameter(name)).abs().max().item()
            expected = 0.001 if name in embeddings else 0.01
            # B starts at 0, so that A has no gradient in the first step.
            assert moved == pytest.approx(0.0 if ".lora_A." in name else expected, rel=0.02), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_frozen_weights_leaves_trained_embeddings(
    harness: TrainingHarness, variant: str
) -> None:
    method = adapter_method(variant, embeddings="trained", dropout=0.0)
    outcomes = []
    for rounded in (False, True):
        model = attach_adapter(harness.load(), method, 0).eval()
        if rounded:
            cast_frozen_weights(model, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outcomes.append(harness.logits(model))
    assert torch.equal(*outcomes)
    half = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]
    assert len(half) == (0 if variant == "dora" else 14)


def test_adapted_head_cannot_be_trained_in_full(harness: TrainingHarness) -> None:
    method = adapter_method(embeddings="trained", target_modules=["lm_head", "q_proj"])
    with pytest.raises(InputError, match="lora-r4"):
        attach_adapter(harness.load(), method, 0)


# --- hybrids ------------------------------------------------------------------------------------


def test_run_that_ends_in_stage_one_has_no_stage_two(harness: TrainingHarness) -> None:
    """`stop_after_evaluations` ends a run as it ends any other."""
    harness.method = hybrid_method("last 1", 0.9)
    harness.config = replace(harness.config, stop_after_evaluations=0)
    harness.values = [0.5, 0.95, 0.95, 0.95]
    progress, model = harness.run()
    assert (progress.step, progress.status) == (6, "ok")
    assert isinstance(model, PeftModel)


def test_hybrid_penalty_is_towards_the_base_model(harness: TrainingHarness) -> None:
    """The penalty does not refer to the model after the first stage."""
    method, weights = hybrid_method("last 1"), []
    mitigation = MitigationConfig.model_validate({"l2_sp": {"weight": 2.0}})

    def train(model: Any, config: RunConfig, begun: TrainState | None) -> TrainState:
        if begun is None:
            torch.manual_seed(2)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        (penalty,) = config.mitigations.weight_penalties
        weights.append(penalty(model).item())
        return begun or TrainState(step=6)

    factory = RunFactory(
        load_base=lambda: harness.load(),
        build_mitigations=lambda model: build_mitigations(model, mitigation, {}, (), 0),
        train=train,
    )
    train_stages(method, harness.config, factory, harness.folder)
    _, of_adapter, tuned, of_layers = weights
    base = harness.load()
    squares = {
        name: float((weight - base.get_parameter(name)).square().sum())
        for name, weight in tuned.items()
    }
    assert of_adapter == pytest.approx(sum(squares.values()), rel=1e-4)
    last = sum(square for name, square in squares.items() if "layers.1." in name)
    assert of_layers == pytest.approx(last, rel=1e-4)
    assert 0 < of_layers < of_adapter


def test_rate_rises_again_after_a_restart() -> None:
    plan = LrSchedule.plan(10, TRAINING, 1.0)
    again = replace(plan, restart=6)
    ours = [learning_rate(step, 1.0, TRAINING, again) for step in range(12)]
    course = [learning_rate(step, 1.0, TRAINING, plan) for step in range(12)]
    assert ours[6] == 0.0
    assert ours[7] == course[7] / 2
    assert ours[8:] == course[8:]


@pytest.mark.parametrize(
    ("restart", "changes", "peak"),
    [
        # Of twelve steps four or three remain, half of them warm-up; one step needs no warm-up.
        (8, {"schedule": "constant", "warmup_epochs": 2.0}, 10),
        (9, {"schedule": "constant", "warmup_epochs": 2.0}, 10),
        (11, {"schedule": "constant", "warmup_epochs": 2.0}, 11),
        # The cooldown begins after nine.
        (7, {"schedule": "wsd", "warmup_epochs": 2.0, "decay_ratio": 0.25}, 8),
    ],
)
def test_short_second_stage_reaches_its_peak(
    restart: int, changes: dict[str, Any], peak: int
) -> None:
    training = TRAINING.model_copy(update=changes)
    plan = replace(LrSchedule.plan(10, training, 1.0), restart=restart)
    assert plan.steps == 12
    rates = [learning_rate(step, 1.0, training, plan) for step in range(restart, 12)]
    assert max(rates) == 1.0
    assert restart + rates.index(1.0) == peak


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", 20),
        ("last 1", 9),
        ("last 2", 18),
        (["mlp"], 6),
        (["layers.0.self_attn", "norm"], 5),
        (["layers.*.mlp.up_proj"], 2),
        (["lm_head"], 1),
    ],
)
def test_layers_are_selected_by_name(
    harness: TrainingHarness, layers: str | list[str], expected: int
) -> None:
    model = harness.load()
    select_trainable_layers(model, layers, "hybrid-r4")
    assert sum(p.requires_grad for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last 3", "hybrid-r4: second_stage.layers: the model has no 3 blocks, but 2"),
        (["mpl"], "no module with weights ends in mpl; a module is called, for example, model"),
    ],
)
def test_missing_layers_are_reported(
    harness: TrainingHarness, layers: str | list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select_trainable_layers(harness.load(), layers, "hybrid-r4")


def test_missing_layer_is_reported_before_the_first_step(harness: TrainingHarness) -> None:
    harness.method = hybrid_method("last 3")
    with pytest.raises(InputError, match="the model has no 3 blocks"):
        harness.run()
    assert harness.logged == []


def test_adapter_is_merged_into_float32_weights(harness: TrainingHarness) -> None:
    """In bfloat16 the first stage rounds frozen weights; the second starts from float32."""
    models: list[Any] = []

    def train(model: Any, config: RunConfig, begun: TrainState | None) -> TrainState:
        if begun is None:
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.ones_(parameter)
        models.append(model)
        return begun or TrainState(step=6)

    config = replace(harness.config, precision=torch.bfloat16)
    factory = RunFactory(lambda: harness.load(), lambda _: Mitigations(), train)
    train_stages(hybrid_method("last 1"), config, factory, harness.folder)
    first, second = (
        model.get_submodule("base_model.model") if isinstance(model, PeftModel) else model
        for model in models
    )
    layer = first.model.layers[0].mlp.up_proj
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    expected = harness.load().model.layers[0].mlp.up_proj.weight
    expected = expected + layer.get_delta_weight("default").float()
    assert torch.allclose(second.model.layers[0].mlp.up_proj.weight, expected, atol=1e-6)


def test_both_stages_have_steps() -> None:
    plan = LrSchedule.plan(10, TRAINING, 1.0)
    for after, expected in ((0.001, 1), (0.5, 6), (0.999, 11)):
        assert (
            second_stage_step(
                SecondStageConfig(start=after, layers="all", learning_rate=1e-3), plan
            )
            == expected
        )
    with pytest.raises(InputError, match="single step"):
        second_stage_step(
            SecondStageConfig(layers="all", learning_rate=1e-3), replace(plan, steps=1)
        )
