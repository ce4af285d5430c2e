"""Training equals plain loops of peft, transformers and torch, and they load its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    get_scheduler,
)

from forgetting.config.expand import Method
from forgetting.config.methods import RankBudgetConfig
from forgetting.data.tokenize import Example
from forgetting.evaluation.evaluate_models import interpolated_models
from forgetting.models.adapters import (
    attach_adapter,
    cast_frozen_weights,
    embedding_weights,
)
from forgetting.models.forward import collate, target_logits, token_logprobs
from forgetting.models.loading import load_base
from forgetting.models.tuned import load_tuned, save_weights, trained_state
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import (
    ewc,
    fisher_information,
    kl_penalty,
)
from forgetting.training.run_config import batch_indices, loss_groups
from forgetting.training.train_step import compute_gradients
from forgetting.training.trainer import train_run
from support.training import (
    CPU,
    FULL,
    VARIANTS,
    TrainingHarness,
    adapter_method,
    assert_close,
    hybrid_method,
    move_weights,
    no_items,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _batches(harness: TrainingHarness, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of a run in the form of transformers."""
    for step in range(steps):
        indices = batch_indices(
            len(harness.examples), harness.config.training.batch_size, harness.config.seed, step
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


def _plain_loop(harness: TrainingHarness, steps: int) -> tuple[list[float], torch.nn.Module]:
    """Train with peft, torch's AdamW and transformers' schedule and loss only."""
    model: Any = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    if harness.method.kind == "lora":
        torch.manual_seed(harness.config.seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=harness.method.rank,
            lora_alpha=harness.method.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        model = get_peft_model(model, config)
    model.train()
    training, setting = harness.config.training, harness.config.hyperparameters
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    norms = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": setting.weight_decay}, norms],
        lr=setting.learning_rate,
        betas=training.resolved_betas,
    )
    plan = harness.config.schedule
    scheduler = get_scheduler(training.schedule, optimizer, plan.warmup_steps, plan.steps)
    losses = []
    for batch in _batches(harness, steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_losses_match_a_plain_loop(harness: TrainingHarness, kind: str) -> None:
    """The same batches through peft, AdamW and transformers' loss give equal weights."""
    harness.method = adapter_method(dropout=0.0) if kind == "lora" else FULL
    harness.set_rate(0.01 if kind == "lora" else 1e-3, weight_decay=0.1)
    harness.set_training(epochs=20 / 3)
    progress, model = harness.run(no_items)
    losses, plain = _plain_loop(harness, 20)
    assert len(progress.losses) == 20
    assert progress.losses == pytest.approx(losses, rel=2e-5)
    assert losses[-1] < 0.8 * losses[0]
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, theirs[name], atol=2e-4), name


def test_micro_batch_size_does_not_change_the_run(harness: TrainingHarness, tmp_path: Path) -> None:
    harness.method = adapter_method(dropout=0.0)
    ended = []
    for size in (1, 3, 32):
        harness.set_training(micro_batch_size=size)
        ended.append(harness.copy_to(tmp_path / str(size)).run(no_items)[0])
    for other in ended[1:]:
        assert other.losses == pytest.approx(ended[0].losses, rel=1e-4)
        assert other.tokens == ended[0].tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_a_saved_adapter(harness: TrainingHarness, variant: str) -> None:
    harness.method = adapter_method(variant)
    _, model = harness.run()
    base = AutoModelForCausalLM.from_pretrained(harness.base, dtype=torch.float32)
    untouched = harness.logits(base)
    loaded = PeftModel.from_pretrained(base, harness.folder / "step-0000012")
    # PiSSA's is written as the update of the original weights, and AdaLoRA's without what it has
    # pruned: the sums round otherwise.
    tolerance = 1e-5 if variant in ("pissa", "adalora") else 0.0
    assert_close(harness.logits(loaded), harness.logits(model), tolerance)
    assert not torch.allclose(harness.logits(loaded), untouched, atol=1e-2)
    ours = load_tuned(harness.base, harness.folder / "step-0000012", CPU)
    assert_close(harness.logits(ours), harness.logits(model), tolerance)


def test_transformers_loads_a_full_checkpoint(harness: TrainingHarness) -> None:
    harness.method = FULL
    _, model = harness.run()
    checkpoint = harness.folder / "step-0000012"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(harness.logits(loaded), harness.logits(model))
    ours = load_tuned(harness.base, checkpoint, CPU)
    assert torch.equal(harness.logits(ours), harness.logits(model))


def test_rounding_frozen_weights_changes_no_bit(harness: TrainingHarness) -> None:
    """Autocast rounds them in every pass; weights rounded before give the same losses."""
    config = replace(harness.config, precision=torch.bfloat16)
    harness.method = adapter_method(dropout=0.0)
    outcomes = []
    for rounded in (False, True):
        model = harness.model()
        if rounded:
            cast_frozen_weights(model, config.precision)
        folder = harness.folder / str(rounded)
        progress = train_run(model, harness.examples, config, no_items, folder, harness.log)
        outcomes.append((progress.losses, trained_state(model)))
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert {layer.get_base_layer().weight.dtype for layer in adapted} == {torch.bfloat16}
    (plain, weights), (again, same) = outcomes
    assert plain == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


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


def _from_peft(checkpoint: Path, base: Path) -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, checkpoint)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_trained_embeddings_are_saved_for_peft(any_head: TrainingHarness, variant: str) -> None:
    """They start as the base's, change, and are loaded by peft and here with the same logits."""
    any_head.method = adapter_method(variant, embeddings="trained")
    base = load_base(any_head.base, CPU)
    untouched = any_head.logits(base)
    before = {name: base.get_parameter(name).detach().clone() for name in embedding_weights(base)}
    assert_close(any_head.logits(attach_adapter(base, any_head.method, 5)), untouched, 1e-5)
    _, model = any_head.run()
    assert len(embedding_weights(model)) == len(before)
    checkpoint = any_head.folder / "step-0000012"
    tolerance = 1e-5 if variant in ("pissa", "adalora") else 0.0
    for read in (_from_peft, lambda folder, base: load_tuned(base, folder, CPU)):
        loaded = read(checkpoint, any_head.base)
        if read is not _from_peft:
            loaded.tie_weights()  # as the harness does
        assert_close(any_head.logits(loaded), any_head.logits(model), tolerance)
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert (head.weight is embedding.weight) == (len(before) == 1)
    merged = loaded.merge_and_unload()
    for name, was in before.items():
        assert not torch.allclose(merged.get_parameter(name), was, atol=1e-3), name
    ((_, whole),) = interpolated_models(load_base(any_head.base, CPU), model, [1.0])
    assert_close(any_head.logits(whole), any_head.logits(model), 1e-3)


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


