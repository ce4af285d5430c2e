"""The stages of a run: one (an adapter or all weights) or two (an adapter, then chosen layers).

A two-stage run trains an adapter up to a step of its schedule. There the adapter is merged into the
base, and the chosen layers are trained in full with a new optimizer. Both stages share one schedule
and one order of the data. Checkpoints are adapters in the first stage and whole models in the
second.
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
    orthogonality_penalty,
    set_rank_schedule,
)
from forgetting.models.loading import Model, freeze_non_text, language_model
from forgetting.models.tuned import trained_state
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState, newest_step
from forgetting.training.distributed import shard_model
from forgetting.training.mitigations import Mitigations
from forgetting.training.optimizer import learning_rate_ratios
from forgetting.training.run_config import RunConfig


@dataclass(frozen=True)
class RunFactory:
    """Functions that build and train a run.

    Attributes:
        load_base: loads the base model from disk, at every call.
        build_mitigations: builds the mitigations of a model that still computes what the base does.
        train: trains a model, optionally from the state that an earlier stage has reached.
    """

    load_base: Callable[[], PreTrainedModel]
    build_mitigations: Callable[[Model], Mitigations]
    train: Callable[[Model, RunConfig, TrainState | None], TrainState]


def train_stages(
    method: Method, config: RunConfig, factory: RunFactory, folder: Path
) -> tuple[TrainState, Model]:
    """Train all stages of a run, from its newest checkpoint in `folder` if there is one."""
    if method.second_stage is None:
        model, config = prepare_run(method, config, factory)
        return factory.train(model, config, None), model
    switch = second_stage_step(method.second_stage, config.schedule)
    adapter, progress = None, None
    if newest_step(folder) <= switch:
        model, first = prepare_run(method, config, factory)
        progress = factory.train(model, replace(first, until=switch), None)
        if progress.status != "running":
            return progress, model
        adapter = trained_state(model)
        del model
    model, second = _prepare_second_stage(method, config, factory, adapter)
    return factory.train(model, second, progress), model


def prepare_run(method: Method, config: RunConfig, factory: RunFactory) -> tuple[Model, RunConfig]:
    """Return the model of the first stage, and the configuration with the method's additions."""
    base = factory.load_base()
    if method.second_stage:
        # Raise the error for a missing layer now, not after the first stage.
        select_trainable_layers(base, method.second_stage.layers, method.name)
    model = shard_model(
        attach_adapter(base, method, config.seed), config.process_group, config.precision
    )
    mitigations = factory.build_mitigations(model)
    if method.rank_budget:
        set_rank_schedule(model, method.rank_budget, config.schedule.steps)
        penalty = partial(orthogonality_penalty, weight=method.rank_budget.orth_reg_weight)
        mitigations = replace(
            mitigations, weight_penalties=(*mitigations.weight_penalties, penalty)
        )
    cast_frozen_weights(model, config.precision)
    ratios = learning_rate_ratios(model, method)
    return model, replace(config, mitigations=mitigations, lr_ratios=ratios)


def prepare_batched_runs(
    method: Method, configs: Sequence[RunConfig], factory: RunFactory
) -> tuple[Model, list[RunConfig]]:
    """Return the model that runs of one method and seed share, and their configurations."""
    model, prepared = prepare_run(method, configs[0], factory)
    return model, [replace(prepared, hyperparameters=each.hyperparameters) for each in configs]


def second_stage_step(stage: SecondStageConfig, schedule: LrSchedule) -> int:
    """Return the step after which the second stage begins; each stage has at least one step."""
    if schedule.steps < 2:
        raise InputError("methods: a hybrid has two stages, but the training has a single step")
    return min(max(1, round(stage.start * schedule.steps)), schedule.steps - 1)


def _prepare_second_stage(
    method: Method, config: RunConfig, factory: RunFactory, adapter: dict[str, Tensor] | None
) -> tuple[Model, RunConfig]:
    """Return the model of the second stage: the base with the merged adapter and chosen layers.

    Without an `adapter`, the weights come from a checkpoint later. The mitigations are built from
    the base before the merge, so that they keep the model near the base.
    """
    assert method.second_stage is not None
    model = factory.load_base()
    select_trainable_layers(model, method.second_stage.layers, method.name)
    mitigations = factory.build_mitigations(model)
    if adapter is not None:
        # Merge into float32 weights: those under the trained adapter may have been rounded.
        adapted = attach_adapter(factory.load_base(), method, config.seed)
        set_peft_model_state_dict(adapted, adapter)
        model.load_state_dict(adapted.merge_and_unload().state_dict())
    return model, replace(
        config,
        hyperparameters=config.hyperparameters.model_copy(
            update={"learning_rate": method.second_stage.learning_rate}
        ),
        schedule=replace(
            config.schedule, restart=second_stage_step(method.second_stage, config.schedule)
        ),
        mitigations=mitigations,
    )


def select_trainable_layers(model: PreTrainedModel, layers: str | list[str], method: str) -> None:
    """Make `all` layers trainable, the `last N` blocks, or modules whose names end in a pattern.

    Modules that no text passes through, such as a vision tower, stay frozen.

    Raises:
        InputError: no trainable module matches a pattern, or the model has fewer than N blocks.
    """
    model.requires_grad_(layers == "all")
    if isinstance(layers, str):
        if layers != "all":
            for block in _last_blocks(model, int(layers.split()[1]), method):
                block.requires_grad_(True)
        freeze_non_text(model)
        return
    for pattern in layers:
        modules = [
            module
            for name, module in model.named_modules()
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        ]
        if not any(True for module in modules for _ in module.parameters()):
            examples = [name for name, part in model.named_modules() if not list(part.children())]
            raise InputError(
                f"methods: {method}: second_stage.layers: no module with weights ends in "
                f"{pattern}; a module is called, for example, {examples[len(examples) // 2]}"
            )
        for module in modules:
            module.requires_grad_(True)
        freeze_non_text(model)
        if not any(weight.requires_grad for module in modules for weight in module.parameters()):
            raise InputError(
                f"methods: {method}: second_stage.layers: no text reaches the modules whose names "
                f"end in {pattern}; name modules of the language model"
            )


def _last_blocks(model: PreTrainedModel, number: int, method: str) -> list[nn.Module]:
    # The outermost ModuleList of a transformer holds its blocks.
    modules = language_model(model).modules()
    blocks = list(next((m for m in modules if isinstance(m, nn.ModuleList)), []))
    if number > len(blocks):
        raise InputError(
            f"methods: {method}: second_stage.layers: the model has no {number} blocks, but "
            f"{len(blocks)}"
        )
    return blocks[-number:]
