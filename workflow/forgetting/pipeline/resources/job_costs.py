"""What every job of a study costs: seconds by stage, processes, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Rules whose jobs have a GPU for each process, where there are any."""

SUBMITTED = (*ON_DEVICES, "run_programs")
"""Rules whose jobs are not local."""

PROGRAMS = 19.0
"""Programs of a model that one core starts and checks in a second (measured)."""

LIGHT_RULES = 10.0
"""Seconds of a local job: Python starts, reads tables and writes some."""

PREPARATION_RULES = 1e8
"""Bytes of the new knowledge that are read, checked and written in a second (130 MB were measured,
of rows of 9 KB)."""

MARGIN = 1.5
"""Factor by which a job may exceed its forecast and still end within the site's longest time."""


@dataclass(frozen=True)
class JobCost:
    """What a job costs.

    Attributes:
        stages: seconds by stage.
        team: processes, with a GPU each, and the machines they are on.
        device_bytes: largest use of each process's device.
        host_bytes: memory of each machine.
        disk_bytes: what it has on the disk at most.
        copied_bytes: its inputs and outputs, which are copied where Snakemake's files and the job's
            are on different file systems.
        cores: of the processor, on each machine.
        more: processes per machine of a retry, for sharded weights: if memory is exhausted on all
            GPUs alike, only more of them help.
    """

    stages: Mapping[str, float]
    processes: ProcessCount = field(default_factory=ProcessCount)
    device_bytes: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    copied_bytes: float = 0.0
    cores: int = 1
    more: int = 0

    @property
    def seconds(self) -> float:
        """Return the seconds of all stages."""
        return sum(self.stages.values())


