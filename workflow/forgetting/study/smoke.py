"""`--config scale=tiny`: any study, through the same code, in about a minute on two cores.

Rows and steps are few, and a small model trained on the spot stands in for a large one. The
methods keep their names and ranks, so that the plan of a tiny study is that of the whole one for
its first seed, and for the shortest, the middle and the longest of its durations.
What would come from the hub comes from the micro-world instead: nothing is downloaded.
"""

from __future__ import annotations

from forgetting.benchmarks.registry import task_with_same_dataset
from forgetting.config.base_model import BaseModelConfig, PretrainConfig
from forgetting.config.data import DatasetConfig
from forgetting.config.evaluation import (
    BenchmarksConfig,
    GeneralTextConfig,
    ProbeConfig,
    TaskConfig,
)
from forgetting.config.expand import expand_methods
from forgetting.config.methods import MethodConfig
from forgetting.config.mitigations import EwcConfig, ReplayConfig
from forgetting.config.selection import SelectionConfig
from forgetting.config.study import StudyConfig
from forgetting.config.training import TrainingConfig

MICROWORLD = DatasetConfig(generate="micro-world")
MAX_ROWS = 12
MAX_DOCUMENTS = 60
MAX_EPOCHS = 2.0
MAX_CONTEXT = 2048


def smoke_size(study: StudyConfig) -> StudyConfig:
    """The same study at toy size; its numbers mean nothing, its jobs are all there."""
    on_hub = {name for name, data in study.datasets.items() if data.hub and not data.folder}
    datasets = {
        name: MICROWORLD if name in on_hub else data for name, data in study.datasets.items()
    }
    benchmarks = _benchmarks(study, datasets, on_hub)

    def stand_in(table: str, knowledge: str) -> str:
        dataset = table.split("/", 1)[0]
        if dataset not in on_hub:
            return table
        old = "world_facts" if "world_facts" in table else "real_authors"
        return f"{dataset}/{'new_authors' if knowledge == 'new' else old}"

    probes = {
        name: probe.model_copy(
            update={
                "table": [stand_in(t, probe.knowledge) for t in probe.table][:1],
                "limit": MAX_ROWS,
            }
        )
        for name, probe in study.probes.items()
    }
    train = [stand_in(table, "new") for table in study.train][:1]
    return study.model_copy(
        update={
            "title": f"Toy size: {study.title}",
            "description": _description_of(study, on_hub),
            "datasets": datasets,
            "base": _small_pretraining(study, on_hub, probes, train),
            "train": train,
            "train_limit": MAX_ROWS,
            "seeds": study.seeds[:1],
            "probes": probes,
            "general_text": _general_text(study, on_hub),
            "methods": [
                _small_base(_fewer_hyperparameters(_offline(m, on_hub))) for m in study.methods
            ],
            "evaluation": study.evaluation.model_copy(
                update={"every_epochs": 1.0, "max_new_tokens": 8}
            ),
            "training": _short_schedule(study.training),
            "selection": _earlier_deadline(study.selection),
            "benchmarks": benchmarks,
        }
    )


def _description_of(study: StudyConfig, on_hub: set[str]) -> str:
    """What the page says in place of the study's own description."""
    model = "" if study.base.pretrain else f" A model made here stands in for {study.base.model}."
    rows = f" Rows of the micro-world stand in for {', '.join(sorted(on_hub))}." if on_hub else ""
    return (
        "This run only tries every job of the study, with a few rows and steps: its numbers mean "
        f"nothing.{model}{rows}"
    )


def _general_text(study: StudyConfig, on_hub: set[str]) -> GeneralTextConfig | None:
    if study.general_text is None:
        return None
    dataset = study.general_text.table.split("/", 1)[0]
    table = f"{dataset}/held_out" if dataset in on_hub else study.general_text.table
    return study.general_text.model_copy(update={"table": table, "block": 32, "limit": 4})


