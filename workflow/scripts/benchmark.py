"""Run the lm-evaluation-harness tasks, and prompts to refuse, on the base or checkpoints.

The models of a method are scored in one process: its base, the rows and the prompts are read once.
A model that is finished is kept in a folder that is no output of the rule, named by a key of all
that its scores depend on, so that a retry resumes with the next.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetting.benchmarks.registry import SCORE_FILES
from forgetting.benchmarks.scorer import Scorer, finished_folder, format_scores, models_to_score
from forgetting.config.job_params import BenchmarkParams
from forgetting.errors import reports_input_errors
from forgetting.io import read_table, write_atomically
from forgetting.models.loading import read_base, silence_libraries


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the scores, items, responses, programs and record of every model into its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="parameters (JSON)")
    parser.add_argument("--base", type=Path, required=True, help="record of the base")
    parser.add_argument(
        "--prompts", type=Path, nargs="?", help="table of the prompts that should be refused"
    )
    parser.add_argument(
        "--selection", type=Path, nargs="?", help="choice of the method; none: the base"
    )
    parser.add_argument(
        "--checkpoints", type=Path, nargs="?", help="folder of the method's checkpoints"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder of finished models")
    parser.add_argument("--output", type=Path, required=True, help="folder of the models' folders")
    options = parser.parse_args(argv)
    silence_libraries()
    params = BenchmarkParams.read(options.params)
    base = read_base(options.base)
    scorer = Scorer(params, params.rows, params.versions, base, options.prompts)
    for model in models_to_score(options.selection, options.checkpoints, params.models):
        finished = finished_folder(scorer, options.state, model)
        for file in SCORE_FILES:  # new files, since Snakemake goes by their age
            write_atomically(options.output / model.name / file, (finished / file).read_bytes())
        for line in format_scores(model.run, read_table(finished / "scores.parquet")):
            print(line, flush=True)


if __name__ == "__main__":
    main()
