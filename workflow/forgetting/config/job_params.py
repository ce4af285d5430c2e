"""Parameters of the programs: one class for each, which its rule fills in and the program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from forgetting.config.base_model import SmallModelConfig
from forgetting.config.data import ColumnsConfig, PromptConfig
from forgetting.config.evaluation import (
    EvaluationConfig,
    GeneralTextConfig,
    ProbeConfig,
    RougeTokenizer,
    ScoringConfig,
    SelectionConfig,
    TrainingBenchmarksConfig,
)
from forgetting.config.expand import Method, RunGroupConfig
from forgetting.config.study import StudyConfig
from forgetting.config.types import ConfigModel
from forgetting.io import check_file

LOCATIONS = {"name", "folder", "tables", "rows", "benchmark_rows"}
"""Parameters that say where files are. Snakemake compares the inputs of jobs itself."""


class Params(ConfigModel):
    """What a program reads from its file of parameters."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            InputError: its content is not what was written.
        """
        check_file(path)
        return cls.model_validate_json(path.read_bytes())


class PrepareDataParams(Params):
    """Parameters of `prepare_data`."""

    prompt: PromptConfig
    train: list[str]
    train_limit: int | None
    probes: dict[str, ProbeConfig]
    documents: list[str]
    documents_limit: int | None
    columns: dict[str, ColumnsConfig]
    rouge_tokenizer: RougeTokenizer
    max_new_tokens: int
    tables: dict[str, Path]
    """File of every table."""


class PretrainBaseParams(Params):
    """Parameters of `pretrain_base`."""

    model: SmallModelConfig
    seed: int
    precision: str


class RegisterBaseParams(Params):
    """Parameters of `register_base`."""

    folder: Path
    """The model, in Hugging Face form."""
    origin: str
    """The model as the study names it."""
    downloaded: bool
    """Whether the workflow downloaded it."""
    prompt: PromptConfig | None
    """The study's prompt, if it is in the model's chat template."""


class EvaluateBaseParams(Params):
    """Parameters of `evaluate_base`."""

    prompt: PromptConfig
    evaluation: EvaluationConfig
    precision: str
    knowledge: dict[str, str]
    """`new` or `old` by probe."""
    watched: str
    """The probe by which checkpoints are selected."""
    metric: str
    must_reach: bool
    """Whether a run that never reaches the threshold has no checkpoint. Otherwise its last one is
    taken, and the page says that answers are cut."""
    general_text: GeneralTextConfig | None
    columns: dict[str, ColumnsConfig]
    training_benchmarks: TrainingBenchmarksConfig | None
    benchmark_rows: dict[str, Path]
    """Folder of SPLIT.jsonl by task."""


class FinetuneParams(Params):
    """Parameters of `finetune`."""

    run_group: RunGroupConfig
    versions: str
    """Versions of the stages that the job runs."""
    training_benchmarks: TrainingBenchmarksConfig | None
    benchmark_rows: dict[str, Path]


class TrainCooldownParams(FinetuneParams):
    """Parameters of `train_cooldown`."""

    duration: float
    """Epochs of the branch."""


class SelectCheckpointParams(Params):
    """Parameters of `select_checkpoint`."""

    method: Method
    selection: SelectionConfig
    seeds: list[int]
    durations: list[float]


class EvaluateWiseFtParams(Params):
    """Parameters of `evaluate_wise_ft`."""

    model: str
    """Name of the checkpoint in its method's folder, such as `seed0`."""
    prompt: PromptConfig
    evaluation: EvaluationConfig
    precision: str
    shares: list[float]
    """Shares of the update."""


class BenchmarkParams(Params, ScoringConfig):
    """Parameters of `benchmark` and `benchmark_base`."""

    rows: dict[str, Path]
    """Folder of SPLIT.jsonl by task."""
    models: list[str]
    """Names of the method's checkpoints, such as `seed0`; none for the base."""
    versions: str
    """Version of the stage."""


class MakeTablesParams(Params):
    """Parameters of `make_tables`."""

    name: str
    study: StudyConfig