# --- mitigations --------------------------------------------------------------------------------

LORA = adapter_method(dropout=0.0)
METHODS = pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
REPLAY = {"table": "world/documents", "ratio": 0.3}
EWC = {"table": "world/documents", "samples": 2}
WEIGHTLESS: dict[str, Any] = {
    "l2_sp": {"l2_sp": {"weight": 0.0}},
    "kl": {"kl": {"weight": 0.0}},
    "ewc": {"ewc": EWC | {"weight": 0.0}},
}
STRONG: dict[str, Any] = {
    "l2_sp": {"l2_sp": {"weight": 100.0}},
    "kl": {"kl": {"weight": 30.0}},
    "ewc": {"ewc": EWC | {"weight": 1e5}},
    "kl on replay": {"replay": REPLAY, "kl": {"weight": 30.0, "tokens": "replay"}},
}


@METHODS
@pytest.mark.parametrize("sections", WEIGHTLESS.values(), ids=WEIGHTLESS)
def test_weight_0_equals_no_mitigation(
    harness: TrainingHarness, method: Method, sections: Any, tmp_path: Path
) -> None:
    """Bit for bit."""
    (ours, model), (theirs, other) = (
        harness.with_mitigation(method, each).copy_to(tmp_path / str(each)).run(no_items)
        for each in (sections, None)
    )
    assert ours.losses == theirs.losses
    for name, tensor in trained_state(model).items():
        assert torch.equal(tensor, trained_state(other)[name]), name


