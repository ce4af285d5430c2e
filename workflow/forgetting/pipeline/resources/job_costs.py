"""Cost of every job of a study: seconds by stage, processes, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from forgetting.config.data import TableRef
from forgetting.config.expand import Method, duration_name, expand_methods, method_of
from forgetting.config.study import StudyConfig
from forgetting.data.table_sizes import document_tokens, train_bytes
from forgetting.pipeline.resources.hardware import DOWNLOAD, STORAGE, Site
from forgetting.pipeline.resources.memory import (
    benchmark_bytes,
    checkpoint_bytes,
    disk_bytes,
    finished_bytes,
    host_bytes,
    scoring_bytes,
    shard_count,
    training_bytes,
    unfinished_bytes,
)
from forgetting.pipeline.resources.runtime import (
    STARTUP_SECONDS,
    benchmark_seconds,
    evaluation_seconds,
    load_seconds,
    pretraining_seconds,
    run_group_seconds,
    tokenize_seconds,
)
from forgetting.pipeline.resources.workload import (
    ProcessCount,
    Workload,
    downloaded_bytes,
    training_benchmark_workloads,
)
from forgetting.schedule import branch_step

TRAINING = ("finetune", "train_cooldown")
SCORING = ("evaluate_wise_ft", "benchmark", "benchmark_base")
ON_DEVICES = ("pretrain_base", "evaluate_base", *TRAINING, *SCORING)
"""Rules whose jobs have a GPU for each process, if there are GPUs."""

SUBMITTED = (*ON_DEVICES, "run_programs")
"""Rules whose jobs are not local."""

PROGRAMS = 19.0
"""Generated programs that one core runs in a second (measured)."""

LIGHT_RULES = 10.0
"""Seconds of a local job: Python starts, reads tables and writes some."""

PREPARATION_RULES = 1e8
"""Bytes of training data that are prepared in a second (measured: 130 MB, with rows of 9 KB)."""

MARGIN = 1.5
"""Factor by which a job may exceed its forecast within the time limit of the site."""


@dataclass(frozen=True)
class JobCost:
    """Cost of a job.

    Attributes:
        stages: seconds by stage.
        processes: number of processes, with a GPU each, and of their machines.
        device_bytes: largest memory of each process's device.
        host_bytes: memory of each machine.
        disk_bytes: largest disk use.
        copied_bytes: inputs and outputs, which are copied if the job runs on another file system.
        cores: processor cores on each machine.
        retry_processes: largest number of processes of a retry, for sharded weights. If all GPUs
            run out of memory, only more of them help.
    """

    stages: Mapping[str, float]
    processes: ProcessCount = field(default_factory=ProcessCount)
    device_bytes: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    copied_bytes: float = 0.0
    cores: int = 1
    retry_processes: int = 0

    @property
    def seconds(self) -> float:
        """Return the seconds of all stages."""
        return sum(self.stages.values())


class JobCosts:
    """Costs of the jobs of a study at a site.

    Attributes:
        methods: the methods by name.
        durations: epochs of the cooldown branches by name.
    """

    def __init__(self, study: StudyConfig, site: Site) -> None:
        self.study, self.site = study, site
        self.workload = Workload(study, site.device, site.cores)
        self.methods = {method.name: method for method in expand_methods(study)}
        self.durations = {duration_name(epochs): epochs for epochs in study.training.durations}
        self.process_count = lru_cache(maxsize=None)(self._process_count)
        self._of_job = lru_cache(maxsize=None)(self._cost)

    def of(self, rule: str, wildcards: Mapping[str, str]) -> JobCost:
        """Return the cost of a job; those of other seeds are equal."""
        if rule.startswith("download"):
            return self._download(rule, wildcards)
        method = wildcards.get("method", "") or method_of(wildcards.get("model", ""))
        return self._of_job(rule, method, wildcards.get("duration", ""))

    def _cost(self, rule: str, method: str, duration: str) -> JobCost:
        if rule in TRAINING:
            return self._training(self.methods[method], duration)
        if rule == "run_programs":
            return self._programs()
        if rule in ON_DEVICES:
            return self._scoring(rule, method)
        if rule == "all":
            return JobCost({})
        read = train_bytes(self.study) / PREPARATION_RULES if rule == "prepare_data" else 0.0
        return JobCost({"local": LIGHT_RULES + read})

    def _scoring(self, rule: str, method: str) -> JobCost:
        """Return the cost of a job that scores models, or pretrains one, in one process."""
        workload, size = self.workload, self.workload.model_size
        stages = {"start": STARTUP_SECONDS[workload.device.is_gpu], "load": load_seconds(workload)}
        memory, disk, copied = scoring_bytes(workload), 1e8, self._copied_bytes
        if rule == "pretrain_base":
            del stages["load"]
            tokens = document_tokens(self.study)
            stages["pretraining"] = pretraining_seconds(workload, size, tokens)
            memory, disk = 20.0 * size.parameters, 4.0 * size.parameters
        elif rule == "evaluate_base":
            stages["probes"] = evaluation_seconds(workload, ProcessCount())
            if self.study.benchmarks.during_training:
                tasks = training_benchmark_workloads(self.study, workload.task_workloads)
                stages["benchmarks"] = benchmark_seconds(workload, tasks)
                memory = max(memory, benchmark_bytes(workload))
        elif rule == "evaluate_wise_ft":
            shares = len(self.study.selection.wise_ft)
            stages["probes"] = shares * evaluation_seconds(workload, ProcessCount())
            memory += 4.0 * size.parameters  # the base in addition to the interpolated model
            copied += self._selected_bytes(method)
        elif rule == "benchmark":
            # Adapters of one loaded base are swapped.
            is_full = method in self.methods and self.methods[method].kind == "full"
            stages["load"] *= self.scored if is_full else 1
            stages["benchmarks"] = self.scored * benchmark_seconds(workload)
            memory = benchmark_bytes(workload)
            copied += self._selected_bytes(method)
        else:
            stages["benchmarks"] = benchmark_seconds(workload)
            memory = benchmark_bytes(workload)
        return JobCost(
            stages,
            device_bytes=memory,
            host_bytes=host_bytes(workload, memory),
            disk_bytes=disk,
            copied_bytes=copied,
            cores=self.site.cores,
        )

    @cached_property
    def _copied_bytes(self) -> float:
        """Bytes of tables and of the base's predictions: its last hidden states and its head."""
        size, text = self.workload.model_size, self.workload.probe_workloads.text
        return 1e8 + (4.0 * size.hidden_size * (text + size.vocab_size) if text else 0.0)

    def _selected_bytes(self, name: str) -> float:
        """Return the bytes of all selected checkpoints of a method, which are one folder."""
        method = self.methods.get(name)
        return 4.0 * self.workload.model_size.trained(method) * self.scored if method else 0.0

    def _training(self, method: Method, duration: str) -> JobCost:
        """Return the cost of a run group, of its trunks, or of the branches of one duration."""
        workload, group = self.workload, self.process_count(method.name)
        memory = training_bytes(workload, method, group)
        checkpoint = checkpoint_bytes(workload, method) / shard_count(method, group)
        disk = disk_bytes(workload, method, group)
        if duration:
            branch = unfinished_bytes(workload, method, group) + finished_bytes(workload, method)
            disk = len(method.hyperparameters) * branch
        may_grow = method.kind == "full" and group.processes > 1 and group.nodes == 1
        most = min(self.site.machines.gpus, self.site.devices_of_a_job)
        return JobCost(
            self._training_stages(method, group, duration),
            processes=group,
            device_bytes=memory,
            host_bytes=group.per_node * host_bytes(workload, memory, checkpoint),
            disk_bytes=disk,
            copied_bytes=self._copied_bytes + train_bytes(self.study),
            cores=group.per_node * self.site.cores,
            retry_processes=most if may_grow and not method.processes else 0,
        )

    def _training_stages(
        self, method: Method, group: ProcessCount, duration: str = ""
    ) -> dict[str, float]:
        """Return the seconds of each stage of a run group, or of the branches of one duration."""
        workload = self.workload
        if not duration:
            plan = workload.schedule
            evaluations, stored = len(plan.evaluations), len(plan.branch_steps)
            stages = run_group_seconds(workload, method, group, plan.steps, evaluations, stored)
            return stages | {"tokens": tokenize_seconds(workload, group)}
        epochs = self.durations[duration]
        branch = workload.branch(epochs)
        start = branch_step(self.study.training, epochs, branch.steps_per_epoch)
        evaluations = sum(step > start for step in branch.evaluations)
        return run_group_seconds(workload, method, group, branch.steps - start, evaluations)

    def _process_count(self, name: str) -> ProcessCount:
        """Return the processes of a method: those of the study, or the fewest that suffice.

        They suffice if memory does, and if the longest job of the method ends within the time limit
        of the site, divided by `MARGIN`. Candidates are 1, 2, 4, ... on one machine, then whole
        machines.
        """
        method, machines = self.methods[name], self.site.machines
        if method.processes:
            return ProcessCount(method.processes, method.nodes or 1)
        needs_whole_matrices = (
            method.kind == "full" and self.study.training.optimizer == "adafactor"
        )
        if not self.workload.device.is_gpu or method.kind == "hybrid" or needs_whole_matrices:
            return ProcessCount()
        most = self.site.devices_of_a_job
        counts = [count for count in (1, 2, 4, 8, 16) if count < machines.gpus] + [machines.gpus]
        groups = [ProcessCount(count) for count in counts if count <= most] or [ProcessCount()]
        groups += [
            ProcessCount(nodes * machines.gpus, nodes)
            for nodes in (2, 4, 8, 16, 32, 64)
            if nodes <= machines.count and nodes * machines.gpus <= most
        ]
        # If none has enough memory, more GPUs help only sharded weights.
        fallback = groups[-1:] if method.kind == "full" else groups[:1]
        usable, limit = self.workload.device.usable, 60.0 * self.site.longest / MARGIN
        fitting = [
            group for group in groups if training_bytes(self.workload, method, group) <= usable
        ] or fallback
        in_time = (group for group in fitting if self._longest_job(method, group) <= limit)
        return next(in_time, fitting[-1])

    def _longest_job(self, method: Method, group: ProcessCount) -> float:
        """Return the seconds of the longest job of a method."""
        return max(
            sum(self._training_stages(method, group, duration).values())
            for duration in ["", *self.durations]
        )

    def _programs(self) -> JobCost:
        cores, tasks = self.program_cores, self.workload.task_workloads.values()
        count = sum(task.items * task.samples for task in tasks if task.programs)
        return JobCost(
            {"start": LIGHT_RULES, "programs": count / PROGRAMS / cores},
            host_bytes=1e9 + 0.5e9 * cores,  # each program may take half a gigabyte
            disk_bytes=1e8,
            copied_bytes=1e8,
            cores=cores,
        )

    @property
    def scored(self) -> int:
        """Return the number of models of a method that one job benchmarks."""
        ends = len(self.durations) if self.study.benchmarks.models == "durations" else 1
        return len(self.study.seeds) * ends

    @property
    def program_cores(self) -> int:
        """Return the cores that run the programs of a model: more if answers are sampled."""
        samples = [task.samples or 1 for task in self.study.benchmarks.tasks.values()]
        return min(8, -(-max(samples, default=1) // 8))

    @cached_property
    def downloads(self) -> dict[str, float]:
        """Bytes of each download."""
        return downloaded_bytes(self.study, self.workload.model_size.parameters)

    def _download(self, rule: str, wildcards: Mapping[str, str]) -> JobCost:
        name = wildcards.get("task", f"{wildcards.get('owner')}/{wildcards.get('repository')}")
        if rule == "download_table":
            tables = {
                f"{ref.config(self.study).hub}/{ref.table}": table
                for _, table in self.study.tables()
                if (ref := TableRef.parse(table)).origin(self.study) == "hub"
            }
            name = tables.get(f"{name}/{wildcards.get('table')}", "")
        size = self.downloads.get(name, 0.0)
        return JobCost(
            {"downloads": LIGHT_RULES + size / DOWNLOAD + size / STORAGE}, disk_bytes=size
        )
