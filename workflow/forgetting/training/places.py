"""Where a run is kept: in a folder named by a key of everything that it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forgetting.records import content_key
from forgetting.sections.method import Setting
from forgetting.settings.plan import run_name
from forgetting.training.materials import CohortSpec


@dataclass(frozen=True)
class Place:
    """One run of the cohort, and where it is kept."""

    spec: CohortSpec
    setting: Setting
    name: str
    key: str
    folder: Path

    @classmethod
    def of(
        cls, spec: CohortSpec, setting: Setting, inputs: Mapping[str, str], state: Path
    ) -> Place:
        """Where the folder of all states holds a run."""
        name, key = run_name(spec.tuning.name, spec.seed, setting), run_key(spec, setting, inputs)
        return cls(spec, setting, name, key, state / name / key)

    @property
    def record(self) -> Path:
        """What is written when the run is finished."""
        return self.folder / "run.json"


def run_key(spec: CohortSpec, setting: Setting, inputs: Mapping[str, str]) -> str:
    """Digest of all that a run depends on: its settings, its inputs, the versions."""
    described = spec.model_dump(exclude={"tuning": {"settings", "fixed", "label"}})
    # How much memory a pass takes changes no number; alone or fused, a run comes to the same.
    for key in ("activation_checkpointing", "fused"):
        del described["training"][key]
    if not spec.tuning.dropout:  # its masks are drawn per pass
        del described["training"]["micro_batch_size"]
    # The rule decides which checkpoint is kept; how hyper-parameters are compared does not matter.
    described["selection"] = {
        key: described["selection"][key] for key in ("probe", "metric", "threshold", "stop_after")
    }
    # A trunk is the same for any shorter budgets: one more is a branch more.
    described["training"]["budgets"] = bool(spec.training.budgets)
    return content_key({"spec": described, "setting": setting.model_dump(), **inputs})
