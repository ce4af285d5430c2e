"""What the study's classes say, as a JSON Schema for editors and as config/README.md for people.

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
LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}

INTRODUCTION = """\
# Configuration

A study is one YAML file: a base model, new knowledge to fine-tune on, probes of old knowledge,
benchmarks, a sweep of methods, and the rule that selects checkpoints. Those that come with the
workflow are in `config/studies`; `config/config.yaml` names the one that is run by default.

## Choosing a study

```
snakemake                                        # the study of config/config.yaml
snakemake --config study=tofu-scratch            # another one of config/studies
snakemake --config study=path/to/mine.yaml       # a file of your own
snakemake -n --config study=path/to/mine.yaml    # check it and show its jobs, run nothing
snakemake --profile slurm --config study=NAME    # on a cluster
```

What may stand in `config/config.yaml` or after `--config`, several separated by blanks:

- `study`: a name in `config/studies`, or the path of a YAML file. Results go to `results/NAME`,
  the page to `reports/NAME.html`; studies of different names may run at the same time.
- `scale`: `full`, or `tiny` to try a set-up: every job of the study runs, on a few rows and with a
  toy model, offline, in about a minute. The numbers mean nothing; they go to `results/NAME-tiny`.
- `model`: a folder in Hugging Face form, or OWNER/NAME@COMMIT on the hub, in place of the study's
  base.
- `NAME_dir`: a folder with `TABLE.jsonl`, `.json` or `.csv` for every table that the study uses of
  its dataset `NAME`, one JSON object a line. Nothing of that dataset is downloaded then.
- `benchmarks_dir`: a folder with the rows of the benchmarks as `TASK/SPLIT.jsonl`, in the columns
  of the hub's datasets.
- `rerun_on_code_change`: `true` reruns all jobs when a file of the library changes, for people who
  edit it. By default jobs run again when the version of their stage is raised
  (`workflow/forgetting/versions.py`), or their files or settings change.

## Writing a study

Copy `config/studies/own-data.yaml`, change `datasets`, `base`, `train` and `probes`, and look at
the plan with `snakemake -n --config study=FILE`. Relative paths start where snakemake is started.
An unknown key or a wrong value is told with its line. YAML reads `1e-4` as text: write `1.0e-4`.
Where the type says `or a list`, one value may stand alone. The file's first line,

```
# yaml-language-server: $schema=../schema.json
```

makes editors that know the YAML language server complete and check keys as you type.

A table is named `DATASET/TABLE`. Its rows have `question` and `answer`; for the truth ratio of a
probe also `perturbed_answer`, a list of wrong answers, and, if there is one, `paraphrased_answer`.
What a probe asks as old knowledge must not be among the questions that are trained on.

Rows that are trained on may instead have `messages`, a conversation as a list of `role` (system,
user, assistant) and `content`, of which all answers of the assistant are learned, in the chat
template of the base's tokenizer; or `text`, of which every token is learned: texts are joined, each
with its end of sequence, and cut into blocks of `training.max_length` tokens. Rows of all kinds may
stand side by side. What is learned from texts is measured by probes in tables of their own. Where a
dataset has other names for its columns, `columns` says which: `{question: instruction, answer:
response}` for Magicoder, `{question: query, answer: response}` for MetaMathQA, `{system:
system_prompt, answer: response}` for OpenOrca. A table of that dataset that has our names is read
by our names. Tables are read row by row, and trained on from files of tokens; they need not fit
into memory.

A CSV table is UTF-8, has commas between its columns, a line of column names first, and as many
cells in every row. A cell with commas, line breaks or quotation marks is put into quotation marks,
and those inside it are doubled. When the data are prepared, there is a warning for columns of text
that are not read, and for questions with different answers, within a table or between the training
and a probe.

ROUGE as published drops all letters but a to z. If these are more than 5 % of the letters in the
answers of a probe, there is a warning; above 50 % the study is refused, unless
`evaluation.rouge_tokenizer` names another tokenizer.

## All keys

