"""AdaLoRA, hybrids and trained embeddings: they match peft and resume bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_scheduler

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig, SelectionConfig
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.methods import Hyperparameters, RankBudgetConfig, SecondStageConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.errors import InputError
from forgetting.evaluation.evaluate_models import interpolated_models
from forgetting.models.adapters import (
    attach_adapter,
    cast_frozen_weights,
    embedding_weights,
    set_rank_schedule,
)
from forgetting.models.loading import load_base
from forgetting.models.tuned import load_tuned, save_weights
from forgetting.schedule import LrSchedule, learning_rate
from forgetting.training import checkpoints, stages
from forgetting.training import trainer as module
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import Mitigations, build_mitigations
from forgetting.training.run_config import RunConfig, batch_indices
from forgetting.training.run_group import train_run_group
from forgetting.training.stages import (
    RunFactory,
    second_stage_step,
    select_trainable_layers,
    train_stages,
)
from forgetting.training.training_job import RunContext, TrainingJob
from support.kill import BEFORE_AND_AFTER, Killed, kill_at
from support.training import (
    CPU,
    TRAINING,
    VARIANTS,
    TrainingHarness,
    adapter_method,
    assert_close,
    hybrid_method,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]


@pytest.fixture
def untied_folder(base_folder: Path, tmp_path: Path) -> Path:
    """Save the tiny base model with a separate LM head."""
    folder = tmp_path / "untied"
    shutil.copytree(base_folder, folder)
    config = LlamaConfig.from_pretrained(base_folder)
    config.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _batches(harness: TrainingHarness, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of a run in the form of transformers."""
    for step in range(steps):
        indices = batch_indices(
            len(harness.examples), TRAINING.batch_size, harness.config.seed, step
        )
        batch = [harness.examples[index] for index in indices]
        length = max(len(example.ids) for example in batch)
        ids = torch.full((len(batch), length), harness.config.pad)
        labels = torch.full((len(batch), length), -100)
        for row, example in enumerate(batch):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            targets = torch.tensor(example.ids[example.prompt_length :])
            labels[row, example.prompt_length : len(example.ids)] = targets
        mask = (torch.arange(length) < torch.tensor([[len(e.ids)] for e in batch])).long()
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _from_peft(checkpoint: Path, base: Path) -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, checkpoint)


# --- every variant ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
def test_trainable_parameters_match_the_formula(
    harness: TrainingHarness, variant: str, embeddings: str
) -> None:
    """r (in + out) per matrix; dora adds a magnitude per output, adalora r values."""
    model = attach_adapter(
        load_base(harness.base, CPU), adapter_method(variant, embeddings=embeddings), 0
    )
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
    model = attach_adapter(load_base(harness.base, CPU), method, 0)
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


@pytest.mark.parametrize(
    ("variant", "embeddings"),
    # peft's own conversion of PiSSA's adapters leaves trained embeddings out.
    [(v, e) for v in VARIANTS for e in ("frozen", "trained") if (v, e) != ("pissa", "trained")],
)
def test_adapter_saved_by_peft_is_loaded(
    harness: TrainingHarness, variant: str, embeddings: str
) -> None:
    """Saved by peft after its weights were changed."""
    plain = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    shared = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens"] if embeddings == "trained" else None,
        "ensure_weight_tying": embeddings == "trained",
    }
    if variant == "adalora":
        config: LoraConfig = AdaLoraConfig(target_r=2, init_r=4, total_step=10, **shared)
    else:
        config = LoraConfig(
            r=4,
            use_rslora=variant == "rslora",
            use_dora=variant == "dora",
            init_lora_weights="pissa" if variant == "pissa" else True,
            **shared,
        )
    model = get_peft_model(plain, config)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    folder = harness.folder / "theirs"
    if variant == "pissa":
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(first[name])
    conversion = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    model.save_pretrained(folder, **(conversion if variant == "pissa" else {}))
    ours = load_tuned(harness.base, folder, CPU)
    assert_close(harness.logits(ours), harness.logits(model), 1e-4 if variant == "pissa" else 0.0)


