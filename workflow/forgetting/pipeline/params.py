"""Fill in the parameters of every job of a study.

A job gets them as a file, which `StudyParams.write` makes before the job starts. Whether the
job runs again does not depend on that file: the digest that `StudyParams.digest` returns is a
parameter of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from forgetting.benchmarks.programs import has_bubblewrap, programs_were_run
from forgetting.config.base_model import SmallModelConfig, is_local
from forgetting.config.data import ColumnsConfig
from forgetting.config.evaluation import (
    BenchmarksConfig,
    RefusalPromptsConfig,
    TrainingBenchmarksConfig,
)
from forgetting.config.expand import RunGroupConfig
from forgetting.config.job_params import (
    LOCATIONS,
    BenchmarkParams,
    EvaluateBaseParams,
    EvaluateWiseFtParams,
    FinetuneParams,
    MakeTablesParams,
    Params,
    PrepareDataParams,
    PretrainBaseParams,
    RegisterBaseParams,
    SelectCheckpointParams,
    TrainCooldownParams,
)
from forgetting.config.study import StudyConfig
from forgetting.digests import file_damage
from forgetting.inputs import content_digest
from forgetting.io import content_key, write_atomically
from forgetting.pipeline.paths import Paths
from forgetting.study.run_groups import may_batch
from forgetting.versions import stage_versions


class StudyParams:
    """The parameters of every job of a study."""

    def __init__(
        self, study: StudyConfig, name: str, paths: Paths, code: str | None = None
    ) -> None:
        self.study, self.name, self.paths, self.code = study, name, paths, code

    def version(self, *stages: str) -> str:
        """Return the versions of the stages that a rule runs. A raised version reruns the rule."""
        return stage_versions(*stages, code=self.code)

    def of(self, rule: str, wildcards: Mapping[str, str]) -> Params:
        """Return the parameters of a job."""
        params: Params = getattr(self, f"_{rule}")(wildcards)
        return params

    def digest(self, rule: str) -> Callable[[Any], str]:
        """Return a function of the wildcards: the digest of all that a job of a rule depends on.

        That is its parameters, the versions of its stages, and files of the user's own.
        """

        def digest(wildcards: Any) -> str:
            named = _named(wildcards)
            params = self.of(rule, named).model_dump(mode="json", exclude=LOCATIONS)
            return content_key([params, self._dependencies(rule, named)])

        return digest

    def write(self, rule: str, wildcards: Any) -> None:
        """Write the file with the parameters of a job, if its content changes."""
        if not hasattr(self, f"_{rule}"):
            return
        named = _named(wildcards)
        path = Path(self.paths.params(rule).format(**named))
        text = self.of(rule, named).model_dump_json(indent=1) + "\n"
        written = path.is_file() and path.read_text(encoding="utf-8") == text
        if not written or file_damage(path):
            write_atomically(path, text)

    def microworld_seed(self, wildcards: Any) -> int:
        """Return the seed of a generated dataset."""
        return self.study.datasets[wildcards.dataset].seed

    def sandbox_state(self, wildcards: Any) -> str:
        """Return a text that changes when programs of a model that were not run may now be run.

        Where a job runs on another machine, what is installed on this one is only a hint: if the
        programs were run there, the text changes once, and they are run once more.
        """
        if not self.paths.runs_programs or self.study.benchmarks.sandbox == "none":
            return "no sandbox is needed"
        outcomes = Path(self.paths.benchmarks("outcomes.json").format(model=wildcards.model))
        here = has_bubblewrap() or programs_were_run(outcomes)
        return "there may be a sandbox" if here else "there is no sandbox"

    def _dependencies(self, rule: str, wildcards: Mapping[str, str]) -> list[Any]:
        """Return what a job depends on beyond its parameters."""
        paths, training_tasks = self.paths, self.paths.training_tasks
        in_training = ["benchmark"] if training_tasks else []
        match rule:
            case "prepare_data":
                return [self.version("prepare"), self._table_contents(paths.prepared_tables)]
            case "pretrain_base":
                return [self.version("pretrain")]
            case "register_base":
                return [self.version("pretrain"), content_digest(paths.local_model_files)]
            case "evaluate_base":
                tables = self._table_contents(paths.text_tables)
                rows = content_digest(paths.users_task_files(training_tasks))
                return [self.version("evaluate", *in_training), tables, rows]
            case "finetune" | "train_cooldown":
                method = wildcards["method"]
                tables = self._table_contents(paths.mitigation_tables(method))
                rows = content_digest(paths.users_task_files(training_tasks))
                return [self.version("train", "evaluate", *in_training), tables, rows]
            case "select_checkpoint":
                return [self.version("select")]
            case "evaluate_wise_ft":
                return [self.version("evaluate")]
            case "benchmark" | "benchmark_base":
                tables = self._table_contents(paths.prompt_tables)
                rows = content_digest(paths.users_task_files(paths.tasks))
                return [self.version("benchmark"), tables, rows]
            case "make_tables":
                return [self.version("tables")]
        raise ValueError(rule)

    def _table_contents(self, tables: Any) -> str:
        """Return a digest of the contents of those tables that are the user's own."""
        paths = self.paths
        return content_digest(
            {table: Path(paths.table(table)) for table in tables if paths.is_users(table)}
        )

    def _columns(self, tables: Any) -> dict[str, ColumnsConfig]:
        return {table: self.study.columns(table) for table in tables}

    @cached_property
    def _knowledge(self) -> dict[str, str]:
        return {name: probe.knowledge for name, probe in self.study.probes.items()}

    @cached_property
    def _training_benchmarks(self) -> TrainingBenchmarksConfig | None:
        """Return the benchmarks of every evaluation; the base and the runs get the same items."""
        benchmarks = self.study.benchmarks
        if not benchmarks.during_training:
            return None
        tasks = {
            # The score of blind guessing changes no answer.
            task: benchmarks.tasks[task].model_copy(
                update={
                    "limit": min(count, benchmarks.tasks[task].limit or count),
                    "chance": None,
                }
            )
            for task, count in benchmarks.during_training.items()
        }
        return TrainingBenchmarksConfig(tasks=tasks, batch_size=benchmarks.batch_size)

    @cached_property
    def _training_rows(self) -> dict[str, Path]:
        folders = self.paths.task_folders(self.paths.training_tasks)
        return {task: Path(folder) for task, folder in folders.items()}

    def _prepare_data(self, wildcards: Mapping[str, str]) -> PrepareDataParams:
        study, tables = self.study, self.paths.prepared_tables
        pretrain = study.base.pretrain
        return PrepareDataParams(
            prompt=study.prompt,
            train=study.train,
            train_limit=study.train_limit,
            probes=study.probes,
            documents=pretrain.documents if pretrain else [],
            documents_limit=pretrain.limit if pretrain else None,
            columns=self._columns(tables),
            rouge_tokenizer=study.evaluation.rouge_tokenizer,
            max_new_tokens=study.evaluation.max_new_tokens,
            tables={table: Path(path) for table, path in tables.items()},
        )

    def _pretrain_base(self, wildcards: Mapping[str, str]) -> PretrainBaseParams:
        pretrain = self.study.base.pretrain
        assert pretrain
        return PretrainBaseParams(
            model=SmallModelConfig(**pretrain.model_dump(exclude={"documents", "limit"})),
            seed=self.study.seeds[0],
            precision=self.study.precision,
        )

    def _register_base(self, wildcards: Mapping[str, str]) -> RegisterBaseParams:
        base = self.study.base
        return RegisterBaseParams(
            folder=Path(self.paths.model_folder),
            origin=" at ".join(filter(None, [base.model, base.revision])),
            downloaded=not is_local(base.model or ""),
            prompt=self.study.prompt if self.study.prompt.chat else None,
        )

    def _evaluate_base(self, wildcards: Mapping[str, str]) -> EvaluateBaseParams:
        study = self.study
        return EvaluateBaseParams(
            prompt=study.prompt,
            evaluation=study.evaluation,
            precision=study.precision,
            knowledge=self._knowledge,
            watched=study.selection.probe,
            metric=study.selection.metric,
            must_reach=study.selection.if_not_reached == "none",
            general_text=study.general_text,
            columns=self._columns(self.paths.text_tables),
            training_benchmarks=self._training_benchmarks,
            benchmark_rows=self._training_rows,
        )

    def _finetune(self, wildcards: Mapping[str, str]) -> FinetuneParams:
        return FinetuneParams(
            run_group=self._run_group(wildcards),
            versions=self._training_versions,
            training_benchmarks=self._training_benchmarks,
            benchmark_rows=self._training_rows,
        )

    def _train_cooldown(self, wildcards: Mapping[str, str]) -> TrainCooldownParams:
        return TrainCooldownParams(
            run_group=self._run_group(wildcards),
            versions=self._training_versions,
            training_benchmarks=None,
            benchmark_rows={},
            duration=self.paths.durations[wildcards["duration"]],
        )

    @cached_property
    def _training_versions(self) -> str:
        in_training = ["benchmark"] if self.paths.training_tasks else []
        return self.version("train", "evaluate", *in_training)

    def _run_group(self, wildcards: Mapping[str, str]) -> RunGroupConfig:
        study, method = self.study, self.paths.methods[wildcards["method"]]
        # A changed `training.batched_lora` reruns only the methods that it affects.
        batched = "auto" if may_batch(method, study.training) else "never"
        return RunGroupConfig(
            method=method,
            seed=int(wildcards["seed"]),
            prompt=study.prompt,
            training=study.training.model_copy(update={"batched_lora": batched}),
            evaluation=study.evaluation,
            selection=study.selection,
            precision=study.precision,
            knowledge=self._knowledge,
            columns=self._columns(self.paths.mitigation_tables(method.name)),
        )

    def _select_checkpoint(self, wildcards: Mapping[str, str]) -> SelectCheckpointParams:
        return SelectCheckpointParams(
            method=self.paths.methods[wildcards["method"]],
            selection=self.study.selection,
            seeds=self.study.seeds,
            durations=self.study.training.durations,
        )

    def _evaluate_wise_ft(self, wildcards: Mapping[str, str]) -> EvaluateWiseFtParams:
        return EvaluateWiseFtParams(
            model=Path(wildcards["model"]).name,
            prompt=self.study.prompt,
            evaluation=self.study.evaluation,
            precision=self.study.precision,
            shares=self.study.selection.wise_ft,
        )

    def _benchmark(self, wildcards: Mapping[str, str]) -> BenchmarkParams:
        return self._benchmark_of(self.paths.scored_models)

    def _benchmark_base(self, wildcards: Mapping[str, str]) -> BenchmarkParams:
        return self._benchmark_of([])

    def _benchmark_of(self, models: list[str]) -> BenchmarkParams:
        study, refusals = self.study, self.study.benchmarks.refusals
        # None of these changes the score of a checkpoint; of the rows the content counts.
        unrelated = {"during_training", "models", "dataset", "sandbox"}
        folders = self.paths.task_folders(self.paths.tasks)
        return BenchmarkParams(
            benchmarks=BenchmarksConfig(**study.benchmarks.model_dump(exclude=unrelated)),
            precision=study.precision,
            refusal_prompts=(
                RefusalPromptsConfig(prompt=study.prompt, columns=study.columns(refusals.table))
                if refusals
                else None
            ),
            rows={task: Path(folder) for task, folder in folders.items()},
            models=models,
            versions=self.version("benchmark"),
        )

    def _make_tables(self, wildcards: Mapping[str, str]) -> MakeTablesParams:
        return MakeTablesParams(name=self.name, study=self.study)


def _named(wildcards: Any) -> dict[str, str]:
    """Return wildcards by name, also where there are none."""
    return dict(wildcards.items()) if wildcards else {}
