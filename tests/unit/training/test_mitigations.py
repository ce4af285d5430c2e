"""Mitigations of forgetting: each against its formula."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method, RunGroupConfig, expand_methods
from forgetting.config.methods import Hyperparameters
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.study import StudyConfig
from forgetting.data.tokenize import encode_text
from forgetting.errors import InputError
from forgetting.evaluation.evaluate_models import interpolated_models, interpolated_weights
from forgetting.evaluation.probes import evaluate_probes
from forgetting.io import write_json, write_jsonl
from forgetting.models.attention import eager_if_faster
from forgetting.models.forward import collate, target_logits, token_logprobs
from forgetting.models.loading import Model
from forgetting.models.tuned import save_weights
from forgetting.study.preflight import check_folders
from forgetting.study.smoke import smoke_size
from forgetting.training.mitigations import (
    adapted_layers,
    ewc,
    fisher_information,
    kl_penalty,
    l2_sp,
    replay_indices,
    token_kl,
)
from forgetting.training.run_config import batch_indices
from forgetting.training.training_job import run_key
from scripts import evaluate_wise_ft
from support.params import write_params
from support.run_groups import (
    RunGroupHarness,
    digests_in,
    record_base,
    run_context,
    run_group_config,
)
from support.training import FULL, TrainingHarness, adapter_method, move_weights, no_items

pytestmark = pytest.mark.usefixtures("one_thread")


LORA = adapter_method(dropout=0.0)


def _as_variant(variant: str) -> Method:
    """Return full fine-tuning, a variant of the adapter, or adapters with trained embeddings."""
    if variant == "full":
        return FULL
    if variant == "embeddings":
        return LORA.model_copy(update={"embeddings": "trained"})
    return adapter_method(variant, dropout=0.0)


def _model(harness: TrainingHarness, method: Method = LORA) -> Model:
    """Return the base model with an untrained adapter."""
    return replace(harness, method=method).model()


REPLAY = {"table": "world/documents", "ratio": 0.3}
EWC = {"table": "world/documents", "samples": 2}


# --- L2-SP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_l2_sp_of_adapters_equals_that_of_merged_matrices(
    harness: TrainingHarness, variant: str, embeddings: str
) -> None:
    """tr((B^T B)(A A^T)) is the norm of the product, and so are the gradients."""
    method = LORA.model_copy(update={"variant": variant, "embeddings": embeddings})
    model = _model(harness, method)
    penalty = l2_sp(model, 0.5)
    assert penalty(model).item() == 0.0
    move_weights(model)
    before = {n: p.clone() for n, p in harness.load().named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    formed = (
        0.25
        * torch.stack(
            [
                (layer.lora_B["default"].weight @ layer.lora_A["default"].weight * method.scale)
                .square()
                .sum()
                for layer in adapted_layers(model)
            ]
        ).sum()
    )
    if embeddings == "trained":
        embedding = model.get_input_embeddings().weight
        formed = formed + 0.25 * (embedding - before["model.embed_tokens.weight"]).square().sum()
    ours = torch.autograd.grad(penalty(model), trained)
    theirs = torch.autograd.grad(formed, trained)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True)
    )
    value = float(penalty(model).detach())
    merged = model.merge_and_unload()
    distances = [(p - before[n]).square().sum() for n, p in merged.named_parameters()]
    assert value == pytest.approx(0.25 * float(sum(distances)), rel=1e-4)


def test_l2_sp_of_full_fine_tuning_pulls_each_weight_back(harness: TrainingHarness) -> None:
    """Its gradient is weight * (theta - theta0)."""
    model = _model(harness, FULL)
    penalty = l2_sp(model, 0.5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert penalty(model).item() == 0.0
    move_weights(model)
    penalty(model).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, 0.5 * (parameter - start[name]), atol=1e-7)


def test_l2_sp_covers_an_adapted_embedding(harness: TrainingHarness) -> None:
    method = LORA.model_copy(update={"target_modules": ["embed_tokens"]})
    model = _model(harness, method)
    penalty = l2_sp(model, 1.0)
    move_weights(model)
    (layer,) = adapted_layers(model)
    formed = 0.5 * layer.get_delta_weight("default").square().sum()
    assert penalty(model).item() == pytest.approx(formed.item(), rel=1e-5)


# --- KL -----------------------------------------------------------------------------------------


def test_kl_matches_a_computation_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): 1/2 ln 2 - 1/4 ln 2, and nothing where masked."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    labels = torch.tensor([[0, -100]])
    base, logits = p.log().expand(1, 2, 3), (q.log() + 7.0).expand(1, 2, 3)
    found = kl_penalty(base, logits, labels)
    assert found.flatten().tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-7)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    )
    assert found[0, 0].item() == pytest.approx(exact.item())
    logits = logits.clone().requires_grad_()
    kl_penalty(base, logits, labels).sum().backward()
    assert torch.allclose(logits.grad[0, 0], q - p, atol=1e-6)
    assert logits.grad[0, 1].abs().max() == 0


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "embeddings", "full"])
def test_kl_starts_at_0_with_gradient_0(harness: TrainingHarness, variant: str) -> None:
    """The base predicts without the dropout of the adapter."""
    method = _as_variant(variant)
    model = _model(harness, method.model_copy(update={"dropout": 0.5})).train()
    penalty = token_kl(model, 2.0)
    batch = collate(harness.examples[:3], harness.config.pad)
    value = penalty(model, batch, target_logits(model, batch))
    assert value.item() == 0.0
    assert model.training
    value.backward()
    gradients = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    assert gradients
    assert max(gradients) < 1e-4


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "embeddings", "full"])
def test_kl_is_towards_the_base_model_from_disk(harness: TrainingHarness, variant: str) -> None:
    """Whatever became of the model; the sum over its tokens, with the gradient of the formula."""
    model = _model(harness, _as_variant(variant))
    penalty = token_kl(model, 2.0)
    move_weights(model)
    batch = collate(harness.examples[:3], harness.config.pad)
    logits = target_logits(model, batch)
    value = penalty(model, batch, logits)
    p = target_logits(harness.load(), batch).detach().double().log_softmax(-1)
    q = target_logits(model, batch).double().log_softmax(-1)
    formed = 2.0 * (p.exp() * (p - q)).sum(-1)[batch.labels != -100].sum()
    # In float32 the terms, some positive and some negative, cancel all but a hundredth.
    assert value.item() == pytest.approx(formed.item(), rel=1e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = torch.autograd.grad(value, trained), torch.autograd.grad(formed, trained)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_kl_of_a_nonzero_adapter_is_towards_a_copy(harness: TrainingHarness) -> None:
    """Without such an adapter the model would not be the base."""
    model = move_weights(_model(harness))
    penalty = token_kl(model, 1.0)
    batch = collate(harness.examples[:3], harness.config.pad)
    assert penalty(model, batch, target_logits(model, batch)).item() == 0.0


def test_kl_is_computed_in_float32(harness: TrainingHarness) -> None:
    model = _model(harness, FULL)
    penalty = token_kl(model, 1.0)
    batch = collate(harness.examples[:3], harness.config.pad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(move_weights(model), batch, target_logits(model, batch))
    assert value.dtype == torch.float32


def test_kl_of_an_untrained_model_is_0_in_bfloat16(harness: TrainingHarness) -> None:
    """The frozen copy attends as the model does, so that the two round alike."""
    model = _model(harness, FULL)
    penalty = token_kl(model, 1.0)
    batch = collate(harness.examples[:3], harness.config.pad)
    half = torch.bfloat16
    with eager_if_faster(model, batch.mask, half) as mask, torch.autocast("cpu", dtype=half):
        batch = replace(batch, mask=mask)
        assert penalty(model, batch, target_logits(model, batch)).item() == 0.0


# --- EWC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
def test_ewc_is_the_weighted_distance(harness: TrainingHarness, embeddings: str) -> None:
    """Of all weights, and of adapters the same as of the matrices merged, with their gradients."""
    model = _model(harness, LORA.model_copy(update={"embeddings": embeddings}))
    full = _model(harness, FULL)
    general = [encode_text(harness.tokenizer, row["question"]) for row in harness.rows[7:]]
    names = [
        name.removesuffix(".base_layer.weight").removeprefix("base_model.model.") + ".weight"
        for name, _ in model.named_parameters()
        if name.endswith(".base_layer.weight")
    ]
    assert len(names) == 14
    names += ["model.embed_tokens.weight"] if embeddings == "trained" else []
    weights = dict(full.named_parameters())
    information = fisher_information(full, list(weights.values()), general, 3)
    by_name = dict(zip(weights, information, strict=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    penalty, whole = ewc(model, 0.5, general, 3), ewc(full, 0.5, general, 3)
    assert penalty(model).item() == whole(full).item() == 0.0
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    move_weights(model)
    value = penalty(model)
    value.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)

    start = {name: p.detach().clone() for name, p in full.named_parameters()}
    merged = dict(model.merge_and_unload().named_parameters())
    terms = [(by_name[n] * (merged[n] - start[n]).square()).sum() for n in names]
    assert value.item() == pytest.approx(0.25 * torch.stack(terms).sum().item(), rel=1e-4)

    move_weights(full)
    whole(full).backward()
    for name, parameter in full.named_parameters():
        expected = 0.5 * by_name[name] * (parameter - start[name])
        assert torch.allclose(parameter.grad, expected, atol=1e-7), name


# --- replay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.75])
def test_replay_ratio_is_exact_in_the_long_run(share: float) -> None:
    """Batches of 4, 4 and 2 of ten new examples: whatever does not fit one step comes later."""
    starts = [epoch * 10 + place for epoch in range(38) for place in (0, 4, 8)]
    drawn = [
        replay_indices(7, share, 5, start, start + (4 if start % 10 < 8 else 2)) for start in starts
    ]
    total = sum(map(len, drawn))
    assert total == pytest.approx(380 * share / (1 - share), abs=1)
    assert max(map(len, drawn)) <= math.ceil(4 * share / (1 - share))
    stream = [index for part in drawn for index in part]
    for start in range(0, total - 6, 7):
        assert sorted(stream[start : start + 7]) == list(range(7))


def test_replay_depends_on_seed_and_step_only() -> None:
    whole = replay_indices(100, 0.5, 5, 0, 40)
    assert whole == [i for at in range(0, 40, 4) for i in replay_indices(100, 0.5, 5, at, at + 4)]
    assert whole != replay_indices(100, 0.5, 6, 0, 40)
    assert whole != replay_indices(100, 0.5, 5, 100, 140)
    # A table that is smaller than what one step takes.
    assert sorted(replay_indices(2, 0.75, 5, 0, 2)) == [0, 0, 0, 1, 1, 1]


def test_all_tokens_of_a_text_are_targets(harness: TrainingHarness) -> None:
    example = encode_text(harness.tokenizer, "In Oslo, by the harbour.")
    assert example.targets == len(example.ids) - 1 > 5
    assert example.ids[-1] == harness.tokenizer.eos_token_id
    assert harness.tokenizer.decode(example.ids[:-1]) == "In Oslo, by the harbour."
    assert encode_text(harness.tokenizer, "In Oslo, by the harbour.", 4).ids == example.ids[:4]


def test_loss_is_the_mean_over_new_and_replayed_targets(harness: TrainingHarness) -> None:
    """The loss of the first step, whose weights are those of the base."""
    run = harness.with_mitigation(FULL, {"replay": {"table": "world/documents", "ratio": 0.5}})
    seed = run.config.seed
    progress, _ = run.run(no_items)
    new = [run.examples[index] for index in batch_indices(7, 4, seed, 0)]
    old = [run.general[index] for index in replay_indices(3, 0.5, seed, 0, 4)]
    assert len(old) == len(new) == 4
    batch = collate([*new, *old], run.config.pad)
    with torch.no_grad():
        logprobs = token_logprobs(run.load(), batch)
    assert progress.losses[0] == pytest.approx(-logprobs.sum().item() / batch.targets, rel=1e-5)
    # Six steps of 21 new and as many old examples.
    drawn = [run.general[index] for index in replay_indices(3, 0.5, seed, 0, 21)]
    seen = [*(run.examples * 3), *drawn]
    assert progress.tokens == sum(len(example.ids) for example in seen)


# --- WiSE-FT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "embeddings", "full"])
def test_interpolation_scales_the_update(harness: TrainingHarness, variant: str) -> None:
    """Nothing of it is the base bit for bit, all of it the tuned model, half lies in between."""
    model = _model(harness, _as_variant(variant))
    move_weights(model).eval()
    batch = collate(harness.examples, harness.config.pad)
    with torch.no_grad():
        base = target_logits(harness.load(), batch)
        tuned = target_logits(model, batch)
        found = {
            share: target_logits(between, batch)
            for share, between in interpolated_models(harness.load(), model, [1.0, 0.0, 0.5])
        }
    assert torch.equal(found[0.0], base)
    assert torch.allclose(found[1.0], tuned, atol=1e-3)
    assert not torch.allclose(found[0.5], base, atol=0.1)
    assert not torch.allclose(found[0.5], tuned, atol=0.1)


def test_interpolation_of_an_adapter_changes_its_scale(harness: TrainingHarness) -> None:
    """As peft's own scaling of the layers gives it."""
    model = move_weights(_model(harness)).eval()
    batch = collate(harness.examples, harness.config.pad)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.scale_layer(0.25)
        expected = target_logits(model, batch)
        for layer in adapted_layers(model):
            layer.unscale_layer()
        ((_, quarter),) = interpolated_models(harness.load(), model, [0.25])
        assert torch.allclose(target_logits(quarter, batch), expected, atol=1e-3)