@METHODS
@pytest.mark.parametrize("sections", STRONG.values(), ids=STRONG)
def test_strong_mitigation_keeps_the_model_near_the_base(
    harness: TrainingHarness, method: Method, sections: Any, tmp_path: Path
) -> None:
    """On text that is not trained on, outputs move much less far."""
    batch = collate(harness.examples[7:], harness.config.pad)

    def change(each: Any) -> float:
        run = harness.with_mitigation(method, each).copy_to(tmp_path / str(each))
        _, model = run.run(no_items)
        with torch.no_grad():
            base = target_logits(harness.load(), batch)
            return float((target_logits(model.eval(), batch) - base).abs().mean())

    assert 0 < change(sections) < 0.8 * change(None)


def test_replay_lowers_the_loss_on_replayed_text(harness: TrainingHarness, tmp_path: Path) -> None:
    losses = []
    for sections in (None, {"replay": {"table": "world/documents", "ratio": 0.5}}):
        run = harness.with_mitigation(LORA, sections, epochs=8.0)
        _, model = run.copy_to(tmp_path / str(sections)).run(no_items)
        batch = collate(run.general, run.config.pad)
        with torch.no_grad():
            losses.append(-token_logprobs(model.eval(), batch).sum().item() / batch.targets)
    assert losses[1] < 0.8 * losses[0]


@METHODS
@pytest.mark.parametrize(
    "sections", [*STRONG.values(), {"replay": REPLAY}], ids=[*STRONG, "replay"]
)
def test_gradient_does_not_depend_on_the_split(
    harness: TrainingHarness, method: Method, sections: Any
) -> None:
    """Gradients of a step of a run that has moved away from the base."""

    def gradients(size: int) -> list[torch.Tensor]:
        run = harness.with_mitigation(method, sections, micro_batch_size=size)
        model = run.model()
        config = replace(run.config, mitigations=run.mitigations(model))
        move_weights(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = loss_groups(run.examples, config, 1)
        optimizer = torch.optim.SGD(trained, lr=0.0)
        compute_gradients(model, config, groups, TrainState(step=1), optimizer)
        return [parameter.grad for parameter in trained]

    whole = gradients(32)
    for size in (1, 3):
        for ours, theirs in zip(gradients(size), whole, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class Unigram(torch.nn.Module):
    """Predicts the same distribution, softmax(theta), whatever came before."""

    device = CPU

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> Any:
        shape = (len(input_ids), len(logits_to_keep), len(self.theta))
        return SimpleNamespace(logits=self.theta.expand(shape))


def test_fisher_matches_known_information() -> None:
    """p (1 - p) of a softmax, though the text says one and the same token again and again."""
    p = [0.6, 0.3, 0.1]
    model: Any = Unigram(p)
    rows = [Example(ids=[1] * 9, prompt_length=1)] * 3000
    (found,) = fisher_information(model, [model.theta], rows, 0)
    assert found.tolist() == pytest.approx([x * (1 - x) for x in p], abs=0.01)
    (again,) = fisher_information(model, [model.theta], rows, 0)
    assert torch.equal(found, again)
    # Near the base the penalty is KL(base || model), of one changed weight exactly.
    penalty = ewc(model, 1.0, rows, 0)
    base = model.theta.detach().clone()
    with torch.no_grad():
        model.theta[1] += 0.05
    exact = kl_penalty(base, model.theta, torch.tensor(0)).item()
    assert penalty(model).item() == pytest.approx(exact, rel=0.08)
