"""The report: all results in tidy tables, then the page and its figures.

Outputs: results/STUDY/tables/, reports/STUDY.html, reports/STUDY-figures/, and reports/tradeoff.html,
the page of the study that was run last.
"""

TABLES = [
    "runs",
    "trajectory",
    "items",
    "selection",
    "comparisons",
    "churn",
    "benchmarks",
    "benchmark_items",
    "benchmark_responses",
]
if STUDY.selection.wise_ft:
    TABLES.append("wise_ft")
if ALONG:
    TABLES += ["benchmark_trajectory", "benchmark_trajectory_items"]


rule make_tables:
    """Gather what all jobs found in the tables that anyone can ask with pandas."""
    input:
        unpack(job_results),
    output:
        tables=expand(f"{RESULTS}/tables/{{table}}.parquet", table=TABLES),
        runs=f"{RESULTS}/tables/runs.json",
        study=f"{RESULTS}/tables/study.json",
        resolved=f"{RESULTS}/study.json",
    log:
        f"{LOGS}/make_tables.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=version("tables"),
        # A study may be longer than an argument of a program, 128 KiB: it is resolved once more.
        # Where it lies is no reason to run again, so the parameter is made from the output.
        asked=lambda wildcards, output: json.dumps(config),
        digest=content_key(STUDY.model_dump(mode="json")),
        results=subpath(output.resolved, parent=True),
        folder=subpath(output.study, parent=True),
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/make_tables.py \
            --asked {params.asked:q} \
            --digest {params.digest:q} \
            --results {params.results:q} \
            --output {params.folder:q}
        """


rule report:
    """Render the study as one page that opens offline, and its figures as SVG and PNG."""
    input:
        tables=rules.make_tables.output.tables,
        study=rules.make_tables.output.study,
    output:
        page=f"reports/{NAME}.html",
        # As a whole, for they are not the same of every study.
        figures=directory(f"reports/{NAME}-figures"),
    log:
        f"{LOGS}/report.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    params:
        version=version("report"),
        # Templates, style sheet and script of the page.
        assets=sha256_of_all(
            sorted(Path(LIBRARY, "forgetting", "report", "templates").iterdir())
        )[1],
        tables=subpath(input.study, parent=True),
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
        page=rules.report.output.page,
        lost=lost_results,
    output:
        "reports/tradeoff.html",
    log:
        f"{LOGS}/publish.log",
    localrule: True
    conda:
        "../../envs/environment.yaml"
    shell:
        r"""
        exec &> >(tee {log:q})

        python "$SCRIPTS"/publish.py \
            --page {input.page:q} \
            --output {output:q}
        """
