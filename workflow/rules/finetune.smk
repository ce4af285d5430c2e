"""Fine-tuning: one job for each method and seed trains and evaluates all its hyperparameters.

Where the study gives a method several processes, they train each of its runs together. In a study
with training.durations these runs are trunks, and a job for each duration trains the cooldown
branches that leave them.

Outputs: results/STUDY/runs/METHOD/seedN/{items.parquet,runs.json}; benchmarks.parquet there, where
the study evaluates benchmarks during training; results/STUDY/branches/METHOD/seedN/durationD with the
same files. Runs and checkpoints are in results/STUDY/state, which is no output: Snakemake deletes the
outputs of a job that it retries, and a job that was killed resumes from there.
"""


rule finetune:
    """Train all hyperparameters of one method and seed; evaluate while training."""
    input:
        base=PATHS.base_record,
        base_items=PATHS.base_items,
        train=PATHS.data("train.jsonl"),
        probes=PATHS.probes,
        general=PATHS.mitigation_inputs,
        targets=PATHS.base_predictions,
        rows=PATHS.task_inputs(PATHS.training_tasks),
    output:
        scored=PATHS.run_group("items.parquet"),
        benchmarks=PATHS.run_group_benchmarks,
        runs=PATHS.run_group("runs.json"),
        # In the state: where that is deleted, what needs a checkpoint trains the runs again.
        checkpoints=PATHS.checkpoints,
    log:
        f"{PATHS.logs}/finetune/{{method}}-seed{{seed}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: RESOURCES.threads("finetune")
    resources:
        **RESOURCES.of("finetune"),
    params:
        file=PATHS.params("finetune"),
        digest=PARAMS.digest("finetune"),
        data=subpath(input.train, parent=True),
        state=PATHS.state_folder,
    message:
        RESOURCES.message(
            "finetune", "Fine-tune {wildcards.method}, seed {wildcards.seed}"
        )
    shell:
        r"""
        exec &> >(tee {log:q})

        python -m forgetting.training.launch {resources.gpu:q} {resources.nodes:q} "$SCRIPTS"/finetune.py \
            --params {params.file:q} \
            --base {input.base:q} \
            --base-items {input.base_items:q} \
            --data {params.data:q} \
            --general {input.general:q} \
            --targets {input.targets:q} \
            --state {params.state:q} \
            --items {output.scored:q} \
            --benchmarks {output.benchmarks:q} \
            --runs {output.runs:q} \
            --checkpoints {output.checkpoints:q}
        """


rule train_cooldown:
    """Train every trunk of one method and seed to the end of one duration, through its cooldown."""
    input:
        base=PATHS.base_record,
        base_items=PATHS.base_items,
        train=PATHS.data("train.jsonl"),
        probes=PATHS.probes,
        general=PATHS.mitigation_inputs,
        targets=PATHS.base_predictions,
        trunks=PATHS.run_group("runs.json"),
    output:
        scored=PATHS.cooldown("items.parquet"),
        runs=PATHS.cooldown("runs.json"),
        checkpoints=PATHS.cooldown_checkpoints,
    log:
        f"{PATHS.logs}/train_cooldown/{{method}}-seed{{seed}}-{{duration}}.log",
    conda:
        "../../envs/environment.yaml"
    threads: RESOURCES.threads("train_cooldown")
    resources:
        **RESOURCES.of("train_cooldown"),
    params:
        file=PATHS.params("train_cooldown"),
        digest=PARAMS.digest("train_cooldown"),
        data=subpath(input.train, parent=True),
        state=PATHS.state_folder,
    message:
        RESOURCES.message(
            "train_cooldown",
            "Cool down {wildcards.method}, seed {wildcards.seed}, {wildcards.duration}",
        )
    shell:
        r"""
        exec &> >(tee {log:q})

        python -m forgetting.training.launch {resources.gpu:q} {resources.nodes:q} "$SCRIPTS"/train_cooldown.py \
            --params {params.file:q} \
            --base {input.base:q} \
            --base-items {input.base_items:q} \
            --data {params.data:q} \
            --general {input.general:q} \
            --targets {input.targets:q} \
            --trunks {input.trunks:q} \
            --state {params.state:q} \
            --items {output.scored:q} \
            --runs {output.runs:q} \
            --checkpoints {output.checkpoints:q}
        """
