"""Where runs that are trained together stand on disk, and from which step they go on.

The last bits of a fused step depend on which runs are in it. So that a group that was killed ends
with the same bits, it goes on from the newest evaluation of which all its runs have a record: all
write theirs before any removes an older one, and a run that has ended tells at which evaluation of
the group it had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetting.records import read_json, remove_file, remove_folder, write_json
from forgetting.training.checkpoints import Progress, can_go_on

END = "end.json"


def write_end(folder: Path, progress: Progress, step: int, together: int) -> None:
    """Record how one of so many runs ended, at the evaluation of its group at `step` or before."""
    write_json(folder / END, {"step": step, "together": together, "progress": vars(progress)})


def read_end(folder: Path) -> Progress | None:
    """How a run ended, if it did."""
    path = folder / END
    return Progress(**read_json(path)["progress"]) if path.exists() else None


def trained_together(folder: Path) -> int:
    """With how many runs, itself among them, a run that has ended was trained."""
    path = folder / END
    return int(read_json(path)["together"]) if path.exists() else 1


@dataclass(frozen=True)
class Standing:
    """From which steps a run can go on: those of its checkpoints, and all since it ended."""

    checkpoints: frozenset[int]
    ended: int | None

    @classmethod
    def of(cls, folder: Path) -> Standing:
        """What the folder of a run holds; 0 is the start, as long as no checkpoint was removed.

        A checkpoint that is only there to be picked has no moments, and nothing goes on from it.
        """
        steps = {_step(path): path for path in folder.glob("step-*/progress.json")}
        end = folder / END
        started = not steps or len(read_json(steps[max(steps)])["points"]) == 1
        able = {step for step, path in steps.items() if can_go_on(path.parent)}
        return cls(
            frozenset(able | {0} if started else able),
            int(read_json(end)["step"]) if end.exists() else None,
        )

    @property
    def newest(self) -> float:
        """The last of the steps from which the run can go on."""
        return max(self.checkpoints) if self.ended is None else math.inf

    def reaches(self, step: float) -> bool:
        """Can the run go on from this step?"""
        return step in self.checkpoints or (self.ended is not None and self.ended <= step)


def _step(progress: Path) -> int:
    return int(progress.parent.name.removeprefix("step-"))


def groups(folders: Sequence[Path]) -> list[list[Path]]:
    """Runs that can go on from the same step; all of them, unless the sweep was changed."""
    waiting = {folder: Standing.of(folder) for folder in folders}
    found = []
    while waiting:
        step = min(standing.newest for standing in waiting.values())
        found.append([folder for folder, standing in waiting.items() if standing.reaches(step)])
        for folder in found[-1]:
            del waiting[folder]
    return found


def rewind(folders: Sequence[Path]) -> int:
    """Remove what is newer than the newest step from which all can go on; returns that step."""
    standings = [Standing.of(folder) for folder in folders]
    step = min(standing.newest for standing in standings)
    if step == math.inf:
        return max(standing.ended or 0 for standing in standings)
    for folder, standing in zip(folders, standings, strict=True):
        if standing.ended is not None and standing.ended > step:
            remove_file(folder / END)
        for newer in sorted(folder.glob("step-*"), reverse=True):
            if int(newer.name.removeprefix("step-")) > step:
                remove_folder(newer)
    return int(step)
