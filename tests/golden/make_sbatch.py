"""Write sbatch.txt: the sbatch options of each kind of job of every study.

Usage: PYTHONPATH=workflow:tests python tests/golden/make_sbatch.py 2> /dev/null; then read what
has changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from support.snakemake import GOLDEN, STUDIES, golden_lines, planned, undone


def main() -> None:
    """Plan every study in a folder of its own."""
    lines = []
    for study in STUDIES:
        with tempfile.TemporaryDirectory() as folder, undone():
            lines += golden_lines(study, planned(Path(folder), study, "slurm"))
    GOLDEN.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
