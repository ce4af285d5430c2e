"""The base model: trained here, downloaded, or a folder; then its scores, the zero point.

Outputs: results/STUDY/base/base.json (what and where it is), base/items.parquet (its scores), and
base/benchmarks.parquet where the study asks benchmarks at every evaluation.
"""

BASE = f"{RESULTS}/base/base.json"
# What the base predicts on the general text, for the forgetting cross-entropy of the others.
TARGETS = [f"{RESULTS}/base/targets.safetensors"] if STUDY.general_text else []


if STUDY.base.pretrain:

    rule pretrain_base:
        """Train a small model from scratch on the study's documents."""
        input:
            documents=f"{RESULTS}/data/documents.jsonl",
        output:
            BASE,
        log:
            f"{LOGS}/pretrain_base.log",
        conda:
            "../../envs/environment.yaml"
        threads: 8
        resources:
            **snakemake_resources("pretrain_base", COSTS),
        params:
            version=version("pretrain"),
            seed=STUDY.seeds[0],
            precision=STUDY.precision,
            # Named in the record, so that it must lie where all jobs find it.
            folder=f"{RESULTS}/base/model",
            state=f"{RESULTS}/state/pretrain",
            spec=lambda wildcards: json.dumps(
                STUDY.base.pretrain.model_dump(exclude={"documents", "limit"})
            ),
        shell:
            r"""
            exec &> >(tee {log:q})

            python "$SCRIPTS"/pretrain_base.py \
                --spec {params.spec:q} \
                --documents {input.documents:q} \
                --seed {params.seed:q} \
                --precision {params.precision:q} \
                --folder {params.folder:q} \
                --state {params.state:q} \
                --output {output:q}
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
            model_inputs(),
        output:
            BASE,
        log:
            f"{LOGS}/register_base.log",
        localrule: True
        conda:
            "../../envs/environment.yaml"
        params:
            version=version("pretrain"),
            contents=lambda wildcards: model_contents(),
            folder=model_folder(),
            origin=" at ".join(filter(None, [STUDY.base.model, STUDY.base.revision])),
            prompt=lambda wildcards: as_json(STUDY.prompt) if STUDY.prompt.chat else "",
            downloaded=[] if is_local(STUDY.base.model) else "--downloaded",
        shell:
            r"""
            exec &> >(tee {log:q})

            python "$SCRIPTS"/register_base.py \
                --model={params.folder:q} \
                --origin={params.origin:q} {params.downloaded:q} \
                --prompt={params.prompt:q} \
                --output {output:q}
            """


rule evaluate_base:
    """Score the base on every probe, and ask it the benchmarks that trainings ask as they go."""
    input:
        base=BASE,
        probes=rules.prepare_data.output.probes,
        text=table_inputs(text_tables()),
        rows=lambda wildcards: rows_inputs(ALONG),
    output:
        scored=f"{RESULTS}/base/items.parquet",
        targets=TARGETS,
        benchmarks=f"{RESULTS}/base/benchmarks.parquet" if ALONG else [],
    log:
        f"{LOGS}/evaluate_base.log",
    conda:
        "../../envs/environment.yaml"
    threads: threads("evaluate_base", COSTS)
    resources:
        **snakemake_resources("evaluate_base", COSTS),
    params:
        version=version("evaluate", *(["benchmark"] if ALONG else [])),
        contents=lambda wildcards: [table_contents(text_tables()), rows_contents(ALONG)],
        folder=lambda wildcards, input: str(Path(input.probes[0]).parent),
        spec=lambda wildcards: as_json(
            sections("prompt", "evaluation", "precision", "general_text"),
            knowledge={name: probe.knowledge for name, probe in STUDY.probes.items()},
            columns=columns([STUDY.general_text.table] if STUDY.general_text else []),
            watched=STUDY.selection.probe,
            metric=STUDY.selection.metric,
            # Otherwise a last checkpoint stands in, and the page says that answers are cut.
            must_reach=STUDY.selection.if_not_reached == "none",
        ),
        text=lambda wildcards, input: [f"--text={path}" for path in input.text],
        targets=target_options,
        along=along_options(),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/evaluate_base.py \
            --spec {params.spec:q} \
            --base {input.base:q} \
            --probes {params.folder:q} \
            {params.text:q} {params.targets:q} \
            {params.along:q} --benchmarks {output.benchmarks:q} \
            --output {output.scored:q}
        """
