"""An evaluation with merged adapters has the same numbers and restores the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import Model, load_base
from forgetting.models.tuned import merged_adapter
from support.training import VARIANTS, adapter_method

IDS = torch.arange(3, 15)[None]


def _trained(base_folder: Path, variant: str) -> Model:
    """Return a model with an adapter of random weights, as after training."""
    model = attach_adapter(
        load_base(base_folder, torch.device("cpu")), adapter_method(variant), seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_adapter_keeps_logits_and_restores_bits(base_folder: Path, variant: str) -> None:
    model = _trained(base_folder, variant)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    separate = model(input_ids=IDS).logits
    with merged_adapter(model, torch.float32):
        together = model(input_ids=IDS).logits
    assert separate == pytest.approx(together, abs=2e-5)
    assert (
        separate - load_base(base_folder, torch.device("cpu"))(input_ids=IDS).logits
    ).abs().max() > 0.01
    assert torch.equal(model(input_ids=IDS).logits, separate)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "adalora"])
def test_merged_zero_adapter_is_bit_identical_to_the_base(base_folder: Path, variant: str) -> None:
    base = load_base(base_folder, torch.device("cpu"))
    logits = base(input_ids=IDS).logits
    model = attach_adapter(base, adapter_method(variant), seed=0).eval()
    with merged_adapter(model, torch.float32):
        assert torch.equal(model(input_ids=IDS).logits, logits)


def test_failed_evaluation_unmerges_the_adapter(base_folder: Path) -> None:
    model = _trained(base_folder, "lora")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), merged_adapter(model, torch.float32):
        raise KeyboardInterrupt
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_bfloat16_adapter_is_not_merged(base_folder: Path) -> None:
    """The sum would round a small update away."""
    model = _trained(base_folder, "lora")
    assert isinstance(model, PeftModel)
    with merged_adapter(model, torch.bfloat16):
        assert not any(getattr(module, "merged", False) for module in model.modules())