def _short_schedule(training: TrainingConfig) -> TrainingConfig:
    """Two epochs of small batches, and three durations, each as large a share of the longest."""
    longest = training.epochs
    warmup: dict[str, object] = {"warmup_epochs": 0.5, "warmup_steps": None, "warmup_ratio": None}
    if training.durations and not training.has_decay:  # each of them is warmed up by itself
        warmup |= {"warmup_epochs": None, "warmup_ratio": 0.1}
    if training.decay_ratio:
        warmup["decay_ratio"] = min(training.decay_ratio, 0.5)
    some = sorted(training.durations)
    some = sorted({some[0], some[len(some) // 2], some[-1]}) if some else []
    durations = [MAX_EPOCHS * duration / longest for duration in some]
    return training.model_copy(
        update={
            "epochs": MAX_EPOCHS,
            "batch_size": 4,
            "durations": durations,
            "max_length": min(training.max_length, MAX_CONTEXT),
            **warmup,
        }
    )


def _earlier_deadline(selection: SelectionConfig) -> SelectionConfig:
    """The same rule, its deadline within the training; a last checkpoint where none is reached."""
    within = selection.deadline_epochs and min(selection.deadline_epochs, MAX_EPOCHS)
    return selection.model_copy(update={"if_not_reached": "last", "deadline_epochs": within})


def _fewer_hyperparameters(method: MethodConfig) -> MethodConfig:
    """At most two learning rates and one weight decay; only the `fixed` setting if there is one."""
    rates, decays = method.learning_rate[:2], method.weight_decay[:1]
    if method.selected_hyperparameters:
        rates, decays = (
            [method.selected_hyperparameters.learning_rate],
            [method.selected_hyperparameters.weight_decay],
        )
    return method.model_copy(update={"learning_rate": rates, "weight_decay": decays})


def _small_base(method: MethodConfig) -> MethodConfig:
    """The same without names of layers, which the model that stands in may not have."""
    update: dict[str, object] = {}
    if isinstance(method.target_modules, list):
        update["target_modules"] = "all-linear"
    if method.second_stage:
        changes = {"layers": "all", "suffix": method.second_stage.name}
        update["second_stage"] = method.second_stage.model_copy(update=changes)
    return method.model_copy(update=update)


def _offline(method: MethodConfig, on_hub: set[str]) -> MethodConfig:
    """The same mitigation with the micro-world's documents in place of tables from the hub."""
    if method.mitigation is None:
        return method
    sections: dict[str, ReplayConfig | EwcConfig] = {}
    for name, section in method.mitigation:
        if isinstance(section, ReplayConfig | EwcConfig):
            dataset = section.table.split("/", 1)[0]
            table = f"{dataset}/documents" if dataset in on_hub else section.table
            sections[name] = section.model_copy(update={"table": table})
    return method.model_copy(update={"mitigation": method.mitigation.model_copy(update=sections)})


def _benchmarks(
    study: StudyConfig, datasets: dict[str, DatasetConfig], on_hub: set[str]
) -> BenchmarksConfig:
    rows, tasks = study.benchmarks.dataset, study.benchmarks.tasks
    if rows is None and tasks:
        datasets["micro_world"], rows = MICROWORLD, "micro_world"
        # Of other tasks on the hub nothing stands in for the rows.
        tasks = {name: task for name, task in tasks.items() if task_with_same_dataset(name)}
    tasks = {name: _fewer_answers(task) for name, task in tasks.items()}
    refusals = study.benchmarks.refusals
    if refusals is not None:
        dataset = refusals.table.split("/", 1)[0]
        stand_in = f"{dataset}/refusals" if dataset in on_hub else refusals.table
        refusals = refusals.model_copy(update={"table": stand_in, "limit": 4, "max_new_tokens": 8})
    along = {
        name: min(4, count)
        for name, count in study.benchmarks.during_training.items()
        if name in tasks
    }
    few = {"dataset": rows, "tasks": tasks, "refusals": refusals, "during_training": along}
    return study.benchmarks.model_copy(update=few)


def _fewer_answers(task: TaskConfig) -> TaskConfig:
    """A few items with short answers, and at most four samples of each."""
    few: dict[str, object] = {"limit": 4, "max_new_tokens": 8}
    if task.samples is not None:
        samples = min(task.samples, 4)
        few |= {"samples": samples, "k": sorted({min(k, samples) for k in task.k or [1]})}
    return task.model_copy(update=few)


def _small_pretraining(
    study: StudyConfig, on_hub: set[str], probes: dict[str, ProbeConfig], train: list[str]
) -> BaseModelConfig:
    """A model just wide enough for the largest rank, in place of one that is large or far."""
    tables = study.base.pretrain.documents if study.base.pretrain else []
    origins = [table.split("/", 1)[0] for table in tables]
    tables = [
        f"{origin}/documents" if origin in on_hub else table
        for origin, table in zip(origins, tables, strict=True)
    ]
    tables = tables or [probe.table[0] for probe in probes.values()] + train
    width = max([64, *(tuning.largest_rank or 0 for tuning in expand_methods(study))])
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
