"""How a question and its answer become text.

Where the tables of a study come from.

Names of columns: those of a dataset that has its own for what is called otherwise here.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from forgetting.config.types import ConfigModel, GitCommit, HubRepository, KeyedError, Seed


class ColumnsConfig(ConfigModel):
    """What a dataset calls its columns, where it is not as here; it holds for all its tables.

    A table that lacks such a column and has it under our name is read under our name.
    """

    question: str | None = Field(None, description="For instance `instruction` or `query`.")
    answer: str | None = Field(None, description="For instance `response` or `output`.")
    system: str | None = Field(
        None, description="A row's own system message, or nothing; only with `prompt.chat`."
    )
    messages: str | None = Field(
        None, description="Conversations: lists of messages with `role` and `content`."
    )
    text: str | None = Field(None, description="Plain text.")
    paraphrased_answer: str | None = Field(None, description="The answer in other words.")
    perturbed_answer: str | None = Field(None, description="Wrong answers.")

    @property
    def renamed(self) -> dict[str, str]:
        """The dataset's names by ours, of those that differ."""
        return {ours: theirs for ours, theirs in self if theirs not in (None, ours)}


MICROWORLD_TABLES = (
    "new_authors",
    "real_authors",
    "world_facts",
    "documents",
    "held_out",
    "refusals",
)
"""What the generator of the micro-world makes."""


class DatasetConfig(ConfigModel):
    """Where tables of rows come from; `NAME/TABLE` elsewhere in the study means one of its tables.

    With `--config NAME_dir=FOLDER` the files are taken from a folder instead.
    """

    generate: Literal["micro-world"] | None = Field(
        None, description="Make the tables with the seeded generator of the micro-world."
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

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetConfig:
        given = [name for name in ("generate", "hub", "folder") if getattr(self, name)]
        if not given:
            raise ValueError("a dataset needs one of `generate`, `hub` or `folder`")
        if len(given) > 1:
            both = " and ".join(f"`{name}`" for name in given)
            raise ValueError(f"a dataset comes from one place, found {both}; take one of them out")
        if self.hub and not self.revision:
            raise ValueError("a hub dataset needs its `revision`, so that it cannot change")
        if self.generate and self.columns.renamed:
            raise ValueError("generated tables have their `columns`; leave them out")
        return self


RESERVED_ARGUMENTS = {
    *("messages", "conversation", "tools", "documents", "add_generation_prompt"),
    *("continue_final_message", "chat_template", "tokenize", "return_dict"),
    *("strftime_now", "raise_exception", "namespace", "dict", "range"),
}
"""Names that the renderer of a chat template gives a value itself."""
TemplateArgument = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def _names_a_field(name: str) -> Any:
    def check(template: str) -> str:
        if template.count("{" + name + "}") != 1:
            raise ValueError(f"the template must hold {{{name}}} exactly once")
        return template

    return AfterValidator(check)


class PromptConfig(ConfigModel):
    """How a question and its answer become text. The answer's side is trained on and scored.

    The default is TOFU's template for Phi: the literal `Answer: ` belongs to the answer's side.
    open-unlearning has it on the other: `"Question: {question}\\nAnswer:"` and `" {answer}"`.
    TOFU's template for Llama-2-chat has `"[INST] {question} [/INST]"` and `"{answer}"`; with
    `chat: true` the base's tokenizer has the template.
    """

    chat: bool = Field(
        False,
        description="Take the chat template of the base's tokenizer in place of `question` and "
        "`answer`. What it puts behind an answer, up to its first special token, is on the "
        "answer's side: trained models learn to end there, and all models' answers are cut there.",
    )
    system: str | None = Field(
        None, description="System message before the question; only with `chat`."
    )
    template_arguments: dict[TemplateArgument, bool | int | float | str] = Field(
        {},
        description="Arguments of the chat template, such as `{enable_thinking: false}`, which "
        "the templates of models with a thinking mode need. Thinking that is asked for counts as "
        "a part of the answer.",
    )
    question: Annotated[str, _names_a_field("question")] = Field(
        "Question: {question}\n", description="The prompt, masked in training."
    )
    answer: Annotated[str, _names_a_field("answer")] = Field(
        "Answer: {answer}", description="What the model is to say; one EOS token follows."
    )

    # Prompts are keys of caches, and a dictionary has no hash.
    def __hash__(self) -> int:
        arguments = tuple(sorted(self.template_arguments.items()))
        return hash((self.chat, self.system, self.question, self.answer, arguments))

    @model_validator(mode="after")
    def _free_names(self) -> PromptConfig:
        for name in self.template_arguments:
            if name in RESERVED_ARGUMENTS or name.endswith("_token"):
                raise KeyedError(
                    ("template_arguments", name),
                    "the renderer of chat templates sets this name itself; leave it out",
                )
        return self

    @model_validator(mode="after")
    def _one_template(self) -> PromptConfig:
        if self.system is not None and not self.chat:
            raise ValueError(
                "`system` needs `chat: true`; in a template of your own, write it into `question`"
            )
        own = [type(self).model_fields[name].default for name in ("question", "answer")]
        if self.chat and [self.question, self.answer] != own:
            raise ValueError("with `chat` the tokenizer has the template: leave out the other one")
        return self
