"""Benchmarks: lm-evaluation-harness runs on the base and on every selected checkpoint.

A job scores the models of a method one after the other. Those that are finished stay in
results/STUDY/state/benchmarks, which is no output: a retry goes on with the next.

Outputs: results/STUDY/benchmarks/MODEL/{scores,items,responses}.parquet, programs.json, record.json
(model, tasks, rows) and outcomes.json, where MODEL is `base` or METHOD/seedN; METHOD/seedN-durationD
where the ends of all durations are scored.
"""


rule download_benchmark:
    """Fetch the rows of one benchmark at a pinned revision."""
    output:
        directory("resources/benchmarks/{task}/{revision}"),
    log:
        "logs/download_benchmark/{task}/{revision}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    shell:
        r"""
        exec &> >(tee {log:q})

        HF_HUB_OFFLINE=0 python "$SCRIPTS"/download_benchmark.py \
            --task {wildcards.task:q} \
            --revision {wildcards.revision:q} \
            --output {output:q}
        """


rule benchmark:
    """Run all tasks on the models of a method in one process: the harness's prompts, our rows."""
    input:
        base=BASE,
        rows=lambda wildcards: rows_inputs(TASKS),
        prompts=table_inputs(prompt_tables()),
        selection=f"{RESULTS}/selection/{{method}}.json",
        # The digests in the selection tell whether they are others.
        checkpoints=ancient(f"{RESULTS}/selected/{{method}}/index.json"),
    output:
        results=expand(
            f"{RESULTS}/benchmarks/{{{{method}}}}/{{name}}/{{file}}",
            name=SCORED,
            file=SCORE_FILES,
        ),
    log:
        f"{LOGS}/benchmark/{{method}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: threads("benchmark", COSTS)
    resources:
        **snakemake_resources("benchmark", COSTS),
    params:
        version=version("benchmark"),
        contents=lambda wildcards: [
            rows_contents(TASKS),
            table_contents(prompt_tables()),
        ],
        spec=lambda wildcards: benchmark_spec(),
        rows=[f"--rows={task}={task_folder(task)}" for task in TASKS],
        prompts=lambda wildcards, input: [f"--prompts={path}" for path in input.prompts],
        chosen=lambda wildcards, input: [
            f"--selection={input.selection}",
            f"--checkpoints={RESULTS}/selected/{wildcards.method}",
            "--models",
            *SCORED,
        ],
        state=f"{RESULTS}/state/benchmarks",
        folder=lambda wildcards, output: str(Path(output.results[0]).parents[1]),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/benchmark.py \
            --spec {params.spec:q} \
            --versions {params.version:q} \
            --base {input.base:q} \
            {params.rows:q} {params.prompts:q} {params.chosen:q} \
            --state {params.state:q} \
            --output {params.folder:q}
        """


use rule benchmark as benchmark_base with:
    """The same on the base."""
    input:
        base=BASE,
        rows=lambda wildcards: rows_inputs(TASKS),
        prompts=table_inputs(prompt_tables()),
    output:
        results=expand(f"{RESULTS}/benchmarks/base/{{file}}", file=SCORE_FILES),
    log:
        f"{LOGS}/benchmark/base.log",
    threads: threads("benchmark_base", COSTS)
    resources:
        **snakemake_resources("benchmark_base", COSTS),
    params:
        version=version("benchmark"),
        contents=lambda wildcards: [
            rows_contents(TASKS),
            table_contents(prompt_tables()),
        ],
        spec=lambda wildcards: benchmark_spec(),
        rows=[f"--rows={task}={task_folder(task)}" for task in TASKS],
        prompts=lambda wildcards, input: [f"--prompts={path}" for path in input.prompts],
        chosen=[],
        state=f"{RESULTS}/state/benchmarks",
        folder=lambda wildcards, output: str(Path(output.results[0]).parents[1]),


rule run_programs:
    """Run the programs that a model wrote for HumanEval, in a sandbox, apart from the model."""
    input:
        f"{RESULTS}/benchmarks/{{model}}/programs.json",
    output:
        f"{RESULTS}/benchmarks/{{model}}/outcomes.json",
    log:
        f"{LOGS}/run_programs/{{model}}.log",
    conda:
        "../../envs/environment.yaml"
    # One core starts some 19 programs a second; the models' jobs run beside each other.
    threads: COSTS.program_cores
    resources:
        **snakemake_resources("run_programs", COSTS),
    params:
        version=version("benchmark"),
        sandbox=STUDY.benchmarks.sandbox,
        # What was left unscored for want of a sandbox is run again once there may be one.
        hope=sandbox_hope,
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/run_programs.py \
            --programs {input:q} \
            --sandbox {params.sandbox:q} \
            --workers {threads:q} \
            --output {output:q}
        """
