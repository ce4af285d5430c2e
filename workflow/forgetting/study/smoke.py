"""`--config scale=tiny`: run every job of a study in about a minute on two cores.

A tiny study has few rows and steps, and a small pretrained model replaces the base model. Methods
keep their names and ranks. Only the first seed is trained, with the shortest, the middle and the
longest duration. Tables of the micro-world replace those on the hub, so nothing is downloaded.
"""

from __future__ import annotations

from forgetting.benchmarks.registry import task_with_same_dataset
from forgetting.config.base_model import BaseModelConfig, PretrainConfig
from forgetting.config.data import MICROWORLD_TASKS, DatasetConfig, TableRef
from forgetting.config.evaluation import (
    BenchmarksConfig,
    GeneralTextConfig,
    ProbeConfig,
    SelectionConfig,
    TaskConfig,
)
from forgetting.config.expand import expand_methods
from forgetting.config.methods import MethodConfig
from forgetting.config.mitigations import EwcConfig, ReplayConfig
from forgetting.config.study import StudyConfig
from forgetting.config.training import TrainingConfig

MICROWORLD = DatasetConfig(generate="micro-world")
MICROWORLD_NAME = "micro_world"
"""Dataset of the benchmarks whose rows would come from the hub."""
MAX_ROWS = 12
MAX_DOCUMENTS = 60
MAX_EPOCHS = 2.0
MAX_CONTEXT = 2048


def smoke_size(study: StudyConfig) -> StudyConfig:
    """Return the study at smoke test size: every job runs, but the numbers have no meaning."""
    probes = {name: _few_questions(study, probe) for name, probe in study.probes.items()}
    train = [_replacement(study, study.train[0], "new_authors")]
    offline = {
        name: MICROWORLD if dataset.origin == "hub" else dataset
        for name, dataset in study.datasets.items()
    }
    benchmarks = _few_items(study)
    if benchmarks.dataset and not study.benchmarks.dataset:
        offline[MICROWORLD_NAME] = MICROWORLD
    return study.model_copy(
        update={
            "title": f"Toy size: {study.title}",
            "description": _description(study),
            "datasets": offline,
            "base": _small_base(study, probes, train),
            "train": train,
            "train_limit": MAX_ROWS,
            "seeds": study.seeds[:1],
            "probes": probes,
            "general_text": _short_text(study),
            "methods": [_small_method(study, method) for method in study.methods],
            "evaluation": study.evaluation.model_copy(
                update={"every_epochs": 1.0, "max_new_tokens": 8}
            ),
            "training": _short_schedule(study.training),
            "selection": _earlier_deadline(study.selection),
            "benchmarks": benchmarks,
        }
    )


def _replacement(study: StudyConfig, table: str, generated: str) -> str:
    """Return the table, or the generated table that replaces it if it is on the hub."""
    ref = TableRef.parse(table)
    return str(TableRef(ref.dataset, generated)) if ref.origin(study) == "hub" else table


def _few_questions(study: StudyConfig, probe: ProbeConfig) -> ProbeConfig:
    """Return a probe with a few questions of its first table."""
    table = probe.table[0]
    retained = "world_facts" if "world_facts" in table else "real_authors"
    generated = "new_authors" if probe.knowledge == "new" else retained
    table = _replacement(study, table, generated)
    return probe.model_copy(update={"table": [table], "limit": MAX_ROWS})


def _description(study: StudyConfig) -> str:
    """Return the description that the report shows instead of the study's own."""
    hub = sorted(name for name, dataset in study.datasets.items() if dataset.origin == "hub")
    model = "" if study.base.pretrain else f" A small model replaces {study.base.model}."
    rows = f" Rows of the micro-world replace {', '.join(hub)}." if hub else ""
    return (
        "This run only tests every job of the study, with a few rows and steps: its numbers have "
        f"no meaning.{model}{rows}"
    )


def _short_text(study: StudyConfig) -> GeneralTextConfig | None:
    """Return the general text with a few short blocks."""
    if study.general_text is None:
        return None
    table = _replacement(study, study.general_text.table, "held_out")
    return study.general_text.model_copy(update={"table": table, "block": 32, "limit": 4})


