"""Selection: of each method's hyperparameters, and of each seed's checkpoint.

Outputs: results/STUDY/selection/METHOD.json and results/STUDY/selected/METHOD/index.json. The
checkpoints in that folder are not declared, since Snakemake deletes outputs before their replacement
is made. On demand: results/STUDY/wise_ft/METHOD/seedN/items.parquet, the scores of the checkpoints with
scaled updates.
"""


rule select_checkpoint:
    """Apply the study's rules to the trajectories of one method."""
    input:
        base_items=PATHS.base_items,
        runs=PATHS.selection_runs,
        stored=PATHS.selection_checkpoints,
    output:
        selection=PATHS.selection(),
        index=PATHS.selected_index(),
    log:
        f"{PATHS.logs}/select_checkpoint/{{method}}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        file=PATHS.params("select_checkpoint"),
        digest=PARAMS.digest("select_checkpoint"),
        folder=PATHS.selected(),
    message:
        "Select the checkpoints of {wildcards.method}"
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/select_checkpoint.py \
            --params {params.file:q} \
            --base-items {input.base_items:q} \
            --runs {input.runs:q} \
            --selection {output.selection:q} \
            --stored {input.stored:q} \
            --checkpoints {params.folder:q} \
            --index {output.index:q}
        """


rule evaluate_wise_ft:
    """Evaluate a selected checkpoint with shares of its update, from the base to the whole."""
    input:
        selection=PATHS.wise_ft_selection,
        # The digests in the selection show whether the checkpoint is another.
        checkpoints=PATHS.wise_ft_index,
        base=PATHS.base_record,
        probes=PATHS.probes,
        targets=PATHS.base_predictions,
    output:
        PATHS.wise_ft,
    log:
        f"{PATHS.logs}/evaluate_wise_ft/{{model}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: RESOURCES.threads("evaluate_wise_ft")
    resources:
        **RESOURCES.of("evaluate_wise_ft"),
    params:
        file=PATHS.params("evaluate_wise_ft"),
        digest=PARAMS.digest("evaluate_wise_ft"),
        checkpoints=PATHS.wise_ft_checkpoints,
    message:
        RESOURCES.message(
            "evaluate_wise_ft", "Evaluate {wildcards.model} with shares of its update"
        )
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/evaluate_wise_ft.py \
            --params {params.file:q} \
            --base {input.base:q} \
            --probes {input.probes:q} \
            --targets {input.targets:q} \
            --selection {input.selection:q} \
            --checkpoints {params.checkpoints:q} \
            --output {output:q}
        """
