"""Write sbatch.txt: the sbatch options of each kind of job of every study.

Usage: PYTHONPATH=workflow:tests python tests/golden/make_sbatch.py 2> /dev/null; then read the
differences.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from support.snakemake import GOLDEN, STUDIES, golden_lines, planned, restore_process


def main() -> None:
    """Plan every study and write the file."""
    lines = []
    for study in STUDIES:
        with tempfile.TemporaryDirectory() as folder, restore_process():
            lines += golden_lines(study, planned(Path(folder), study, "slurm"))
    GOLDEN.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
