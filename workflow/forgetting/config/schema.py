"""Generate config/schema.json and config/README.md from the classes of a study.

Usage, from the root of the checkout:

    PYTHONPATH=workflow python -m forgetting.config.schema --write
    PYTHONPATH=workflow python -m forgetting.config.schema --check
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from forgetting.config import study, types
from forgetting.errors import InputError, reports_input_errors
from forgetting.io import write_atomically

ROOT = Path(__file__).parents[3]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
BOUND_KEYWORDS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
}

INTRODUCTION = """\
# Configuration

A study is one YAML file. It names a base model, new knowledge to fine-tune on, probes of old
knowledge, benchmarks, methods with their sweeps, and the rule that selects checkpoints. The
studies of the workflow are in `config/studies`. `config/config.yaml` names the default study.

## Choosing a study

```
snakemake                                        # the study of config/config.yaml
snakemake --config study=tofu-scratch            # another one of config/studies
snakemake --config study=path/to/mine.yaml       # a file of your own
snakemake -n --config study=path/to/mine.yaml    # check it and show its jobs, run nothing
snakemake --profile slurm --config study=NAME    # on a cluster
```

`config/config.yaml` and `--config` accept these options; `--config` separates them by spaces:

- `study`: a name in `config/studies`, or the path of a YAML file. Results go to `results/NAME`,
  the page to `reports/NAME.html`. Studies of different names may run at the same time.
- `scale`: `full`, or `tiny` to try a setup. With `tiny` every job of the study runs offline, on a
  few rows and with a toy model, in about a minute. The numbers have no meaning. They go to
  `results/NAME-tiny`.
- `model`: a folder in Hugging Face format, or OWNER/NAME@COMMIT on the hub. It replaces the base
  model of the study.
- `NAME_dir`: a folder that replaces the dataset `NAME`. It contains `TABLE.jsonl`, `.json` or
  `.csv` for every table that the study uses, with one JSON object a line. Nothing of that dataset
  is downloaded.
- `benchmarks_dir`: a folder with the rows of the benchmarks as `TASK/SPLIT.jsonl`, with the columns
  of the hub's datasets.
- `rerun_on_code_change`: `true` reruns all jobs when a file of the library changes, for people who
  edit it. By default a job reruns when its files or options change, or when the version of its
  stage is raised (`workflow/forgetting/versions.py`).

## Writing a study

Copy `config/studies/own-data.yaml` and change `datasets`, `base`, `train` and `probes`. Check the
plan with `snakemake -n --config study=FILE`. Paths are relative to the folder in which snakemake is
started. Unknown keys and wrong values are reported with their lines. YAML reads `1e-4` as text:
write `1.0e-4`. Where the type is `..., or a list`, a single value needs no brackets. The first line
of the file,

```
# yaml-language-server: $schema=../schema.json
```

makes editors with a YAML language server complete and check keys.

A table is named `DATASET/TABLE`. Its rows have `question` and `answer`. For the truth ratio of a
probe they also have `perturbed_answer`, a list of wrong answers, and may have
`paraphrased_answer`. Questions of old knowledge must not be trained on.

Training rows may have `messages` instead, a conversation as a list of `role` (system, user,
assistant) and `content`. The model is trained on all answers of the assistant, in the chat template
of the base model's tokenizer. Training rows may also have `text`, of which every token is trained
on: texts are joined, each with an end of sequence, and cut into blocks of `training.max_length`
tokens. One table may have rows of all kinds. What a model learns from texts is measured by probes
in other tables.

If the columns of a dataset have other names, `columns` lists them: `{question: instruction, answer:
response}` for Magicoder, `{question: query, answer: response}` for MetaMathQA, `{system:
system_prompt, answer: response}` for OpenOrca. A table of that dataset that has the workflow's own
column names is read by them. Tables need not fit into memory: they are read row by row, and
training reads token ids from disk.

A CSV table is UTF-8 text with commas between columns, column names in the first line, and equally
many cells in every row. A cell with commas, line breaks or quotation marks is enclosed in quotation
marks, and quotation marks inside it are doubled. Preparing the data prints a warning for columns of
text that are not read, and for questions with different answers, within a table or between training
and a probe.

ROUGE as published drops all letters except a to z. The workflow prints a warning if these are more
than 5 % of the letters in the answers of a probe. Above 50 % it refuses the study, unless
`evaluation.rouge_tokenizer` names another tokenizer.

## All keys

The rest of this file is generated from `workflow/forgetting/config` by `make schema`."""


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, with knowledge of the validators of a study."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Any:
        """Allow a single value where a validator makes it a list of one."""
        inner = super().function_before_schema(schema)
        if schema["function"]["function"] is types.as_list:
            return {"anyOf": [inner["items"], inner]}
        return inner


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a study file."""
    schema = study.StudyConfig.model_json_schema(schema_generator=_Generator)
    strict: dict[str, Any] = _forbid_extra(schema)
    return {"$schema": DIALECT, **strict}


