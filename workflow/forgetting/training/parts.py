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

from forgetting.models.adalora import orthogonality, plan_budget
from forgetting.models.adapters import attach, embedding_weights, round_frozen
from forgetting.models.loading import Model, freeze_unread, language_model
from forgetting.models.tuned import trained_state
from forgetting.records import InputError
from forgetting.sections.variants import Then
from forgetting.settings.plan import Tuning
from forgetting.training.checkpoints import Progress, newest_step
from forgetting.training.fused import Own
from forgetting.training.mitigate import Safeguards
from forgetting.training.parallel import shard
from forgetting.training.recipe import Recipe
from forgetting.training.schedule import Schedule


@dataclass(frozen=True)
class Means:
    """What a run is made with.

    Attributes:
        load: the base, afresh at every call.
        guard: the mitigation of a model that still computes what the base does.
        fit: trains a model by a recipe, from what an earlier part has reached.
    """

    load: Callable[[], PreTrainedModel]
    guard: Callable[[Model], Safeguards]
    fit: Callable[[Model, Recipe, Progress | None], Progress]


def train_parts(
    tuning: Tuning, recipe: Recipe, means: Means, folder: Path
) -> tuple[Progress, Model]:
    """Train a base as the method says, from the newest checkpoint in `folder` if there is one."""
    if tuning.then is None:
        model, recipe = prepare(tuning, recipe, means)
        return means.fit(model, recipe, None), model
    switch = switch_step(tuning.then, recipe.schedule)
    adapter, progress = None, None
    if newest_step(folder) <= switch:
        model, first = prepare(tuning, recipe, means)
        progress = means.fit(model, replace(first, until=switch), None)
        if progress.status != "running":
            return progress, model
        adapter = trained_state(model)
        del model
    second, last = _second_part(tuning, recipe, means, adapter)
    return means.fit(second, last, progress), second


def prepare(tuning: Tuning, recipe: Recipe, means: Means) -> tuple[Model, Recipe]:
    """A base made trainable, and the recipe with what the method adds to it."""
    base = means.load()
    if tuning.then:
        # A layer that is not there is told now, not when half of the training is done.
        choose_layers(base, tuning.then.layers, tuning.name)
    model = shard(attach(base, tuning, recipe.seed), recipe.team, recipe.precision)
    safeguards = means.guard(model)
    if tuning.budget:
        plan_budget(model, tuning.budget, recipe.schedule.steps)
        penalty = partial(orthogonality, weight=tuning.budget.orthogonality)
        safeguards = replace(safeguards, on_weights=(*safeguards.on_weights, penalty))
    ratios: dict[str, float] = {}
    if tuning.embedding_ratio is not None:
        ratios = dict.fromkeys(embedding_weights(model), tuning.embedding_ratio)
    round_frozen(model, recipe.precision)
    return model, replace(recipe, safeguards=safeguards, rate_ratios=ratios)


def prepare_together(
    tuning: Tuning, recipes: Sequence[Recipe], means: Means
) -> tuple[Model, list[Recipe], list[Own]]:
    """Return the model that runs of a method and seed share, their recipes and first weights."""
    model, whole = prepare(tuning, recipes[0], means)
    start = Own.of(model)
    return model, [replace(whole, setting=each.setting) for each in recipes], [start] * len(recipes)


def switch_step(then: Then, schedule: Schedule) -> int:
    """The step after which the second part begins; both parts have at least one."""
    if schedule.steps < 2:
        raise InputError("methods: a hybrid has two parts, but the training has a single step")
    return min(max(1, round(then.after * schedule.steps)), schedule.steps - 1)


def _second_part(
    tuning: Tuning, recipe: Recipe, means: Means, adapter: dict[str, Tensor] | None
) -> tuple[Model, Recipe]:
    """The base with chosen layers to train and the adapter merged, unless a checkpoint follows.

    The mitigation looks at the base before the adapter is merged, so that it keeps the model near
    the base, and not near what the first part has made of it.
    """
    assert tuning.then is not None
    model = means.load()
    choose_layers(model, tuning.then.layers, tuning.name)
    safeguards = means.guard(model)
    if adapter is not None:
        # Merged into float32 weights: those under the adapter may have been rounded for speed.
        adapted = attach(means.load(), tuning, recipe.seed)
        set_peft_model_state_dict(adapted, adapter)
        model.load_state_dict(adapted.merge_and_unload().state_dict())
    return model, replace(
        recipe,
        setting=recipe.setting.model_copy(update={"learning_rate": tuning.then.learning_rate}),
        schedule=replace(recipe.schedule, restart=switch_step(tuning.then, recipe.schedule)),
        lora_plus_ratio=None,
        safeguards=safeguards,
    )


def choose_layers(model: PreTrainedModel, layers: str | list[str], method: str) -> None:
    """Train only `all`, or the `last N` blocks, or the modules whose names end in a pattern.

    What no text reaches, such as a vision tower, stays frozen.
    """
    model.requires_grad_(layers == "all")
    if isinstance(layers, str):
        if layers != "all":
            for block in _last_blocks(model, int(layers.split()[1]), method):
                block.requires_grad_(True)
        freeze_unread(model)
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
        freeze_unread(model)
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
