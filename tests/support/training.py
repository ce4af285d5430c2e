"""Runs on the tiny base model, which can be killed and resumed in their folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.config.expand import Method
from forgetting.config.methods import Hyperparameters, RankBudgetConfig, SecondStageConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.config.training import TrainingConfig
from forgetting.data.tokenize import Example, encode_pair, encode_text
from forgetting.evaluation.metrics import mean_score
from forgetting.evaluation.probes import evaluate_probes
from forgetting.models.adapters import attach_adapter
from forgetting.models.forward import target_logits
from forgetting.models.loading import Model, load_base
from forgetting.models.tuned import trained_state
from forgetting.schedule import LrSchedule
from forgetting.training import microbatches, train_step
from forgetting.training.checkpoints import TrainState
from forgetting.training.mitigations import Mitigations, build_mitigations
from forgetting.training.optimizer import learning_rate_ratios
from forgetting.training.run_config import RunConfig
from forgetting.training.stages import RunFactory, train_stages
from forgetting.training.trainer import train_batched, train_run
from support.kill import Killed, kill_at
from support.run_groups import examples_in

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


def run_config(
    examples: Sequence[Example], training: TrainingConfig, pad: int, **changes: Any
) -> RunConfig:
    """Return the configuration of a run that is evaluated every epoch; `changes` are its fields."""
    defaults: dict[str, Any] = {
        "hyperparameters": Hyperparameters(learning_rate=0.01),
        "seed": 0,
        "schedule": LrSchedule.plan(len(examples), training, 1.0),
        "base_value": 0.1,
        "threshold": 1.0,
        "stop_after_evaluations": None,
        "precision": torch.float32,
    }
    return RunConfig(training=training, pad=pad, **defaults | changes)


def no_items(_: Model) -> tuple[pd.DataFrame, float]:
    """Evaluate nothing."""
    return pd.DataFrame({"value": [0.1]}), 0.1


def move_weights(model: Model) -> Model:
    """Change all trained weights at random, and return the model."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@dataclass
