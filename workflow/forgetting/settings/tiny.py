"""`--config scale=tiny`: any study, through the same code, in about a minute on two cores.

Rows and steps are few, and a small model trained on the spot stands in for a large one. The
methods keep their names and ranks, so that the plan of a tiny study is that of the whole one for
its first seed, and for the shortest, the middle and the longest of its budgets.
What would come from the hub comes from the micro-world instead: nothing is downloaded.
"""

from __future__ import annotations

from forgetting.benchmarks.known import same_rows
from forgetting.sections.base import Base, Pretraining
from forgetting.sections.benchmarks import Benchmarks
from forgetting.sections.dataset import Dataset
from forgetting.sections.measurement import GeneralText, Probe
from forgetting.sections.method import Method
from forgetting.sections.mitigation import FisherPenalty, Replay
from forgetting.sections.selection import Selection
from forgetting.sections.task import Task
from forgetting.sections.training import Training
from forgetting.settings.plan import tunings
from forgetting.settings.study import Study

WORLD = Dataset(generate="micro-world")
ROWS = 12
DOCUMENTS = 60
EPOCHS = 2.0
CONTEXT = 2048


def shrink(study: Study) -> Study:
    """The same study at toy size; its numbers mean nothing, its jobs are all there."""
    on_hub = {name for name, data in study.datasets.items() if data.hub and not data.folder}
    datasets = {name: WORLD if name in on_hub else data for name, data in study.datasets.items()}
    benchmarks = _benchmarks(study, datasets, on_hub)

    def stand_in(table: str, knowledge: str) -> str:
        dataset = table.split("/", 1)[0]
        if dataset not in on_hub:
            return table
        old = "world_facts" if "world_facts" in table else "real_authors"
        return f"{dataset}/{'new_authors' if knowledge == 'new' else old}"

    probes = {
        name: probe.model_copy(
            update={"table": [stand_in(t, probe.knowledge) for t in probe.table][:1], "limit": ROWS}
        )
        for name, probe in study.probes.items()
    }
    train = [stand_in(table, "new") for table in study.train][:1]
    return study.model_copy(
        update={
            "title": f"Toy size: {study.title}",
            "description": _told(study, on_hub),
            "datasets": datasets,
            "base": _base(study, on_hub, probes, train),
            "train": train,
            "train_limit": ROWS,
            "seeds": study.seeds[:1],
            "probes": probes,
            "general_text": _text(study, on_hub),
            "methods": [_any_model(_few_settings(_offline(m, on_hub))) for m in study.methods],
            "measurement": study.measurement.model_copy(
                update={"every_epochs": 1.0, "max_new_tokens": 8}
            ),
            "training": _short(study.training),
            "selection": _no_later(study.selection),
            "benchmarks": benchmarks,
        }
    )


def _told(study: Study, on_hub: set[str]) -> str:
    """What the page says in place of the study's own description."""
    model = "" if study.base.pretrain else f" A model made here stands in for {study.base.model}."
    rows = f" Rows of the micro-world stand in for {', '.join(sorted(on_hub))}." if on_hub else ""
    return (
        "This run only tries every job of the study, with a few rows and steps: its numbers mean "
        f"nothing.{model}{rows}"
    )


def _text(study: Study, on_hub: set[str]) -> GeneralText | None:
    if study.general_text is None:
        return None
    dataset = study.general_text.table.split("/", 1)[0]
    table = f"{dataset}/held_out" if dataset in on_hub else study.general_text.table
    return study.general_text.model_copy(update={"table": table, "block": 32, "limit": 4})


