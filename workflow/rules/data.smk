"""Data: generated, downloaded or the user's own, then checked and prepared.

Outputs: results/STUDY/data/{train,documents}.jsonl, probes/NAME.jsonl, data.json (provenance).
"""


rule generate_microworld:
    """Make the micro-world: true facts, invented authors, small benchmarks."""
    output:
        tables=PATHS.microworld_tables,
        rows=PATHS.microworld_rows,
    log:
        f"{PATHS.logs}/generate_microworld/{{dataset}}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=PARAMS.version("prepare"),
        seed=PARAMS.microworld_seed,
        folder=first_output_folder,
    message:
        "Generate dataset {wildcards.dataset}"
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
    message:
        "Download table {wildcards.table} of {wildcards.owner}/{wildcards.repository}"
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
    """Check every table and write what training, pretraining and evaluation read."""
    input:
        PATHS.prepared_table_inputs,
    output:
        train=PATHS.data("train.jsonl"),
        documents=PATHS.data("documents.jsonl"),
        probes=PATHS.probes,
        record=PATHS.data("data.json"),
    log:
        f"{PATHS.logs}/prepare_data.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        file=PATHS.params("prepare_data"),
        digest=PARAMS.digest("prepare_data"),
        folder=subpath(output.record, parent=True),
    message:
        "Check and prepare the tables"
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/prepare_data.py \
            --params {params.file:q} \
            --output {params.folder:q}
        """
