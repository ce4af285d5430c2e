"""Sections `datasets` and `prompt`: origins of tables, names of columns, prompt templates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field, model_validator

from forgetting.config.types import ConfigModel, GitCommit, HubRepository, KeyedError, Seed


class ColumnsConfig(ConfigModel):
    """Names of a dataset's columns where they differ from those of the workflow.

    They apply to all tables of the dataset. A table that lacks a column of that name but has the
    workflow's own name is read under the latter.
    """

    question: str | None = Field(None, description="For instance `instruction` or `query`.")
    answer: str | None = Field(None, description="For instance `response` or `output`.")
    system: str | None = Field(
        None, description="System message of a row, which may be empty; only with `prompt.chat`."
    )
    messages: str | None = Field(
        None, description="Conversations: lists of messages with `role` and `content`."
    )
    text: str | None = Field(None, description="Plain text.")
    paraphrased_answer: str | None = Field(None, description="A paraphrase of the answer.")
    perturbed_answer: str | None = Field(None, description="Wrong answers.")

    @property
    def renamed(self) -> dict[str, str]:
        """Return the dataset's column names that differ, by the workflow's names."""
        return {own: name for own, name in self if name not in (None, own)}


MICROWORLD_TABLES = (
    "new_authors",
    "real_authors",
    "world_facts",
    "documents",
    "held_out",
    "refusals",
)
"""Tables that the generator of the micro-world writes."""

MICROWORLD_TASKS = ("gsm8k", "humaneval", "hellaswag", "winogrande", "arc_challenge")
"""Benchmarks whose rows the generator of the micro-world writes."""

Origin = Literal["folder", "generated", "hub"]


class DatasetConfig(ConfigModel):
    """Origin of some tables, each of which the study names as `NAME/TABLE`.

    `--config NAME_dir=FOLDER` reads the tables from a folder instead.
    """

    generate: Literal["micro-world"] | None = Field(
        None, description="Generate the tables with the seeded generator of the micro-world."
    )
    seed: Seed = Field(0, description="Seed of the generator.")
    hub: HubRepository | None = Field(
        None, description="Dataset on the Hugging Face hub, as OWNER/NAME."
    )
    revision: GitCommit | None = Field(
        None, description="Commit of the hub dataset: 40 hexadecimal digits."
    )
    folder: Annotated[str, AfterValidator(os.path.expanduser)] | None = Field(
        None,
        description="Folder with TABLE.jsonl or TABLE.json (one JSON object a line), or TABLE.csv.",
    )
    columns: ColumnsConfig = ColumnsConfig()

    @property
    def origin(self) -> Origin:
        """Return where the tables come from."""
        if self.folder:
            return "folder"
        return "generated" if self.generate else "hub"

    @model_validator(mode="after")
    def _check_one_origin(self) -> DatasetConfig:
        given = [name for name in ("generate", "hub", "folder") if getattr(self, name)]
        if not given:
            raise ValueError("a dataset needs one of `generate`, `hub` or `folder`")
        if len(given) > 1:
            both = " and ".join(f"`{name}`" for name in given)
            raise ValueError(f"a dataset has one origin, found {both}; remove one of them")
        if self.hub and not self.revision:
            raise ValueError("a hub dataset needs its `revision`, so that it cannot change")
        if self.generate and self.columns.renamed:
            raise ValueError("generated tables have fixed column names; remove `columns`")
        return self


class HasDatasets(Protocol):
    """A study, of which only the datasets matter."""

    @property
    def datasets(self) -> Mapping[str, DatasetConfig]:
        """Return the datasets by name."""


@dataclass(frozen=True)
class TableRef:
    """A table as the study names it, `DATASET/TABLE`. Table names may contain slashes."""

    dataset: str
    table: str

    @classmethod
    def parse(cls, name: str) -> TableRef:
        """Return the reference that `DATASET/TABLE` writes."""
        dataset, table = name.split("/", 1)
        return cls(dataset, table)

    def __str__(self) -> str:
        return f"{self.dataset}/{self.table}"

    def config(self, study: HasDatasets) -> DatasetConfig:
        """Return the section of the table's dataset."""
        return study.datasets[self.dataset]

    def origin(self, study: HasDatasets) -> Origin:
        """Return whether the table is in a folder, generated or on the hub."""
        return self.config(study).origin


