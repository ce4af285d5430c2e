"""Write the tables of the seeded micro-world: questions, documents and benchmark rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.data.microworld import build_world
from forgetting.errors import reports_input_errors
from forgetting.io import write_jsonl


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """One file per table, in the columns that a user's own files have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    options = parser.parse_args(argv)
    world = build_world(options.seed)
    for name, rows in world.probes.items():
        write_jsonl(
            options.output / f"{name}.jsonl",
            (
                {
                    "question": row["question"],
                    "answer": row["answer"],
                    "paraphrased_answer": row["paraphrased_answer"],
                    "perturbed_answer": row["wrong_answers"],
                }
                for row in rows
            ),
        )
    write_jsonl(options.output / "documents.jsonl", ({"text": text} for text in world.documents))
    write_jsonl(options.output / "held_out.jsonl", ({"text": text} for text in world.held_out))
    write_jsonl(options.output / "refusals.jsonl", world.refusals)
    for task, splits in world.benchmarks.items():
        for split, rows in splits.items():
            write_jsonl(options.output / "benchmarks" / task / f"{split}.jsonl", rows)
    print(f"micro-world of seed {options.seed}: {len(world.documents)} documents")


if __name__ == "__main__":
    main()
