"""Measure the processor seconds of `snakemake --dry-run` on sweeps of many runs.

    make bench-plan

This prints a table. A job trains every learning rate and weight decay of one rank and seed. So a
sweep of many seeds and ranks has many more jobs than one of many learning rates.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
ROUNDS = 3


@dataclass(frozen=True)
class Sweep:
    """A study with this many ranks, learning rates and seeds, each once per weight decay."""

    ranks: int
    rates: int
    seeds: int
    target: float | None = None

    @property
    def runs(self) -> int:
        """Return the number of runs."""
        return 2 * self.ranks * self.rates * self.seeds

    def study(self) -> dict[str, object]:
        """Return the study of Phi-1.5 with more seeds, ranks and learning rates."""
        path = ROOT / "config" / "studies" / "tofu-phi-1.5.yaml"
        study: dict[str, object] = yaml.safe_load(path.read_text(encoding="utf-8"))
        study["seeds"] = list(range(self.seeds))
        study["methods"] = [
            {
                "method": "lora",
                "rank": [2 + rank for rank in range(self.ranks)],
                "alpha": 32,
                "learning_rate": [round(1e-5 * (1 + rate), 7) for rate in range(self.rates)],
                "weight_decay": [0.0, 0.01],
            }
        ]
        return study


SWEEPS = (Sweep(5, 10, 10, 3.0), Sweep(5, 10, 100, 20.0), Sweep(10, 1, 100))


def seconds(sweep: Sweep) -> float:
    """Return the processor seconds of planning a sweep in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        path.write_text(yaml.safe_dump(sweep.study()), encoding="utf-8")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [
                *(sys.executable, "-m", "snakemake", "--dry-run", "--quiet"),
                *("--snakefile", str(ROOT / "Snakefile"), "--directory", folder),
                *("--configfile", str(ROOT / "config" / "config.yaml")),
                *("--config", f"study={path}"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table."""
    rows = [
        {
            "runs": f"{sweep.runs:,}",
            "run group jobs": f"{sweep.ranks * sweep.seeds:,}",
            "seconds": f"{statistics.median(seconds(sweep) for _ in range(ROUNDS)):.1f}",
            "at most": "" if sweep.target is None else f"{sweep.target:g}",
        }
        for sweep in SWEEPS
    ]
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
