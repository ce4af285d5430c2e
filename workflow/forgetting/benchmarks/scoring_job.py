"""The models that a benchmark's job scores: the base, or checkpoints of a method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.digests import sha256_of_all, visible_files
from forgetting.io import damage_error, read_json, removal_command
from forgetting.models.tuned import ADAPTER, checkpoint_damage


@dataclass(frozen=True)
class ModelRef:
    """A model that is to be scored.

    Attributes:
        name: of its folder: `base`, `seed0` or `seed0-duration0.5`.
        run, step: which training it comes from; no step where there is no checkpoint.
        reason: why there is none.
        checkpoint: where its weights are; none of the base.
        about: the same with the content of the weights, for the record.
    """

    name: str
    run: str | None
    step: int | None
    reason: str
    checkpoint: Path | None
    origin: dict[str, Any]


def models_to_score(
    selection: Path | None, folder: Path | None, names: list[str]
) -> list[ModelRef]:
    """The models that are named, of the choice of a method; the base where there is none."""
    if selection is None or folder is None:
        about = {"run": "base", "step": 0, **score_identity(None)}
        return [ModelRef("base", "base", 0, "", None, about)]
    rows: list[dict[str, Any]] = read_json(selection)
    found = []
    for name in names:
        seed, between, duration = name.removeprefix("seed").partition("-duration")
        row = next(row for row in rows if str(row["seed"]) == seed)
        if between:
            duration = f"duration{duration}"
            no_end = {"run": row["run"], "step": None, "reason": f"no run of {duration} ended well"}
            row = row["ends"].get(duration, no_end)
        checkpoint = None if row["step"] is None else folder / name
        who = {"run": row["run"], "step": row["step"]}
        reason = row["reason"] if row["step"] is None else ""
        about = who | score_identity(checkpoint)
        if checkpoint is not None:
            _check_checkpoint(checkpoint, about["files"], row)
        found.append(ModelRef(name, **who, reason=reason, checkpoint=checkpoint, origin=about))
    return found


def _check_checkpoint(checkpoint: Path, found: dict[str, str], row: dict[str, Any]) -> None:
    """Refuse a selected checkpoint whose files are not those that were selected."""
    selected: dict[str, str] = row["files"]
    differing = sorted(
        name for name in {*found, *selected} if found.get(name) != selected.get(name)
    )
    if not differing:
        return
    path = checkpoint / differing[0]
    wrong = "differs from what was selected (sha256)" if path.exists() else "is missing"
    # The files may be links of those of the run: what damaged the ones damaged the others.
    origin, again = Path(row["checkpoint"]), [checkpoint.parent]
    if checkpoint_damage(origin):
        again += [origin.parent, Path(row["checkpoints"])]
    raise damage_error(path, wrong, removal_command(*again))


def score_identity(checkpoint: Path | None) -> dict[str, Any]:
    """Which weights were measured: folder and content of the checkpoint; none of the base."""
    if checkpoint is None:
        return {"checkpoint": None}
    files, identity = sha256_of_all(visible_files(checkpoint))
    adapter = (checkpoint / ADAPTER).exists()
    return {
        "checkpoint": str(checkpoint),
        "kind": "adapter" if adapter else "weights",
        "identity": identity,
        "files": files,
    }
