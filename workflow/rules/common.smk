"""The study, and what its jobs are made of: paths, parameters, versions.

Nothing here decides anything about the science; that stands in the study and in the library.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# The library, for this file and for every program that a rule starts.
LIBRARY = str(Path(workflow.basedir) / "workflow")
sys.path.insert(0, LIBRARY)
SCRIPTS = str(Path(LIBRARY, "scripts"))
# Programs are run by the Python that runs Snakemake, also where its environment is not activated.
PATHS = os.pathsep.join(
    [str(Path(sys.executable).parent), os.getenv("PATH", os.defpath)]
)
if shutil.which("sbatch"):
    # In front of it one that waits for a controller which is away.
    patient = Path(workflow.basedir, "profiles", "slurm", "bin")
    PATHS = os.pathsep.join([str(patient), PATHS])
    os.environ.update(FORGETTING_SNAKEMAKE=str(os.getpid()))
    os.environ.pop("FORGETTING_SBATCH", None)
os.environ.update(PYTHONPATH=LIBRARY, SCRIPTS=SCRIPTS, PATH=PATHS)
# Only the download rules may use the network; elsewhere a missing file is told at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A job that SLURM starts again would begin its log anew, and what befell it would be lost.
os.environ.setdefault("SBATCH_OPEN_MODE", "append")

from forgetting.benchmarks.registry import (
    SCORE_FILES,
    benchmark,
    task_with_same_dataset,
    required_splits,
)
from forgetting.benchmarks.programs import has_bubblewrap, programs_were_run
from forgetting.pipeline.resources.job_costs import JobCosts
from forgetting.pipeline.resources.hardware import read_site
from forgetting.pipeline.resources.requests import (
    check_single_node,
    capacity_warnings,
    snakemake_resources,
    threads,
)
from forgetting.data.hub_datasets import HUB_DATASETS
from forgetting.data.table_files import find_table
from forgetting.digests import COPIES_VARIABLE
from forgetting.inputs import content_digest, model_files
from forgetting.pipeline.slurm import cancel_orphaned_jobs
from forgetting.locks import (
    JOBS_LOCK,
    check_no_running_jobs,
    check_owner,
    lock_results,
    lock_downloads,
    study_origin,
)
from forgetting.pipeline.slurm import SUBMITTED_FILE
from forgetting.digests import sha256_of_all
from forgetting.errors import InputError
from forgetting.io import content_key
from forgetting.config.data import MICROWORLD_TABLES
from forgetting.study.preflight import check_inputs
from forgetting.config.base_model import is_local
from forgetting.study.load import load_study, study_source
from forgetting.config.expand import (
    duration_name,
    scored_models,
    scored_model_names,
    selected_models,
    expand_methods,
)
from forgetting.versions import source_digest, stage_versions

if getattr(workflow.storage_settings, "default_storage_provider", None):
    # Jobs then get copies of their inputs, without the hidden files that record digests.
    os.environ[COPIES_VARIABLE] = "1"

STUDIES = Path(workflow.basedir) / "config" / "studies"
SITE = Path(workflow.basedir) / "profiles" / "slurm" / "partitions.yaml"
try:
    NAME, STUDY = load_study(config, STUDIES)
    ORIGIN = study_origin(study_source(config, STUDIES).path, STUDIES)
    check_owner(Path("results", NAME), ORIGIN)
    check_inputs(STUDY, study_source(config, STUDIES).locate)
    COSTS = JobCosts(STUDY, read_site(SITE))
    check_single_node(COSTS)
    for note in capacity_warnings(COSTS) if workflow.is_main_process else ():
        logger.warning(note)
except InputError as error:
    raise WorkflowError(str(error)) from None

RESULTS = f"results/{NAME}"
LOGS = f"logs/{NAME}"
os.environ.update(
    FORGETTING_JOBS_LOCK=str(Path(RESULTS, JOBS_LOCK).absolute()),
    FORGETTING_SUBMITTED=str(Path(RESULTS, SUBMITTED_FILE).absolute()),
)
TUNINGS = {tuning.name: tuning for tuning in expand_methods(STUDY)}
DURATIONS = {duration_name(duration): duration for duration in STUDY.training.durations}
TASKS = list(STUDY.benchmarks.tasks)
SELECTED = selected_models(STUDY)
# Is anything scored beside the probes?
BENCHMARKED = bool(TASKS or STUDY.benchmarks.refusals)
# Does a benchmark have models write programs, which are then run?
PROGRAMS = any(benchmark(task).generates_code for task in TASKS)
# The models of each method that are scored, and all that are.
SCORED = scored_model_names(STUDY)
MODELS = scored_models(STUDY)


wildcard_constraints:
    duration=r"duration[^/]+",
    dataset=r"[^/]+",
    method=r"[^/]+",
    model=r"base|[^/]+/seed-?\d+(-duration[^/]+)?",
    owner=r"[^/]+",
    repository=r"[^/]+",
    revision=r"[0-9a-f]{40}",
    seed=r"-?\d+",
    task=r"[^/]+",


# People who edit the library may have every change of its files rerun all jobs.
CODE = source_digest(Path(LIBRARY)) if config.get("rerun_on_code_change") else None


def version(*stages):
    """Return the versions of the stages that a rule runs. A raised version reruns the rule."""
    return stage_versions(*stages, code=CODE)


def as_json(section, **more):
    """A section of the study, with more keys, as one argument of a program."""
    if hasattr(section, "model_dump"):
        section = section.model_dump(mode="json")
    return json.dumps({**section, **more})


def sections(*names):
    """Several sections of the study, by name, as plain values."""
    whole = STUDY.model_dump(mode="json", include=set(names))
    return {name: whole[name] for name in names}


def table_file(table):
    """The file of a table: generated, downloaded, or in a folder of the user's."""
    dataset, name = table.split("/", 1)
    origin = STUDY.datasets[dataset]
    if origin.folder:
        return str(find_table(Path(origin.folder), name))
    if origin.generate:
        return f"{RESULTS}/world/{dataset}/{name}.jsonl"
    return f"resources/datasets/{origin.hub}/{origin.revision}/{name}.jsonl"


