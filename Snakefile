"""Learning and forgetting of LoRA and full fine-tuning, from data to report.

Usage, in the environment that `make .venv` builds:

    snakemake reports/tradeoff.html                        the embedded study, on this machine
    snakemake --profile slurm --config study=NAME          a study of config/studies on a cluster
    snakemake -n --config study=path/to/my.yaml            the plan of a study of your own
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/cohorts.smk"


onstart:
    # Nobody else may write what this one writes: no other snakemake, no job of one that was killed.
    try:
        lock_results(Path(RESULTS), ORIGIN)
        for message in cancel_orphaned_jobs(
            Path.cwd(), Path("logs/slurm"), Path(RESULTS)
        ):
            logger.warning(message)
        check_no_running_jobs(Path(RESULTS))
        planned = [str(path) for path in workflow.persistence.all_outputfiles()]
        lock_downloads(path for path in planned if path.startswith("resources/"))
    except InputError as error:
        raise WorkflowError(str(error)) from None


rule all:
    """The page of the study that the configuration chooses."""
    input:
        "reports/tradeoff.html",


include: "workflow/rules/data.smk"
include: "workflow/rules/base.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/train_cooldown.smk"
include: "workflow/rules/select.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"
