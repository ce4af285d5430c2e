"""The base model: trained here, downloaded, or a folder; then its scores, the zero point.

Outputs: results/STUDY/base/base.json (what and where it is), base/layers.json (its weights),
base/items.parquet (its scores), and base/benchmarks.parquet where the study evaluates benchmarks
during training.
"""

if STUDY.base.pretrain:

    rule pretrain_base:
        """Train a small model from scratch on the study's documents."""
        input:
            documents=PATHS.data("documents.jsonl"),
        output:
            record=PATHS.base_record,
            layers=PATHS.base_layers,
        log:
            f"{PATHS.logs}/pretrain_base.log",
        conda:
            "../../envs/environment.yaml"
        threads: 8
        resources:
            **RESOURCES.of("pretrain_base"),
        params:
            file=PATHS.params("pretrain_base"),
            digest=PARAMS.digest("pretrain_base"),
            # The record names it, so all jobs must find it there.
            folder=PATHS.base("model"),
            state=f"{PATHS.state}/pretrain",
        message:
            "Pretrain the base model"
        shell:
            r"""
            exec &> >(tee {log:q})

            python "$SCRIPTS"/pretrain_base.py \
                --params {params.file:q} \
                --documents {input.documents:q} \
                --folder {params.folder:q} \
                --state {params.state:q} \
                --layers {output.layers:q} \
                --output {output.record:q}
            """

else:

    rule download_model:
        """Fetch a hub model at its pinned revision."""
        output:
            directory("resources/models/{owner}/{repository}/{revision}"),
        log:
            "logs/download_model/{owner}/{repository}/{revision}.log",
        localrule: True
        conda:
            "../../envs/environment.yaml"
        message:
            "Download model {wildcards.owner}/{wildcards.repository}"
        shell:
            r"""
            exec &> >(tee {log:q})

            HF_HUB_OFFLINE=0 python "$SCRIPTS"/download_model.py \
                --model {wildcards.owner:q}/{wildcards.repository:q} \
                --revision {wildcards.revision:q} \
                --output {output:q}
            """

    rule register_base:
        """Check a model that was trained elsewhere and record what it is."""
        input:
            PATHS.model_inputs,
        output:
            record=PATHS.base_record,
            layers=PATHS.base_layers,
        log:
            f"{PATHS.logs}/register_base.log",
        localrule: True
        conda:
            "../../envs/environment.yaml"
        params:
            file=PATHS.params("register_base"),
            digest=PARAMS.digest("register_base"),
        message:
            "Check the base model"
        shell:
            r"""
            exec &> >(tee {log:q})

            python "$SCRIPTS"/register_base.py \
                --params {params.file:q} \
                --layers {output.layers:q} \
                --output {output.record:q}
            """


rule evaluate_base:
    """Evaluate the base on every probe, and on the benchmarks that trainings evaluate."""
    input:
        base=PATHS.base_record,
        probes=PATHS.probes,
        text=PATHS.table_inputs(PATHS.text_tables),
        rows=PATHS.task_inputs(PATHS.training_tasks),
    output:
        scored=PATHS.base_items,
        targets=PATHS.base_predictions,
        benchmarks=PATHS.base_benchmarks,
    log:
        f"{PATHS.logs}/evaluate_base.log",
    conda:
        "../../envs/environment.yaml"
    threads: RESOURCES.threads("evaluate_base")
    resources:
        **RESOURCES.of("evaluate_base"),
    params:
        file=PATHS.params("evaluate_base"),
        digest=PARAMS.digest("evaluate_base"),
    message:
        RESOURCES.message("evaluate_base", "Evaluate the base model")
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/evaluate_base.py \
            --params {params.file:q} \
            --base {input.base:q} \
            --probes {input.probes:q} \
            --text {input.text:q} \
            --targets {output.targets:q} \
            --benchmarks {output.benchmarks:q} \
            --output {output.scored:q}
        """