def tables():
    """Every table that the study reads, with its file."""
    documents = STUDY.base.pretrain.documents if STUDY.base.pretrain else []
    probes = [table for probe in STUDY.probes.values() for table in probe.table]
    return {
        table: table_file(table)
        for table in dict.fromkeys([*STUDY.train, *probes, *documents])
    }


def is_users(table):
    """Return whether a table is in a folder of the user's."""
    return STUDY.datasets[table.split("/", 1)[0]].folder is not None


def table_inputs(tables):
    """The files of tables, as inputs: of the user's own the content counts, not the date."""
    return [
        ancient(table_file(table)) if is_users(table) else table_file(table)
        for table in tables
    ]


def table_contents(tables):
    """Digest of the contents of those tables that are in folders of the user's."""
    return content_digest(
        {table: Path(table_file(table)) for table in tables if is_users(table)}
    )


def columns(tables):
    """What the columns of tables are called, by table."""
    return {table: STUDY.columns(table).model_dump() for table in tables}


def text_tables():
    """The table of the general text, if the study has one."""
    return [STUDY.general_text.table] if STUDY.general_text else []


def target_options(wildcards):
    """The option that names the base's predictions on the general text, if there is one."""
    return [f"--targets={path}" for path in TARGETS]


def task_folder(task):
    """The folder of SPLIT.jsonl from which a benchmark takes its rows."""
    if STUDY.benchmarks.dataset is None:
        pinned = STUDY.benchmarks.tasks[task].revision or HUB_DATASETS[task].revision
        return f"resources/benchmarks/{task}/{pinned}"
    origin = STUDY.datasets[STUDY.benchmarks.dataset]
    if origin.folder:
        return str(Path(origin.folder, task))
    return f"{RESULTS}/world/{STUDY.benchmarks.dataset}/benchmarks/{task_with_same_dataset(task)}"


def rows_inputs(tasks):
    """What the rows of tasks depend on: files, or folders that are downloaded."""
    if STUDY.benchmarks.dataset is None:
        return [task_folder(task) for task in tasks]
    if users := users_rows(tasks):
        return [ancient(str(path)) for path in users.values()]
    return [
        f"{task_folder(task)}/{split}.jsonl"
        for task in tasks
        for split in HUB_DATASETS[task_with_same_dataset(task)].splits
    ]


