"""Render a study's tables as one offline HTML page and four figures.

    python workflow/scripts/report.py --tables results/mini/tables \\
        --output reports/mini.html --figures reports/mini-figures
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.errors import reports_input_errors
from forgetting.report.frames import read_tables
from forgetting.report.page import write_report


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Read the command line, render, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tables", type=Path, required=True, help="folder of the study's tables")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument("--figures", type=Path, required=True, help="folder of the SVGs and PNGs")
    options = parser.parse_args(argv)
    write_report(read_tables(options.tables), options.output, options.figures)
    print(f"{options.output} and {options.figures}/")


if __name__ == "__main__":
    main()