def _short(training: Training) -> Training:
    """Two epochs of small batches, and three budgets, each as large a share of the longest."""
    longest = training.epochs
    warmup: dict[str, object] = {"warmup_epochs": 0.5, "warmup_steps": None, "warmup_share": None}
    if training.budgets and not training.has_cooldown:  # each of them is warmed up by itself
        warmup |= {"warmup_epochs": None, "warmup_share": 0.1}
    if training.cooldown:
        warmup["cooldown"] = min(training.cooldown, 0.5)
    some = sorted(training.budgets)
    some = sorted({some[0], some[len(some) // 2], some[-1]}) if some else []
    budgets = [EPOCHS * budget / longest for budget in some]
    return training.model_copy(
        update={
            "epochs": EPOCHS,
            "batch_size": 4,
            "budgets": budgets,
            "max_length": min(training.max_length, CONTEXT),
            **warmup,
        }
    )


def _no_later(selection: Selection) -> Selection:
    """The same rule, its deadline within the training; a last checkpoint where none is reached."""
    within = selection.within_epochs and min(selection.within_epochs, EPOCHS)
    return selection.model_copy(update={"if_not_reached": "last", "within_epochs": within})


def _few_settings(method: Method) -> Method:
    """At most two learning rates and one weight decay; only the `fixed` setting if there is one."""
    rates, decays = method.learning_rate[:2], method.weight_decay[:1]
    if method.fixed:
        rates, decays = [method.fixed.learning_rate], [method.fixed.weight_decay]
    return method.model_copy(update={"learning_rate": rates, "weight_decay": decays})


def _any_model(method: Method) -> Method:
    """The same without names of layers, which the model that stands in may not have."""
    update: dict[str, object] = {}
    if isinstance(method.target_modules, list):
        update["target_modules"] = "all-linear"
    if method.then:
        changes = {"layers": "all", "suffix": method.then.name}
        update["then"] = method.then.model_copy(update=changes)
    return method.model_copy(update=update)


def _offline(method: Method, on_hub: set[str]) -> Method:
    """The same mitigation with the micro-world's documents in place of tables from the hub."""
    if method.mitigation is None:
        return method
    sections: dict[str, Replay | FisherPenalty] = {}
    for name, section in method.mitigation:
        if isinstance(section, Replay | FisherPenalty):
            dataset = section.table.split("/", 1)[0]
            table = f"{dataset}/documents" if dataset in on_hub else section.table
            sections[name] = section.model_copy(update={"table": table})
    return method.model_copy(update={"mitigation": method.mitigation.model_copy(update=sections)})


def _benchmarks(study: Study, datasets: dict[str, Dataset], on_hub: set[str]) -> Benchmarks:
    rows, tasks = study.benchmarks.rows, study.benchmarks.tasks
    if rows is None and tasks:
        datasets["micro_world"], rows = WORLD, "micro_world"
        # Of other tasks on the hub nothing stands in for the rows.
        tasks = {name: task for name, task in tasks.items() if same_rows(name)}
    tasks = {name: _few_answers(task) for name, task in tasks.items()}
    refusals = study.benchmarks.refusals
    if refusals is not None:
        dataset = refusals.table.split("/", 1)[0]
        stand_in = f"{dataset}/refusals" if dataset in on_hub else refusals.table
        refusals = refusals.model_copy(update={"table": stand_in, "limit": 4, "max_new_tokens": 8})
    along = {name: min(4, count) for name, count in study.benchmarks.along.items() if name in tasks}
    few = {"rows": rows, "tasks": tasks, "refusals": refusals, "along": along}
    return study.benchmarks.model_copy(update=few)


def _few_answers(task: Task) -> Task:
    """A few items with short answers, and at most four samples of each."""
    few: dict[str, object] = {"limit": 4, "max_new_tokens": 8}
    if task.samples is not None:
        samples = min(task.samples, 4)
        few |= {"samples": samples, "k": sorted({min(k, samples) for k in task.k or [1]})}
    return task.model_copy(update=few)


def _base(study: Study, on_hub: set[str], probes: dict[str, Probe], train: list[str]) -> Base:
    """A model just wide enough for the largest rank, in place of one that is large or far."""
    tables = study.base.pretrain.documents if study.base.pretrain else []
    origins = [table.split("/", 1)[0] for table in tables]
    tables = [
        f"{origin}/documents" if origin in on_hub else table
        for origin, table in zip(origins, tables, strict=True)
    ]
    tables = tables or [probe.table[0] for probe in probes.values()] + train
    width = max([64, *(tuning.largest_rank or 0 for tuning in tunings(study))])
    return Base(
        pretrain=Pretraining(
            documents=list(dict.fromkeys(tables)),
            hidden_size=width,
            intermediate_size=width,
            layers=1,
            heads=max(1, width // 64),
            vocabulary=400,
            context=CONTEXT,
            block=64,
            batch_tokens=512,
            limit=DOCUMENTS,
        )
    )
