"""Every mistake in a study and in the user's own files that can be found before any job starts.

What is not here yet, a hub's model or table and the tokens of a text, is checked by the first job
that has it. Nothing here is heavy: files are read, no library of models is imported.

Mistakes about one benchmark that can be found before any job: name, settings, rows, lengths.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from forgetting.benchmarks.registry import Benchmark, benchmark, main_metric, task_with_same_dataset
from forgetting.benchmarks.task_definitions import read_task_definition
from forgetting.benchmarks.tasks import read_rows
from forgetting.config.base_model import is_local
from forgetting.config.data import MICROWORLD_TABLES, ColumnsConfig, PromptConfig
from forgetting.config.evaluation import TaskConfig
from forgetting.config.expand import Method, expand_methods_numbered
from forgetting.config.study import StudyConfig
from forgetting.config.types import KeyPath, LocateKey, dotted
from forgetting.data.chat_template import check_arguments, read_chat_template
from forgetting.data.checks import reject_leaked_questions
from forgetting.data.hub_datasets import HUB_DATASETS
from forgetting.data.table_files import Row, find_table, source_line
from forgetting.data.tables import (
    evenly_spaced,
    joined_text,
    read_probe_rows,
    read_prompts,
    read_training_rows,
    render_question,
)
from forgetting.errors import InputError
from forgetting.evaluation.rouge import check_letters
from forgetting.models.architecture import ModelLayers, read_model_layers, small_model
from forgetting.models.layers import (
    UnsupportedLayer,
    check_rank,
    check_variant,
    layers_to_adapt,
    selected_layers,
)
from forgetting.schedule import validate_warmup


def check_inputs(study: StudyConfig, at: LocateKey = dotted) -> None:
    """Find every mistake that can be found before any job starts.

    Raises:
        InputError: says where it stands, in the study, on the command line or in a file.
    """
    answers = check_folders(study, at)
    _check_leakage(study, at)
    _check_questions(study, answers)
    for name, probe in study.probes.items():
        rows = _used(answers, ("probes", name), len(probe.table), probe.limit)
        check_letters(rows, name, study.evaluation.rouge_tokenizer, partial(_where, study))
    _check_warm_up(study, answers, at)
    architecture = _architecture(study, at)
    _check_chat_template(study, answers, at)
    if architecture:
        for number, tuning in expand_methods_numbered(study):
            _check_layers(architecture, tuning, number, at)
    _check_lengths(study, architecture.context if architecture else None, answers, at)
    for name, task in study.benchmarks.tasks.items():
        check_task(study, name, task, architecture.context if architecture else None, at)


def check_folders(study: StudyConfig, at: LocateKey = dotted) -> dict[KeyPath, list[Row]]:
    """Read the tables in folders of the user's.

    Returns:
        Rows of probes and of the training, by the keys at which their table stands in the study.
    """
    answers: dict[KeyPath, list[Row]] = {}
    read: set[tuple[str, str]] = set()
    for keys, table in study.tables():
        path = _file(study, table, keys, at)
        if path is None or path.stat().st_size > LARGE_TASK_ITEMS:
            continue
        columns = study.columns(table)
        if keys[0] == "probes":
            probe = str(keys[1])
            scored = study.probes[probe].truth_ratio
            answers[keys] = read_probe_rows(
                path, table, wrong_answers=scored, probe=probe, columns=columns
            )
        elif keys[0] == "train":
            # Of a text it matters here only that it is one.
            answers[keys] = [
                {"id": row["id"], "text": ""} if "text" in row else row
                for row in read_training_rows(path, table, columns)
            ]
        elif (table, str(keys[0])) not in read:
            read.add((table, str(keys[0])))
            if keys[0] == "general_text":
                _check_text(study, path, columns)
            else:
                rows_of = read_prompts if keys[0] == "benchmarks" else read_training_rows
                for _ in rows_of(path, table, columns):
                    pass
    return answers


def _file(study: StudyConfig, table: str, keys: KeyPath, at: LocateKey) -> Path | None:
    """The file of a table in a folder; none of one that is generated or downloaded."""
    dataset, name = table.split("/", 1)
    origin = study.datasets[dataset]
    if origin.folder is None:
        if origin.generate and name not in MICROWORLD_TABLES:
            raise InputError(
                f"{at(*keys)}: the {origin.generate} has no table {name}, only "
                f"{', '.join(MICROWORLD_TABLES)}"
            )
        return None
    if not Path(origin.folder).is_dir():
        raise InputError(f"{at('datasets', dataset, 'folder')}: there is no folder {origin.folder}")
    try:
        return find_table(Path(origin.folder), name)
    except InputError as error:
        raise InputError(f"{at(*keys)}: {error}") from None


def _check_text(study: StudyConfig, path: Path, columns: ColumnsConfig) -> None:
    assert study.general_text is not None
    size = sum(len(text.encode()) for text in joined_text(path, columns))
    if size < study.general_text.block:
        # No token is shorter than a byte.
        raise InputError(
            f"{path}: the text has {size} bytes, fewer than the {study.general_text.block} tokens "
            "of one block; give a longer text, or make general_text.block smaller"
        )


def _check_leakage(study: StudyConfig, at: LocateKey) -> None:
    """Old knowledge is not trained on under another name of the same file."""
    trained = [t for keys, t in study.tables() if keys[0] == "train" or "replay" in keys]
    for keys, table in study.tables():
        old = keys[0] == "probes" and study.probes[str(keys[1])].knowledge == "old"
        if not old and keys[0] != "general_text":
            continue
        for other in trained:
            if other != table and _same_rows(study, table, other):
                raise InputError(
                    f"{at(*keys)}: {table} holds what {other} holds, which is trained on, so it "
                    "would not tell what is forgotten; take another table"
                )


def _check_questions(study: StudyConfig, answers: dict[KeyPath, list[Row]]) -> None:
    """No question of old knowledge is trained on, as far as both are in folders."""
    old = {
        name: _used(answers, ("probes", name), len(probe.table), probe.limit)
        for name, probe in study.probes.items()
        if probe.knowledge == "old"
    }
    trained = _used(answers, ("train",), len(study.train), study.train_limit)
    for _ in reject_leaked_questions(trained, old, partial(_where, study)):
        pass


def _where(study: StudyConfig, row_id: str) -> str:
    """The file and the line of a row of a table in a folder."""
    dataset, name = row_id.rpartition("/")[0].split("/", 1)
    return source_line(find_table(Path(study.datasets[dataset].folder or "."), name), row_id)


def _check_warm_up(study: StudyConfig, answers: dict[KeyPath, list[Row]], at: LocateKey) -> None:
    """Where examples are rows; how many texts or packs make, the tokens tell the job."""
    rows = _used(answers, ("train",), len(study.train), study.train_limit)
    if not rows or study.training.packing or any("text" in row for row in rows):
        return
    if mistake := validate_warmup(len(rows), study.training):
        raise InputError(f"{at('training', mistake[0])}: {mistake[1]}")


def _same_rows(study: StudyConfig, one: str, other: str) -> bool:
    """Are two tables one, or copies: the same file, bytes or origin?"""
    (first, name), (second, other_name) = (table.split("/", 1) for table in (one, other))
    here, there = study.datasets[first], study.datasets[second]
    if here.folder and there.folder:
        files = find_table(Path(here.folder), name), find_table(Path(there.folder), other_name)
        return filecmp.cmp(files[0], files[1], shallow=False)
    return not here.folder and name == other_name and here == there


def _architecture(study: StudyConfig, at: LocateKey) -> ModelLayers | None:
    """The layers of the base, where its files are here, or its settings tell them."""
    model = study.base.model
    if study.base.pretrain:
        return small_model(study.base.pretrain)
    if model is None:
        return None
    if not is_local(model):
        return _downloaded(Path("resources/models") / model / str(study.base.revision))
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise InputError(f"{at('base', 'model')}: there is no folder {folder}")
    try:
        architecture = read_model_layers(folder)
    except InputError as error:
        raise InputError(f"{at('base', 'model')}: {error}") from None
    if study.prompt.chat and not read_chat_template(folder):
        raise InputError(
            f"{at('prompt', 'chat')}: the tokenizer in {folder} has no chat template; write the "
            "prompt as `question` and `answer`, or take a base that was tuned to chat"
        )
    _check_conversations(study, folder, at)
    return architecture


def _downloaded(folder: Path) -> ModelLayers | None:
    """Layers of a hub model that is here already; the job that registers it tells its faults."""
    try:
        return read_model_layers(folder) if folder.is_dir() else None
    except InputError:
        return None


def _check_conversations(study: StudyConfig, folder: Path, at: LocateKey) -> None:
    """Refuse conversations to train on where the tokenizer has no chat template."""
    if read_chat_template(folder):
        return
    for keys, table in study.tables():
        path = None
        if keys[0] not in ("probes", "general_text", "benchmarks"):
            path = _file(study, table, keys, at)
        if path is None or path.stat().st_size > LARGE_TASK_ITEMS:
            continue
        for row in read_training_rows(path, table, study.columns(table)):
            if "messages" in row:
                raise InputError(
                    f"{source_line(path, row['id'])}: `messages` are written in the chat "
                    f"template of the base's tokenizer, and that in {folder} has none; take a "
                    "base that was tuned to chat, or give rows with `question` and `answer`"
                )


def _check_chat_template(
    study: StudyConfig, answers: dict[KeyPath, list[Row]], at: LocateKey
) -> None:
    """The template of a base in a folder has the arguments of the study, and thinks as it says."""
    model, arguments = study.base.model, study.prompt.template_arguments
    if study.base.pretrain and arguments:
        raise InputError(
            f"{at('prompt', 'template_arguments')}: the chat template of a model that is trained "
            "here has no arguments; leave them out"
        )
    if model is None or not is_local(model):
        return
    source = read_chat_template(Path(model).expanduser())
    if source is None:
        if arguments:
            raise InputError(
                f"{at('prompt', 'template_arguments')}: the tokenizer in {model} has no chat "
                "template; leave them out"
            )
        return
    talks = any("messages" in row for rows in answers.values() for row in rows)
    if study.prompt.chat or talks or arguments:
        check_arguments(source, study.prompt, at)


def _check_layers(base: ModelLayers, tuning: Method, number: int, at: LocateKey) -> None:
    """The layers that a method names are there, and have matrices as large as its ranks."""
    if tuning.kind != "full":
        try:
            if base.has_leaves:
                layers_to_adapt(base.layers, tuning)
            else:
                # Listed names are those of the loaded model; what is known of the rest is certain.
                known = selected_layers(base.layers, tuning.target_modules)
                check_variant(known, tuning)
                check_rank([layer for layer in known if layer.kind != "tensor"], tuning)
        except UnsupportedLayer as error:
            raise InputError(f"{at('methods', number, error.key)}: {error}") from None
    if tuning.second_stage is None or tuning.second_stage.layers == "all":
        return
    place = at("methods", number, "second_stage", "layers")
    if isinstance(tuning.second_stage.layers, str):
        wanted = int(tuning.second_stage.layers.split()[1])
        if base.blocks is not None and wanted > base.blocks:
            raise InputError(f"{place}: the model has no {wanted} blocks, but {base.blocks}")
        return
    for pattern in tuning.second_stage.layers:
        found = base.within(pattern)
        if base.is_complete and not found:
            raise InputError(f"{place}: the model has no module whose name ends in {pattern}")
        if found and not any(layer.reads_text for layer in found):
            raise InputError(
                f"{place}: no text reaches the modules whose names end in {pattern}; name modules "
                "of the language model"
            )


def _check_lengths(
    study: StudyConfig, context: int | None, answers: dict[KeyPath, list[Row]], at: LocateKey
) -> None:
    """What is certainly too long: words tell the least number of tokens, jobs the exact one."""
    longest = study.training.max_length
    for row in _used(answers, ("train",), len(study.train), study.train_limit):
        if "question" in row and (least := _describe(study.prompt, row)) >= longest:
            raise InputError(
                f"{at('training', 'max_length')}: {longest} tokens leave nothing of the answer in "
                f"{_where(study, row['id'])}, whose question has {least} words in the "
                "prompt; make it longer"
            )
    if context is None:
        return
    text, measured = study.general_text, study.evaluation.max_new_tokens
    if text and text.block > context:
        raise InputError(
            f"{at('general_text', 'block')}: {text.block} tokens are more than the {context} that "
            "the model reads; make it smaller"
        )
    if measured >= context:
        raise InputError(
            f"{at('evaluation', 'max_new_tokens')}: {measured} tokens and a question are more "
            f"than the {context} that the model reads; make it smaller"
        )
    for name, probe in study.probes.items():
        for row in _used(answers, ("probes", name), len(probe.table), probe.limit):
            if (least := _describe(study.prompt, row)) + measured > context:
                raise InputError(
                    f"{at('evaluation', 'max_new_tokens')}: {measured} after the {least} words of "
                    f"the question in {_where(study, row['id'])} are more than the {context} "
                    "tokens that the model reads; make it smaller"
                )


def _used(
    answers: dict[KeyPath, list[Row]], start: KeyPath, tables: int, limit: int | None
) -> Sequence[Row]:
    """The rows of a set of tables that the study takes; none if one of them is not here yet."""
    parts = [rows for keys, rows in answers.items() if keys[: len(start)] == start]
    rows = [row for part in parts for row in part]
    return evenly_spaced(rows, limit) if len(parts) == tables else []


def _describe(prompt: PromptConfig, row: Row) -> int:
    """Words of a question in the prompt: no token of a language model spans two of them."""
    text = row["question"] if prompt.chat else render_question(prompt, row["question"])
    return len(re.findall(r"\S+", text, re.ASCII))


LARGE_TASK_ITEMS = 50 * 2**20
"""Tables above so many bytes are checked by the first job that reads them, not before."""


def check_task(
    study: StudyConfig, name: str, task: TaskConfig, context: int | None, at: LocateKey
) -> None:
    """Name, settings, rows, examples and room for the answers of a benchmark."""
    place = ("benchmarks", "tasks", name)
    try:
        known = benchmark(name)
    except InputError as error:
        raise InputError(f"{at(*place)}: {error}") from None
    try:
        metric = main_metric(name, task.metric)
    except InputError as error:
        raise InputError(f"{at(*place, 'metric')}: {error}") from None
    shots = known.num_fewshot if task.num_fewshot is None else task.num_fewshot
    if task.num_fewshot and name in HUB_DATASETS and known.example_split is None:
        raise InputError(
            f"{at(*place, 'num_fewshot')}: {name} is defined without examples; leave it out"
        )
    if task.samples is not None and not known.generates_code:
        raise InputError(
            f"{at(*place, 'samples')}: the answers of {name} are no programs, and pass@k is for "
            "programs; leave it out"
        )
    if name in study.benchmarks.during_training:
        _check_training_benchmarks(name, known, metric, at)
    tokens = known.max_gen_toks and (task.max_new_tokens or known.max_gen_toks)
    if tokens and context is not None and tokens >= context:
        raise InputError(
            f"{at(*place, 'max_new_tokens')}: the answers of {name} may take {tokens} tokens, but "
            f"the model reads {context}; set a smaller `max_new_tokens`"
        )
    _check_rows(study, name, task, known, shots, at)


def _check_training_benchmarks(name: str, known: Benchmark, metric: str, at: LocateKey) -> None:
    """A task can be asked in training, item by item."""
    place = at("benchmarks", "during_training", name)
    if known.generates_code:
        raise InputError(
            f"{place}: the answers of {name} are programs, which run in a sandbox after the "
            "training; take it out"
        )
    definition = read_task_definition(name)
    if definition.is_mean(metric):
        return
    means = [other for other in definition.metrics if definition.is_mean(other)]
    instead = f", or have benchmarks.tasks.{name}.metric name {' or '.join(means)}" if means else ""
    raise InputError(
        f"{place}: {metric} of {name} is no mean over items, so that the first of them do not tell "
        f"it; take it out{instead}"
    )


def _check_rows(
    study: StudyConfig, name: str, task: TaskConfig, known: Benchmark, shots: int, at: LocateKey
) -> None:
    """The rows of a benchmark are where the study says, as far as that can be told."""
    place, rows = ("benchmarks", "tasks", name), at("benchmarks", "dataset")
    if study.benchmarks.dataset is None:
        if name not in HUB_DATASETS and task.revision is None:
            raise InputError(
                f"{at(*place)}: its rows come from {known.dataset[0]} on the hub, so it needs a "
                "`revision`, a commit of that dataset; or name a folder in benchmarks.dataset"
            )
        return
    origin = study.datasets[study.benchmarks.dataset]
    splits = {known.split: 1}
    if shots and known.example_split:
        splits[known.example_split] = shots + 1
    if origin.folder is None:
        if origin.generate is None:
            raise InputError(
                f"{rows}: {study.benchmarks.dataset} is a dataset on the hub, which has no rows of "
                "benchmarks; leave `dataset` out, or name a dataset with a `folder`"
            )
        alike = task_with_same_dataset(name)
        if alike is None or not set(splits) <= set(HUB_DATASETS[alike].splits):
            raise InputError(
                f"{at(*place)}: the {origin.generate} has no rows for {name}, only for tasks on "
                f"the data of {', '.join(HUB_DATASETS)}; take the rows from a folder or the hub"
            )
        return
    for split, least in splits.items():
        path = Path(origin.folder, name, f"{split}.jsonl")
        if not path.is_file():
            more = f" (for {shots} examples in the prompt)" if split == known.example_split else ""
            raise InputError(f"{rows}: there is no {path}, which {name} needs{more}")
        if (
            path.stat().st_size <= LARGE_TASK_ITEMS
            and (found := len(read_rows(path, known.columns))) < least
        ):
            raise InputError(
                f"{path}: has {found} rows, and {shots} examples in the prompt need {least} to "
                f"draw from; lower benchmarks.tasks.{name}.num_fewshot"
            )
