"""Selection: of each method's hyper-parameters, and of each seed's checkpoint.

Outputs: results/STUDY/selection/METHOD.json and results/STUDY/selected/METHOD/index.json. The
checkpoints in that folder are not declared, since Snakemake deletes outputs before their replacement
is made. On demand: results/STUDY/wise_ft/METHOD/seedN/items.parquet, the scores of the checkpoints with
scaled updates.
"""


rule select_checkpoint:
    """Apply the study's rules to the trajectories of one method."""
    input:
        base_items=rules.evaluate_base.output.scored,
        runs=lambda wildcards: finished("runs.json", [wildcards.method]),
        # The digests of what is selected tell whether it is another.
        stored=lambda wildcards: [
            ancient(path) for path in checkpoint_records([wildcards.method])
        ],
    output:
        selection=f"{RESULTS}/selection/{{method}}.json",
        index=f"{RESULTS}/selected/{{method}}/index.json",
    log:
        f"{LOGS}/select_checkpoint/{{method}}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=version("select"),
        folder=lambda wildcards: f"{RESULTS}/selected/{wildcards.method}",
        spec=lambda wildcards: as_json(
            sections("selection", "seeds"),
            method=TUNINGS[wildcards.method].model_dump(mode="json"),
            durations=STUDY.training.durations,
        ),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/select_checkpoint.py \
            --spec {params.spec:q} \
            --base-items {input.base_items:q} \
            --runs {input.runs:q} \
            --selection {output.selection:q} \
            --stored {input.stored:q} \
            --checkpoints {params.folder:q} \
            --index {output.index:q}
        """


rule evaluate_wise_ft:
    """Measure a selected checkpoint with shares of its update, from the base to the whole."""
    input:
        unpack(chosen_inputs),
        base=BASE,
        probes=rules.prepare_data.output.probes,
        targets=TARGETS,
    output:
        f"{RESULTS}/wise_ft/{{model}}/items.parquet",
    log:
        f"{LOGS}/evaluate_wise_ft/{{model}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: threads("evaluate_wise_ft", COSTS)
    resources:
        **snakemake_resources("evaluate_wise_ft", COSTS),
    params:
        version=version("evaluate"),
        chosen=chosen_options,
        targets=target_options,
        folder=lambda wildcards, input: str(Path(input.probes[0]).parent),
        spec=lambda wildcards: as_json(
            sections("prompt", "evaluation", "precision"),
            probes=list(STUDY.probes),
            shares=STUDY.selection.wise_ft,
        ),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/evaluate_wise_ft.py \
            --spec {params.spec:q} \
            --base {input.base:q} \
            --probes {params.folder:q} \
            {params.chosen:q} {params.targets:q} \
            --output {output:q}
        """
