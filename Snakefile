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


onstart:
    try:
        for message in PIPELINE.start(
            jobs=() if workflow.touch else workflow.dag.needrun_jobs(),
            outputs=workflow.persistence.all_outputfiles(),
        ):
            logger.warning(message)
    except InputError as error:
        raise WorkflowError(str(error)) from None


onerror:
    JOB_MESSAGES.print_errors_at_exit()


rule all:
    """The page of the study that the configuration chooses."""
    input:
        "reports/tradeoff.html",


include: "workflow/rules/data.smk"
include: "workflow/rules/base.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/select.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"
