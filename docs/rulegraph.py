"""Write the graph of the rules into docs/architecture.md, or check that it is up to date."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rulegraph: begin -->", "<!-- rulegraph: end -->"


def rule_graph(study: str = "mini") -> str:
    """Return the rules of a study and what each needs, as a Mermaid diagram.

    Snakemake's own diagram changes the order of its lines and the colours from run to run.
    """
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js", "--forceall"]
    config = ["--config", f"study={study}"]
    printed = subprocess.run(
        [*command, *config], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    names = dict(re.findall(r"(id\d+)\[([^\]]+)\]", printed))
    arrows = re.findall(r"(id\d+) --> (id\d+)", printed)
    lines = sorted(f"  {names[start]} --> {names[end]}" for start, end in arrows)
    return "\n".join(["```mermaid", "flowchart TB", *lines, "```"])


def main() -> None:
    """Write the diagram; with `--check`, fail if the document has another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = f"{before}{BEGIN}\n{rule_graph()}\n{END}{after}"
    if options.check:
        if made != text:
            sys.exit(f"{DOCUMENT}: the graph of the rules is not up to date: make rulegraph")
    else:
        DOCUMENT.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
