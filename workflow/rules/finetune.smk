"""Fine-tuning: one job per method and seed trains and measures all its learning rates and decays.

Where the study gives a method several processes, they train each of its runs together.

Outputs: results/STUDY/runs/METHOD/seedN/{items.parquet,runs.json}, and
benchmarks.parquet where the study asks benchmarks at every evaluation. Runs and checkpoints lie in
results/STUDY/state, which is no output: Snakemake deletes the outputs of a job that it retries, and
a job that was killed goes on from there.
"""


rule finetune:
    """Train every learning rate and weight decay of one method and seed, measuring as it learns."""
    input:
        base=BASE,
        base_items=rules.evaluate_base.output.scored,
        train=rules.prepare_data.output.train,
        probes=rules.prepare_data.output.probes,
        general=general_files,
        targets=TARGETS,
        rows=lambda wildcards: rows_inputs(ALONG),
    output:
        scored=f"{RESULTS}/runs/{{method}}/seed{{seed}}/items.parquet",
        benchmarks=(
            f"{RESULTS}/runs/{{method}}/seed{{seed}}/benchmarks.parquet"
            if ALONG
            else []
        ),
        runs=f"{RESULTS}/runs/{{method}}/seed{{seed}}/runs.json",
        # In the state: where that is deleted, what needs a checkpoint trains the runs again.
        checkpoints=f"{RESULTS}/state/checkpoints/{{method}}/seed{{seed}}.json",
    log:
        f"{LOGS}/finetune/{{method}}-seed{{seed}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: threads("finetune", COSTS)
    resources:
        **SEVERAL_NODES,
        **snakemake_resources("finetune", COSTS),
    params:
        version=version("train", "evaluate", *(["benchmark"] if ALONG else [])),
        contents=lambda wildcards: [
            table_contents(general_tables(wildcards)),
            rows_contents(ALONG),
        ],
        tunings=whole_tunings,
        spec=run_group_spec,
        general=general_options,
        targets=target_options,
        data=subpath(input.train, parent=True),
        state=lambda wildcards: f"{RESULTS}/state",
        along=along_options(),
    shell:
        r"""
        exec &> >(tee {log:q})

        python -m forgetting.training.launch {resources.gpu:q} {resources.nodes:q} "$SCRIPTS"/finetune.py \
            --spec {params.spec:q} \
            --versions {params.version:q} \
            --base {input.base:q} \
            --base-items {input.base_items:q} \
            --data {params.data:q} \
            {params.general:q} {params.targets:q} \
            {params.along:q} --benchmarks {output.benchmarks:q} \
            --state {params.state:q} \
            --items {output.scored:q} \
            --runs {output.runs:q} \
            --checkpoints {output.checkpoints:q}
        """