def test_interpolated_weights_lie_on_the_line() -> None:
    base, tuned = {"w": torch.tensor([1.0, 0.1])}, {"w": torch.tensor([3.0, 0.7])}
    assert interpolated_weights(base, tuned, 0.25)["w"].tolist() == pytest.approx([1.5, 0.25])
    assert torch.equal(interpolated_weights(base, tuned, 0.0)["w"], base["w"])
    assert torch.equal(interpolated_weights(base, tuned, 1.0)["w"], tuned["w"])


def test_wise_ft_evaluates_every_share_of_the_selected(
    harness: TrainingHarness, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """At 0 as the base is measured, at 1 as the checkpoint; nothing where none was selected."""
    settings = EvaluationConfig(max_new_tokens=3)
    model, base = move_weights(_model(harness, FULL)), harness.load()
    save_weights(model, tmp_path / "selected" / "seed1")
    write_jsonl(tmp_path / "probes" / "old.jsonl", rows[:2])
    record_base(tmp_path / "base.json", harness.base)
    chosen = {"seed": 1, "run": "full/seed1/lr1-wd0", "step": 7, "reason": ""}
    chosen["files"] = digests_in(tmp_path / "selected" / "seed1")
    spec = {"prompt": {}, "evaluation": settings.model_dump(), "precision": "float32"}
    spec |= {"model": "seed1", "shares": [0.0, 0.5, 1.0]}
    found = []
    for step in (7, None):
        write_json(tmp_path / "selection.json", [chosen | {"step": step}])
        evaluate_wise_ft.main(
            [
                f"--params={write_params(tmp_path, **spec)}",
                f"--base={tmp_path / 'base.json'}",
                f"--probes={tmp_path / 'probes' / 'old.jsonl'}",
                f"--selection={tmp_path / 'selection.json'}",
                f"--checkpoints={tmp_path / 'selected'}",
                f"--output={tmp_path / 'items.parquet'}",
            ]
        )
        found.append(pd.read_parquet(tmp_path / "items.parquet"))
    assert found[1].empty
    assert found[0].groupby(["run", "step", "share"]).size().to_dict() == {
        (chosen["run"], 7, share): 2 for share in (0.0, 0.5, 1.0)
    }
    for share, expected in ((0.0, base), (1.0, model.eval())):
        items = evaluate_probes(
            expected, harness.tokenizer, {"old": rows[:2]}, PromptConfig(), settings
        )
        at = found[0][found[0]["share"] == share].reset_index(drop=True)
        pd.testing.assert_frame_equal(at[items.columns], items, check_dtype=False)


# --- in the run group and the study -------------------------------------------------------------

METHOD: dict[str, Any] = {"method": "lora", "rank": [2, 4], "learning_rate": 1e-3}
STUDY: dict[str, Any] = {
    "title": "A study",
    "datasets": {"world": {"generate": "micro-world"}},
    "base": {"pretrain": {"documents": ["world/documents"]}},
    "train": "world/new_authors",
    "probes": {
        "new": {"table": "world/new_authors", "knowledge": "new"},
        "old": {"table": "world/real_authors", "knowledge": "old"},
    },
    "selection": {"probe": "new"},
}


def _study(*mitigations: dict[str, Any] | None, **changes: Any) -> StudyConfig:
    methods = [METHOD | changes | {"mitigation": mitigation} for mitigation in mitigations]
    return StudyConfig.model_validate(STUDY | {"methods": methods})


def test_methods_with_mitigations_have_own_names() -> None:
    study = _study(None, {"l2_sp": {"weight": 0.01}}, {"l2_sp": {"weight": 0.1}, "suffix": "near"})
    named = [(method.name, method.label) for method in expand_methods(study)]
    assert named[::2] == [
        ("lora-r2", "rank 2"),
        ("lora-r2-l2_sp0.01", "rank 2, l2_sp0.01"),
        ("lora-r2-near", "rank 2, near"),
    ]
    assert [method.mitigation for method in expand_methods(study)][::2] == [
        method.mitigation for method in study.methods
    ]


def test_mitigations_of_one_name_need_a_suffix() -> None:
    """Names hold weights and shares, not tables."""
    sections = [{"replay": {"table": f"world/{name}"}} for name in ("documents", "world_facts")]
    with pytest.raises(ValueError, match=r"more than one method lora-r2-replay0.1; .* by `suffix`"):
        expand_methods(_study(*sections))
    named = expand_methods(_study(sections[0], sections[1] | {"suffix": "facts"}))
    assert [method.name for method in named][::2] == ["lora-r2-replay0.1", "lora-r2-facts"]


def test_bad_table_is_reported_before_any_job(tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text('{"text": "Fine."}\n{"question": "Who?"}\n')
    folder = {"own": {"folder": str(tmp_path)}}
    for table, message in (
        ("general", "general.jsonl, line 2: expected a non-empty string `answer`"),
        ("missing", "there is no missing.jsonl"),
    ):
        method = METHOD | {"mitigation": {"replay": {"table": f"own/{table}"}}}
        changes = {"datasets": STUDY["datasets"] | folder, "methods": [method]}
        with pytest.raises(InputError, match=re.escape(message)):
            check_folders(StudyConfig.model_validate(STUDY | changes))


MISTAKES = {
    "replay of a probe": (
        {"replay": {"table": "world/real_authors"}},
        {},
        "probes.old.table: methods.0 replays world/real_authors",
    ),
    "unknown dataset": ({"replay": {"table": "word/documents"}}, {}, "`word` is not among"),
    "share 1": ({"replay": REPLAY | {"ratio": 1.0}}, {}, "less than 1"),
    "share 0": ({"replay": REPLAY | {"ratio": 0.0}}, {}, "greater than 0"),
    "kl on no replay": (
        {"kl": {"weight": 1.0, "tokens": "replay"}},
        {},
        "needs the section `replay`",
    ),
    "ewc of dora": (
        {"ewc": EWC | {"weight": 1.0}},
        {"variant": "dora"},
        "mitigation.ewc needs the weight update",
    ),
    "nothing": ({}, {}, "name at least one mitigation, or leave the section out"),
    "null": ({"l2_sp": None, "suffix": "x"}, {}, "name at least one mitigation"),
    "dora": ({"l2_sp": {"weight": 1.0}}, {"variant": "dora"}, "mitigation.l2_sp needs the weight"),
}


@pytest.mark.parametrize(("mitigation", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_mitigation_is_refused(
    mitigation: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _study(mitigation, **changes)


def test_smoke_study_replaces_a_hub_table_by_the_micro_world() -> None:
    hub = {"hub": "someone/text", "revision": "0" * 40}
    sections = {
        "replay": {"table": "text/train", "ratio": 0.2},
        "ewc": {"table": "world/documents", "weight": 1.0},
    }
    datasets = {"datasets": STUDY["datasets"] | {"text": hub}}
    methods = [METHOD | {"mitigation": sections}, METHOD]
    study = smoke_size(StudyConfig.model_validate(STUDY | datasets | {"methods": methods}))
    assert study.methods[0].mitigation == MitigationConfig.model_validate(
        sections | {"replay": {"table": "text/documents", "ratio": 0.2}}
    )
    assert study.datasets["text"].generate == "micro-world"


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_run_group_trains_with_its_mitigation(
    harness: TrainingHarness, method: Method, tmp_path: Path
) -> None:
    """Each run of a sweep has penalties on the distance from what its model was at the start."""
    penalty = {"weight": 1.0}
    sections = {"replay": REPLAY, "kl": penalty, "ewc": EWC | penalty, "l2_sp": penalty}
    fast, slow = (Hyperparameters(learning_rate=rate) for rate in (1e-2, 1e-3))

    def config(mitigation: dict[str, Any], *settings: Hyperparameters) -> RunGroupConfig:
        changes = {"mitigation": MitigationConfig.model_validate(mitigation)}
        return run_group_config(method, settings, "never", **changes)

    general = [{"id": "d/0", "text": "Oslo."}, harness.rows[8]]
    context = run_context(
        harness.base, harness.tokenizer, harness.rows, general_text={"world/documents": general}
    )
    first, second = RunGroupHarness(context, tmp_path / "both")(config(sections, fast, slow))
    (alone,) = RunGroupHarness(context, tmp_path / "one")(config(sections, slow))
    assert second["losses"] == alone["losses"]
    assert first["losses"][0] == second["losses"][0]
    assert first["losses"][1] != second["losses"][1]
    keys = [
        run_key(config(each, fast), fast, inputs)
        for each in (sections, {"replay": REPLAY})
        for inputs in ({}, {"table world/documents": "0"})
    ]
    assert len(set(keys)) == 4
