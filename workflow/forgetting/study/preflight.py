"""Preflight checks: find mistakes in a study and in the user's files before any job starts.

Models and tables on the hub, and numbers of tokens, are checked by the first job that has them. The
checks read files, but import no model library.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from forgetting.benchmarks import registry
from forgetting.benchmarks.registry import Benchmark
from forgetting.benchmarks.task_definitions import read_task_definition
from forgetting.benchmarks.tasks import read_task_rows
from forgetting.config.base_model import is_local
from forgetting.config.data import (
    MICROWORLD_TABLES,
    MICROWORLD_TASKS,
    ColumnsConfig,
    PromptConfig,
    TableRef,
)
from forgetting.config.evaluation import TaskConfig
from forgetting.config.expand import Method, expand_methods_numbered
from forgetting.config.study import StudyConfig
from forgetting.config.types import KeyPath, LocateKey, dotted
from forgetting.data import tables
from forgetting.data.chat_template import check_arguments, read_chat_template
from forgetting.data.checks import reject_leaked_questions
from forgetting.data.hub import HUB_DATASETS
from forgetting.data.table_files import Row, source_line, table_in_folder, table_of_row
from forgetting.data.tables import evenly_spaced, joined_text
from forgetting.errors import InputError
from forgetting.evaluation.rouge import check_letters
from forgetting.models.architecture import ModelLayers, read_model_layers
from forgetting.models.layers import (
    UnsupportedLayer,
    check_rank,
    check_variant,
    layers_to_adapt,
    selected_layers,
)
from forgetting.models.size import small_model_size
from forgetting.schedule import validate_warmup

LARGE_TABLE_BYTES = 50 * 2**20
"""Larger tables are checked by the first job that reads them."""

TableRows = dict[KeyPath, list[Row]]
"""Rows of the tables in folders, by the key path at which the study names the table."""


def check_inputs(
    study: StudyConfig, at: LocateKey = dotted, layers_record: Path | None = None
) -> None:
    """Run all preflight checks.

    Args:
        study: what is checked.
        at: returns the place of a key, for messages.
        layers_record: where an earlier job may have recorded the layers of the base model.

    Raises:
        InputError: the first mistake, with its place in the study, command line or file.
    """
    rows = check_folders(study, at)
    _check_leakage(study, at)
    _check_questions(study, rows)
    for name, probe in study.probes.items():
        probe_rows = _selected_rows(rows, ("probes", name), len(probe.table), probe.limit)
        check_letters(probe_rows, name, study.evaluation.rouge_tokenizer, partial(_locate, study))
    _check_warmup(study, rows, at)
    model = _model_layers(study, at, layers_record)
    _check_chat_template(study, rows, at)
    if model:
        for number, method in expand_methods_numbered(study):
            _check_layers(model, method, number, at)
    context = model.context if model else None
    _check_lengths(study, context, rows, at)
    for name, task in study.benchmarks.tasks.items():
        _check_task(study, name, task, context, at)


def check_folders(study: StudyConfig, at: LocateKey = dotted) -> TableRows:
    """Read the tables in folders, and return the rows of probes and of the training.

    Raises:
        InputError: a table or a row is missing or invalid.
    """
    rows: TableRows = {}
    read: set[tuple[str, str]] = set()
    for keys, table in study.tables():
        path = _table_file(study, table, keys, at)
        if path is None or path.stat().st_size > LARGE_TABLE_BYTES:
            continue
        columns = study.columns(table)
        if keys[0] == "probes":
            name = str(keys[1])
            read_probe = partial(tables.read_probe_rows, path, table, columns=columns, probe=name)
            rows[keys] = read_probe(wrong_answers=study.probes[name].truth_ratio)
        elif keys[0] == "train":
            # The checks need no text, only which rows have one.
            rows[keys] = [
                {"id": row["id"], "text": ""} if "text" in row else row
                for row in tables.read_training_rows(path, table, columns)
            ]
        elif (table, str(keys[0])) not in read:
            read.add((table, str(keys[0])))
            if keys[0] == "general_text":
                _check_text(study, path, columns)
            else:
                has_prompts = keys[0] == "benchmarks"
                read_table = tables.read_prompts if has_prompts else tables.read_training_rows
                for _ in read_table(path, table, columns):
                    pass
    return rows


def _table_file(study: StudyConfig, table: str, keys: KeyPath, at: LocateKey) -> Path | None:
    """Return the file of a table in a folder, or None for other tables."""
    ref = TableRef.parse(table)
    dataset = ref.config(study)
    if dataset.origin == "generated" and ref.table not in MICROWORLD_TABLES:
        raise InputError(
            f"{at(*keys)}: the {dataset.generate} has no table {ref.table}, only "
            f"{', '.join(MICROWORLD_TABLES)}"
        )
    if dataset.folder and not Path(dataset.folder).is_dir():
        place = at("datasets", ref.dataset, "folder")
        raise InputError(f"{place}: there is no folder {dataset.folder}")
    try:
        return table_in_folder(study, table)
    except InputError as error:
        raise InputError(f"{at(*keys)}: {error}") from None


def _check_text(study: StudyConfig, path: Path, columns: ColumnsConfig) -> None:
    """Raise InputError if the general text is shorter than a block."""
    assert study.general_text is not None
    size = sum(len(text.encode()) for text in joined_text(path, columns))
    if size < study.general_text.block:
        # A token has at least one byte.
        raise InputError(
            f"{path}: the text has {size} bytes, fewer than the {study.general_text.block} tokens "
            "of one block; take a longer text, or make general_text.block smaller"
        )


def _check_leakage(study: StudyConfig, at: LocateKey) -> None:
    """Raise InputError if old knowledge is trained on under another name of the same table."""
    trained = [t for keys, t in study.tables() if keys[0] == "train" or "replay" in keys]
    for keys, table in study.tables():
        is_old = keys[0] == "probes" and study.probes[str(keys[1])].knowledge == "old"
        if not is_old and keys[0] != "general_text":
            continue
        for other in trained:
            if other != table and _same_rows(study, table, other):
                raise InputError(
                    f"{at(*keys)}: {table} has the rows of {other}, which is trained on, so it "
                    "cannot measure forgetting; take another table"
                )


def _check_questions(study: StudyConfig, rows: TableRows) -> None:
    """Raise InputError if a question of old knowledge is trained on, for tables in folders."""
    old = {
        name: _selected_rows(rows, ("probes", name), len(probe.table), probe.limit)
        for name, probe in study.probes.items()
        if probe.knowledge == "old"
    }
    trained = _selected_rows(rows, ("train",), len(study.train), study.train_limit)
    for _ in reject_leaked_questions(trained, old, partial(_locate, study)):
        pass


def _locate(study: StudyConfig, row_id: str) -> str:
    """Return file and line of a row of a table in a folder."""
    path = table_in_folder(study, table_of_row(row_id))
    assert path
    return source_line(path, row_id)


def _check_warmup(study: StudyConfig, rows: TableRows, at: LocateKey) -> None:
    """Raise InputError if the warm-up is too long, where the number of examples is known.

    The number of blocks of text and of packed sequences depends on tokens, which the job has.
    """
    trained = _selected_rows(rows, ("train",), len(study.train), study.train_limit)
    if not trained or study.training.packing or any("text" in row for row in trained):
        return
    if mistake := validate_warmup(len(trained), study.training):
        raise InputError(f"{at('training', mistake[0])}: {mistake[1]}")


def _same_rows(study: StudyConfig, table: str, other: str) -> bool:
    """Return whether two tables have the same bytes, or the same origin and name."""
    path, other_path = table_in_folder(study, table), table_in_folder(study, other)
    if path and other_path:
        return filecmp.cmp(path, other_path, shallow=False)
    first, second = TableRef.parse(table), TableRef.parse(other)
    same_origin = first.config(study) == second.config(study)
    return path is None and first.table == second.table and same_origin


def _model_layers(study: StudyConfig, at: LocateKey, record: Path | None) -> ModelLayers | None:
    """Return the layers of the base model, or None if they are not known yet."""
    model = study.base.model
    if study.base.pretrain:
        return small_model_size(study.base.pretrain).layers
    if model is None:
        return None
    if not is_local(model):
        return _downloaded(Path("resources/models") / model / str(study.base.revision), record)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise InputError(f"{at('base', 'model')}: there is no folder {folder}")
    try:
        layers = read_model_layers(folder, record)
    except InputError as error:
        raise InputError(f"{at('base', 'model')}: {error}") from None
    if study.prompt.chat and not read_chat_template(folder):
        raise InputError(
            f"{at('prompt', 'chat')}: the tokenizer in {folder} has no chat template; write the "
            "prompt as `question` and `answer`, or take a base model that was tuned to chat"
        )
    _check_conversations(study, folder, at)
    return layers


def _downloaded(folder: Path, record: Path | None) -> ModelLayers | None:
    """Return the layers of a downloaded hub model; register_base reports its mistakes."""
    try:
        return read_model_layers(folder, record) if folder.is_dir() else None
    except InputError:
        return None


def _check_conversations(study: StudyConfig, folder: Path, at: LocateKey) -> None:
    """Raise InputError for training conversations if the tokenizer has no chat template."""
    if read_chat_template(folder):
        return
    for keys, table in study.tables():
        if keys[0] in ("probes", "general_text", "benchmarks"):
            continue
        path = _table_file(study, table, keys, at)
        if path is None or path.stat().st_size > LARGE_TABLE_BYTES:
            continue
        for row in tables.read_training_rows(path, table, study.columns(table)):
            if "messages" in row:
                raise InputError(
                    f"{source_line(path, row['id'])}: `messages` need the chat template of the "
                    f"base model's tokenizer, but that in {folder} has none; take a base model "
                    "that was tuned to chat, or rows with `question` and `answer`"
                )


def _check_chat_template(study: StudyConfig, rows: TableRows, at: LocateKey) -> None:
    """Raise InputError if the chat template of a base model in a folder has other arguments."""
    model, arguments = study.base.model, study.prompt.template_arguments
    if study.base.pretrain and arguments:
        raise InputError(
            f"{at('prompt', 'template_arguments')}: the chat template of a pretrained small model "
            "has no arguments; remove them"
        )
    if model is None or not is_local(model):
        return
    source = read_chat_template(Path(model).expanduser())
    if source is None:
        if arguments:
            raise InputError(
                f"{at('prompt', 'template_arguments')}: the tokenizer in {model} has no chat "
                "template; remove them"
            )
        return
    has_conversations = any("messages" in row for table in rows.values() for row in table)
    if study.prompt.chat or has_conversations or arguments:
        check_arguments(source, study.prompt, at)


def _check_layers(base: ModelLayers, method: Method, number: int, at: LocateKey) -> None:
    """Raise InputError if the base model lacks layers of a method, or matrices of its rank."""
    if method.kind != "full":
        try:
            if base.has_leaves:
                layers_to_adapt(base.layers, method)
            else:
                # Listed names are those of the loaded model. Only known layers can be checked.
                known = selected_layers(base.layers, method.target_modules)
                check_variant(known, method)
                check_rank([layer for layer in known if layer.kind != "tensor"], method)
        except UnsupportedLayer as error:
            raise InputError(f"{at('methods', number, error.key)}: {error}") from None
    if method.second_stage is None or method.second_stage.layers == "all":
        return
    where = at("methods", number, "second_stage", "layers")
    if isinstance(method.second_stage.layers, str):
        count = int(method.second_stage.layers.split()[1])
        if base.blocks is not None and count > base.blocks:
            raise InputError(f"{where}: the model has only {base.blocks} blocks, not {count}")
        return
    for pattern in method.second_stage.layers:
        modules = base.within(pattern)
        if base.is_complete and not modules:
            raise InputError(f"{where}: the model has no module whose name ends in {pattern}")
        if modules and not any(layer.reads_text for layer in modules):
            raise InputError(
                f"{where}: no text reaches the modules whose names end in {pattern}; name modules "
                "of the language model"
            )


def _check_lengths(study: StudyConfig, context: int | None, rows: TableRows, at: LocateKey) -> None:
    """Raise InputError for sequences that are too long even with one token per word."""
    longest = study.training.max_length
    for row in _selected_rows(rows, ("train",), len(study.train), study.train_limit):
        if "question" in row and (words := _word_count(study.prompt, row)) >= longest:
            raise InputError(
                f"{at('training', 'max_length')}: {longest} tokens leave nothing of the answer in "
                f"{_locate(study, row['id'])}, whose question has {words} words in the prompt; "
                "make it longer"
            )
    if context is None:
        return
    text, answer = study.general_text, study.evaluation.max_new_tokens
    if text and text.block > context:
        raise InputError(
            f"{at('general_text', 'block')}: {text.block} tokens exceed the context of the model, "
            f"{context}; make it smaller"
        )
    if answer >= context:
        raise InputError(
            f"{at('evaluation', 'max_new_tokens')}: {answer} tokens and a question exceed the "
            f"context of the model, {context}; make it smaller"
        )
    for name, probe in study.probes.items():
        for row in _selected_rows(rows, ("probes", name), len(probe.table), probe.limit):
            if (words := _word_count(study.prompt, row)) + answer > context:
                raise InputError(
                    f"{at('evaluation', 'max_new_tokens')}: {answer} tokens after the {words} "
                    f"words of the question in {_locate(study, row['id'])} exceed the context of "
                    f"the model, {context}; make it smaller"
                )


def _selected_rows(
    rows: TableRows, start: KeyPath, table_count: int, limit: int | None
) -> Sequence[Row]:
    """Return the rows that the study uses of the tables below a key path; none if one is absent."""
    parts = [part for keys, part in rows.items() if keys[: len(start)] == start]
    selected = [row for part in parts for row in part]
    return evenly_spaced(selected, limit) if len(parts) == table_count else []


def _word_count(prompt: PromptConfig, row: Row) -> int:
    """Return the words of a question in the prompt, a lower bound of its tokens."""
    text = row["question"] if prompt.chat else prompt.render_question(row["question"])
    return len(re.findall(r"\S+", text, re.ASCII))


def _check_task(
    study: StudyConfig, name: str, task: TaskConfig, context: int | None, at: LocateKey
) -> None:
    """Raise InputError for mistakes in the options, rows and lengths of a benchmark task."""
    keys = ("benchmarks", "tasks", name)
    try:
        definition = registry.benchmark(name)
    except InputError as error:
        raise InputError(f"{at(*keys)}: {error}") from None
    try:
        metric = registry.main_metric(name, task.metric)
    except InputError as error:
        raise InputError(f"{at(*keys, 'metric')}: {error}") from None
    if task.num_fewshot and name in HUB_DATASETS and definition.example_split is None:
        raise InputError(
            f"{at(*keys, 'num_fewshot')}: {name} is defined without examples; remove it"
        )
    if task.samples is not None and not definition.generates_code:
        raise InputError(
            f"{at(*keys, 'samples')}: the answers of {name} are not programs, but pass@k is for "
            "programs; remove it"
        )
    if name in study.benchmarks.during_training:
        _check_training_benchmark(name, definition, metric, at)
    tokens = definition.max_gen_toks and (task.max_new_tokens or definition.max_gen_toks)
    if tokens and context is not None and tokens >= context:
        raise InputError(
            f"{at(*keys, 'max_new_tokens')}: answers of {name} may have {tokens} tokens, but the "
            f"context of the model is {context}; set a smaller `max_new_tokens`"
        )
    _check_task_rows(study, name, task, definition, at)


def _check_training_benchmark(name: str, definition: Benchmark, metric: str, at: LocateKey) -> None:
    """Raise InputError if a task cannot be evaluated in training, item by item."""
    where = at("benchmarks", "during_training", name)
    if definition.generates_code:
        raise InputError(
            f"{where}: the answers of {name} are programs, which run in a sandbox after the "
            "training; remove it"
        )
    task = read_task_definition(name)
    if task.is_mean(metric):
        return
    means = [other for other in task.metrics if task.is_mean(other)]
    remedy = f", or set benchmarks.tasks.{name}.metric to {' or '.join(means)}" if means else ""
    raise InputError(
        f"{where}: {metric} of {name} is not a mean over items, so the first items do not give it; "
        f"remove it{remedy}"
    )


def _check_task_rows(
    study: StudyConfig, name: str, task: TaskConfig, definition: Benchmark, at: LocateKey
) -> None:
    """Raise InputError if the rows of a task are not where the study says."""
    where, rows_where = at("benchmarks", "tasks", name), at("benchmarks", "dataset")
    dataset = study.benchmark_dataset
    if dataset is None:
        if name not in HUB_DATASETS and task.revision is None:
            raise InputError(
                f"{where}: its rows come from {definition.dataset[0]} on the hub, so it needs a "
                "`revision`, a commit of that dataset; or name a folder in benchmarks.dataset"
            )
        return
    if dataset.origin == "hub":
        raise InputError(
            f"{rows_where}: {study.benchmarks.dataset} is a dataset on the hub, which has no rows "
            "of benchmarks; remove `dataset`, or name a dataset with a `folder`"
        )
    shots = definition.num_fewshot if task.num_fewshot is None else task.num_fewshot
    splits = {definition.split: 1}
    if shots and definition.example_split:
        splits[definition.example_split] = shots + 1
    if dataset.folder is None:
        same = registry.task_with_same_dataset(name, MICROWORLD_TASKS)
        if same is None or not set(splits) <= set(HUB_DATASETS[same].splits):
            raise InputError(
                f"{where}: the {dataset.generate} has no rows for {name}, only for tasks on the "
                f"data of {', '.join(MICROWORLD_TASKS)}; take the rows from a folder or the hub"
            )
        return
    for split, minimum in splits.items():
        path = Path(dataset.folder, name, f"{split}.jsonl")
        if not path.is_file():
            is_example = split == definition.example_split
            use = f" (for {shots} examples in the prompt)" if is_example else ""
            raise InputError(f"{rows_where}: there is no {path}, which {name} needs{use}")
        if path.stat().st_size > LARGE_TABLE_BYTES:
            continue
        if (count := len(read_task_rows(path, definition.columns))) < minimum:
            raise InputError(
                f"{path}: {shots} examples in the prompt need {minimum} rows, but there are "
                f"{count}; lower benchmarks.tasks.{name}.num_fewshot"
            )
