"""Which methods and seeds one job trains: each alone, or several whose runs may share a pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from forgetting.records import content_key
from forgetting.settings.plan import Tuning, tunings
from forgetting.settings.study import Study
from forgetting.training.fusing import allows_fusing

Member = tuple[Tuning, int]
"""A method and a seed."""


def joint_cohorts(study: Study) -> dict[str, list[Member]]:
    """Methods and seeds that are trained in one job, several of them, by the cohort's name.

    With `training.fused: across`, those whose adapters stand on the same matrices of the same base,
    and whose batches are alike but for their order. PiSSA is none of them, since each of its ranks
    leaves another base; with dropout, a pass draws one mask, which is that of one seed.
    """
    if study.training.fused != "across":
        return {}
    alike: dict[str, list[Member]] = {}
    for tuning, seed in product(tunings(study), study.seeds):
        alone = tuning.variant == "pissa" or (tuning.processes or 1) > 1
        if not alone and allows_fusing(tuning, study.training):
            mitigation = tuning.mitigation and tuning.mitigation.model_dump()
            common = (tuning.target_modules, tuning.dropout, mitigation)
            form = content_key([*common, seed if tuning.dropout else None])
            alike.setdefault(form, []).append((tuning, seed))
    several = [members for members in alike.values() if len(members) > 1]
    return {f"together-{number}": members for number, members in enumerate(several, 1)}


def cohort_names(study: Study) -> dict[tuple[str, int], str]:
    """The cohort of every method and seed, which is the folder of its results too.

    `METHOD/seedN`, or `together-1` of several that are trained in one job.
    """
    alone = {(t.name, seed): f"{t.name}/seed{seed}" for t in tunings(study) for seed in study.seeds}
    return alone | {
        (tuning.name, seed): together
        for together, members in joint_cohorts(study).items()
        for tuning, seed in members
    }


def as_one(name: str, members: Sequence[Member]) -> Tuning:
    """Methods and seeds that are trained together, as one of the largest rank among them."""
    largest = max((tuning for tuning, _ in members), key=lambda tuning: tuning.rank or 0)
    settings = [setting for tuning, _ in members for setting in tuning.settings]
    return largest.model_copy(update={"name": name, "settings": settings})
