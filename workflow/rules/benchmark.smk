"""Benchmarks: lm-evaluation-harness runs on the base and on every selected checkpoint.

A job scores the models of a method one after the other. Those that are finished stay in
results/STUDY/state/benchmarks, which is no output: a retry resumes with the next.

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
    message:
        "Download benchmark {wildcards.task}"
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
        base=PATHS.base_record,
        rows=PATHS.task_inputs(PATHS.tasks),
        prompts=PATHS.table_inputs(PATHS.prompt_tables),
        selection=PATHS.selection(),
        # The digests in the selection show whether the checkpoints are others.
        checkpoints=ancient(PATHS.selected_index()),
    output:
        results=PATHS.method_benchmarks,
    log:
        f"{PATHS.logs}/benchmark/{{method}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: RESOURCES.threads("benchmark")
    resources:
        **RESOURCES.of("benchmark"),
    params:
        file=PATHS.params("benchmark"),
        digest=PARAMS.digest("benchmark"),
        checkpoints=PATHS.selected_folder,
        state=f"{PATHS.state}/benchmarks",
        folder=scored_models_folder,
    message:
        RESOURCES.message("benchmark", "Run the benchmarks on {wildcards.method}")
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/benchmark.py \
            --params {params.file:q} \
            --base {input.base:q} \
            --prompts {input.prompts:q} \
            --selection {input.selection:q} \
            --checkpoints {params.checkpoints:q} \
            --state {params.state:q} \
            --output {params.folder:q}
        """


use rule benchmark as benchmark_base with:
    """The same on the base."""
    input:
        base=PATHS.base_record,
        rows=PATHS.task_inputs(PATHS.tasks),
        prompts=PATHS.table_inputs(PATHS.prompt_tables),
        selection=[],
    output:
        results=PATHS.base_benchmark_results,
    log:
        f"{PATHS.logs}/benchmark/base.log",
    threads: RESOURCES.threads("benchmark_base")
    resources:
        **RESOURCES.of("benchmark_base"),
    params:
        file=PATHS.params("benchmark_base"),
        digest=PARAMS.digest("benchmark_base"),
        checkpoints=[],
        state=f"{PATHS.state}/benchmarks",
        folder=scored_models_folder,
    message:
        RESOURCES.message("benchmark_base", "Run the benchmarks on the base model")


rule run_programs:
    """Run the programs that a model wrote for HumanEval, in a sandbox, without the model."""
    input:
        PATHS.benchmarks("programs.json"),
    output:
        PATHS.benchmarks("outcomes.json"),
    log:
        f"{PATHS.logs}/run_programs/{{model}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: RESOURCES.program_cores
    resources:
        **RESOURCES.of("run_programs"),
    params:
        version=PARAMS.version("benchmark"),
        sandbox=STUDY.benchmarks.sandbox,
        # What was left unscored for want of a sandbox is run again once there may be one.
        sandbox_state=PARAMS.sandbox_state,
    message:
        RESOURCES.message("run_programs", "Run the programs of {wildcards.model}")
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/run_programs.py \
            --programs {input:q} \
            --sandbox {params.sandbox:q} \
            --workers {threads:q} \
            --output {output:q}
        """
