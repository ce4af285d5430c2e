"""The divergence from the base, by hand, and 0 for the base itself."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerBase,
)

from forgetting.config.expand import Method
from forgetting.data.tables import joined_text
from forgetting.errors import InputError
from forgetting.evaluation.divergence import (
    BasePredictions,
    append_divergence,
    compute_base_predictions,
    cut_blocks,
    divergence_items,
    divergence_metrics,
    load_base_predictions,
    save_base_predictions,
)
from forgetting.evaluation.metrics import TEXT_SCORES, UNBOUNDED_METRICS
from forgetting.io import write_jsonl
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def blocks(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return seven blocks of sixteen tokens."""
    texts = [f"{row['question']} {row['answer']}\n\n" for row in rows]
    return cut_blocks(tokenizer, texts * 3, 16)[:7]


@pytest.fixture
def targets(base: Any, blocks: torch.Tensor) -> BasePredictions:
    """Return the tiny base's predictions on the blocks."""
    return compute_base_predictions(base, blocks, 3)


def _adapted(folder: Path, tuning: Method, **changes: Any) -> Any:
    changed = tuning.model_copy(update={"dropout": 0.0, **changes})
    return attach_adapter(load_base(folder, CPU), changed, 0)


def test_divergence_metrics_by_hand() -> None:
    """p = (3/4, 1/4) against q = (1/2, 1/2), and against (1/5, 4/5) where they disagree."""
    p = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    q = torch.tensor([[1.0, 1.0], [1.0, 4.0]]).log()
    found = divergence_metrics(p, q, torch.tensor([1, 1]))
    hard = (math.log(2) + math.log(5)) / 2
    soft = (math.log(2) - 0.75 * math.log(0.2) - 0.25 * math.log(0.8)) / 2
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found["forgetting_ce_hard"] == pytest.approx(hard, rel=1e-6)
    assert found["forgetting_ce_soft"] == pytest.approx(soft, rel=1e-6)
    assert found["forgetting_kl"] == pytest.approx(soft - entropy, rel=1e-6)
    assert found["base_agreement"] == 0.5
    assert found["text_loss"] == pytest.approx((math.log(2) - math.log(0.8)) / 2, rel=1e-6)


def test_divergence_of_base_and_new_adapter_is_zero(
    base_folder: Path, tuning: Method, targets: BasePredictions, base: Any
) -> None:
    """The divergence is exactly 0, every token agrees, and the hard target is -log max p."""
    itself = divergence_items(base, targets)
    assert (itself["forgetting_kl"] == 0.0).all()
    assert (itself["base_agreement"] == 1.0).all()
    adapted = divergence_items(_adapted(base_folder, tuning), targets)
    pd.testing.assert_frame_equal(adapted, itself, check_exact=True)
    logits = base(input_ids=targets.blocks).logits[:, :-1].double().log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1).mean(-1)
    assert itself["forgetting_ce_soft"].tolist() == pytest.approx(entropy.tolist(), rel=1e-5)
    most_likely = -logits.max(-1).values.mean(-1)
    assert itself["forgetting_ce_hard"].tolist() == pytest.approx(most_likely.tolist(), rel=1e-5)


def test_divergence_of_pissa_is_from_the_base(
    base_folder: Path, tuning: Method, targets: BasePredictions
) -> None:
    """PiSSA's model starts as the base with its adapter, and far from it without."""
    model = _adapted(base_folder, tuning, variant="pissa")
    assert divergence_items(model, targets)["forgetting_kl"].max() < 1e-8
    with model.disable_adapter():
        assert divergence_items(model, targets)["forgetting_kl"].min() > 1e-3


def test_text_loss_equals_the_loss_of_transformers(base: Any, targets: BasePredictions) -> None:
    """The loss is shifted by one token, as in transformers."""
    for block, found in zip(
        targets.blocks, divergence_items(base, targets)["text_loss"], strict=True
    ):
        theirs = base(input_ids=block[None], labels=block[None]).loss.item()
        assert found == pytest.approx(theirs, rel=1e-5)