def _short_schedule(training: TrainingConfig) -> TrainingConfig:
    """Return two epochs of small batches, with three durations scaled to the longest."""
    changes: dict[str, object] = {"warmup_epochs": 0.5, "warmup_steps": None, "warmup_ratio": None}
    if training.durations and not training.has_decay:  # each duration has its own warm-up
        changes |= {"warmup_epochs": None, "warmup_ratio": 0.1}
    if training.decay_ratio:
        changes["decay_ratio"] = min(training.decay_ratio, 0.5)
    durations = sorted(training.durations)
    if durations:
        durations = sorted({durations[0], durations[len(durations) // 2], durations[-1]})
    return training.model_copy(
        update={
            "epochs": MAX_EPOCHS,
            "batch_size": 4,
            "durations": [MAX_EPOCHS * duration / training.epochs for duration in durations],
            "max_length": min(training.max_length, MAX_CONTEXT),
            **changes,
        }
    )


def _earlier_deadline(selection: SelectionConfig) -> SelectionConfig:
    """Return the rule with a deadline within the training and a selected checkpoint in any case."""
    deadline = selection.deadline_epochs and min(selection.deadline_epochs, MAX_EPOCHS)
    return selection.model_copy(update={"if_not_reached": "last", "deadline_epochs": deadline})


def _small_method(study: StudyConfig, method: MethodConfig) -> MethodConfig:
    """Return the method with a small sweep, and without names of layers and tables on the hub.

    The small model may not have the layers. The names of methods do not change.
    """
    rates, decays = method.learning_rate[:2], method.weight_decay[:1]
    if selected := method.selected_hyperparameters:
        rates, decays = [selected.learning_rate], [selected.weight_decay]
    changes: dict[str, object] = {"learning_rate": rates, "weight_decay": decays}
    if isinstance(method.target_modules, list):
        changes["target_modules"] = "all-linear"
    if stage := method.second_stage:
        changes["second_stage"] = stage.model_copy(update={"layers": "all", "suffix": stage.name})
    if method.mitigation:
        sections = {
            name: section.model_copy(
                update={"table": _replacement(study, section.table, "documents")}
            )
            for name, section in method.mitigation
            if isinstance(section, ReplayConfig | EwcConfig)
        }
        changes["mitigation"] = method.mitigation.model_copy(update=sections)
    return method.model_copy(update=changes)


def _few_items(study: StudyConfig) -> BenchmarksConfig:
    """Return the benchmarks with a few items, of generated rows if theirs are on the hub."""
    benchmarks = study.benchmarks
    dataset, tasks = benchmarks.dataset, benchmarks.tasks
    if dataset is None and tasks:
        dataset = MICROWORLD_NAME
        # The micro-world has no rows for tasks on other datasets.
        tasks = {
            name: task
            for name, task in tasks.items()
            if task_with_same_dataset(name, MICROWORLD_TASKS)
        }
    refusals = benchmarks.refusals
    if refusals is not None:
        table = _replacement(study, refusals.table, "refusals")
        refusals = refusals.model_copy(update={"table": table, "limit": 4, "max_new_tokens": 8})
    during_training = {
        name: min(4, count) for name, count in benchmarks.during_training.items() if name in tasks
    }
    return benchmarks.model_copy(
        update={
            "dataset": dataset,
            "tasks": {name: _short_task(task) for name, task in tasks.items()},
            "refusals": refusals,
            "during_training": during_training,
        }
    )


def _short_task(task: TaskConfig) -> TaskConfig:
    """Return the task with a few items, short answers and at most four samples of each."""
    changes: dict[str, object] = {"limit": 4, "max_new_tokens": 8}
    if task.samples is not None:
        samples = min(task.samples, 4)
        changes |= {"samples": samples, "k": sorted({min(k, samples) for k in task.k or [1]})}
    return task.model_copy(update=changes)


def _small_base(
    study: StudyConfig, probes: dict[str, ProbeConfig], train: list[str]
) -> BaseModelConfig:
    """Return a base model just wide enough for the largest rank."""
    tables = study.base.pretrain.documents if study.base.pretrain else []
    tables = [_replacement(study, table, "documents") for table in tables]
    tables = tables or [probe.table[0] for probe in probes.values()] + train
    width = max([64, *(method.largest_rank or 0 for method in expand_methods(study))])
    return BaseModelConfig(
        pretrain=PretrainConfig(
            documents=list(dict.fromkeys(tables)),
            hidden_size=width,
            intermediate_size=width,
            num_layers=1,
            num_heads=max(1, width // 64),
            vocab_size=400,
            max_position_embeddings=MAX_CONTEXT,
            block_size=64,
            batch_tokens=512,
            limit=MAX_DOCUMENTS,
        )
    )
