"""Compute golden losses: trl and peft train a tiny model for 20 steps.

    pip install --requirement envs/bench.txt --constraint envs/requirements.txt
    python tests/golden/make_losses.py

This writes losses.json to the same folder; tests/equivalence/test_golden_losses.py reads it. Seeds
determine model, batches and adapters. Loss, gradients, accumulation, clipping, decay, schedule and
optimizer are those of trl's SFTTrainer or transformers' Trainer; adapters are peft's. The settings
make their definitions equal to ours:

- loss: the mean over the target tokens of the whole step, not the mean of the means of
  micro-batches (`loss_type: nll`, and the number of items in the batch that the Trainer passes);
- weight decay: the Trainer excludes biases and norms, as we do; `full-decay-vectors` passes AdamW
  over all weights, which is our `training.decay_norms_and_biases`;
- rows in the order of the file, no truncation, no dropout.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FILE = Path(__file__).with_name("losses.json")
STEPS, ROWS, RANK, ALPHA, WARMUP, CLIP = 20, 8, 4, 6.0, 2, 1.0
PAD, VOCABULARY, LONGEST = 0, 96, 40
PROBE = [3, 14, 15, 92, 65, 35, 89, 79]
"""Tokens whose logits are compared after training."""


@dataclass(frozen=True)
class Case:
    """Settings of one training; all other settings are shared."""

    variant: str | None = None
    rate: float = 1e-2
    decay: float = 0.1
    accumulate: int = 1
    library: str = "trl"
    loraplus_lr_ratio: float | None = None
    decay_norms_and_biases: bool = False
    optimizer: str = "adamw"
    scale_parameter: bool = False


CASES = {
    "lora": Case("lora"),
    "lora-accumulated": Case("lora", accumulate=4),
    "lora-plus": Case("lora", rate=2e-3, loraplus_lr_ratio=8.0),
    "rslora": Case("rslora"),
    "dora": Case("dora"),
    "pissa": Case("pissa", rate=5e-3),
    "full": Case(rate=2e-3, decay=0.0),
    "full-decay": Case(rate=2e-3, decay=1.0, library="transformers"),
    "full-decay-vectors": Case(rate=2e-3, decay_norms_and_biases=True),
    "full-accumulated": Case(rate=2e-3, decay=0.0, accumulate=2),
    "full-transformers": Case(rate=2e-3, decay=0.0, accumulate=2, library="transformers"),
    "lora-adafactor": Case("lora", optimizer="adafactor"),
    "full-adafactor": Case(rate=2e-3, decay=0.0, optimizer="adafactor", library="transformers"),
    "full-adafactor-scaled": Case(
        rate=5e-2, decay=0.0, optimizer="adafactor", scale_parameter=True
    ),
}


def rows() -> list[tuple[list[int], int]]:
    """Return token ids and prompt lengths of examples whose lengths vary widely in a batch."""
    draw = random.Random(0)
    made = []
    for number in range(STEPS * ROWS):
        length = LONGEST if number % ROWS == 0 else draw.randint(4, LONGEST // 2)
        # Some tokens are much more frequent than others, so that there is something to learn.
        ids = [1 + int((VOCABULARY - 1) * draw.random() ** 4) for _ in range(length)]
        made.append((ids, draw.randint(1, length - 2)))
    return made


def write_base(folder: Path) -> None:
    """Write a Llama of 2 layers and width 32 with weights from numpy."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=PAD,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    draw({n: p for n, p in model.named_parameters() if p.ndim == 2}, 0.3)
    model.save_pretrained(folder)


def draw_adapter(model: torch.nn.Module) -> None:
    """Set the random halves of adapters to weights from numpy."""
    draw({n: p for n, p in model.named_parameters() if ".lora_A." in n}, 0.3)


@torch.no_grad()
def draw(parameters: dict[str, torch.nn.Parameter], width: float) -> None:
    """Fill weights uniformly, in the order of their names."""
    generator = torch.Generator().manual_seed(0)
    for name in sorted(parameters):
        shape = parameters[name].shape
        parameters[name].copy_((torch.rand(shape, generator=generator) - 0.5) * 2 * width)


def outcome(model: Any, start: dict[str, torch.Tensor], losses: list[float]) -> dict[str, Any]:
    """Return losses, the norm of the changes of weights, and final predictions."""
    moved = [(p.detach() - start[n]).double().norm() for n, p in weights(model).items()]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([PROBE])).logits[0, -1, :8]
    return {
        "losses": losses,
        "moved": float(torch.stack(moved).norm()),
        "logits": logits.tolist(),
    }


def weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained weights by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _adapter(case: Case) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_rslora=case.variant == "rslora",
        use_dora=case.variant == "dora",
        init_lora_weights="pissa" if case.variant == "pissa" else True,
    )


def _optimizer(case: Case, model: Any) -> torch.optim.Optimizer | None:
    if case.loraplus_lr_ratio:
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=case.rate,
            loraplus_lr_ratio=case.loraplus_lr_ratio,
            weight_decay=case.decay,
            loraplus_weight_decay=case.decay,
        )
    if case.scale_parameter:
        from transformers import Adafactor

        return Adafactor(
            model.parameters(), lr=case.rate, scale_parameter=True, relative_step=False
        )
    if case.decay_norms_and_biases:
        return torch.optim.AdamW(model.parameters(), lr=case.rate, weight_decay=case.decay)
    return None


def _arguments(case: Case, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // case.accumulate,
        "gradient_accumulation_steps": case.accumulate,
        "learning_rate": case.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "weight_decay": case.decay,
        "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "optim": "adafactor" if case.optimizer == "adafactor" else "adamw_torch",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _trl(case: Case, base: str, folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{number}": number for number in range(VOCABULARY)}
    table = [
        {"input_ids": ids, "completion_mask": [0] * prompt + [1] * (len(ids) - prompt)}
        for ids, prompt in rows()
    ]
    return SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(
            **_arguments(case, folder), max_length=None, completion_only_loss=True, loss_type="nll"
        ),
        train_dataset=Dataset.from_list(table),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words)), pad_token="w0", eos_token="w0"
        ),
        peft_config=_adapter(case) if case.variant else None,
    )


def _transformers(case: Case, base: str, folder: str) -> Any:
    from transformers import Trainer, TrainingArguments

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": PAD, "labels": -100, "attention_mask": 0}
        return {
            key: torch.tensor([e[key] + [value] * (length - len(e[key])) for e in examples])
            for key, value in fill.items()
        }

    table = [
        {
            "input_ids": ids,
            "labels": [-100] * prompt + ids[prompt:],
            "attention_mask": [1] * len(ids),
        }
        for ids, prompt in rows()
    ]
    return Trainer(
        model=LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=TrainingArguments(**_arguments(case, folder)),
        train_dataset=table,
        data_collator=collate,
    )


def train_theirs(case: Case) -> dict[str, Any]:
    """Train a case with trl or transformers."""
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as folder:
        write_base(Path(base))
        make = {"trl": _trl, "transformers": _transformers}[case.library]
        trainer = make(case, base, folder)
        if case.variant != "pissa":
            draw_adapter(trainer.model)
        trainer.optimizer = _optimizer(case, trainer.model)
        start = {name: p.detach().clone() for name, p in weights(trainer.model).items()}
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return outcome(trainer.model, start, losses)


def main() -> None:
    """Train every case and write the outcomes."""
    torch.set_num_threads(1)
    libraries = ("torch", "transformers", "peft", "accelerate", "trl")
    made = {
        "versions": {name: version(name) for name in libraries},
        "cases": {name: train_theirs(case) for name, case in CASES.items()},
    }
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
