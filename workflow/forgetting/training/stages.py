"""The parts of a run: an adapter, all weights, or first the one and then chosen layers.

A hybrid trains an adapter up to a step of its schedule. There the adapter is merged into the base,
and the chosen layers are trained in full with a new optimizer, on the same schedule and the same
order of the data. What is on disk is an adapter up to that step, and a whole model after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from peft import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetting.config.expand import Method
from forgetting.config.methods import SecondStageConfig
from forgetting.errors import InputError
from forgetting.models.adapters import (
    attach_adapter,
    cast_frozen_weights,
    embedding_weights,
    orthogonality_penalty,
    set_rank_schedule,
)
from forgetting.models.loading import Model, freeze_non_text, language_model
from forgetting.models.tuned import trained_state
from forgetting.schedule import LrSchedule
from forgetting.training.batched_lora import AdapterState
from forgetting.training.checkpoints import TrainState, newest_step
from forgetting.training.distributed import shard_model
from forgetting.training.mitigations import Mitigations
from forgetting.training.run_config import RunConfig


@dataclass(frozen=True)
class RunFactory:
    """What a run is made with.

    Attributes:
        load: the base, afresh at every call.
        guard: the mitigation of a model that still computes what the base does.
        fit: trains a model by a recipe, from what an earlier part has reached.
    """

    load_base: Callable[[], PreTrainedModel]
    build_mitigations: Callable[[Model], Mitigations]
    train: Callable[[Model, RunConfig, TrainState | None], TrainState]


def train_stages(
    tuning: Method, recipe: RunConfig, means: RunFactory, folder: Path
) -> tuple[TrainState, Model]:
    """Train a base as the method says, from the newest checkpoint in `folder` if there is one."""
    if tuning.second_stage is None:
        model, recipe = prepare_run(tuning, recipe, means)
        return means.train(model, recipe, None), model
    switch = second_stage_step(tuning.second_stage, recipe.schedule)
    adapter, progress = None, None
    if newest_step(folder) <= switch:
        model, first = prepare_run(tuning, recipe, means)
        progress = means.train(model, replace(first, until=switch), None)
        if progress.status != "running":
            return progress, model
        adapter = trained_state(model)
        del model
    second, last = _second_stage(tuning, recipe, means, adapter)
    return means.train(second, last, progress), second


def prepare_run(tuning: Method, recipe: RunConfig, means: RunFactory) -> tuple[Model, RunConfig]:
    """A base made trainable, and the recipe with what the method adds to it."""
    base = means.load_base()
    if tuning.second_stage:
        # A layer that is not there is told now, not when half of the training is done.
        select_trainable_layers(base, tuning.second_stage.layers, tuning.name)
    model = shard_model(
        attach_adapter(base, tuning, recipe.seed), recipe.process_group, recipe.precision
    )
    mitigations = means.build_mitigations(model)
    if tuning.rank_budget:
        set_rank_schedule(model, tuning.rank_budget, recipe.schedule.steps)
        penalty = partial(orthogonality_penalty, weight=tuning.rank_budget.orth_reg_weight)
        mitigations = replace(
            mitigations, weight_penalties=(*mitigations.weight_penalties, penalty)
        )
    ratios: dict[str, float] = {}
    if tuning.embedding_lr_ratio is not None:
        ratios = dict.fromkeys(embedding_weights(model), tuning.embedding_lr_ratio)
    cast_frozen_weights(model, recipe.precision)
    return model, replace(recipe, mitigations=mitigations, lr_ratios=ratios)


def prepare_batched_runs(
    tuning: Method, recipes: Sequence[RunConfig], means: RunFactory
) -> tuple[Model, list[RunConfig], list[AdapterState]]:
    """Return the model that runs of a method and seed share, their recipes and first weights."""
    model, whole = prepare_run(tuning, recipes[0], means)
    start = AdapterState.of(model)
    return (
        model,
        [replace(whole, hyperparameters=each.hyperparameters) for each in recipes],
        [start] * len(recipes),
    )


def second_stage_step(then: SecondStageConfig, schedule: LrSchedule) -> int:
    """The step after which the second part begins; both parts have at least one."""
    if schedule.steps < 2:
        raise InputError("methods: a hybrid has two parts, but the training has a single step")
    return min(max(1, round(then.start * schedule.steps)), schedule.steps - 1)


def _second_stage(
    tuning: Method, recipe: RunConfig, means: RunFactory, adapter: dict[str, Tensor] | None
) -> tuple[Model, RunConfig]:
    """The base with chosen layers to train and the adapter merged, unless a checkpoint follows.

    The mitigation looks at the base before the adapter is merged, so that it keeps the model near
    the base, and not near what the first part has made of it.
    """
    assert tuning.second_stage is not None
    model = means.load_base()
    select_trainable_layers(model, tuning.second_stage.layers, tuning.name)
    mitigations = means.build_mitigations(model)
    if adapter is not None:
        # Merged into float32 weights: those under the adapter may have been rounded for speed.
        adapted = attach_adapter(means.load_base(), tuning, recipe.seed)
        set_peft_model_state_dict(adapted, adapter)
        model.load_state_dict(adapted.merge_and_unload().state_dict())
    return model, replace(
        recipe,
        hyperparameters=recipe.hyperparameters.model_copy(
            update={"learning_rate": tuning.second_stage.learning_rate}
        ),
        schedule=replace(
            recipe.schedule, restart=second_stage_step(tuning.second_stage, recipe.schedule)
        ),
        loraplus_lr_ratio=None,
        mitigations=mitigations,
    )


def select_trainable_layers(model: PreTrainedModel, layers: str | list[str], method: str) -> None:
    """Train only `all`, or the `last N` blocks, or the modules whose names end in a pattern.

    What no text reaches, such as a vision tower, stays frozen.
    """
    model.requires_grad_(layers == "all")
    if isinstance(layers, str):
        if layers != "all":
            for block in _last_blocks(model, int(layers.split()[1]), method):
                block.requires_grad_(True)
        freeze_non_text(model)
        return
    for pattern in layers:
        found = [
            module
            for name, module in model.named_modules()
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        ]
        if not any(True for module in found for _ in module.parameters()):
            examples = [name for name, part in model.named_modules() if not list(part.children())]
            raise InputError(
                f"methods: {method}: then.layers: no module with weights ends in {pattern}; "
                f"a module is called, for example, {examples[len(examples) // 2]}"
            )
        for module in found:
            module.requires_grad_(True)
        freeze_non_text(model)
        if not any(weight.requires_grad for module in found for weight in module.parameters()):
            raise InputError(
                f"methods: {method}: then.layers: no text reaches the modules whose names end in "
                f"{pattern}; name modules of the language model"
            )


def _last_blocks(model: PreTrainedModel, number: int, method: str) -> list[nn.Module]:
    # The outermost list of a transformer holds its blocks.
    inner = language_model(model).modules()
    blocks = list(next((m for m in inner if isinstance(m, nn.ModuleList)), []))
    if number > len(blocks):
        raise InputError(
            f"methods: {method}: then.layers: the model has no {number} blocks, but {len(blocks)}"
        )
    return blocks[-number:]