class JobCosts:
    """The jobs of a study at a site.

    Attributes:
        tunings: methods by name.
        run_groups: methods of the runs of a training job, by the name of the method.
    """

    def __init__(self, study: StudyConfig, site: Site) -> None:
        self.study, self.site = study, site
        self.case = Workload(study, site.device, site.cores)
        self.tunings = {tuning.name: tuning for tuning in expand_methods(study)}
        self.run_groups = {name: [tuning] for name, tuning in self.tunings.items()}
        self.durations = {
            duration_name(duration): duration for duration in study.training.durations
        }
        self.of_job = lru_cache(maxsize=None)(self._of_job)
        self.team = lru_cache(maxsize=None)(self._team)

    def of(self, rule: str, wildcards: Mapping[str, str]) -> JobCost:
        """What a job of a rule costs; those of other seeds cost the same."""
        method, duration = wildcards.get("method", ""), wildcards.get("duration", "")
        if model := wildcards.get("model", ""):
            method = method_of(model)
        if rule.startswith("download"):
            return self._download(rule, wildcards)
        return self.of_job(rule, method, duration)

    def _of_job(self, rule: str, method: str, duration: str) -> JobCost:
        if rule in TRAINING:
            return self._training(method, duration)
        if rule == "run_programs":
            return self._programs()
        if rule not in ON_DEVICES:
            read = train_bytes(self.study) / PREPARATION_RULES if rule == "prepare_data" else 0.0
            return JobCost({} if rule == "all" else {"local": LIGHT_RULES + read})
        case = self.case
        start = STARTUP_SECONDS[case.device.is_gpu]
        stages = {"start": start, "load": load_seconds(case)}
        used, disk, copied = scoring_bytes(case), 1e8, self._copied_bytes
        if rule == "pretrain_base":
            tokens = document_tokens(self.study)
            seconds = pretraining_seconds(case, case.model_size, tokens)
            stages = {"start": start, "pretraining": seconds}
            used, disk = 20.0 * case.model_size.parameters, 4.0 * case.model_size.parameters
        elif rule == "evaluate_base":
            stages["probes"] = evaluation_seconds(case, ProcessCount())
            if self.study.benchmarks.during_training:
                stages["benchmarks"] = benchmark_seconds(
                    case, training_benchmark_workloads(self.study, case.task_workloads)
                )
                used = max(used, benchmark_bytes(case))
        elif rule == "evaluate_wise_ft":
            shares = len(self.study.selection.wise_ft)
            stages["probes"] = shares * evaluation_seconds(case, ProcessCount())
            # The base model in addition to the interpolated one.
            used += 4.0 * case.model_size.parameters
            copied += self._selected_bytes(method)
        else:
            models = self.scored if rule == "benchmark" else 1
            stages["load"] *= self._loads(method) if rule == "benchmark" else 1
            stages["benchmarks"] = models * benchmark_seconds(case)
            used = benchmark_bytes(case)
            copied += self._selected_bytes(method) if rule == "benchmark" else 0.0
        return JobCost(
            stages,
            device_bytes=used,
            host_bytes=host_bytes(case, used),
            disk_bytes=disk,
            copied_bytes=copied,
            cores=self.site.cores,
        )

    @cached_property
    def _copied_bytes(self) -> float:
        """Bytes of tables, and of what the base predicts on the general text: its last hidden
        states and its head."""
        shape, text = self.case.model_size, self.case.probe_workloads.text
        return 1e8 + (4.0 * shape.hidden_size * (text + shape.vocab_size) if text else 0.0)

    def _selected_bytes(self, method: str) -> float:
        """Bytes of all selected checkpoints of a method, which are one folder."""
        tuning = self.tunings.get(method)
        return 4.0 * self.case.model_size.trained(tuning) * self.scored if tuning else 0.0

    def _training(self, name: str, duration: str) -> JobCost:
        """A run group, the trunks of one, or the branches of one of its durations."""
        case, team, run_group = self.case, self.team(name), self.run_groups[name]
        tuning = run_group[0]
        used = training_bytes(case, run_group, team)
        written = max(checkpoint_bytes(case, tuning) for tuning in run_group)
        copied = written / team.processes if tuning.kind == "full" else written
        disk = disk_bytes(case, run_group, team)
        shared = tuning.kind == "full" and team.processes > 1 and not tuning.processes
        if duration:
            own = unfinished_bytes(case, tuning, team) + finished_bytes(case, tuning)
            disk = len(tuning.hyperparameters) * own
        return JobCost(
            self._stages(run_group, team, duration),
            processes=team,
            device_bytes=used,
            host_bytes=team.per_node * host_bytes(case, used, copied),
            disk_bytes=disk,
            copied_bytes=self._copied_bytes + train_bytes(self.study),
            cores=team.per_node * self.site.cores,
            more=min(self.site.machines.gpus, self.site.devices_of_a_job)
            if shared and team.nodes == 1
            else 0,
        )

    def _stages(
        self, run_group: Sequence[Method], team: ProcessCount, duration: str = ""
    ) -> dict[str, float]:
        case, training = self.case, self.study.training
        if not duration:
            plan = case.schedule
            evaluations, stored = len(plan.evaluations), len(plan.branch_steps)
            stages = run_group_seconds(case, run_group, team, plan.steps, evaluations, stored)
            return stages | {"tokens": tokenize_seconds(case, team)}
        whole, epochs = case.branch(self.durations[duration]), self.durations[duration]
        begin = branch_step(training, epochs, whole.steps_per_epoch)
        due = [step for step in whole.evaluations if step > begin]
        return run_group_seconds(case, run_group, team, whole.steps - begin, len(due))

    def _team(self, name: str) -> ProcessCount:
        """The processes of a method: what the study says, else the fewest that do.

        So many that memory does not run out, and that the longest of its jobs ends in the longest
        time of the site with a half to spare; 1, 2, 4, ... on one machine, then whole machines.
        """
        tuning, machines = self.run_groups[name][0], self.site.machines
        if tuning.processes:
            return ProcessCount(tuning.processes, tuning.nodes or 1)
        if not self.case.device.is_gpu or tuning.kind == "hybrid":
            return ProcessCount()
        if tuning.kind == "full" and self.study.training.optimizer == "adafactor":
            return ProcessCount()
        most = self.site.devices_of_a_job
        here = [count for count in (1, 2, 4, 8, 16) if count < machines.gpus] + [machines.gpus]
        here = [count for count in here if count <= most] or [1]
        wider = [nodes for nodes in (2, 4, 8, 16, 32, 64) if nodes <= machines.count]
        wider = [nodes for nodes in wider if nodes * machines.gpus <= most]
        teams = [ProcessCount(count) for count in here]
        teams += [ProcessCount(nodes * machines.gpus, nodes) for nodes in wider]
        # Where none fits, more GPUs help what is sharded, and nothing else.
        hopeless = teams[-1:] if tuning.kind == "full" else teams[:1]
        fitting = [team for team in teams if self._fits(name, team)] or hopeless
        limit = 60.0 * self.site.longest / MARGIN
        longest = (team for team in fitting if self._longest(name, team) <= limit)
        return next(longest, fitting[-1])

    def _fits(self, name: str, team: ProcessCount) -> bool:
        return training_bytes(self.case, self.run_groups[name], team) <= self.case.device.usable

    def _longest(self, name: str, team: ProcessCount) -> float:
        """Seconds of the longest job of a method."""
        run_group = self.run_groups[name]
        return max(
            sum(self._stages(run_group, team, duration).values())
            for duration in ["", *self.durations]
        )

    def _programs(self) -> JobCost:
        cores = self.program_cores
        count = sum(b.items * b.samples for b in self.case.task_workloads.values() if b.programs)
        return JobCost(
            {"start": LIGHT_RULES, "programs": count / PROGRAMS / cores},
            host_bytes=1e9 + 0.5e9 * cores,  # each program may take half a gigabyte
            disk_bytes=1e8,
            copied_bytes=1e8,
            cores=cores,
        )

    @property
    def scored(self) -> int:
        """Models of a method that are benchmarked, in one job."""
        ends = len(self.durations) if self.study.benchmarks.models == "durations" else 1
        return len(self.study.seeds) * ends

    def _loads(self, method: str) -> int:
        """How often a job reads a base or a whole model; adapters of one base are swapped."""
        tuning = self.tunings.get(method)
        return self.scored if tuning and tuning.kind == "full" else 1

    @property
    def program_cores(self) -> int:
        """Processor cores that run the programs of a model: more where answers are sampled."""
        samples = [task.samples or 1 for task in self.study.benchmarks.tasks.values()]
        return min(8, -(-max(samples, default=1) // 8))

    @cached_property
    def downloads(self) -> dict[str, float]:
        """Bytes from the hub, by what is fetched."""
        return downloaded_bytes(self.study, self.case.model_size.parameters)

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