class TrainingHarness:
    """Runs on the tiny base model, which are trained, or resumed as a new process would.

    Attributes:
        values: selection metric of each evaluation; None for the probability of the answers.
        general: examples of general text, for mitigations that read `world/documents`.
        settings: hyperparameters of the runs of `batched` and `single`.
        dtype: type of the weights in `batched` and `single`.
        logged: steps that were logged; of several runs with the index of the run.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    rows: list[dict[str, Any]]
    method: Method
    folder: Path
    config: RunConfig
    examples: list[Example]
    values: list[float] | None = field(default_factory=lambda: REACHES)
    general: list[Example] = field(default_factory=list)
    settings: Sequence[Hyperparameters] = ()
    dtype: torch.dtype = torch.float32
    logged: list[Any] = field(default_factory=list)

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
        setting = Hyperparameters(learning_rate=0.01, weight_decay=0.1)
        config = run_config(
            examples,
            TRAINING,
            tokenizer.pad_token_id,
            hyperparameters=setting,
            seed=5,
            threshold=0.9,
        )
        return cls(base, tokenizer, prompt, rows, method, folder, config, examples)

    def set_training(self, every: float = 1.0, **changes: Any) -> None:
        """Change fields of the training section, and evaluate every so many epochs."""
        training = self.config.training.model_copy(update=changes)
        schedule = LrSchedule.plan(len(self.examples), training, every)
        self.config = replace(self.config, training=training, schedule=schedule)

    def set_rate(self, rate: float, weight_decay: float = 0.0) -> None:
        """Change the hyperparameters."""
        setting = Hyperparameters(learning_rate=rate, weight_decay=weight_decay)
        self.config = replace(self.config, hyperparameters=setting)

    def copy_to(self, folder: Path) -> TrainingHarness:
        """Return the same runs in another folder."""
        return replace(self, folder=folder, logged=[])

    def with_untied_head(self, folder: Path) -> TrainingHarness:
        """Return the same run on a base with a separate output head, which is written to folder."""
        shutil.copytree(self.base, folder)
        config = LlamaConfig.from_pretrained(self.base, tie_word_embeddings=False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            LlamaForCausalLM(config).save_pretrained(folder)
        return replace(self, base=folder)

    def with_mitigation(
        self, method: Method, sections: Mapping[str, Any] | None, **changes: Any
    ) -> TrainingHarness:
        """Return a run on seven rows with mitigations; the last three rows are the general text.

        Three epochs in batches of four, each of two forward passes.

        Args:
            method: method of the run.
            sections: mitigation section of a study, or None.
            changes: fields of the training section.
        """
        mitigation = MitigationConfig.model_validate(sections) if sections else None
        general = [
            encode_text(self.tokenizer, f"{row['answer']} {row['question']}")
            for row in self.rows[7:]
        ]
        harness = replace(
            self,
            method=method.model_copy(update={"mitigation": mitigation}),
            examples=self.examples[:7],
            general=general,
        )
        harness.set_rate(2e-3 if method.kind == "full" else 0.01)
        settings = {"epochs": 3.0, "micro_batch_size": 2, "warmup_epochs": 0.0} | changes
        harness.set_training(**settings)
        return harness

    def load(self) -> PreTrainedModel:
        """Load the base model from disk."""
        return load_base(self.base, CPU)

    def model(self) -> Model:
        """Return the base model with an untrained adapter."""
        return attach_adapter(self.load(), self.method, self.config.seed).to(self.dtype)

    def mitigations(self, model: Model) -> Mitigations:
        """Return the mitigations of the method."""
        return build_mitigations(
            model,
            self.method.mitigation,
            {"world/documents": self.general},
            self.general if self.method.mitigation and self.method.mitigation.replay else (),
            self.config.seed,
        )

    def run(self, evaluate: Callable[..., Any] | None = None) -> tuple[TrainState, Model]:
        """Load the base model again and train it from the newest checkpoint in the folder."""

        def train(model: Model, config: RunConfig, begun: TrainState | None) -> TrainState:
            measure = evaluate or self.evaluate
            return train_run(model, self.examples, config, measure, self.folder, self.log, begun)

        factory = RunFactory(load_base=self.load, build_mitigations=self.mitigations, train=train)
        return train_stages(self.method, self.config, factory, self.folder)

    def run_in(self, folder: Path) -> tuple[TrainState, Model]:
        """Train the same run in another folder."""
        return self.copy_to(folder).run()

    def plans(self) -> list[tuple[RunConfig, Path]]:
        """Return a run for each of the settings, in folders numbered from 0."""
        ratios = learning_rate_ratios(self.model(), self.method)
        return [
            (
                replace(self.config, hyperparameters=setting, lr_ratios=ratios),
                self.folder / str(number),
            )
            for number, setting in enumerate(self.settings)
        ]

    def batched(self) -> list[TrainState]:
        """Train the runs of all settings in shared passes."""
        return train_batched(
            self.model(), self.examples, self.plans(), self.evaluate, self.log_batched
        )

    def single(self) -> list[TrainState]:
        """Train the runs of all settings one after the other."""
        return [
            train_run(self.model(), self.examples, config, self.evaluate, folder, self.log)
            for config, folder in self.plans()
        ]

    def evaluate(self, model: Model) -> tuple[pd.DataFrame, float]:
        """Return real items, and their probability or the value for the number of evaluations."""
        settings = EvaluationConfig(max_new_tokens=2)
        items = evaluate_probes(model, self.tokenizer, {"p": self.rows[:2]}, self.prompt, settings)
        if self.values is None:
            return items, mean_score(items, "p", "probability")
        newest = max(self.folder.glob("step-*/progress.json"), default=None)
        done = len(json.loads(newest.read_text())["evaluations"]) if newest else 0
        return items, self.values[done]

    def log(self, state: TrainState, schedule: LrSchedule) -> None:
        """Note the steps that are logged."""
        self.logged.append(state.step)

    def log_batched(self, number: int, state: TrainState, schedule: LrSchedule) -> None:
        """Note the runs and steps that are logged."""
        self.logged.append((number, state.step))

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
        kept = self.copy_to(folder).checkpoints()
        assert self.checkpoints() == kept
        for name in kept:
            for file in (folder / name).glob("*.safetensors"):
                assert file.read_bytes() == (self.folder / name / file.name).read_bytes()

    def assert_resumes(
        self, reference: Path, expected: tuple[TrainState, Model], *kill: Any, after: bool = False
    ) -> None:
        """Kill a run at a call of a function, resume it, and compare it with a run, bit for bit.

        Args:
            reference: folder of the run to compare with.
            expected: final state and model of that run.
            kill: owner and name of the function, and number of the call.
            after: whether the function does its work before the kill.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, *kill, after=after)
            with pytest.raises(Killed):
                self.run()
        self.assert_same_end(self.run(), expected, reference)


def limit_examples(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Limit the examples of a pass; return a list that collects those of all attempts."""
    attempts: list[int] = []

    def limited(model: Model, batch: Any) -> torch.Tensor:
        attempts.append(examples_in(batch))
        if attempts[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return target_logits(model, batch)

    monkeypatch.setattr(train_step, "target_logits", limited)
    # Batches are never split to save padding.
    monkeypatch.setitem(microbatches.FORWARD_OVERHEAD_TOKENS, "cpu", 10_000)
    return attempts
