"""One training run on the tiny base model, which can be killed and resumed in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters, RankBudgetConfig, SecondStageConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example, encode_pair
from forgetting.evaluation.probes import evaluate_probes
from forgetting.models.loading import Model, load_base
from forgetting.models.tuned import trained_state
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import build_mitigations
from forgetting.training.run_config import RunConfig
from forgetting.training.stages import RunFactory, train_stages
from forgetting.training.trainer import train_run

CPU = torch.device("cpu")
TRAINING = TrainingConfig(
    epochs=4.0, batch_size=4, micro_batch_size=3, schedule="cosine", warmup_epochs=0.5
)
FULL = Method(
    name="full", kind="full", label="full", hyperparameters=[Hyperparameters(learning_rate=1e-3)]
)
VARIANTS = ["lora", "rslora", "dora", "pissa", "adalora"]

# The selection metric by evaluation. With the first list the rule chooses the third evaluation;
# with the second it chooses none, so that only the newest checkpoint is kept.
REACHES = [0.2, 0.5, 0.8, 0.95]
NEVER_REACHES = [0.2, 0.5, 0.8, 0.85]


def adapter_method(variant: str = "lora", **changes: Any) -> Method:
    """Return a method of rank 4 with dropout; AdaLoRA's initial rank is 6."""
    adalora = changes.pop("adalora", {})
    rank_budget = RankBudgetConfig(**adalora) if variant == "adalora" else None
    return Method(
        name=f"{variant}-r4",
        kind=changes.pop("kind", "lora"),
        label="",
        variant=variant,
        rank=4,
        alpha=8.0,
        dropout=changes.pop("dropout", 0.1),
        rank_budget=rank_budget,
        initial_rank=6 if rank_budget else None,
        hyperparameters=[],
        **changes,
    )


def hybrid_method(layers: str | list[str] = "last 1", start: float = 0.5, **changes: Any) -> Method:
    """Return a method that trains an adapter, merges it, and trains some layers."""
    rate = changes.pop("learning_rate", 1e-3)
    stage = SecondStageConfig(start=start, layers=layers, learning_rate=rate)
    return adapter_method(kind="hybrid", second_stage=stage, **changes)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare tensors with one tolerance, relative and absolute."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@dataclass
class TrainingHarness:
    """A run with its folder; `run` trains it, or resumes it as a new process would."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    rows: list[dict[str, Any]]
    method: Method
    folder: Path
    config: RunConfig
    examples: list[Example]
    values: list[float] = field(default_factory=lambda: REACHES)
    logged: list[int] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        base: Path,
        tokenizer: PreTrainedTokenizerBase,
        prompt: PromptConfig,
        rows: list[dict[str, Any]],
        method: Method,
        folder: Path,
    ) -> TrainingHarness:
        """Return a run on ten rows in batches of four: four epochs, twelve steps."""
        examples = [encode_pair(tokenizer, prompt, row["question"], row["answer"]) for row in rows]
        config = RunConfig(
            hyperparameters=Hyperparameters(learning_rate=0.01, weight_decay=0.1),
            seed=5,
            training=TRAINING,
            schedule=LrSchedule.plan(len(examples), TRAINING, 1.0),
            threshold=0.9,
            stop_after_evaluations=None,
            precision=torch.float32,
            pad=tokenizer.pad_token_id,
        )
        return cls(base, tokenizer, prompt, rows, method, folder, config, examples)

    def run(self, evaluate: Callable[..., Any] | None = None) -> tuple[TrainState, Model]:
        """Load the base model again and train it from the newest checkpoint in the folder."""

        def train(model: Model, config: RunConfig, begun: TrainState | None) -> TrainState:
            measure = evaluate or self.evaluate
            return train_run(
                model, self.examples, config, 0.1, measure, self.folder, self.log, begun
            )

        factory = RunFactory(
            load_base=lambda: load_base(self.base, CPU),
            build_mitigations=lambda model: build_mitigations(
                model, self.method.mitigation, {}, self.config.seed
            ),
            train=train,
        )
        return train_stages(self.method, self.config, factory, self.folder)

    def run_in(self, folder: Path) -> tuple[TrainState, Model]:
        """Train the same run in another folder."""
        return replace(self, folder=folder).run()

    def evaluate(self, model: Model) -> tuple[pd.DataFrame, float]:
        """Return real items, and a value that depends only on the number of evaluations."""
        settings = EvaluationConfig(max_new_tokens=2)
        items = evaluate_probes(model, self.tokenizer, {"p": self.rows[:2]}, self.prompt, settings)
        newest = max(self.folder.glob("step-*/progress.json"), default=None)
        done = len(json.loads(newest.read_text())["evaluations"]) if newest else 0
        return items, self.values[done]

    def log(self, state: TrainState, schedule: LrSchedule) -> None:
        """Note the steps that are logged."""
        self.logged.append(state.step)

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints on disk, including unfinished ones."""
        return sorted(path.name for path in self.folder.iterdir() if "step-" in path.name)

    def logits(self, model: Any) -> torch.Tensor:
        """Return a model's logits on the first example."""
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor([self.examples[0].ids])).logits

    def assert_same_end(
        self,
        ended: tuple[TrainState, Model],
        reference: tuple[TrainState, Model],
        folder: Path,
    ) -> None:
        """Compare weights, losses, evaluations, items and checkpoints with a run, bit for bit.

        Args:
            ended: the run of this harness.
            reference: the run to compare with.
            folder: of the reference.
        """
        (state, model), (expected, other) = ended, reference
        assert state.losses == expected.losses
        assert state.evaluations == expected.evaluations
        assert (state.step, state.tokens, state.status) == (
            expected.step,
            expected.tokens,
            expected.status,
        )
        theirs = trained_state(other)
        for name, tensor in trained_state(model).items():
            assert torch.equal(tensor, theirs[name]), name
        files = sorted(path.name for path in folder.glob("items-*"))
        assert files == sorted(path.name for path in self.folder.glob("items-*"))
        for name in files:
            items, others = pd.read_parquet(self.folder / name), pd.read_parquet(folder / name)
            pd.testing.assert_frame_equal(items, others, check_exact=True)
        kept = replace(self, folder=folder).checkpoints()
        assert self.checkpoints() == kept
        for name in kept:
            for file in (folder / name).glob("*.safetensors"):
                assert file.read_bytes() == (self.folder / name / file.name).read_bytes()
