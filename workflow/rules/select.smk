"""Selection: of each method's hyper-parameters, and of each seed's checkpoint.

Outputs: results/STUDY/selection/METHOD.json and the checkpoints, results/STUDY/selected/METHOD/.
"""


rule select_checkpoint:
    """Apply the study's rules to the trajectories of one method."""
    input:
        base_items=rules.score_base.output,
        runs=lambda wildcards: [
            f"{RESULTS}/cohorts/{wildcards.method}/seed{seed}/runs.json"
            for seed in STUDY.seeds
        ],
    output:
        selection=f"{RESULTS}/selection/{{method}}.json",
        checkpoints=directory(f"{RESULTS}/selected/{{method}}"),
    log:
        f"{LOGS}/select_checkpoint/{{method}}.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        code=code("select_checkpoint"),
        spec=lambda wildcards: as_json(
            sections("selection", "seeds"),
            tuning=TUNINGS[wildcards.method].model_dump(mode="json"),
        ),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/select_checkpoint.py \
            --spec {params.spec:q} \
            --base-items {input.base_items:q} \
            --runs {input.runs:q} \
            --selection {output.selection:q} \
            --checkpoints {output.checkpoints:q}
        """
