"""Paths of every input and output of a study's jobs, relative to Snakemake's working folder.

Wildcards of Snakemake stay in braces: `PATHS.run_group("runs.json")` is
`results/STUDY/runs/{method}/seed{seed}/runs.json`. Methods with a `wildcards` argument are input
functions of rules. Files of the user's own are marked `ancient`: their content counts, which the
digest among the parameters has, and their date does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from snakemake.io import ancient

from forgetting.benchmarks.registry import (
    SCORE_FILES,
    benchmark,
    required_splits,
    task_with_same_dataset,
)
from forgetting.config.base_model import is_local
from forgetting.config.data import MICROWORLD_TABLES, MICROWORLD_TASKS, TableRef
from forgetting.config.expand import (
    duration_name,
    expand_methods,
    law_methods,
    method_of,
    scored_model_names,
    scored_models,
    selected_models,
)
from forgetting.config.study import StudyConfig
from forgetting.data.hub import HUB_DATASETS
from forgetting.data.table_files import table_in_folder
from forgetting.inputs import model_files

Wildcards = Any
"""Wildcards of a job: attributes, or `items()`."""

PARAMS_FILES = {
    "prepare_data": "prepare_data",
    "pretrain_base": "pretrain_base",
    "register_base": "register_base",
    "evaluate_base": "evaluate_base",
    "finetune": "finetune/{method}/seed{seed}",
    "train_cooldown": "train_cooldown/{method}/seed{seed}/{duration}",
    "select_checkpoint": "select_checkpoint/{method}",
    "evaluate_wise_ft": "evaluate_wise_ft/{model}",
    "benchmark": "benchmark/{method}",
    "benchmark_base": "benchmark_base",
    "make_tables": "make_tables",
}
"""Where the parameters of a rule's jobs are, below the folder of parameters."""

LAW_TABLES = ["law_linear", "law_power", "law_comparison", "law_predictions", "law_profile"]


