"""Cohorts: what the job of a method and seed is given, and where its results lie."""

from forgetting.study.run_groups import may_batch


def general_tables(wildcards):
    """The tables that the mitigation reads, in its order."""
    mitigation = TUNINGS[wildcards.method].mitigation
    return mitigation.tables if mitigation else []


def general_files(wildcards):
    """Their files."""
    return table_inputs(general_tables(wildcards))


def general_options(wildcards):
    """Return the options that name them."""
    return [f"--general={path}" for path in general_files(wildcards)]


def run_group_spec(wildcards):
    """Return what the job needs of the study, with its method and seed."""
    tuning = TUNINGS[wildcards.method]
    settings = sections("prompt", "training", "evaluation", "selection", "precision")
    # A changed `training.batched_lora` reruns only the methods that it affects.
    batched = may_batch(tuning, STUDY.training)
    settings["training"]["batched_lora"] = "auto" if batched else "never"
    return as_json(
        settings,
        knowledge={name: probe.knowledge for name, probe in STUDY.probes.items()},
        columns=columns(general_tables(wildcards)),
        method=tuning.model_dump(mode="json", exclude_defaults=True),
        seed=int(wildcards.seed),
    )


def whole_tunings(wildcards):
    """Digest of the method with its defaults, which the specification leaves out."""
    return content_key([TUNINGS[wildcards.method].model_dump(mode="json")])


# The plugin puts `srun` before a job, for one machine, unless the job has this resource.
SEVERAL_NODES = (
    {"mpi": False}
    if any(COSTS.team(name).nodes > 1 for name in COSTS.run_groups)
    else {}
)


def run_groups(methods):
    """The names of every run_group that some methods are in."""
    return [f"{method}/seed{seed}" for method in methods for seed in STUDY.seeds]


def branches(methods):
    """The names of every job that trains branches of some methods."""
    return [
        f"{method}/seed{seed}/{duration}"
        for method in methods
        for seed in STUDY.seeds
        for duration in DURATIONS
    ]


def trained(file, methods):
    """A file of every run_group that some methods are in."""
    return [f"{RESULTS}/runs/{name}/{file}" for name in run_groups(methods)]


def finished(file, methods):
    """A file of every job whose runs are results: of run_groups, or of their durations' branches."""
    if not DURATIONS:
        return trained(file, methods)
    return [f"{RESULTS}/branches/{name}/{file}" for name in branches(methods)]


def checkpoint_records(methods):
    """The files that say where the checkpoints of those runs are."""
    names = branches(methods) if DURATIONS else run_groups(methods)
    return [f"{RESULTS}/state/checkpoints/{name}.json" for name in names]


def job_results(wildcards):
    """Return the results of all jobs that the tables gather.

    Long lists come from functions: of others Snakemake hashes the whole for every member.
    """
    files = [*SCORE_FILES, *(["outcomes.json"] if PROGRAMS else [])]
    scaled = SELECTED if STUDY.selection.wise_ft else []
    return {
        "base": BASE,
        "base_items": rules.evaluate_base.output.scored,
        "data": rules.prepare_data.output.record,
        "run_groups": [
            path
            for file in ["items.parquet", "runs.json"]
            for path in finished(file, TUNINGS)
        ],
        "during_training": (
            [
                rules.evaluate_base.output.benchmarks,
                *trained("benchmarks.parquet", TUNINGS),
            ]
            if ALONG
            else []
        ),
        "trunks": trained("runs.json", TUNINGS) if DURATIONS else [],
        "selection": expand(f"{RESULTS}/selection/{{method}}.json", method=TUNINGS),
        "scaled": expand(f"{RESULTS}/wise_ft/{{model}}/items.parquet", model=scaled),
        "benchmarks": expand(
            f"{RESULTS}/benchmarks/{{model}}/{{file}}",
            model=MODELS if BENCHMARKED else [],
            file=files,
        ),
    }


def lost_results(wildcards):
    """Return the results that are missing though the study's page or tables are there.

    A job that fails loses its outputs. Snakemake makes a missing file only if a job that needs it
    runs, so it would take the earlier page for up to date. The command after the one that makes them
    again copies the page once more, since these inputs are gone.
    """
    last = [*rules.make_tables.output, rules.report.output.page]
    if not any(Path(path).exists() for path in last):
        return []
    named = job_results(wildcards).values()
    made = [
        path for item in named for path in ([item] if isinstance(item, str) else item)
    ]
    return [path for path in [*made, *last] if not Path(path).exists()]