@pytest.mark.parametrize("kind", ["adalora", "hybrid"])
def test_run_group_keeps_only_weights(
    harness: TrainingHarness, rows: Rows, prompt: PromptConfig, kind: str, tmp_path: Path
) -> None:
    """From JSON, with mitigations; the training state of a finished run is removed."""
    mitigation = MitigationConfig.model_validate(
        {"kl": {"weight": 0.1}, "replay": {"table": "a/b"}}
    )
    settings = [Hyperparameters(learning_rate=rate) for rate in (1e-2, 5e-3)]
    method = (
        adapter_method("adalora") if kind == "adalora" else hybrid_method("last 1")
    ).model_copy(update={"hyperparameters": settings, "mitigation": mitigation})
    spec = RunGroupConfig(
        method=method,
        seed=0,
        prompt=prompt,
        training=TRAINING.model_copy(update={"epochs": 2.0}),
        evaluation=EvaluationConfig(max_new_tokens=2),
        selection=SelectionConfig(probe="new"),
        precision="float32",
        knowledge={"new": "new"},
    )
    context = RunContext(
        base=harness.base,
        tokenizer=harness.tokenizer,
        train=rows[:7],
        probes={"new": rows[:1]},
        base_value=0.1,
        device=CPU,
        precision=torch.float32,
        general_text={"a/b": rows[7:]},
    )
    spec = RunGroupConfig.model_validate_json(spec.model_dump_json())
    records = train_run_group(TrainingJob(spec, context, {}, tmp_path, lambda *_: None))
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


def _plain_adalora(
    harness: TrainingHarness, budget: RankBudgetConfig, steps: int
) -> tuple[list[float], PeftModel]:
    """Train with peft's model, penalty and allocation in the loop of its documentation."""
    torch.manual_seed(harness.config.seed)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_r=4,
        init_r=6,
        lora_alpha=8.0,
        target_modules="all-linear",
        total_step=steps,
        tinit=int(budget.tinit * steps),
        tfinal=int(budget.tfinal * steps),
        deltaT=budget.delta_t,
    )
    plain = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    model = get_peft_model(plain, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    plan = harness.config.schedule
    scheduler = get_scheduler("cosine", optimizer, plan.warmup_steps, plan.steps)
    losses = []
    for step, batch in enumerate(_batches(harness, steps)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("budget", [{}, {"tinit": 0.0, "tfinal": 0.0}, {"delta_t": 3}])
def test_adalora_matches_a_plain_loop(harness: TrainingHarness, budget: dict[str, Any]) -> None:
    """Losses with penalty, ranks and weights are equal over twelve steps."""
    harness.method = adapter_method("adalora", dropout=0.0, adalora=budget)
    losses, theirs = _plain_adalora(harness, harness.method.rank_budget or RankBudgetConfig(), 12)
    progress, ours = harness.run()
    whole = [sum(pair) for pair in zip(progress.losses, progress.penalties, strict=True)]
    assert whole == pytest.approx(losses, rel=2e-5)
    assert min(progress.penalties) > 0.0
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=2e-4), name


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
    loaded = _from_peft(harness.folder / "step-0000012", harness.base)
    found = [len(p) for n, p in loaded.named_parameters() if ".lora_E." in n]
    assert sorted(found) == sorted(ranks)


def test_checkpoint_between_allocations_is_the_evaluated_model(harness: TrainingHarness) -> None:
    """Every checkpoint equals the evaluated model, whatever is pruned."""
    harness.method = adapter_method(
        "adalora", dropout=0.0, adalora={"delta_t": 4, "tinit": 0.0, "tfinal": 0.1}
    )
    harness.config = replace(
        harness.config,
        schedule=replace(harness.config.schedule, evaluations=frozenset(range(1, 13))),
    )
    pruned = []

    def evaluate(model: Any) -> Any:
        model.eval()
        folder = harness.folder / "seen"
        shutil.rmtree(folder, ignore_errors=True)
        save_weights(model, folder)
        loaded = load_tuned(harness.base, folder, CPU)
        assert_close(harness.logits(loaded), harness.logits(model), 1e-5)
        config = json.loads((folder / "adapter_config.json").read_text())
        ranks = [sum(mask) for mask in (config["rank_pattern"] or {}).values()]
        pruned.append(84 - sum(ranks) if ranks else 0)
        model.train()
        return harness.evaluate(model)[0], 0.2

    harness.values = [0.2] * 12
    harness.run(evaluate)
    assert pruned[:3] == [0, 0, 0]
    assert pruned[3] > pruned[4] == 0
    assert pruned[7] > pruned[3]
    assert pruned[11] == 28


def test_matrix_without_ranks_is_loaded(harness: TrainingHarness, tmp_path: Path) -> None:
    model = attach_adapter(load_base(harness.base, CPU), adapter_method("adalora"), 0).eval()
    masks = {}
    with torch.no_grad():
        for name, values in model.base_model.model.named_parameters():
            if ".lora_E." in name:
                values.fill_(0.0 if "layers.0.mlp" in name else 1.0)
                masks[name] = (values != 0).flatten().tolist()
    model.peft_config["default"].rank_pattern = masks
    save_weights(model, tmp_path)
    loaded = _from_peft(tmp_path, harness.base)
    assert_close(harness.logits(loaded), harness.logits(model), 1e-5)
    assert loaded.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].shape == (0, 32)


