"""Continued pretraining: the branches of a trunk, one job per method, seed and budget.

Outputs: results/STUDY/branches/METHOD/seedN/budgetD/{items.parquet,runs.json}, in a study with
training.budgets. The trunks are the runs of rule finetune there.
"""


rule cool_down:
    """Train every trunk of one method and seed to the end of one budget, through its cooldown."""
    input:
        base=BASE,
        base_items=rules.score_base.output.scored,
        train=rules.prepare_data.output.train,
        probes=rules.prepare_data.output.probes,
        general=general_files,
        targets=TARGETS,
        trunks=rules.finetune.output.runs,
    output:
        scored=f"{RESULTS}/branches/{{method}}/seed{{seed}}/{{budget}}/items.parquet",
        runs=f"{RESULTS}/branches/{{method}}/seed{{seed}}/{{budget}}/runs.json",
        checkpoints=f"{RESULTS}/state/checkpoints/{{method}}/seed{{seed}}/{{budget}}.json",
    log:
        f"{LOGS}/cool_down/{{method}}-seed{{seed}}-{{budget}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: threads("cool_down", COSTS)
    resources:
        **SEVERAL_NODES,
        **sizes("cool_down", COSTS),
    params:
        version=version("train", "evaluate"),
        contents=lambda wildcards: table_contents(general_tables(wildcards)),
        tunings=whole_tunings,
        spec=cohort_spec,
        general=general_options,
        budget=lambda wildcards: BUDGETS[wildcards.budget],
        targets=target_options,
        data=subpath(input.train, parent=True),
        state=lambda wildcards: f"{RESULTS}/state",
    shell:
        r"""
        exec &> >(tee {log:q})

        python -m forgetting.training.launch {resources.gpu:q} {resources.nodes:q} "$SCRIPTS"/cool_down.py \
            --spec {params.spec:q} \
            --versions {params.version:q} \
            --base {input.base:q} \
            --base-items {input.base_items:q} \
            --data {params.data:q} \
            {params.general:q} {params.targets:q} \
            --trunks {input.trunks:q} \
            --budget {params.budget:q} \
            --state {params.state:q} \
            --items {output.scored:q} \
            --runs {output.runs:q} \
            --checkpoints {output.checkpoints:q}
        """
