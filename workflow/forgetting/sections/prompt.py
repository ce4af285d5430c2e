"""How a question and its answer become text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from forgetting.sections.fields import AtKey, Strict

RESERVED = {
    *("messages", "conversation", "tools", "documents", "add_generation_prompt"),
    *("continue_final_message", "chat_template", "tokenize", "return_dict"),
    *("strftime_now", "raise_exception", "namespace", "dict", "range"),
}
"""Names that the renderer of a chat template gives a value itself."""
Argument = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def _has_field(name: str) -> Any:
    def check(template: str) -> str:
        if template.count("{" + name + "}") != 1:
            raise ValueError(f"the template must hold {{{name}}} exactly once")
        return template

    return AfterValidator(check)


class Prompt(Strict):
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
    template_arguments: dict[Argument, bool | int | float | str] = Field(
        {},
        description="Arguments of the chat template, such as `{enable_thinking: false}`, which "
        "the templates of models with a thinking mode need. Thinking that is asked for counts as "
        "a part of the answer.",
    )
    question: Annotated[str, _has_field("question")] = Field(
        "Question: {question}\n", description="The prompt, masked in training."
    )
    answer: Annotated[str, _has_field("answer")] = Field(
        "Answer: {answer}", description="What the model is to say; one EOS token follows."
    )

    # Prompts are keys of caches, and a dictionary has no hash.
    def __hash__(self) -> int:
        arguments = tuple(sorted(self.template_arguments.items()))
        return hash((self.chat, self.system, self.question, self.answer, arguments))

    @model_validator(mode="after")
    def _free_names(self) -> Prompt:
        for name in self.template_arguments:
            if name in RESERVED or name.endswith("_token"):
                raise AtKey(
                    ("template_arguments", name),
                    "the renderer of chat templates sets this name itself; leave it out",
                )
        return self

    @model_validator(mode="after")
    def _one_template(self) -> Prompt:
        if self.system is not None and not self.chat:
            raise ValueError(
                "`system` needs `chat: true`; in a template of your own, write it into `question`"
            )
        own = [type(self).model_fields[name].default for name in ("question", "answer")]
        if self.chat and [self.question, self.answer] != own:
            raise ValueError("with `chat` the tokenizer has the template: leave out the other one")
        return self