def test_divergence_detects_a_shift_by_one() -> None:
    """A base that predicts its input's successor, and a model that repeats its input instead."""
    blocks = torch.arange(12).reshape(2, 6)

    class Table(nn.Module):
        """A model whose logits are rows of a table."""

        def __init__(self, shift: int) -> None:
            super().__init__()
            self.head = nn.Linear(16, 16, bias=False)
            self.head.weight.data = 50.0 * torch.eye(16).roll(shift, 0)
            self.device = CPU

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.head(nn.functional.one_hot(input_ids, 16).float()))

    right: Any = Table(shift=1)
    targets = compute_base_predictions(right, blocks, 2)
    assert divergence_items(right, targets)["text_loss"].max() < 1e-6
    copier: Any = Table(shift=0)
    found = divergence_items(copier, targets)
    assert (found["base_agreement"] == 0.0).all()
    assert found["forgetting_ce_hard"].tolist() == pytest.approx([50.0, 50.0])


@pytest.mark.parametrize("tied", [True, False])
def test_divergence_of_full_fine_tuning_uses_the_base_head(
    base_folder: Path, targets: BasePredictions, base: Any, tied: bool
) -> None:
    """The base's predictions come from its own head, not from the trained one."""
    if not tied:
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    before = divergence_items(base, targets)["forgetting_kl"].mean()
    with torch.no_grad():
        base.lm_head.weight += 0.05 * torch.randn_like(base.lm_head.weight)
    after = divergence_items(base, targets)
    assert before == 0.0
    assert after["forgetting_kl"].mean() > 1e-4
    gap = after["forgetting_ce_soft"] - after["forgetting_kl"]
    logits = load_base(base_folder, CPU)(input_ids=targets.blocks).logits[:, :-1].double()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(-1)
    assert gap.tolist() == pytest.approx(entropy.tolist(), rel=1e-5)


def test_divergence_restores_the_mode_of_the_model(base: Any, targets: BasePredictions) -> None:
    base.train()
    divergence_items(base, targets)
    assert base.training


def test_base_predictions_keep_the_bias_of_the_head(blocks: torch.Tensor) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    phi = PhiForCausalLM(PhiConfig(vocab_size=512, num_attention_heads=2, **shape)).eval()
    phi.lm_head.bias.data.normal_()
    targets = compute_base_predictions(phi, blocks, 4)
    assert targets.bias is not None
    assert (divergence_items(phi, targets)["forgetting_kl"] == 0.0).all()


def test_capped_logits_are_refused(blocks: torch.Tensor) -> None:
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=3.0,
    )
    with pytest.raises(InputError, match="caps the logits"):
        compute_base_predictions(Gemma2ForCausalLM(config).eval(), blocks, 4)


def test_base_predictions_survive_saving(
    base: Any, targets: BasePredictions, tmp_path: Path
) -> None:
    save_base_predictions(targets, tmp_path / "targets.safetensors")
    loaded = load_base_predictions(tmp_path / "targets.safetensors")
    pd.testing.assert_frame_equal(
        divergence_items(base, loaded), divergence_items(base, targets), check_exact=True
    )


def test_cut_blocks_drops_the_end_of_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["In Oslo, by the sea.\n", "\n", "In Lima.\n"] * 4
    ids = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    blocks = cut_blocks(tokenizer, texts, 5)
    assert blocks.flatten().tolist() == ids[: len(ids) // 5 * 5]
    few = cut_blocks(tokenizer, texts, 5, 2)
    assert few.tolist() == [blocks[0].tolist(), blocks[len(blocks) // 2].tolist()]
    with pytest.raises(InputError, match="fewer than one block of 5000"):
        cut_blocks(tokenizer, texts, 5000)


def test_append_divergence_adds_items_below_the_probes(base: Any, targets: BasePredictions) -> None:
    items = pd.DataFrame({"probe": ["p"], "item": ["p/0"], "rougeL_recall": [0.5]})
    assert append_divergence(items, base, None) is items
    both = append_divergence(items, base, targets)
    assert both["probe"].tolist() == ["p"] + ["general_text"] * 7
    scores = set(divergence_items(base, targets).columns) - {"probe", "item"}
    assert scores == set(TEXT_SCORES)
    assert scores - {"base_agreement"} <= UNBOUNDED_METRICS


def test_joined_text_keeps_blank_rows_and_names_bad_lines(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", [{"text": " = Title = \n"}, {"text": ""}])
    assert joined_text(tmp_path / "good.jsonl") == [" = Title = \n", ""]
    write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"content": "b"}])
    with pytest.raises(InputError, match=r"bad.jsonl, line 2: expected a string `text`.*content"):
        joined_text(tmp_path / "bad.jsonl")
