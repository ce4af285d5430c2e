"""Training speed, side by side: this project's loop, transformers.Trainer, trl's SFTTrainer.

    make bench-train BENCH="--data path/to/full.jsonl --rounds 3"

One process, one model, one set of question-answer pairs, one precision, the same LoRA, the same
loss (mean over the target tokens of a step), one contender after the other, in `--rounds` rounds.
Each trains two epochs and the second is timed, so that nobody pays for warming up. Useful tokens
are those that are not padding. Prints a table and, with --record, appends it to a file.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from forgetting.adapters import attach
from forgetting.checkpoints import Progress
from forgetting.encode import Example, encode_pair
from forgetting.models import (
    has_fast_bfloat16,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    quieten_libraries,
)
from forgetting.optimize import Schedule
from forgetting.plan import Tuning
from forgetting.pretrain import pretrain
from forgetting.recipe import Recipe
from forgetting.records import read_jsonl
from forgetting.study import Prompt, Setting, SmallModel, Training
from forgetting.train import train
from forgetting.world import build_world

LEARNING_RATE = 1e-3
TOFU_LENGTH = 500
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Bench:
    """What all contenders share."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    batch_size: int
    tuning: Tuning
    precision: torch.dtype

    @property
    def tokens(self) -> int:
        """Useful tokens of one epoch."""
        return sum(len(example.ids) for example in self.examples)

    def model(self) -> PeftModel:
        """The base with a fresh adapter."""
        model = attach(load_base(self.base, pick_device()), self.tuning, seed=0)
        assert isinstance(model, PeftModel)
        return model.train()


def ours(bench: Bench) -> float:
    """Seconds of the second epoch in this project's loop."""
    training = Training(
        epochs=2.0,
        batch_size=bench.batch_size,
        micro_batch_size=bench.batch_size,
        schedule="constant",
        warmup_epochs=0.0,
    )
    recipe = Recipe(
        setting=Setting(learning_rate=LEARNING_RATE),
        seed=0,
        training=training,
        schedule=Schedule.plan(len(bench.examples), training, 2.0),
        threshold=1.0,
        stop_after=None,
        precision=bench.precision,
        pad=bench.tokenizer.pad_token_id,
    )
    seconds: list[float] = []

    def tell(progress: Progress, _: Schedule) -> None:
        seconds.append(progress.seconds)

    with tempfile.TemporaryDirectory() as folder:
        train(
            bench.model(), bench.examples, recipe, 0.0, lambda _: (pd.DataFrame(), 0.0),
            Path(folder), tell,
        )  # fmt: skip
    return seconds[-1] - seconds[recipe.schedule.steps_per_epoch - 1]


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Notes when each epoch began and ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._note()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._note()

    def _note(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())


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
    """transformers.Trainer with peft, every pair padded to 500 tokens as TOFU's script does."""

    def padded(example: Example) -> dict[str, torch.Tensor]:
        ids = example.ids[:TOFU_LENGTH]
        rest = TOFU_LENGTH - len(ids)
        labels = [-100] * example.prompt + ids[example.prompt :]
        return {
            "input_ids": torch.tensor(ids + [bench.tokenizer.pad_token_id] * rest),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * rest),
            "labels": torch.tensor(labels + [-100] * rest),
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
        {"input_ids": e.ids, "completion_mask": [0] * e.prompt + [1] * e.targets}
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
    """SFTTrainer, padding to the longest pair of each batch."""
    return _trl(bench, max_length=TOFU_LENGTH)


def trl_packed(bench: Bench) -> float:
    """SFTTrainer, best-fit packing into sequences of 500 tokens; as many tokens to a step."""
    mean = bench.tokens / len(bench.examples)
    packed = max(1, round(bench.batch_size * mean / TOFU_LENGTH))
    return _trl(bench, max_length=TOFU_LENGTH, packing=True, per_device_train_batch_size=packed)


CONTENDERS: dict[str, Callable[[Bench], float]] = {
    "lora-forgetting": ours,
    "Trainer, padded to 500": trainer_padded,
    "trl, padded to the longest": trl_dynamic,
    "trl, packed": trl_packed,
}


@dataclass(frozen=True)
class Cost:
    """Model FLOPs of a useful token: forward and backward without the gradient of frozen weights.

    4 N + 6 N_lora with N the weights of the linear layers, embedding excluded (2 N forward, 2 N for
    the gradient of the activations, 2 N more only where weights are trained); attention's own
    products are left out, which understates all contenders alike.
    """

    frozen: int
    trained: int

    @property
    def flops(self) -> float:
        """Floating-point operations of a useful token."""
        return 4.0 * self.frozen + 6.0 * self.trained