MOMENTS = {
    "before the budget falls": (module, "_train_step", 2),
    "while it falls": (module, "_train_step", 5),
    "when it has fallen": (module, "_train_step", 11),
    "at the method's state": (checkpoints, "adalora_training_state", 2),
    "at the file of it": (checkpoints, "save_tensors", 4),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("every", [1, 2])
def test_killed_adalora_resumes_bit_for_bit(
    harness: TrainingHarness,
    moment: str,
    every: int,
    after: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Averages, masks and pruned values are restored, so that the ranks fall as before."""
    harness.method = adapter_method("adalora", embeddings="trained", adalora={"delta_t": every})
    reference = harness.run_in(tmp_path / "reference")
    owner, name, call = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call, after)
        with pytest.raises(Killed):
            harness.run()
    harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


def test_rank_budget_has_whole_steps_to_fall(harness: TrainingHarness) -> None:
    for steps in (1, 2, 3, 10, 1000):
        model = attach_adapter(load_base(harness.base, CPU), adapter_method("adalora"), 0)
        set_rank_schedule(model, RankBudgetConfig(), steps)
        config = model.peft_config["default"]
        assert (config.tinit, config.tfinal) == (steps // 10, steps // 2)
        assert config.tinit < config.total_step - config.tfinal


def test_initial_rank_must_fit_the_matrix(harness: TrainingHarness) -> None:
    method = adapter_method("adalora").model_copy(update={"initial_rank": 18})
    with pytest.raises(InputError, match="initial rank 18 is larger than the smallest"):
        attach_adapter(load_base(harness.base, CPU), method, 0)


# --- embeddings ---------------------------------------------------------------------------------


@pytest.fixture(params=["tied", "untied"])
def either(
    request: pytest.FixtureRequest, harness: TrainingHarness, untied_folder: Path
) -> TrainingHarness:
    """A harness whose base has one matrix for input and output, or two."""
    return harness if request.param == "tied" else replace(harness, base=untied_folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trained_embeddings_are_saved_for_peft(either: TrainingHarness, variant: str) -> None:
    """They start as the base's, change, and are loaded by peft and here with the same logits."""
    either.method = adapter_method(variant, embeddings="trained")
    base = load_base(either.base, CPU)
    untouched = either.logits(base)
    before = {name: base.get_parameter(name).detach().clone() for name in embedding_weights(base)}
    assert_close(either.logits(attach_adapter(base, either.method, 5)), untouched, 1e-5)
    _, model = either.run()
    assert len(embedding_weights(model)) == len(before)
    checkpoint = either.folder / "step-0000012"
    tolerance = 1e-5 if variant in ("pissa", "adalora") else 0.0
    for read in (_from_peft, lambda folder, base: load_tuned(base, folder, CPU)):
        loaded = read(checkpoint, either.base)
        if read is not _from_peft:
            loaded.tie_weights()  # as the harness does
        assert_close(either.logits(loaded), either.logits(model), tolerance)
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert (head.weight is embedding.weight) == (len(before) == 1)
    merged = loaded.merge_and_unload()
    for name, was in before.items():
        assert not torch.allclose(merged.get_parameter(name), was, atol=1e-3), name
    ((_, whole),) = interpolated_models(load_base(either.base, CPU), model, [1.0])
    assert_close(either.logits(whole), either.logits(model), 1e-3)


def test_frozen_embeddings_of_full_fine_tuning_stay(either: TrainingHarness) -> None:
    either.method = Method(
        name="full", kind="full", label="", embeddings="frozen", hyperparameters=[]
    )
    either.config = replace(either.config, hyperparameters=Hyperparameters(learning_rate=1e-3))
    _, model = either.run()
    base = load_base(either.base, CPU)
    names = embedding_weights(base)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)) == (name in names), name
        assert parameter.requires_grad == (name not in names)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_embedding_lr_ratio_scales_the_first_step(either: TrainingHarness, kind: str) -> None:
    """A first step of Adam moves each weight that has a gradient by its rate."""
    either.method = adapter_method(
        "lora", embeddings="trained", embedding_lr_ratio=0.1, dropout=0.0
    )
    if kind == "full":
        either.method = Method(
            name="full", kind="full", label="", embedding_lr_ratio=0.1, hyperparameters=[]
        )
    training = TRAINING.model_copy(
        update={"epochs": 1 / 3, "warmup_epochs": 0.0, "schedule": "constant"}
    )
    either.config = replace(
        either.config,
        hyperparameters=Hyperparameters(learning_rate=0.01),
        training=training,
        schedule=LrSchedule.plan(10, training, 1.0),
    )
    before = attach_adapter(load_base(either.base, CPU), either.method, either.config.seed)
    progress, model = either.run()
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
        model = attach_adapter(load_base(harness.base, CPU), method, 0).eval()
        if rounded:
            cast_frozen_weights(model, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outcomes.append(harness.logits(model))
    assert torch.equal(*outcomes)
    half = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]
    assert len(half) == (0 if variant == "dora" else 14)


