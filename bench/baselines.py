"""Training loops to compare: this project's, transformers.Trainer and trl's SFTTrainer.

Each trains two epochs, and the second is timed, which excludes warm-up. All have the same model,
pairs, pairs per step, precision, AdamW and gradient clipping. The loss is the mean over the target
tokens of a step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example
from forgetting.models.adapters import attach_adapter, cast_frozen_weights
from forgetting.models.loading import Model
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState
from forgetting.training.run_config import RunConfig
from forgetting.training.trainer import train_run

LEARNING_RATE = 1e-3
TOFU_LENGTH = 500


@dataclass(frozen=True)
class Bench:
    """Model, data and settings that all contenders share."""

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    batch_size: int
    method: Method
    precision: torch.dtype
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Return the tokens of one epoch without padding."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest pair."""
        return max(len(example.ids) for example in self.examples)

    def model(self) -> Model:
        """Return the base with the method's adapter, in training mode."""
        return attach_adapter(self.load(), self.method, self.seed).train()


def run_config(bench: Bench, hyperparameters: Hyperparameters) -> RunConfig:
    """Return the configuration of two epochs in this project's loop."""
    training = TrainingConfig(
        epochs=2.0,
        batch_size=bench.batch_size,
        micro_batch_size=bench.batch_size,
        schedule="constant",
        warmup_epochs=0.0,
    )
    return RunConfig(
        hyperparameters=hyperparameters,
        seed=bench.seed,
        training=training,
        schedule=LrSchedule.plan(len(bench.examples), training, 2.0),
        base_value=0.0,
        threshold=1.0,
        stop_after_evaluations=None,
        precision=bench.precision,
        pad=bench.tokenizer.pad_token_id,
    )


def timed_by() -> str:
    """Return `processor` for a single CPU thread, which other load does not affect, or `clock`."""
    return (
        "processor" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "clock"
    )


def clock() -> float:
    """Return seconds of the processor or the wall clock, see `timed_by`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if timed_by() == "processor" else time.monotonic()


def ours(bench: Bench) -> float:
    """Return the seconds of the second epoch in this project's loop."""
    config = run_config(bench, Hyperparameters(learning_rate=LEARNING_RATE))
    times: list[float] = []

    def log(state: TrainState, schedule: LrSchedule) -> None:
        if state.step == schedule.steps_per_epoch:
            times.append(clock())

    def evaluate(_: Model) -> tuple[pd.DataFrame, float]:
        times.append(clock())
        return pd.DataFrame(), 0.0

    model = bench.model()
    cast_frozen_weights(model, bench.precision)
    with tempfile.TemporaryDirectory() as folder:
        train_run(model, bench.examples, config, evaluate, Path(folder), log)
    start, end = times
    return end - start


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Record when each epoch begins and ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(clock())

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.times.append(clock())


def _arguments(bench: Bench, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": 2,
        "per_device_train_batch_size": bench.batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "bf16": bench.precision == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _second_epoch(trainer: Trainer) -> float:
    epochs = _Epochs()
    trainer.add_callback(epochs)
    trainer.train()
    return epochs.times[3] - epochs.times[2]


def trainer_padded(bench: Bench) -> float:
    """Time transformers.Trainer with peft; pairs are padded to 500 tokens, as in TOFU's script."""

    def padded(example: Example) -> dict[str, torch.Tensor]:
        padding = TOFU_LENGTH - len(example.ids)
        labels = [-100] * example.prompt_length + example.ids[example.prompt_length :]
        return {
            "input_ids": torch.tensor(example.ids + [bench.tokenizer.pad_token_id] * padding),
            "attention_mask": torch.tensor([1] * len(example.ids) + [0] * padding),
            "labels": torch.tensor(labels + [-100] * padding),
        }

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=bench.model(),
            args=TrainingArguments(**_arguments(bench, folder)),
            train_dataset=[padded(example) for example in bench.examples],
        )
        return _second_epoch(trainer)


def _trl(bench: Bench, **options: Any) -> float:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": e.ids, "completion_mask": [0] * e.prompt_length + [1] * e.targets}
        for e in bench.examples
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **(_arguments(bench, folder) | options), completion_only_loss=True, loss_type="nll"
        )
        trainer = SFTTrainer(
            model=bench.model(),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=bench.tokenizer,
        )
        return _second_epoch(trainer)


def trl_dynamic(bench: Bench) -> float:
    """Time SFTTrainer, padding to the longest pair of each batch."""
    return _trl(bench, max_length=TOFU_LENGTH)


def trl_grouped(bench: Bench) -> float:
    """Time SFTTrainer with batches of similar length, which are no longer random."""
    return _trl(bench, max_length=TOFU_LENGTH, train_sampling_strategy="group_by_length")


def trl_accumulated(bench: Bench) -> float:
    """Time SFTTrainer with four micro-batches per step, each padded to its longest pair."""
    rows = max(1, bench.batch_size // 4)
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4}
    return _trl(bench, max_length=TOFU_LENGTH, **options)


def trl_unpadded(bench: Bench) -> float:
    """Time SFTTrainer with the pairs of a batch in one row without padding."""
    return _trl(bench, max_length=None, padding_free=True)


def trl_packed(bench: Bench) -> float:
    """Time SFTTrainer with best-fit packing into blocks of the longest pair.

    A step has about as many tokens as with the other contenders.
    """
    mean = bench.tokens / len(bench.examples)
    blocks = max(1, round(bench.batch_size * mean / bench.longest))
    options = {"packing": True, "per_device_train_batch_size": blocks}
    return _trl(bench, max_length=bench.longest, **options)


OURS = "lora-forgetting"
CONTENDERS: dict[str, Callable[[Bench], float]] = {
    OURS: ours,
    "Trainer, padded to 500": trainer_padded,
    "trl, padded to the longest": trl_dynamic,
    "trl, grouped by length": trl_grouped,
    "trl, four micro-batches a step": trl_accumulated,
    "trl, without padding": trl_unpadded,
    "trl, packed": trl_packed,
}
