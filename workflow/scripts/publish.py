"""Copy the page of a study to where the page of the study that was run last is."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.errors import reports_input_errors
from forgetting.io import write_atomically


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Replace the page that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, required=True, help="the page of the study")
    parser.add_argument("--output", type=Path, required=True, help="its copy")
    options = parser.parse_args(argv)
    write_atomically(options.output, options.page.read_bytes(), recorded=False)
    print(f"{options.output} is {options.page}")


if __name__ == "__main__":
    main()