def cost(bench: Bench) -> Cost:
    """The model's linear weights, frozen and trained."""
    frozen = trained = 0
    for name, parameter in bench.model().named_parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        elif parameter.ndim == 2 and "embed_tokens" not in name:
            frozen += parameter.numel()
    return Cost(frozen, trained)


def matmul_rate(precision: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of square matrix products on this machine, the best of several."""
    device = pick_device()
    left, right = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    best, begun = 0.0, time.monotonic()
    while time.monotonic() - begun < seconds:
        started = time.monotonic()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = max(best, 2.0 * size**3 / (time.monotonic() - started))
    return best


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    """Largest memory since the last reset: of the GPU, else of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(bench: Bench, rounds: int) -> pd.DataFrame:
    """One row per contender: median seconds, tokens/s, ratio to ours, share of the matmul rate."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory = dict.fromkeys(CONTENDERS, 0.0)
    for number in range(rounds):
        for name, contender in CONTENDERS.items():
            _reset_peak()
            seconds[name].append(contender(bench))
            memory[name] = max(memory[name], _peak_gib())
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.2f} s", flush=True)
    flops, peak = cost(bench).flops, matmul_rate(bench.precision)
    rows = []
    for name, times in seconds.items():
        rate = bench.tokens / statistics.median(times)
        ratios = [other / own for other, own in zip(times, seconds["lora-forgetting"], strict=True)]
        rows.append(
            {
                "contender": name,
                "tokens/s": f"{rate:,.0f}",
                "range": f"{bench.tokens / max(times):,.0f}-{bench.tokens / min(times):,.0f}",
                "ours is faster by": f"{statistics.median(ratios):.2f}",
                "share of matmul rate": f"{rate * flops / peak:.1%}",
                "peak GiB": f"{memory[name]:.2f}",
            }
        )
    return pd.DataFrame(rows)


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """The model and the pairs: those given, or a small model and the micro-world's new authors."""
    rows = read_jsonl(options.data) if options.data else build_world(seed=0).train
    rows = rows[: options.pairs]
    base = options.model
    if base is None:
        base = folder / "model"
        texts = [f"{row['question']} {row['answer']}" for row in rows]
        shape = SmallModel(hidden_size=256, intermediate_size=688, layers=4, heads=4, epochs=0.1)
        pretrain(texts, shape, base, seed=0)
    tokenizer = load_tokenizer(base)
    return Bench(
        base=base,
        tokenizer=tokenizer,
        examples=[
            encode_pair(tokenizer, Prompt(), row["question"], row["answer"], TOFU_LENGTH)
            for row in rows
        ],
        batch_size=options.batch_size,
        tuning=Tuning(
            name=f"lora-r{options.rank}",
            kind="lora",
            label=f"rank {options.rank}",
            rank=options.rank,
            alpha=2.0 * options.rank,
            settings=[],
        ),
        precision=pick_precision("auto", pick_device()),
    )


def machine() -> str:
    """What the figures were taken on."""
    device = pick_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bfloat16 = "with" if has_fast_bfloat16(device) else "without"
    return f"{platform.machine()} CPU, {os.cpu_count()} threads, {bfloat16} bfloat16 in hardware"


def main(argv: Sequence[str] | None = None) -> None:
    """Run every contender in every round and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model folder; default: small, 4 layers of 256")
    parser.add_argument("--data", type=Path, help="JSON lines of question and answer")
    parser.add_argument("--pairs", type=int, default=640, help="at most so many pairs")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(options, Path(folder))
        table = measure(bench, options.rounds)
    arithmetic = str(bench.precision).removeprefix("torch.")
    mean = bench.tokens / len(bench.examples)
    head = (
        f"## {datetime.date.today()}, {machine()}\n\n"
        f"LoRA rank {options.rank}, {len(bench.examples)} pairs of {mean:.0f} tokens, "
        f"{options.batch_size} to a step, {arithmetic}, medians of {options.rounds} rounds; "
        f"torch {torch.__version__}, transformers {transformers.__version__}.\n\n"
    )
    text = head + table.to_markdown(index=False) + "\n"
    print("\n" + text)
    if options.record:
        with options.record.open("a", encoding="utf-8") as record:
            record.write("\n" + text)


if __name__ == "__main__":
    main()