The rest of this file is generated from `workflow/forgetting/config/study.py` and from
`workflow/forgetting/sections`, by `make schema`."""


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, told what the validators of a study let through."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Any:
        """Where one value stands for a list of one, allow the value too."""
        inner = super().function_before_schema(schema)
        if schema["function"]["function"] is types.as_list:
            return {"anyOf": [inner["items"], inner]}
        return inner


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a study file."""
    schema = study.StudyConfig.model_json_schema(schema_generator=_Generator)
    strict: dict[str, Any] = _forbid_extra(schema)
    return {"$schema": DIALECT, **strict}


def _forbid_extra(node: Any) -> Any:
    """Say two things that pydantic does not: limits behind a validator of ours, and closed names.

    Such limits come out in its own words, and a pattern for names does not refuse other names.
    """
    if isinstance(node, list):
        return [_forbid_extra(value) for value in node]
    if not isinstance(node, dict):
        return node
    words = LIMITS if node.get("type") == "number" else {}
    closed = {"additionalProperties": False} if "patternProperties" in node else {}
    return {words.get(key, key): _forbid_extra(value) for key, value in node.items()} | closed


def readme(schema: dict[str, Any]) -> str:
    """The introduction, then a table for every section of a study, in the order of the classes."""
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
    yield path, section
    for key, value in section["properties"].items():
        found = _section_of(value)
        if found:
            mark, name = found
            yield from _sections(schema, schema["$defs"][name], _join(path, key) + mark)


def _section_of(value: dict[str, Any]) -> tuple[str, str] | None:
    """The section that a key holds, and how it is reached: itself, `[]` of a list, `.NAME`."""
    for mark, inner in (
        ("", value),
        ("[]", value.get("items", {})),
        (".NAME", value.get("additionalProperties", {})),
        *((".NAME", inner) for inner in value.get("patternProperties", {}).values()),
        *(("", inner) for inner in value.get("anyOf", [])),
    ):
        if isinstance(inner, dict) and "$ref" in inner:
            return mark, inner["$ref"].removeprefix("#/$defs/")
    return None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _type(schema: dict[str, Any], value: dict[str, Any], path: str) -> str:
    """A type in words: `whole number ≥ 1`, `list of text`, a link to the section that it is."""
    if found := _section_of(value):
        anchor = re.sub(r"[^\w-]", "", path + found[0]).lower()
        several = {"": "", "[]": "list of ", ".NAME": "by name: "}[found[0]]
        names = value.get("propertyNames", {}).get("enum", [])
        some = f", of {_choice(names)}" if names else ""
        return f"{several}[section](#{anchor}){some}"
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
        found = _section_of(value)
        return "its own defaults" if found and not found[0] else "none"
    if default is None or default == "":
        return "none"
    plain = isinstance(default, str) and "\n" not in default
    return f"`{default if plain else json.dumps(default)}`"


def _description(schema: dict[str, Any], value: dict[str, Any], section: dict[str, Any]) -> str:
    """The key's own description, else its section's, else that of the section it stands in."""
    if "description" in value:
        return _line(value["description"])
    found = _section_of(value)
    owner = schema["$defs"][found[1]] if found else section
    return _line(owner["description"].split("\n\n")[0])


def _line(text: str) -> str:
    return " ".join(text.split())


def _paragraphs(text: str) -> str:
    return "\n\n".join(_line(paragraph) for paragraph in text.split("\n\n"))


def generated_files() -> dict[Path, str]:
    """Every generated file of the repository with its content."""
    schema = json_schema()
    return {
        ROOT / "config" / "schema.json": json.dumps(schema, indent=2) + "\n",
        ROOT / "config" / "README.md": readme(schema),
    }


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    """Write the files, or fail if they are not in step with the classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write both files")
    what.add_argument("--check", action="store_true", help="fail if one of them is out of step")
    options = parser.parse_args(argv)
    for path, content in generated_files().items():
        if options.write:
            write_atomically(path, content, recorded=False)
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            raise InputError(
                f"{path.relative_to(ROOT)} is not what the study's classes say: run `make schema`"
            )


class _KeepLines(argparse.RawDescriptionHelpFormatter):
    """Keep the usage lines of the docstring."""


if __name__ == "__main__":
    main()
