"""Data: generated, downloaded or the user's own, then checked and prepared.

Outputs: results/STUDY/data/{train,documents}.jsonl, probes/NAME.jsonl, data.json (provenance).
"""


rule generate_microworld:
    """Make the micro-world: true facts, invented authors, small benchmarks."""
    output:
        tables=expand(
            f"{RESULTS}/world/{{{{dataset}}}}/{{table}}.jsonl", table=MICROWORLD_TABLES
        ),
        rows=[
            f"{RESULTS}/world/{{dataset}}/benchmarks/{task}/{split}.jsonl"
            for task, rows in HUB_DATASETS.items()
            for split in rows.splits
        ],
    log:
        f"{LOGS}/generate_microworld/{{dataset}}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=version("prepare"),
        seed=lambda wildcards: STUDY.datasets[wildcards.dataset].seed,
        folder=lambda wildcards, output: str(Path(output.tables[0]).parent),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/generate_microworld.py \
            --seed {params.seed:q} \
            --output {params.folder:q}
        """


rule download_table:
    """Fetch one table of a hub dataset at its pinned revision."""
    output:
        "resources/datasets/{owner}/{repository}/{revision}/{table}.jsonl",
    log:
        "logs/download_table/{owner}/{repository}/{revision}/{table}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    shell:
        r"""
        exec &> >(tee {log:q})

        HF_HUB_OFFLINE=0 python "$SCRIPTS"/download_table.py \
            --dataset {wildcards.owner:q}/{wildcards.repository:q} \
            --revision {wildcards.revision:q} \
            --table {wildcards.table:q} \
            --output {output:q}
        """


rule prepare_data:
    """Check every table and write what training, pretraining and measuring read."""
    input:
        table_inputs(tables()),
    output:
        tables=f"{RESULTS}/data/tables.json",
        train=f"{RESULTS}/data/train.jsonl",
        documents=f"{RESULTS}/data/documents.jsonl",
        probes=expand(f"{RESULTS}/data/probes/{{probe}}.jsonl", probe=STUDY.probes),
        record=f"{RESULTS}/data/data.json",
    log:
        f"{LOGS}/prepare_data.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=version("prepare"),
        contents=lambda wildcards: table_contents(tables()),
        tables=lambda wildcards: json.dumps(tables()),
        folder=subpath(output.record, parent=True),
        spec=lambda wildcards: as_json(
            sections("prompt", "train", "train_limit", "probes"),
            columns=columns(tables()),
            rouge_tokenizer=STUDY.evaluation.rouge_tokenizer,
            max_new_tokens=STUDY.evaluation.max_new_tokens,
            documents=STUDY.base.pretrain.documents if STUDY.base.pretrain else [],
            documents_limit=STUDY.base.pretrain.limit if STUDY.base.pretrain else None,
        ),
    shell:
        r"""
        exec &> >(tee {log:q})

        printf '%s\n' {params.tables:q} >{output.tables:q}
        python "$SCRIPTS"/prepare_data.py \
            --spec {params.spec:q} \
            --tables {output.tables:q} \
            --output {params.folder:q}
        """