def test_killed_run_with_trained_embeddings_resumes(
    either: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in ("lora", "pissa"):
        either.method = adapter_method(variant, embeddings="trained", embedding_lr_ratio=0.2)
        reference = either.run_in(tmp_path / variant)
        shutil.rmtree(either.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, module, "_train_step", 8, after=False)
            with pytest.raises(Killed):
                either.run()
        either.assert_same_end(either.run(), reference, tmp_path / variant)


def test_adapted_head_cannot_be_trained_in_full(harness: TrainingHarness) -> None:
    method = adapter_method(embeddings="trained", target_modules=["lm_head", "q_proj"])
    with pytest.raises(InputError, match="lora-r4"):
        attach_adapter(load_base(harness.base, CPU), method, 0)


# --- hybrids ------------------------------------------------------------------------------------


def _plain_hybrid(
    harness: TrainingHarness, steps: int, switch: int
) -> tuple[list[float], torch.nn.Module]:
    """peft up to the switch, its own merge, then torch's AdamW afresh on all weights."""
    torch.manual_seed(harness.config.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(model, config).train()
    losses = []
    for step, batch in enumerate(_batches(harness, steps)):
        if step == switch:
            model = model.merge_and_unload().requires_grad_(True)
        if step in (0, switch):
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
        # Twelve steps, two of warm-up, a cosine; two steps of warm-up after the switch.
        course = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * max(0, step - 2) / 10)).item())
        rise = min(1.0, step / 2) * (min(1.0, (step - switch) / 2) if step >= switch else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = (0.01 if step < switch else 1e-3) * course * rise
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_hybrid_matches_a_plain_loop(harness: TrainingHarness) -> None:
    harness.method = hybrid_method("all", dropout=0.0)
    progress, model = harness.run()
    losses, plain = _plain_hybrid(harness, 12, 6)
    assert progress.losses == pytest.approx(losses, rel=5e-5)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=2e-4), name


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_second_stage_starts_from_the_merged_adapter(
    harness: TrainingHarness, variant: str
) -> None:
    """With a second rate near 0 the model stays; only the selected layers are trained."""
    harness.method = hybrid_method("last 1", learning_rate=1e-12).model_copy(
        update={"variant": variant}
    )
    seen: list[torch.Tensor] = []

    def evaluate(model: Any) -> Any:
        seen.append(harness.logits(model))
        model.train()
        return harness.evaluate(model)[0], 0.2

    _, model = harness.run(evaluate)
    assert_close(seen[3], seen[1], 1e-4)
    assert not torch.allclose(seen[1], seen[0], atol=1e-2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("model.layers.1.")}


