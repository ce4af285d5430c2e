"""Which methods and seeds one job trains: each alone, or several whose runs may share a pass.

The study alone decides, not the machine, so that its results lie in the same folders everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from forgetting.costs.shape import Shape, base_shape
from forgetting.costs.volumes import training_sequences
from forgetting.records import content_key
from forgetting.settings.plan import Tuning, tunings
from forgetting.settings.study import Study
from forgetting.training.fusing import TOKENS, allows_fusing, packed

Member = tuple[Tuning, int]
"""A method and a seed."""

JOB_BYTES = 24 * 10**9
"""So much memory may the weights, gradients and moments of the runs of one job take: half of what
7 billion weights leave of a GPU of 80 GB. On a smaller one, a job has several passes."""


def joint_cohorts(study: Study) -> dict[str, list[Member]]:
    """Methods and seeds that are trained in one job, several of them, by the cohort's name.

    With `training.fused: across`, those whose adapters stand on the same matrices of the same base,
    and whose batches are alike but for their order; so many to a job as share one pass, since jobs
    run side by side and passes do not. PiSSA is none of them, since each of its ranks leaves
    another base; with dropout, a pass draws one mask, which is that of one seed.
    """
    if study.training.fused != "across":
        return {}
    shape = base_shape(study.base)
    tokens = training_sequences(study, shape.vocabulary).tokens * study.training.batch_size
    if not shape.rows_are_apart or tokens > max(TOKENS.values()):
        return {}
    parts = [
        part
        for members in _alike(study)
        for part in _passes(study, shape, members)
        if len(part) > 1
    ]
    return {f"together-{number}": part for number, part in enumerate(parts, 1)}


def _alike(study: Study) -> list[list[Member]]:
    """Methods and seeds whose runs could share a pass, if there were room for all."""
    alike: dict[str, list[Member]] = {}
    for tuning, seed in product(tunings(study), study.seeds):
        alone = tuning.variant == "pissa" or (tuning.processes or 1) > 1
        if not alone and allows_fusing(tuning, study.training):
            mitigation = tuning.mitigation and tuning.mitigation.model_dump()
            common = (tuning.target_modules, tuning.dropout, mitigation)
            form = content_key([*common, seed if tuning.dropout else None])
            alike.setdefault(form, []).append((tuning, seed))
    return list(alike.values())


def _passes(study: Study, shape: Shape, members: Sequence[Member]) -> list[list[Member]]:
    """Those of them that share each pass."""
    runs = [len(tuning.settings) for tuning, _ in members]
    sizes = [shape.trained(tuning) for tuning, _ in members]
    parts = packed(runs, sizes, study.training.micro_batch_size, JOB_BYTES)
    return [[members[number] for number in part] for part in parts]


def cohort_names(study: Study, joint: Mapping[str, Sequence[Member]]) -> dict[tuple[str, int], str]:
    """The cohort of every method and seed, which is the folder of its results too.

    `METHOD/seedN`, or `together-1` of several that are trained in one job.

    Args:
        joint: what `joint_cohorts` returns.
    """
    alone = {(t.name, seed): f"{t.name}/seed{seed}" for t in tunings(study) for seed in study.seeds}
    return alone | {
        (tuning.name, seed): together
        for together, members in joint.items()
        for tuning, seed in members
    }
