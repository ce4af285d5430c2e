"""The report: all results in tidy tables, then the page and its figures.

Outputs: results/STUDY/tables/, reports/STUDY.html, reports/STUDY-figures/, and reports/tradeoff.html,
the page of the study that was run last.
"""


rule make_tables:
    """Gather the results of all jobs in tables that pandas reads."""
    input:
        unpack(PATHS.job_results),
    output:
        tables=PATHS.tables,
        runs=PATHS.tables_file("runs.json"),
        study=PATHS.tables_file("study.json"),
        resolved=PATHS.resolved_study,
    log:
        f"{PATHS.logs}/make_tables.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        file=PATHS.params("make_tables"),
        digest=PARAMS.digest("make_tables"),
        results=subpath(output.resolved, parent=True),
        folder=subpath(output.study, parent=True),
    message:
        "Gather all results in tables"
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/make_tables.py \
            --params {params.file:q} \
            --results {params.results:q} \
            --output {params.folder:q}
        """


rule report:
    """Render the study as one page that opens offline, and its figures as SVG and PNG."""
    input:
        tables=PATHS.tables,
        study=PATHS.tables_file("study.json"),
    output:
        page=PATHS.page,
        # As a folder, since studies differ in their figures.
        figures=directory(PATHS.figures),
    log:
        f"{PATHS.logs}/report.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=PARAMS.version("report"),
        assets=PIPELINE.assets,
        tables=subpath(input.study, parent=True),
    message:
        "Render the report"
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/report.py \
            --tables {params.tables:q} \
            --output {output.page:q} \
            --figures {output.figures:q}
        """


rule publish:
    """Copy the study's page to where the page of the study that was run last is."""
    input:
        page=PATHS.page,
        lost=PATHS.lost_results,
    output:
        "reports/tradeoff.html",
    log:
        PATHS.publish_log,
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        loss=PATHS.loss,
    message:
        "Copy the report to reports/tradeoff.html"
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/publish.py \
            --page {input.page:q} \
            --output {output:q}
        """
