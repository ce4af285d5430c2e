"""Continued pretraining: the branches of a trunk, one job per method, seed and duration.

Outputs: results/STUDY/branches/METHOD/seedN/durationD/{items.parquet,runs.json}, in a study with
training.durations. The trunks are the runs of rule finetune there.
"""


rule train_cooldown:
    """Train every trunk of one method and seed to the end of one duration, through its cooldown."""
    input:
        base=BASE,
        base_items=rules.evaluate_base.output.scored,
        train=rules.prepare_data.output.train,
        probes=rules.prepare_data.output.probes,
        general=general_files,
        targets=TARGETS,
        trunks=rules.finetune.output.runs,
    output:
        scored=f"{RESULTS}/branches/{{method}}/seed{{seed}}/{{duration}}/items.parquet",
        runs=f"{RESULTS}/branches/{{method}}/seed{{seed}}/{{duration}}/runs.json",
        checkpoints=f"{RESULTS}/state/checkpoints/{{method}}/seed{{seed}}/{{duration}}.json",
    log:
        f"{LOGS}/train_cooldown/{{method}}-seed{{seed}}-{{duration}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: threads("train_cooldown", COSTS)
    resources:
        **SEVERAL_NODES,
        **snakemake_resources("train_cooldown", COSTS),
    params:
        version=version("train", "evaluate"),
        contents=lambda wildcards: table_contents(general_tables(wildcards)),
        tunings=whole_tunings,
        spec=run_group_spec,
        general=general_options,
        duration=lambda wildcards: DURATIONS[wildcards.duration],
        targets=target_options,
        data=subpath(input.train, parent=True),
        state=lambda wildcards: f"{RESULTS}/state",
    shell:
        r"""
        exec &> >(tee {log:q})

        python -m forgetting.training.launch {resources.gpu:q} {resources.nodes:q} "$SCRIPTS"/train_cooldown.py \
            --spec {params.spec:q} \
            --versions {params.version:q} \
            --base {input.base:q} \
            --base-items {input.base_items:q} \
            --data {params.data:q} \
            {params.general:q} {params.targets:q} \
            --trunks {input.trunks:q} \
            --duration {params.duration:q} \
            --state {params.state:q} \
            --items {output.scored:q} \
            --runs {output.runs:q} \
            --checkpoints {output.checkpoints:q}
        """