RESERVED_ARGUMENTS = {
    *("messages", "conversation", "tools", "documents", "add_generation_prompt"),
    *("continue_final_message", "chat_template", "tokenize", "return_dict"),
    *("strftime_now", "raise_exception", "namespace", "dict", "range"),
}
"""Names that the renderer of a chat template sets itself."""
TemplateArgument = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def _with_placeholder(name: str) -> Any:
    """Return a validator of templates in which `{name}` occurs exactly once."""

    def check(template: str) -> str:
        if template.count("{" + name + "}") != 1:
            raise ValueError(f"the template must contain {{{name}}} exactly once")
        return template

    return AfterValidator(check)


class PromptConfig(ConfigModel):
    """How a question and its answer become text. Loss and scores cover only the answer template.

    The default is TOFU's template for Phi, in which the literal `Answer: ` belongs to the answer.
    open-unlearning puts it into the question: `"Question: {question}\\nAnswer:"`, `" {answer}"`.
    TOFU's template for Llama-2-chat is `"[INST] {question} [/INST]"` and `"{answer}"`. With
    `chat: true` the template is that of the base model's tokenizer.
    """

    chat: bool = Field(
        False,
        description="Use the chat template of the base model's tokenizer instead of `question` and "
        "`answer`. The text that it puts after an answer, up to its first special token, belongs "
        "to the answer: trained models learn to end there, and all answers are cut there.",
    )
    system: str | None = Field(
        None, description="System message before the question; only with `chat`."
    )
    template_arguments: dict[TemplateArgument, bool | int | float | str] = Field(
        {},
        description="Arguments of the chat template, such as `{enable_thinking: false}`, which "
        "the templates of models with a thinking mode need. If thinking is enabled, it counts as "
        "part of the answer.",
    )
    question: Annotated[str, _with_placeholder("question")] = Field(
        "Question: {question}\n", description="The prompt, masked in training."
    )
    answer: Annotated[str, _with_placeholder("answer")] = Field(
        "Answer: {answer}", description="The target text; one EOS token follows."
    )

    def render_question(self, question: str) -> str:
        """Return the text of the prompt with a question."""
        return self.question.replace("{question}", question)

    def render_answer(self, answer: str) -> str:
        """Return the target text with an answer."""
        return self.answer.replace("{answer}", answer)

    def strip_answer(self, generated: str) -> str:
        """Return a generated answer without the text that the template puts around answers."""
        before, after = self.answer.split("{answer}")
        text = generated.strip().removeprefix(before.strip())
        return text.removesuffix(after.strip()).strip() if after.strip() else text.strip()

    # Prompts are keys of caches, and a dictionary is not hashable.
    def __hash__(self) -> int:
        arguments = tuple(sorted(self.template_arguments.items()))
        return hash((self.chat, self.system, self.question, self.answer, arguments))

    @model_validator(mode="after")
    def _check_template_arguments(self) -> PromptConfig:
        for name in self.template_arguments:
            if name in RESERVED_ARGUMENTS or name.endswith("_token"):
                raise KeyedError(
                    ("template_arguments", name),
                    "the renderer of chat templates sets this name itself; remove it",
                )
        return self

    @model_validator(mode="after")
    def _check_one_template(self) -> PromptConfig:
        if self.system is not None and not self.chat:
            raise ValueError(
                "`system` needs `chat: true`; in a template of your own, write it into `question`"
            )
        defaults = [type(self).model_fields[name].default for name in ("question", "answer")]
        if self.chat and [self.question, self.answer] != defaults:
            raise ValueError(
                "with `chat` the template is the tokenizer's; remove `question` and `answer`"
            )
        return self
