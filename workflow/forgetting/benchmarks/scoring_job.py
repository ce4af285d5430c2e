"""Find the models that a benchmark job scores: the base, or selected checkpoints of a method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.digests import sha256_of_all, visible_files
from forgetting.io import damage_error, read_json, removal_command
from forgetting.models.tuned import ADAPTER, checkpoint_damage


@dataclass(frozen=True)
class ModelRef:
    """A model to score.

    Attributes:
        name: name of its folder: `base`, `seed0` or `seed0-duration0.5`.
        run, step: the training it comes from; `step` is None if there is no checkpoint.
        reason: why there is no checkpoint.
        checkpoint: folder of its weights; None for the base.
        origin: run, step and digests of the weights, for the record.
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
    """Return the named models from the selection of a method, or the base.

    Args:
        selection: file of the selected checkpoints, one row per seed; None for the base.
        folder: folder of the selected checkpoints, by name; None for the base.
        names: `seed0` or `seed0-duration0.5`.

    Raises:
        InputError: a checkpoint has other files than the ones that were selected.
    """
    if selection is None or folder is None:
        origin = {"run": "base", "step": 0, **score_identity(None)}
        return [ModelRef("base", "base", 0, "", None, origin)]
    rows: list[dict[str, Any]] = read_json(selection)
    models = []
    for name in names:
        seed, separator, duration = name.removeprefix("seed").partition("-duration")
        row = next(row for row in rows if str(row["seed"]) == seed)
        if separator:
            duration = f"duration{duration}"
            no_end = {"run": row["run"], "step": None, "reason": f"no run of {duration} ended well"}
            row = row["ends"].get(duration, no_end)
        checkpoint = None if row["step"] is None else folder / name
        run, step = row["run"], row["step"]
        reason = row["reason"] if step is None else ""
        origin = {"run": run, "step": step, **score_identity(checkpoint)}
        if checkpoint is not None:
            _check_checkpoint(checkpoint, origin["files"], row)
        models.append(ModelRef(name, run, step, reason, checkpoint, origin))
    return models


def _check_checkpoint(checkpoint: Path, present: dict[str, str], row: dict[str, Any]) -> None:
    """Raise `InputError` if the files of a checkpoint differ from those that were selected."""
    selected: dict[str, str] = row["files"]
    differing = sorted(
        name for name in {*present, *selected} if present.get(name) != selected.get(name)
    )
    if not differing:
        return
    path = checkpoint / differing[0]
    reason = "differs from what was selected (sha256)" if path.exists() else "is missing"
    # The files may be hard links to those of the run, so damage affects both.
    origin, removed = Path(row["checkpoint"]), [checkpoint.parent]
    if checkpoint_damage(origin):
        removed += [origin.parent, Path(row["checkpoints"])]
    raise damage_error(path, reason, removal_command(*removed))


def score_identity(checkpoint: Path | None) -> dict[str, Any]:
    """Return the folder and the digests of a checkpoint, for the record of its scores."""
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
