"""Runs of several budgets that share a trunk: what they have in common is trained once.

With the schedules trapezoid and inverse_sqrt a run does what every longer one does, until its
cooldown starts. So one run without a cooldown is trained for all, the trunk, and stores its state
where a budget's cooldown starts. The branch of a budget is the ordinary run of so many epochs, put
in a folder with that state: it goes on from there as if it had been killed there, and ends as if
nothing had been (Biderman et al. 2024, arXiv 2405.09673, continued pretraining).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetting.digests import damage
from forgetting.records import (
    link_or_copy,
    link_recorded,
    read_json,
    remove_folder,
    settle,
    warn_of,
)
from forgetting.sections.method import Setting
from forgetting.sections.training import Training
from forgetting.settings.plan import budget_name, run_name
from forgetting.training.checkpoints import STARTS, checkpoint_damage
from forgetting.training.cohort import Tell, train_cohort
from forgetting.training.materials import CohortSpec, Materials
from forgetting.training.places import Place
from forgetting.training.schedule import branch_start


def alone(spec: CohortSpec, budget: float) -> CohortSpec:
    """The cohort whose runs are trained for one budget, and for nothing else."""
    # One after the other, as the trunks: a branch that goes on from one has the same bits.
    alone = {"epochs": budget, "budgets": [], "fused": "never"}
    training = spec.training.model_copy(update=alone)
    return spec.model_copy(update={"training": training})


def _branches(spec: CohortSpec, budget: float) -> CohortSpec:
    """The same under a name of its own, so that its folders are apart from other budgets'."""
    name = f"{budget_name(budget)}/{spec.tuning.name}"
    tuning = spec.tuning.model_copy(update={"name": name})
    return alone(spec, budget).model_copy(update={"tuning": tuning})


def train_trunks(
    specs: Sequence[CohortSpec],
    materials: Materials,
    inputs: Mapping[str, str],
    state: Path,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Train the trunk of every setting that is not finished yet; return the records of all."""
    settings = [(spec, setting) for spec in specs for setting in spec.tuning.settings]
    for spec, setting in settings if materials.team.first else ():
        folder = _folder(spec, setting, inputs, state)
        if not (folder / "run.json").exists():
            _go_on_from(folder, folder, math.inf)
    # Where train_cohort begins, the others wait for what the first process did here.
    return train_cohort(specs, materials, inputs, state, tell)


def train_branches(
    spec: CohortSpec,
    budget: float,
    trunks: Sequence[Mapping[str, Any]],
    materials: Materials,
    inputs: Mapping[str, str],
    state: Path,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Train the branch of one budget of every setting, from the records of the trunks.

    A trunk that diverged has no state at later starts: a branch goes on from the last one before,
    and diverges where it did. What no unfinished branch starts from is removed at the end.
    """
    by_run = {trunk["run"]: trunk for trunk in trunks}
    names = {run_name(spec.tuning.name, spec.seed, s): s for s in spec.tuning.settings}
    branches = _branches(spec, budget)
    # The first process writes, and the others wait for it where train_cohort begins and ends.
    own = names.items() if materials.team.first else ()
    for name, setting in own:
        folder = _folder(branches, setting, inputs, state)
        if not (folder / "run.json").exists():
            start = branch_start(spec.training, budget, by_run[name]["steps_per_epoch"])
            _go_on_from(Path(by_run[name]["folder"]), folder, start)
    ending = f"/{budget_name(budget)}"
    known = {f"{budget_name(budget)}/{name}": name + ending for name in names}
    records = train_cohort(
        [branches],
        materials,
        inputs,
        state,
        lambda run, *progress: tell(known[run], *progress),
        branches=spec.training.has_cooldown,
    )
    for name, setting in own:
        _forget_trunk(by_run[name], spec, setting, inputs, state)
    return [
        _as_branch(record, budget, spec.training) | {"run": known[record["run"]]}
        for record in records
    ]


def _as_branch(record: Mapping[str, Any], budget: float, training: Training) -> dict[str, Any]:
    """The record of a branch: with its budget, and its own time without the trunk's."""
    start = branch_start(training, budget, record["steps_per_epoch"])
    # Steps take about as long as each other; a branch of a trunk that diverged has none.
    own = 1.0 - start / max(record["steps"], start, 1)
    return {
        **record,
        "budget": budget,
        "training_seconds": own * record["training_seconds"],
    }


def _folder(spec: CohortSpec, setting: Setting, inputs: Mapping[str, str], state: Path) -> Path:
    """Where `train_cohort` keeps a run."""
    return Place.of(spec, setting, inputs, state).folder


def _complete(folder: Path) -> Iterator[tuple[int, Path]]:
    """The complete checkpoints in a folder, by step."""
    for progress in folder.glob("step-*/progress.json"):
        yield int(progress.parent.name.removeprefix("step-")), progress.parent


def _go_on_from(trunk: Path, folder: Path, latest: float) -> None:
    """Put the trunk's newest checkpoint up to a step in a run's folder, if it has none as new.

    The items of the evaluations before it come with it. Files are linked, not copied.
    """
    stored = [found for found in _complete(trunk / STARTS) if found[0] <= latest]
    step, origin = max(stored, default=(0, trunk))
    if step <= max((reached for reached, _ in _complete(folder)), default=0):
        return
    if wrong := checkpoint_damage(origin):
        warn_of(*wrong, "nothing goes on from this checkpoint")
        return
    points = read_json(origin / "progress.json")["points"]
    items = [f"items-{int(point[0]):07d}.parquet" for point in points]
    if wrong := next(((trunk / i, told) for i in items if (told := damage(trunk / i))), None):
        warn_of(*wrong, "nothing goes on from its checkpoints")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in items:
        if not (folder / name).exists():
            link_recorded(trunk / name, folder / name)
    final = folder / origin.name
    partial = folder / f".{origin.name}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(origin, partial, copy_function=link_or_copy)
    settle(partial, final)


def _forget_trunk(
    trunk: Mapping[str, Any],
    spec: CohortSpec,
    setting: Setting,
    inputs: Mapping[str, str],
    state: Path,
) -> None:
    """Remove a finished trunk's checkpoints but for those that unfinished branches start from."""
    folder = Path(trunk["folder"])
    stored = dict(_complete(folder / STARTS))
    needed = set()
    for budget in spec.training.budgets:
        branch = _folder(_branches(spec, budget), setting, inputs, state)
        if not (branch / "run.json").exists():
            start = branch_start(spec.training, budget, trunk["steps_per_epoch"])
            needed.add(max((step for step in stored if step <= start), default=0))
    unused = [path for step, path in stored.items() if step not in needed]
    for checkpoint in [*unused, *folder.glob("step-*")]:
        remove_folder(checkpoint)