def users_rows(tasks):
    """Files of the rows of tasks that are in a folder of the user's, by task and split."""
    rows = STUDY.benchmarks.dataset
    if rows is None or STUDY.datasets[rows].folder is None:
        return {}
    return {
        f"{task}/{split}": Path(task_folder(task), f"{split}.jsonl")
        for task in tasks
        for split in required_splits(task, STUDY.benchmarks.tasks[task].num_fewshot)
    }


def rows_contents(tasks):
    """Digest of the contents of those rows."""
    return content_digest(users_rows(tasks))


def prompt_tables():
    """The table of the prompts that should be refused, if the study has any."""
    refusals = STUDY.benchmarks.refusals
    return [refusals.table] if refusals else []


def sandbox_hope(wildcards):
    """A word that changes when a model's programs were not run and now may be, and only then.

    Where a job runs on another machine, what is installed on this one is no more than a hint: if
    the programs were run all the same, the word changes once, and they are run once more.
    """
    if not PROGRAMS or STUDY.benchmarks.sandbox == "none":
        return "no sandbox is needed"
    outcomes = Path(RESULTS, "benchmarks", wildcards.model, "outcomes.json")
    here = has_bubblewrap() or programs_were_run(outcomes)
    return "there may be a sandbox" if here else "there is no sandbox"


def benchmark_spec():
    """All that a benchmark job is told of the study."""
    refusals = STUDY.benchmarks.refusals
    asking = refusals and {
        **sections("prompt"),
        "columns": STUDY.columns(refusals.table).model_dump(),
    }
    whole = sections("benchmarks", "precision")
    # Nothing of this changes the score of a checkpoint; of the rows the content counts.
    for key in ("during_training", "models", "dataset", "sandbox"):
        del whole["benchmarks"][key]
    return as_json(whole, asking=asking)


ALONG = STUDY.benchmarks.during_training


def along_options():
    """What is told of the benchmarks of every evaluation: to trainings, and to what asks the base.

    Not where the answers go: of parameters made from outputs Snakemake sees no change.
    """
    if not ALONG:
        return []
    told = STUDY.benchmarks.model_dump(mode="json", include={"tasks", "batch_size"})
    told["tasks"] = {
        task: told["tasks"][task]
        | {"limit": min(count, told["tasks"][task]["limit"] or count)}
        # What blind guessing has is asked of nobody.
        | {"chance": None}
        for task, count in ALONG.items()
    }
    return [
        f"--during-training={json.dumps(told)}",
        "--during-training-rows",
        *(f"{task}={task_folder(task)}" for task in ALONG),
    ]


def model_folder():
    """Where a base that was trained elsewhere lies on this disk."""
    model = STUDY.base.model
    if is_local(model):
        return str(Path(model).expanduser())
    return f"resources/models/{model}/{STUDY.base.revision}"


def model_inputs():
    """What the base's record depends on: the files of a local model, or the downloaded folder."""
    folder = model_folder()
    if not is_local(STUDY.base.model):
        return folder
    return [ancient(str(path)) for path in model_files(Path(folder))]


def model_contents():
    """Digest of the contents of a local model's files."""
    folder = Path(model_folder())
    local = is_local(STUDY.base.model)
    return content_digest(
        {str(p.relative_to(folder)): p for p in (model_files(folder) if local else [])}
    )


def chosen_inputs(wildcards):
    """What a tuned model is made of. The digests in the selection tell whether it is another."""
    method = Path(wildcards.model).parent
    return {
        "selection": f"{RESULTS}/selection/{method}.json",
        "checkpoints": ancient(f"{RESULTS}/selected/{method}/index.json"),
    }


def chosen_options(wildcards, input):
    """The options that name a tuned model."""
    return [
        f"--selection={input.selection}",
        f"--checkpoints={RESULTS}/selected/{Path(wildcards.model).parent}",
        f"--seed={Path(wildcards.model).name.removeprefix('seed')}",
    ]