def test_hybrid_checkpoints_are_adapters_then_models(harness: TrainingHarness) -> None:
    """peft reads the first, transformers the second, and `load_tuned` both."""
    harness.method = hybrid_method(["mlp", "lm_head"])
    seen: dict[str, torch.Tensor] = {}

    def evaluate(model: Any) -> Any:
        folder = harness.folder / f"seen-{len(seen)}"
        save_weights(model, folder)
        seen[folder.name] = harness.logits(model)
        model.train()
        return harness.evaluate(model)[0], 0.2

    harness.run(evaluate)
    adapters = [(harness.folder / name / "adapter_model.safetensors").exists() for name in seen]
    assert adapters == [True, True, False, False]
    for name, logits in seen.items():
        ours = load_tuned(harness.base, harness.folder / name, CPU)
        assert torch.equal(harness.logits(ours), logits)
    plain = AutoModelForCausalLM.from_pretrained(harness.folder / "seen-3", dtype=torch.float32)
    assert torch.equal(harness.logits(plain), seen["seen-3"])
    peft = _from_peft(harness.folder / "seen-1", harness.base)
    assert torch.equal(harness.logits(peft), seen["seen-1"])


@pytest.mark.parametrize("after", [0.5, 0.6])
def test_killed_hybrid_resumes_bit_for_bit(
    harness: TrainingHarness, after: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each step around the switch, at an evaluation or between two, before and after it."""
    harness.method = hybrid_method("last 1", after)
    reference = harness.run_in(tmp_path / "reference")
    switch = second_stage_step(harness.method.second_stage, harness.config.schedule)
    assert switch == {0.5: 6, 0.6: 7}[after]
    for call in (2, switch, switch + 1, switch + 2, 10):
        shutil.rmtree(harness.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, module, "_train_step", call, after=False)
            with pytest.raises(Killed):
                harness.run()
        harness.assert_same_end(harness.run(), reference, tmp_path / "reference")
    again, _ = harness.run()
    assert again.losses == reference[0].losses


def test_hybrid_killed_between_stages_resumes(
    harness: TrainingHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the adapter is merged, and while the first full model is written."""
    harness.method = hybrid_method("last 1")
    reference = harness.run_in(tmp_path / "reference")
    for owner, name, call in (
        (stages, "select_trainable_layers", 1),
        (stages, "set_peft_model_state_dict", 1),
        (checkpoints, "save_weights", 3),
        (checkpoints, "write_json", 3),
    ):
        shutil.rmtree(harness.folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, after=True)
            with pytest.raises(Killed):
                harness.run()
        harness.assert_same_end(harness.run(), reference, tmp_path / "reference")


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
        load_base=lambda: load_base(harness.base, CPU),
        build_mitigations=lambda model: build_mitigations(model, mitigation, {}, (), 0),
        train=train,
    )
    train_stages(method, harness.config, factory, harness.folder)
    _, of_adapter, tuned, of_layers = weights
    base = load_base(harness.base, CPU)
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
    model = load_base(harness.base, CPU)
    select_trainable_layers(model, layers, "hybrid-r4")
    assert sum(p.requires_grad for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last 3", "hybrid-r4: then.layers: the model has no 3 blocks, but 2"),
        (["mpl"], "no module with weights ends in mpl; a module is called, for example, model"),
    ],
)
def test_missing_layers_are_reported(
    harness: TrainingHarness, layers: str | list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select_trainable_layers(load_base(harness.base, CPU), layers, "hybrid-r4")


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
    factory = RunFactory(lambda: load_base(harness.base, CPU), lambda _: Mitigations(), train)
    train_stages(hybrid_method("last 1"), config, factory, harness.folder)
    first, second = (
        model.get_submodule("base_model.model") if isinstance(model, PeftModel) else model
        for model in models
    )
    layer = first.model.layers[0].mlp.up_proj
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    expected = load_base(harness.base, CPU).model.layers[0].mlp.up_proj.weight
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
