"""Every mistake in a study and in the user's own files that can be found before any job starts.

What is not here yet, a hub's model or table and the tokens of a text, is checked by the first job
that has it. Nothing here is heavy: files are read, no library of models is imported.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from forgetting.data.questions import kept_apart
from forgetting.data.rows import (
    evenly_spaced,
    general_rows,
    joined_text,
    prepare_rows,
    prompt_rows,
    render_question,
)
from forgetting.data.table_files import Row, find_table, place
from forgetting.records import InputError
from forgetting.scoring.references import check_letters
from forgetting.sections.columns import Columns
from forgetting.sections.dataset import WORLD_TABLES
from forgetting.sections.prompt import Prompt
from forgetting.settings.architecture import Architecture, read_architecture, small_model
from forgetting.settings.chat_template import check_arguments, read_chat_template
from forgetting.settings.check_task import LARGE, check_task
from forgetting.settings.layers import (
    Unadaptable,
    check_rank,
    check_variant,
    layers_to_adapt,
    selected_layers,
)
from forgetting.settings.load import is_local
from forgetting.settings.plan import Tuning, numbered_tunings
from forgetting.settings.source import At, Keys, dotted
from forgetting.settings.study import Study
from forgetting.training.schedule import warmup_mistake


def check_inputs(study: Study, at: At = dotted) -> None:
    """Find every mistake that can be found before any job starts.

    Raises:
        InputError: says where it stands, in the study, on the command line or in a file.
    """
    answers = check_folders(study, at)
    _check_kept_apart(study, at)
    _check_questions(study, answers)
    for name, probe in study.probes.items():
        rows = _used(answers, ("probes", name), len(probe.table), probe.limit)
        check_letters(rows, name, study.measurement.rouge_tokenizer, partial(_where, study))
    _check_warm_up(study, answers, at)
    architecture = _architecture(study, at)
    _check_chat_template(study, answers, at)
    if architecture:
        for number, tuning in numbered_tunings(study):
            _check_layers(architecture, tuning, number, at)
    _check_lengths(study, architecture.context if architecture else None, answers, at)
    for name, task in study.benchmarks.tasks.items():
        check_task(study, name, task, architecture.context if architecture else None, at)


def check_folders(study: Study, at: At = dotted) -> dict[Keys, list[Row]]:
    """Read the tables in folders of the user's.

    Returns:
        Rows of probes and of the training, by the keys at which their table stands in the study.
    """
    answers: dict[Keys, list[Row]] = {}
    read: set[tuple[str, str]] = set()
    for keys, table in study.tables():
        path = _file(study, table, keys, at)
        if path is None or path.stat().st_size > LARGE:
            continue
        columns = study.columns(table)
        if keys[0] == "probes":
            probe = str(keys[1])
            scored = study.probes[probe].truth_ratio
            answers[keys] = prepare_rows(
                path, table, wrong_answers=scored, probe=probe, columns=columns
            )
        elif keys[0] == "train":
            # Of a text it matters here only that it is one.
            answers[keys] = [
                {"id": row["id"], "text": ""} if "text" in row else row
                for row in general_rows(path, table, columns)
            ]
        elif (table, str(keys[0])) not in read:
            read.add((table, str(keys[0])))
            if keys[0] == "general_text":
                _check_text(study, path, columns)
            else:
                rows_of = prompt_rows if keys[0] == "benchmarks" else general_rows
                for _ in rows_of(path, table, columns):
                    pass
    return answers


def _file(study: Study, table: str, keys: Keys, at: At) -> Path | None:
    """The file of a table in a folder; none of one that is generated or downloaded."""
    dataset, name = table.split("/", 1)
    origin = study.datasets[dataset]
    if origin.folder is None:
        if origin.generate and name not in WORLD_TABLES:
            raise InputError(
                f"{at(*keys)}: the {origin.generate} has no table {name}, only "
                f"{', '.join(WORLD_TABLES)}"
            )
        return None
    if not Path(origin.folder).is_dir():
        raise InputError(f"{at('datasets', dataset, 'folder')}: there is no folder {origin.folder}")
    try:
        return find_table(Path(origin.folder), name)
    except InputError as error:
        raise InputError(f"{at(*keys)}: {error}") from None


def _check_text(study: Study, path: Path, columns: Columns) -> None:
    assert study.general_text is not None
    size = sum(len(text.encode()) for text in joined_text(path, columns))
    if size < study.general_text.block:
        # No token is shorter than a byte.
        raise InputError(
            f"{path}: the text has {size} bytes, fewer than the {study.general_text.block} tokens "
            "of one block; give a longer text, or make general_text.block smaller"
        )


def _check_kept_apart(study: Study, at: At) -> None:
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


def _check_questions(study: Study, answers: dict[Keys, list[Row]]) -> None:
    """No question of old knowledge is trained on, as far as both are in folders."""
    old = {
        name: _used(answers, ("probes", name), len(probe.table), probe.limit)
        for name, probe in study.probes.items()
        if probe.knowledge == "old"
    }
    trained = _used(answers, ("train",), len(study.train), study.train_limit)
    for _ in kept_apart(trained, old, partial(_where, study)):
        pass


def _where(study: Study, row_id: str) -> str:
    """The file and the line of a row of a table in a folder."""
    dataset, name = row_id.rpartition("/")[0].split("/", 1)
    return place(find_table(Path(study.datasets[dataset].folder or "."), name), row_id)


def _check_warm_up(study: Study, answers: dict[Keys, list[Row]], at: At) -> None:
    """Where examples are rows; how many texts or packs make, the tokens tell the job."""
    rows = _used(answers, ("train",), len(study.train), study.train_limit)
    if not rows or study.training.packing or any("text" in row for row in rows):
        return
    if mistake := warmup_mistake(len(rows), study.training):
        raise InputError(f"{at('training', mistake[0])}: {mistake[1]}")


def _same_rows(study: Study, one: str, other: str) -> bool:
    """Are two tables one, or copies: the same file, bytes or origin?"""
    (first, name), (second, other_name) = (table.split("/", 1) for table in (one, other))
    here, there = study.datasets[first], study.datasets[second]
    if here.folder and there.folder:
        files = find_table(Path(here.folder), name), find_table(Path(there.folder), other_name)
        return filecmp.cmp(files[0], files[1], shallow=False)
    return not here.folder and name == other_name and here == there


def _architecture(study: Study, at: At) -> Architecture | None:
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
        architecture = read_architecture(folder)
    except InputError as error:
        raise InputError(f"{at('base', 'model')}: {error}") from None
    if study.prompt.chat and not read_chat_template(folder):
        raise InputError(
            f"{at('prompt', 'chat')}: the tokenizer in {folder} has no chat template; write the "
            "prompt as `question` and `answer`, or take a base that was tuned to chat"
        )
    _check_conversations(study, folder, at)
    return architecture


def _downloaded(folder: Path) -> Architecture | None:
    """Layers of a hub model that is here already; the job that registers it tells its faults."""
    try:
        return read_architecture(folder) if folder.is_dir() else None
    except InputError:
        return None


def _check_conversations(study: Study, folder: Path, at: At) -> None:
    """Refuse conversations to train on where the tokenizer has no chat template."""
    if read_chat_template(folder):
        return
    for keys, table in study.tables():
        path = None
        if keys[0] not in ("probes", "general_text", "benchmarks"):
            path = _file(study, table, keys, at)
        if path is None or path.stat().st_size > LARGE:
            continue
        for row in general_rows(path, table, study.columns(table)):
            if "messages" in row:
                raise InputError(
                    f"{place(path, row['id'])}: `messages` are written in the chat template of the "
                    f"base's tokenizer, and that in {folder} has none; take a base that was tuned "
                    "to chat, or give rows with `question` and `answer`"
                )


def _check_chat_template(study: Study, answers: dict[Keys, list[Row]], at: At) -> None:
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


def _check_layers(base: Architecture, tuning: Tuning, number: int, at: At) -> None:
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
        except Unadaptable as error:
            raise InputError(f"{at('methods', number, error.key)}: {error}") from None
    if tuning.then is None or tuning.then.layers == "all":
        return
    place = at("methods", number, "then", "layers")
    if isinstance(tuning.then.layers, str):
        wanted = int(tuning.then.layers.split()[1])
        if base.blocks is not None and wanted > base.blocks:
            raise InputError(f"{place}: the model has no {wanted} blocks, but {base.blocks}")
        return
    for pattern in tuning.then.layers:
        found = base.within(pattern)
        if base.complete and not found:
            raise InputError(f"{place}: the model has no module whose name ends in {pattern}")
        if found and not any(layer.reads_text for layer in found):
            raise InputError(
                f"{place}: no text reaches the modules whose names end in {pattern}; name modules "
                "of the language model"
            )


def _check_lengths(
    study: Study, context: int | None, answers: dict[Keys, list[Row]], at: At
) -> None:
    """What is certainly too long: words tell the least number of tokens, jobs the exact one."""
    longest = study.training.max_length
    for row in _used(answers, ("train",), len(study.train), study.train_limit):
        if "question" in row and (least := _words(study.prompt, row)) >= longest:
            raise InputError(
                f"{at('training', 'max_length')}: {longest} tokens leave nothing of the answer in "
                f"{_where(study, row['id'])}, whose question has {least} words in the "
                "prompt; make it longer"
            )
    if context is None:
        return
    text, measured = study.general_text, study.measurement.max_new_tokens
    if text and text.block > context:
        raise InputError(
            f"{at('general_text', 'block')}: {text.block} tokens are more than the {context} that "
            "the model reads; make it smaller"
        )
    if measured >= context:
        raise InputError(
            f"{at('measurement', 'max_new_tokens')}: {measured} tokens and a question are more "
            f"than the {context} that the model reads; make it smaller"
        )
    for name, probe in study.probes.items():
        for row in _used(answers, ("probes", name), len(probe.table), probe.limit):
            if (least := _words(study.prompt, row)) + measured > context:
                raise InputError(
                    f"{at('measurement', 'max_new_tokens')}: {measured} after the {least} words of "
                    f"the question in {_where(study, row['id'])} are more than the {context} "
                    "tokens that the model reads; make it smaller"
                )


def _used(
    answers: dict[Keys, list[Row]], start: Keys, tables: int, limit: int | None
) -> Sequence[Row]:
    """The rows of a set of tables that the study takes; none if one of them is not here yet."""
    parts = [rows for keys, rows in answers.items() if keys[: len(start)] == start]
    rows = [row for part in parts for row in part]
    return evenly_spaced(rows, limit) if len(parts) == tables else []


def _words(prompt: Prompt, row: Row) -> int:
    """Words of a question in the prompt: no token of a language model spans two of them."""
    text = row["question"] if prompt.chat else render_question(prompt, row["question"])
    return len(re.findall(r"\S+", text, re.ASCII))