def _forbid_extra(node: Any) -> Any:
    """Return the schema with two corrections of pydantic's output.

    Limits after a custom validator have pydantic's names instead of those of JSON Schema, and a
    pattern of names does not exclude other names.
    """
    if isinstance(node, list):
        return [_forbid_extra(value) for value in node]
    if not isinstance(node, dict):
        return node
    keywords = BOUND_KEYWORDS if node.get("type") == "number" else {}
    closed = {"additionalProperties": False} if "patternProperties" in node else {}
    return {keywords.get(key, key): _forbid_extra(value) for key, value in node.items()} | closed


def readme(schema: dict[str, Any]) -> str:
    """Return config/README.md: the introduction, then a table of keys for every section."""
    parts = [INTRODUCTION]
    for path, section in _sections(schema, schema, ""):
        heading = f"### `{path}`" if path else "### The study"
        parts += ["", heading, "", _paragraphs(section["description"]), ""]
        parts += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        required = section.get("required", [])
        for key, value in section["properties"].items():
            cells = [
                f"`{key}`",
                _type(schema, value, _join(path, key)),
                "required" if key in required else _default(value),
                _description(schema, value, section),
            ]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def _sections(
    schema: dict[str, Any], section: dict[str, Any], path: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every section with its path, in the order of the keys."""
    yield path, section
    for key, value in section["properties"].items():
        if subsection := _section_of(value):
            ending, name = subsection
            yield from _sections(schema, schema["$defs"][name], _join(path, key) + ending)


def _section_of(value: dict[str, Any]) -> tuple[str, str] | None:
    """Return the section in a key's value, with the end of its path: none, `[]` or `.NAME`."""
    for ending, inner in (
        ("", value),
        ("[]", value.get("items", {})),
        (".NAME", value.get("additionalProperties", {})),
        *((".NAME", inner) for inner in value.get("patternProperties", {}).values()),
        *(("", inner) for inner in value.get("anyOf", [])),
    ):
        if isinstance(inner, dict) and "$ref" in inner:
            return ending, inner["$ref"].removeprefix("#/$defs/")
    return None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _type(schema: dict[str, Any], value: dict[str, Any], path: str) -> str:
    """Return a type in words: `whole number ≥ 1`, `list of text`, or a link to a section."""
    if subsection := _section_of(value):
        ending = subsection[0]
        anchor = re.sub(r"[^\w-]", "", path + ending).lower()
        container = {"": "", "[]": "list of ", ".NAME": "by name: "}[ending]
        return f"{container}[section](#{anchor})"
    if "anyOf" in value:
        inner = [item for item in value["anyOf"] if item.get("type") != "null"]
        words = [_type(schema, item, path) for item in inner]
        if len(inner) == 2 and inner[1].get("items") == inner[0]:
            words[1] = "a list"
        if len(inner) < len(value["anyOf"]) and value.get("default") is not None:
            words.append("`null`")
        return ", or ".join(words)
    if "enum" in value:
        return _choice(value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "prefixItems" in value:
        return "list: " + ", ".join(_type(schema, item, path) for item in value["prefixItems"])
    if value["type"] == "array":
        return "list of " + _type(schema, value["items"], path).replace("number", "numbers")
    if value["type"] == "object":  # of plain values
        ((_, inner),) = value["patternProperties"].items()
        return "by name: " + _type(schema, inner, path)
    word = {"string": "text", "integer": "whole number", "number": "number"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
    if value["type"] == "boolean":
        return "`true` or `false`"
    if bounds == ["≥ 0", "≤ 1"]:
        bounds = ["from 0 to 1"]
    return " ".join([word[value["type"]], *bounds])


def _choice(values: list[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if isinstance(default, dict) or (default is None and "default" not in value):
        subsection = _section_of(value)
        return "its own defaults" if subsection and not subsection[0] else "none"
    if default is None or default == "":
        return "none"
    plain = isinstance(default, str) and "\n" not in default
    return f"`{default if plain else json.dumps(default)}`"


def _description(schema: dict[str, Any], value: dict[str, Any], section: dict[str, Any]) -> str:
    """Return the description of a key, by default that of its section or of the section around."""
    if "description" in value:
        return _line(value["description"])
    subsection = _section_of(value)
    described = schema["$defs"][subsection[1]] if subsection else section
    return _line(described["description"].split("\n\n")[0])


def _line(text: str) -> str:
    return " ".join(text.split())


def _paragraphs(text: str) -> str:
    return "\n\n".join(_line(paragraph) for paragraph in text.split("\n\n"))


def generated_files() -> dict[Path, str]:
    """Return the generated files of the repository with their contents."""
    schema = json_schema()
    return {
        ROOT / "config" / "schema.json": json.dumps(schema, indent=2) + "\n",
        ROOT / "config" / "README.md": readme(schema),
    }


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the files, or exit with an error if they are out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write both files")
    mode.add_argument("--check", action="store_true", help="fail if a file is out of date")
    options = parser.parse_args(argv)
    for path, content in generated_files().items():
        if options.write:
            write_atomically(path, content, recorded=False)
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            raise InputError(
                f"{path.relative_to(ROOT)} differs from the study's classes: run `make schema`"
            )


if __name__ == "__main__":
    main()