class Paths:
    """Where every input and output of a study is.

    Attributes:
        methods: the study's methods by name.
        durations: epochs of the cooldown branches by name, such as `duration0.5`.
        tasks: benchmarks of the selected checkpoints.
        training_tasks: benchmarks that are evaluated during training.
        scored_models: names of the models of a method that are scored, such as `seed0`.
        text_tables: the table of the general text, if the study has one.
        prompt_tables: the table of prompts that a model should refuse, if the study has one.
        logs: folder of the logs of all jobs.
        results: folder of the study's results.
        state: folder of runs and checkpoints. It is no output, so that a retry resumes.
        world: folder of a generated dataset.
        probes: prepared questions of every probe.
        base_record: what the base is and where.
        base_layers: the layers of the base as transformers loads it.
        base_items: the base's scores on every probe.
        base_predictions: the base's predictions on the general text, if the study has one.
        base_benchmarks: the base's scores on the benchmarks of trainings, if the study has any.
        run_group_benchmarks: scores of the runs of a method and seed on these benchmarks.
        checkpoints: says where the checkpoints of a method and seed are.
        cooldown_checkpoints: the same for the cooldown branches of one duration.
        wise_ft: scores of a selected checkpoint with scaled updates.
        tables: the tables of all results.
        resolved_study: the study with all defaults.
        page: the report.
        figures: folder of the report's figures.
    """

    def __init__(self, study: StudyConfig, name: str) -> None:
        self.study = study
        self.methods = {method.name: method for method in expand_methods(study)}
        self.durations = {duration_name(epochs): epochs for epochs in study.training.durations}
        self.tasks = list(study.benchmarks.tasks)
        self.training_tasks = list(study.benchmarks.during_training)
        self.scored_models = scored_model_names(study)
        self.text_tables = [study.general_text.table] if study.general_text else []
        refusals = study.benchmarks.refusals
        self.prompt_tables = [refusals.table] if refusals else []

        self.logs = f"logs/{name}"
        self.results = f"results/{name}"
        self.state = f"{self.results}/state"
        self.world = f"{self.results}/world/{{dataset}}"
        self.probes = [self.data(f"probes/{name}.jsonl") for name in study.probes]
        self.base_record = self.base("base.json")
        self.base_layers = self.base("layers.json")
        self.base_items = self.base("items.parquet")
        self.base_predictions = [self.base("targets.safetensors")] if self.text_tables else []
        in_training = ["benchmarks.parquet"] if self.training_tasks else []
        self.base_benchmarks = [self.base(file) for file in in_training]
        self.run_group_benchmarks = [self.run_group(file) for file in in_training]
        self.checkpoints = f"{self.state}/checkpoints/{{method}}/seed{{seed}}.json"
        self.cooldown_checkpoints = (
            f"{self.state}/checkpoints/{{method}}/seed{{seed}}/{{duration}}.json"
        )
        self.wise_ft = f"{self.results}/wise_ft/{{model}}/items.parquet"
        self.tables = [self.tables_file(f"{table}.parquet") for table in _table_names(study)]
        self.resolved_study = f"{self.results}/study.json"
        self.page = f"reports/{name}.html"
        self.figures = f"reports/{name}-figures"

    def params(self, rule: str) -> str:
        """Return the JSON file with the parameters of a rule's job."""
        return f"{self.results}/params/{PARAMS_FILES[rule]}.json"

    # Tables

    def table(self, table: str) -> str:
        """Return the file of a table `DATASET/NAME`: generated, downloaded or the user's."""
        if file := table_in_folder(self.study, table):
            return str(file)
        ref = TableRef.parse(table)
        if ref.origin(self.study) == "generated":
            return f"{self.world.format(dataset=ref.dataset)}/{ref.table}.jsonl"
        dataset = ref.config(self.study)
        return f"resources/datasets/{dataset.hub}/{dataset.revision}/{ref.table}.jsonl"

    def is_users(self, table: str) -> bool:
        """Return whether a table is in a folder of the user's."""
        return TableRef.parse(table).origin(self.study) == "folder"

    def table_inputs(self, tables: Iterable[str]) -> list[str]:
        """Return the files of tables as inputs of a rule."""
        return [
            ancient(self.table(table)) if self.is_users(table) else self.table(table)
            for table in tables
        ]

    @cached_property
    def prepared_tables(self) -> dict[str, str]:
        """Return the files of the prepared tables, by table: training, pretraining and probes."""
        documents = self.study.base.pretrain.documents if self.study.base.pretrain else []
        probes = [table for probe in self.study.probes.values() for table in probe.table]
        tables = dict.fromkeys([*self.study.train, *probes, *documents])
        return {table: self.table(table) for table in tables}

    @property
    def prepared_table_inputs(self) -> list[str]:
        """Return those files as inputs of a rule."""
        return self.table_inputs(self.prepared_tables)

    def mitigation_tables(self, method: str) -> list[str]:
        """Return the tables that the mitigation of a method reads, in its order."""
        mitigation = self.methods[method].mitigation
        return mitigation.tables if mitigation else []

    def mitigation_inputs(self, wildcards: Wildcards) -> list[str]:
        """Return the files of the tables that the mitigation of a job's method reads."""
        return self.table_inputs(self.mitigation_tables(wildcards.method))

    @property
    def microworld_tables(self) -> list[str]:
        """Generated tables of a dataset."""
        return [f"{self.world}/{name}.jsonl" for name in MICROWORLD_TABLES]

    @property
    def microworld_rows(self) -> list[str]:
        """Generated rows of the benchmarks of a dataset."""
        return [
            f"{self.world}/benchmarks/{task}/{split}.jsonl"
            for task in MICROWORLD_TASKS
            for split in HUB_DATASETS[task].splits
        ]

    def data(self, file: str) -> str:
        """Return a file of the prepared data."""
        return f"{self.results}/data/{file}"

    # The base model

    def base(self, file: str) -> str:
        """Return a file of the base's: its record, its scores, its folder."""
        return f"{self.results}/base/{file}"

    @property
    def model_folder(self) -> str:
        """Folder of a base that was trained elsewhere."""
        model = self.study.base.model
        assert model
        if is_local(model):
            return str(Path(model).expanduser())
        return f"resources/models/{model}/{self.study.base.revision}"

    @property
    def local_model_files(self) -> dict[str, Path]:
        """Files of a base in a folder of the user's, by their names in it."""
        if not is_local(self.study.base.model or ""):
            return {}
        folder = Path(self.model_folder)
        return {str(path.relative_to(folder)): path for path in model_files(folder)}

    @property
    def model_inputs(self) -> list[str]:
        """Files of a base that was trained elsewhere, or its downloaded folder."""
        if is_local(self.study.base.model or ""):
            return [ancient(str(path)) for path in self.local_model_files.values()]
        return [self.model_folder]

    # Runs

    def run_group(self, file: str) -> str:
        """Return an output of the job that trains the runs of a method and seed."""
        return f"{self.results}/runs/{{method}}/seed{{seed}}/{file}"

    def cooldown(self, file: str) -> str:
        """Return an output of the job that trains the cooldown branches of one duration."""
        return f"{self.results}/branches/{{method}}/seed{{seed}}/{{duration}}/{file}"

    def state_folder(self, wildcards: Wildcards) -> str:
        """Return that folder, as a parameter of rules with an output in it."""
        return self.state

    def run_group_files(self, pattern: str, methods: Iterable[str]) -> list[str]:
        """Return a pattern's files for some methods, all seeds and, if named, all durations."""
        durations = self.durations if "{duration}" in pattern else [""]
        return [
            pattern.format(method=method, seed=seed, duration=duration)
            for method in methods
            for seed in self.study.seeds
            for duration in durations
        ]

    def result_files(self, file: str, methods: Iterable[str]) -> list[str]:
        """Return a file of every job whose runs are results: run groups, or cooldown branches."""
        pattern = self.cooldown(file) if self.durations else self.run_group(file)
        return self.run_group_files(pattern, methods)

    # Selection

    def selection(self, method: str = "{method}") -> str:
        """Return the file with the hyperparameters and checkpoints that are selected."""
        return f"{self.results}/selection/{method}.json"

    def selected(self, method: str = "{method}") -> str:
        """Return the folder of the selected checkpoints.

        It is no output, since Snakemake deletes outputs before their replacement is made.
        """
        return f"{self.results}/selected/{method}"

    def selected_folder(self, wildcards: Wildcards) -> str:
        """Return that folder, as a parameter of rules with an input in it."""
        return self.selected(wildcards.method)

    def selected_index(self, method: str = "{method}") -> str:
        """Return the index of that folder, which is an output of a rule."""
        return f"{self.selected(method)}/index.json"

    def selection_runs(self, wildcards: Wildcards) -> list[str]:
        """Return the records of the runs among which a job selects."""
        return self.result_files("runs.json", [wildcards.method])

    def selection_checkpoints(self, wildcards: Wildcards) -> list[str]:
        """Return the files that say where the checkpoints of those runs are.

        Digests in the selection show whether a checkpoint is another; the dates do not count.
        """
        pattern = self.cooldown_checkpoints if self.durations else self.checkpoints
        return [ancient(path) for path in self.run_group_files(pattern, [wildcards.method])]

    def wise_ft_selection(self, wildcards: Wildcards) -> str:
        """Return the selection from which a model `METHOD/seedN` is taken."""
        return self.selection(method_of(wildcards.model))

    def wise_ft_index(self, wildcards: Wildcards) -> Any:
        """Return the index of the folder that holds that model."""
        return ancient(self.selected_index(method_of(wildcards.model)))

    def wise_ft_checkpoints(self, wildcards: Wildcards) -> str:
        """Return the folder that holds that model."""
        return self.selected(method_of(wildcards.model))

    # Benchmarks

    @property
    def method_benchmarks(self) -> list[str]:
        """Return the files that a benchmark job writes, for every model of its method."""
        return [
            f"{self.results}/benchmarks/{{method}}/{name}/{file}"
            for name in self.scored_models
            for file in SCORE_FILES
        ]

    @property
    def base_benchmark_results(self) -> list[str]:
        """Return the files that the benchmark job of the base model writes."""
        return [f"{self.results}/benchmarks/base/{file}" for file in SCORE_FILES]

    def benchmarks(self, file: str) -> str:
        """Return a file of the benchmarks of one model."""
        return f"{self.results}/benchmarks/{{model}}/{file}"

    @property
    def runs_programs(self) -> bool:
        """Whether a benchmark has models write programs, which are then run."""
        return any(benchmark(task).generates_code for task in self.tasks)

    def task_folder(self, task: str) -> str:
        """Return the folder of SPLIT.jsonl from which a benchmark takes its rows."""
        dataset = self.study.benchmark_dataset
        if dataset is None:
            revision = self.study.benchmarks.tasks[task].revision or HUB_DATASETS[task].revision
            return f"resources/benchmarks/{task}/{revision}"
        if dataset.folder:
            return str(Path(dataset.folder, task))
        world = self.world.format(dataset=self.study.benchmarks.dataset)
        return f"{world}/benchmarks/{task_with_same_dataset(task, MICROWORLD_TASKS)}"

    def task_folders(self, tasks: Iterable[str]) -> dict[str, str]:
        """Return those folders by task."""
        return {task: self.task_folder(task) for task in tasks}

    def task_inputs(self, tasks: Iterable[str]) -> list[str]:
        """Return the rows of tasks as inputs of a rule: files, or folders that are downloaded."""
        if self.study.benchmark_dataset is None:
            return [self.task_folder(task) for task in tasks]
        if files := self.users_task_files(tasks):
            return [ancient(str(path)) for path in files.values()]
        return [
            f"{self.task_folder(task)}/{split}.jsonl"
            for task in tasks
            for split in HUB_DATASETS[str(task_with_same_dataset(task, MICROWORLD_TASKS))].splits
        ]

    def users_task_files(self, tasks: Iterable[str]) -> dict[str, Path]:
        """Return the rows of tasks in a folder of the user's, by task and split."""
        dataset = self.study.benchmark_dataset
        if dataset is None or dataset.origin != "folder":
            return {}
        return {
            f"{task}/{split}": Path(self.task_folder(task), f"{split}.jsonl")
            for task in tasks
            for split in required_splits(task, self.study.benchmarks.tasks[task].num_fewshot)
        }

    # Tables and report

    def tables_file(self, file: str) -> str:
        """Return a file in the folder of the tables."""
        return f"{self.results}/tables/{file}"

    def job_results(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return the results of all jobs that the tables gather.

        Long lists come from functions: Snakemake hashes the whole of others for every member.
        """
        methods = self.methods
        return {
            "base": self.base_record,
            "base_items": self.base_items,
            "data": self.data("data.json"),
            "run_groups": [
                *self.result_files("items.parquet", methods),
                *self.result_files("runs.json", methods),
            ],
            "during_training": [
                *self.base_benchmarks,
                *(
                    path
                    for pattern in self.run_group_benchmarks
                    for path in self.run_group_files(pattern, methods)
                ),
            ],
            "trunks": (
                self.run_group_files(self.run_group("runs.json"), methods) if self.durations else []
            ),
            "selection": [self.selection(method) for method in methods],
            "scaled": [
                self.wise_ft.format(model=model)
                for model in (selected_models(self.study) if self.study.selection.wise_ft else [])
            ],
            "benchmarks": [
                self.benchmarks(file).format(model=model)
                for model in scored_models(self.study)
                for file in (*SCORE_FILES, *(["outcomes.json"] if self.runs_programs else []))
            ],
        }

    def lost_results(self, wildcards: Wildcards) -> list[str]:
        """Return the results that are missing although the page was made once.

        A job that fails loses its outputs. Snakemake makes a missing file only if a job that needs
        it runs, so it would take the earlier page for up to date. The command after the one that
        makes them again copies the page once more, since these inputs are gone.
        """
        last = [*self.tables, self.tables_file("runs.json"), self.tables_file("study.json")]
        last += [self.resolved_study, self.page]
        if not any(Path(path).exists() for path in [*last, self.publish_log]):
            return []
        made = [
            path
            for item in self.job_results(wildcards).values()
            for path in ([item] if isinstance(item, str) else item)
        ]
        return [path for path in [*made, *last] if not Path(path).exists()]

    def loss(self, wildcards: Wildcards) -> str:
        """Return a text that differs from any earlier one if results are lost, or an empty one.

        Snakemake compares it with that of the last copy of the page. The lost results alone would
        not show that the same results are lost a second time.
        """
        return str(time.time_ns()) if self.lost_results(wildcards) else ""

    @property
    def publish_log(self) -> str:
        """Return the log of the job that copies the page."""
        return f"{self.logs}/publish.log"


def first_output_folder(wildcards: Wildcards, output: Any) -> str:
    """Return the folder of a job's first output."""
    return str(Path(output[0]).parent)


def scored_models_folder(wildcards: Wildcards, output: Any) -> str:
    """Return the folder of the folders that a benchmark job writes, one for each model."""
    return str(Path(output[0]).parents[1])


def _table_names(study: StudyConfig) -> list[str]:
    names = ["runs", "trajectory", "items", "selection", "comparisons", "churn"]
    names += ["matched_differences", "matched_values", "fronts", "hypervolumes", "dominance"]
    names += ["benchmarks", "benchmark_items", "benchmark_responses"]
    names += ["durations"] if study.training.durations else []
    names += ["wise_ft"] if study.selection.wise_ft else []
    if study.benchmarks.during_training:
        names += ["benchmark_trajectory", "benchmark_trajectory_items"]
    names += LAW_TABLES if law_methods(study) else []
    return names
