"""What a study is: the validated model of one YAML file under config/studies.

Every key, its type, default and meaning stands here and nowhere else; the JSON Schema in
workflow/schemas and the table in config/README.md are generated from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forgetting.columns import Columns
from forgetting.fields import (
    AtKey,
    Count,
    Name,
    NotNegative,
    Number,
    Positive,
    Seed,
    Share,
    Strict,
    Table,
    distinct,
    several,
)
from forgetting.prompts import Refusals
from forgetting.task import Task
from forgetting.variants import Budget, Then

WORLD_TABLES = (
    "new_authors",
    "real_authors",
    "world_facts",
    "documents",
    "held_out",
    "refusals",
)
"""What the generator of the micro-world makes."""

TEXT_PROBE = "general_text"
"""What the tables of results call the general text, in place of a probe's name."""

ALL_PROBES = "all_probes"
"""The same of what is computed from all probes together."""


class Dataset(Strict):
    """Where tables of rows come from; `NAME/TABLE` elsewhere in the study means one of its tables.

    With `--config NAME_dir=FOLDER` the files are taken from a folder instead.
    """

    generate: Literal["micro-world"] | None = Field(
        None, description="Make the tables with the seeded generator of the micro-world."
    )
    seed: Seed = Field(0, description="Seed of the generator.")
    hub: str | None = Field(None, description="Dataset on the Hugging Face hub, as OWNER/NAME.")
    revision: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{40}$",
        description="Commit of the hub dataset: 40 hexadecimal digits.",
    )
    folder: str | None = Field(
        None,
        description="Folder with TABLE.jsonl or TABLE.json (one JSON object a line), or TABLE.csv.",
    )
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _one_origin(self) -> Dataset:
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


class SmallModel(Strict):
    """Shape of a small Llama-architecture model, and course of its training from scratch."""

    hidden_size: Count = Field(192, description="Width of the residual stream.")
    intermediate_size: Count = Field(512, description="Width of the MLP.")
    layers: Count = Field(4, description="Number of transformer blocks.")
    heads: Count = Field(4, description="Number of attention heads.")
    vocabulary: Annotated[int, Field(ge=300)] = Field(
        2048, description="Tokens of the byte-level BPE that is trained on the documents."
    )
    context: Count = Field(2048, description="Longest sequence that the model accepts, in tokens.")
    block: Count = Field(256, description="Length of a packed training sequence, in tokens.")
    batch_tokens: Count = Field(4096, description="Tokens per optimizer step.")
    epochs: Positive = Field(1.0, description="Passes over the documents.")
    learning_rate: Positive = Field(3e-3, description="Peak learning rate of AdamW.")
    weight_decay: NotNegative = Field(0.1, description="Decoupled weight decay of AdamW.")
    warmup: Share = Field(0.05, description="Share of the steps in which the rate rises.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SmallModel:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of twice the heads, {self.heads}"
            )
        return self


class Pretraining(SmallModel):
    """A small base model, trained from scratch on tables of the study."""

    documents: list[Table] = Field(
        min_length=1,
        description="Tables of training documents: rows with `text`, or with `question` and "
        "`answer`, which are put into the study's prompt.",
    )
    limit: Count | None = Field(
        None, description="At most so many documents, evenly spaced over the tables."
    )


class Base(Strict):
    """The model that is fine-tuned; its scores are the zero point of forgetting."""

    model: str | None = Field(
        None, description="A folder in Hugging Face form, or OWNER/NAME on the hub."
    )
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="Commit of the hub model."
    )
    pretrain: Pretraining | None = Field(None, description="Train the base here instead.")

    @model_validator(mode="after")
    def _one_origin(self) -> Base:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("the base needs either `model` or `pretrain`")
        return self


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
        "`answer`. What it puts behind an answer is on the answer's side, up to one EOS token.",
    )
    system: str | None = Field(
        None, description="System message before the question; only with `chat`."
    )
    question: Annotated[str, _has_field("question")] = Field(
        "Question: {question}\n", description="The prompt, masked in training."
    )
    answer: Annotated[str, _has_field("answer")] = Field(
        "Answer: {answer}", description="What the model is to say; one EOS token follows."
    )

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


class Probe(Strict):
    """A question-answer set on which every model of the study is measured."""

    table: Annotated[list[Table], BeforeValidator(several), AfterValidator(distinct)] = Field(
        description="Table or tables with question, answer, and for the truth ratio "
        "perturbed_answer (wrong answers) and, if there is one, paraphrased_answer."
    )
    knowledge: Literal["new", "old"] = Field(description="Is it trained on, or to be kept?")
    truth_ratio: bool = Field(True, description="Score wrong answers too; the rows must have them.")
    limit: Count | None = Field(
        None, description="At most so many rows, evenly spaced over the table."
    )


class GeneralText(Strict):
    """A text on which the predictions of every model are compared with the base's.

    Gives the forgetting cross-entropy of *Scaling Laws for Forgetting* (arXiv 2401.05605), hard and
    soft, the KL divergence, and the share of tokens on which model and base agree.
    """

    table: Table = Field(description="Rows with `text`; they are joined as they are.")
    block: Annotated[int, Field(ge=2)] = Field(
        512, description="Tokens that are read at once; what is left at the end is dropped."
    )
    limit: Count | None = Field(
        None, description="At most so many blocks, evenly spaced over the text."
    )
    batch_size: Count = Field(4, description="Blocks per forward pass.")


class Measurement(Strict):
    """How and how often the probes are scored."""

    every_epochs: Positive = Field(1.0, description="Epochs between two evaluations.")
    max_new_tokens: Count = Field(200, description="Longest generated answer, in tokens.")
    batch_size: Count = Field(64, description="Sequences per forward pass.")


class Training(Strict):
    """The optimization that all methods share."""

    epochs: Positive = Field(10.0, description="Passes over the new knowledge.")
    batch_size: Count = Field(32, description="Question-answer pairs per optimizer step.")
    micro_batch_size: Count = Field(
        32, description="Pairs per forward pass; the gradient does not depend on it."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        500,
        description="Longest training sequence, in tokens; texts are joined and cut into so long "
        "blocks.",
    )
    packing: bool = Field(
        False,
        description="Put several examples to a sequence of at most `max_length` tokens, whole and "
        "each blind to the others; `batch_size` and `micro_batch_size` then count such sequences.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only what enters each block for the backward pass, and compute the rest "
        "again: less memory, a third more arithmetic, the same gradients.",
    )
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "trapezoid"] = Field(
        "linear",
        description="Course of the learning rate after the warm-up: as it is, down to `floor`, or "
        "(inverse_sqrt, trapezoid) down to `floor` in a cooldown at the end.",
    )
    floor: Share = Field(
        0.0, description="Share of the peak at which the learning rate ends; not for constant."
    )
    cooldown: Share | None = Field(
        None,
        description="Share of all steps in which inverse_sqrt or trapezoid fall linearly to the "
        "floor at the end; 0.2 by default.",
    )
    decay_steps: Count | None = Field(
        None,
        description="Steps after the warm-up in which inverse_sqrt falls to 1/sqrt(2) of the peak "
        "(with `decay_floor` 0); as many as the warm-up by default.",
    )
    decay_floor: Share = Field(
        0.0, description="Share of the peak that inverse_sqrt falls to in the long run."
    )
    budgets: Annotated[list[Positive], AfterValidator(distinct)] = Field(
        [],
        description="Continued pretraining: durations, in epochs, the longest of which is "
        "`epochs`; 0.01 is a hundredth of one. One run without cooldown is the trunk of all; for "
        "each duration a branch leaves it where its own cooldown starts, and ends as the run that "
        "is trained with these `epochs` alone. What is selected is the end of a branch.",
    )
    warmup_epochs: NotNegative | None = Field(
        None,
        description="Epochs of linear warm-up: 1 by default, where neither `warmup_steps` nor "
        "`warmup_share` is given.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up, in place of `warmup_epochs`."
    )
    warmup_share: Share | None = Field(
        None, description="Share of all steps that is warm-up, in place of `warmup_epochs`."
    )
    optimizer: Literal["adamw", "lionw", "adafactor"] = Field(
        "adamw",
        description="adamw; lionw: Lion with a weight decay that the rate does not multiply; "
        "adafactor: factored second moments, steps relative to the weights.",
    )
    betas: tuple[Share, Share] | None = Field(
        None,
        description="Decay rates of the moments: (0.9, 0.999) for adamw and (0.9, 0.95) for lionw "
        "by default; adafactor has none.",
    )
    decay_vectors: bool = Field(
        False,
        description="Apply the weight decay to norms and biases too, as LLM Foundry does; "
        "transformers' Trainer does not.",
    )
    gradient_clip: Positive | None = Field(1.0, description="Largest L2 norm of the gradient.")
    fused: Literal["auto", "never"] = Field(
        "auto",
        description="auto: train the runs of one method and seed in one forward and backward pass "
        "where that is faster: where there are at least four, and a step of one has at most 256 "
        "tokens (8192 on a GPU). Of lora, rslora and pissa, with or without replay; other methods "
        "and mitigations, runs of several processes and those with `budgets` are trained one after "
        "the other. The numbers are the same up to rounding.",
    )

    @property
    def decay_rates(self) -> tuple[float, float]:
        """`betas`, or the optimizer's usual ones."""
        return self.betas or ((0.9, 0.95) if self.optimizer == "lionw" else (0.9, 0.999))

    @property
    def cooldown_share(self) -> float:
        """`cooldown`, or the usual one of the schedule."""
        if self.schedule not in ("inverse_sqrt", "trapezoid"):
            return 0.0
        return 0.2 if self.cooldown is None else self.cooldown

    @model_validator(mode="after")
    def _budgets_are_branches_of_one_trunk(self) -> Training:
        if not self.budgets:
            return self
        longest = max(self.budgets)
        if not self.cooldown_share:
            raise ValueError(
                "`budgets` leave one trunk by their cooldowns: take schedule trapezoid or "
                "inverse_sqrt, with a `cooldown` above 0"
            )
        if longest > self.epochs:
            raise ValueError(
                f"`budgets`: {longest:g} epochs are more than the {self.epochs:g} `epochs` of the "
                "trunk; make `epochs` as long"
            )
        if longest < self.epochs:
            raise ValueError(
                f"`budgets`: the longest must be `epochs`, {self.epochs:g}; nobody would use what "
                f"is trained after {longest:g}"
            )
        if self.warmup_share is not None:
            raise ValueError(
                "`budgets` share one warm-up, of which `warmup_share` would give each another; "
                "take `warmup_steps` or `warmup_epochs`"
            )
        return self

    @model_validator(mode="after")
    def _one_warm_up(self) -> Training:
        named = [
            name
            for name in ("warmup_epochs", "warmup_steps", "warmup_share")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            raise ValueError(f"the warm-up is given twice, by `{named[0]}` and `{named[1]}`")
        return self

    @model_validator(mode="after")
    def _keys_have_effect(self) -> Training:
        for name in ("decay_steps", "decay_floor"):
            if getattr(self, name) and self.schedule != "inverse_sqrt":
                raise ValueError(f"{self.schedule} has no `{name}`; inverse_sqrt does")
        if self.floor and self.schedule == "constant":
            raise ValueError("a constant rate has no `floor`")
        if self.cooldown is not None and self.schedule not in ("inverse_sqrt", "trapezoid"):
            raise ValueError(f"{self.schedule} has no `cooldown`; inverse_sqrt and trapezoid do")
        if self.betas and self.optimizer == "adafactor":
            raise ValueError("adafactor has no `betas`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _betas_as_tuple(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values


class Setting(Strict):
    """One point of the sweep."""

    learning_rate: Positive = Field(description="Peak learning rate.")
    weight_decay: NotNegative = Field(0.0, description="Decoupled weight decay of AdamW.")


class Replay(Strict):
    """Trains on general text too, as if a share of each batch were known already.

    Replayed rows come on top of the batch, so that an epoch of the new knowledge has as many steps
    as without. The loss of a step stays the mean over all its target tokens; a long text thus
    counts more than a short answer. A `text` is trained on whole, up to `training.max_length`.
    """

    table: Table = Field(description="Rows with `text`, or with `question` and `answer`.")
    share: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.1,
        description="Replayed rows among all rows that are trained on; with `training.packing`, "
        "packed sequences.",
    )


class PredictionPenalty(Strict):
    """Adds weight * KL(base || model), the mean over target tokens in nats, to the loss.

    This direction asks for all that the base deems likely (Hinton et al. 2015, arXiv 1503.02531).
    """

    weight: NotNegative = Field(description="Weight of the penalty; the loss is in nats per token.")
    on: Literal["all", "replay"] = Field(
        "all", description="The mean is over all target tokens, or those of the replayed rows."
    )


class ParameterPenalty(Strict):
    """L2-SP: adds weight/2 * ||theta - theta0||^2 to the loss (Li et al. 2018, arXiv 1802.01483).

    Of an adapter, theta - theta0 is the update scale*B*A of the matrices it stands beside; in both
    parts of a hybrid, theta0 is the base.
    """

    weight: NotNegative = Field(description="Weight of the penalty; the loss is in nats per token.")


class FisherPenalty(Strict):
    """EWC: adds weight/2 * sum_i F_i (theta_i - theta0_i)^2 (Kirkpatrick et al. 2017, equation 3).

    F_i is the diagonal of the base's Fisher information per target token of a general text, so that
    near the base the sum is the part of KL(base || model) in nats per token that a diagonal sees.
    Of an adapter, theta - theta0 is the update scale*B*A of the matrices it stands beside; in both
    parts of a hybrid, theta0 is the base.
    """

    weight: NotNegative = Field(description="Weight of the penalty; the loss is in nats per token.")
    table: Table = Field(description="Rows with `text`, or with `question` and `answer`.")
    samples: Count = Field(
        128, description="So many rows, evenly spaced over the table, estimate the information."
    )


class Mitigation(Strict):
    """What a method does against forgetting, beside its training on the new knowledge."""

    replay: Replay | None = Field(None, description="Mix general text into the batches.")
    kl: PredictionPenalty | None = Field(
        None, description="Keep the predictions of next tokens near the base's."
    )
    ewc: FisherPenalty | None = Field(
        None,
        description="Keep the weights near the base's, the more they matter to it; for variants "
        "lora and rslora, and full. Takes the memory of the trained or adapted weights once or "
        "twice more.",
    )
    l2_sp: ParameterPenalty | None = Field(
        None,
        description="Keep the weights near the base's; for variants lora and rslora, and full.",
    )
    suffix: Name | None = Field(
        None,
        description="End of the method's name, in place of the one that is made of the settings.",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Mitigation:
        if not any(value for key, value in self if key != "suffix"):
            raise ValueError("name at least one mitigation, or leave the section out")
        if self.kl and self.kl.on == "replay" and not self.replay:
            raise ValueError("`kl: {on: replay}` needs a `replay` beside it")
        return self

    @property
    def tables(self) -> list[str]:
        """The tables that are read, each once."""
        read = [section.table for section in (self.replay, self.ewc) if section]
        return list(dict.fromkeys(read))

    @property
    def name(self) -> str:
        """The end of the method's name: `replay0.1-kl0.5`."""
        parts = {
            "replay": self.replay and self.replay.share,
            "kl": self.kl and self.kl.weight,
            "ewc": self.ewc and self.ewc.weight,
            "l2_sp": self.l2_sp and self.l2_sp.weight,
        }
        made = [f"{key}{value:g}" for key, value in parts.items() if value is not None]
        return self.suffix or "-".join(made)


class Method(Strict):
    """A way of fine-tuning, with the learning rates and weight decays that are tried."""

    method: Literal["lora", "full", "hybrid"] = Field(
        description="Train adapters beside the linear layers, all weights, or first adapters and "
        "`then` chosen layers in full."
    )
    variant: Literal["lora", "rslora", "dora", "pissa", "adalora"] = Field(
        "lora",
        description="lora: scale alpha/r; rslora: alpha/sqrt(r) (arXiv 2312.03732); "
        "dora: weight-decomposed (arXiv 2402.09353); pissa: starts from the largest singular "
        "values (arXiv 2404.02948); adalora: spends a budget of ranks where it matters, scale "
        "alpha over the initial rank (arXiv 2303.10512).",
    )
    rank: Annotated[list[Count], BeforeValidator(several), AfterValidator(distinct)] | None = Field(
        None, description="Rank or ranks of the adapters; each is a method of its own."
    )
    alpha: Positive | Literal["2r"] = Field(
        32.0,
        description="Numerator of the adapter's scale; `2r` is twice the rank (of adalora, the "
        "initial one).",
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout before the adapter's first matrix."
    )
    target_modules: (
        Literal["all-linear", "attention", "mlp"]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = Field(
        "all-linear",
        description="Adapted linear layers: all but the LM head, those of the attention or of the "
        "MLP, or names.",
    )
    lora_plus_ratio: Positive | None = Field(
        None,
        description="LoRA+: the learning rate of B is this multiple of that of A, which is "
        "`learning_rate` (arXiv 2402.12354 advises 16).",
    )
    budget: Budget | None = Field(
        None, description="The course of adalora's ranks; that of the defaults if left out."
    )
    embeddings: Literal["frozen", "trained"] | None = Field(
        None,
        description="Are the input embedding and the LM head trained, in full? By default frozen "
        "for lora, trained for full.",
    )
    embedding_ratio: Positive | None = Field(
        None,
        description="The learning rate of trained embeddings is this multiple of `learning_rate` "
        "(Biderman et al. 2024 suggest 0.1 to 0.5 beside LoRA).",
    )
    then: Then | None = Field(None, description="The second part of method hybrid.")
    learning_rate: Annotated[list[Positive], BeforeValidator(several), AfterValidator(distinct)] = (
        Field(min_length=1, description="Peak learning rates.")
    )
    weight_decay: Annotated[
        list[NotNegative], BeforeValidator(several), AfterValidator(distinct)
    ] = Field([0.0], min_length=1, description="Decoupled weight decays of AdamW.")
    processes: Count | None = Field(
        None,
        description="Processes that train each run together, a GPU each; by default so many as "
        "memory and the longest time of a job ask for (docs/cluster.md). `full` "
        "shards weights, gradients and the optimizer's state over them, adapters only their "
        "batches; the numbers are the same up to rounding (and the adapters' dropout). Without "
        "SLURM no more than `--resources gpu=N` allows, by default 1 where there is a GPU.",
    )
    nodes: Count | None = Field(
        None,
        description="Machines of a SLURM cluster over which the processes are spread, with a file "
        "system in common; by default 1 for given `processes`. Without SLURM there is one.",
    )
    fixed: Setting | None = Field(
        None, description="Choose this setting of the sweep, whatever the study's rule says."
    )
    mitigation: Mitigation | None = Field(
        None, description="What is done against forgetting; its name ends the method's name."
    )

    @model_validator(mode="after")
    def _rank_fits_method(self) -> Method:
        if self.method != "full" and not self.rank:
            raise ValueError(f"method {self.method} needs a `rank`")
        if self.method == "hybrid" and not self.then:
            raise ValueError("method hybrid needs a section `then`: what is trained in full, when")
        adapters = ("rank", "variant", "alpha", "dropout", "target_modules", "lora_plus_ratio")
        absent = {
            "lora": ("then",),
            "full": (*adapters, "then", "budget"),
            "hybrid": ("embeddings", "embedding_ratio", "budget"),
        }
        for name in absent[self.method]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"method {self.method} has no `{name}`")
        if self.fixed and (
            self.fixed.learning_rate not in self.learning_rate
            or self.fixed.weight_decay not in self.weight_decay
        ):
            raise ValueError("`fixed` is not one of the settings of this method's sweep")
        return self

    @model_validator(mode="after")
    def _variant_fits(self) -> Method:
        if self.budget and self.variant != "adalora":
            raise ValueError(f"variant {self.variant} has no `budget`; adalora has")
        if self.variant == "adalora" and self.method == "hybrid":
            raise ValueError("adalora prunes until its end; a hybrid starts from another variant")
        if self.variant == "adalora" and self.lora_plus_ratio is not None:
            raise ValueError(
                "adalora's A and B both start random and are kept orthogonal; `lora_plus_ratio` is "
                "for adapters whose B starts at 0"
            )
        frozen = self.embeddings == "frozen" or (self.method == "lora" and not self.embeddings)
        if self.embedding_ratio is not None and frozen:
            raise ValueError("`embedding_ratio` needs `embeddings: trained`")
        return self

    @model_validator(mode="after")
    def _update_is_known(self) -> Method:
        # What moves the weights of other variants is not scale*B*A alone.
        if self.mitigation and self.variant not in ("lora", "rslora"):
            for name in ("ewc", "l2_sp"):
                if getattr(self.mitigation, name):
                    raise ValueError(
                        f"mitigation.{name} needs the update of the weights, which is scale*B*A "
                        f"for variants lora and rslora, not for {self.variant}"
                    )
        return self


class Selection(Strict):
    """Which checkpoint, and which hyper-parameters, stand for a method."""

    probe: Name = Field(description="The probe of the new knowledge that the threshold is on.")
    metric: Literal["rougeL_recall", "rougeL_f1", "rouge1_recall", "probability"] = Field(
        "rougeL_recall", description="Mean of this metric over the probe's items is compared."
    )
    threshold: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="The last evaluation before the metric first reaches it is selected."
    )
    hyperparameters: Literal["earliest", "smallest-lr", "fixed"] = Field(
        "earliest",
        description="earliest: the setting that reaches the threshold at the earliest step; "
        "smallest-lr: the smallest rate that reaches it within `within_epochs`; "
        "fixed: the setting named in each method, or its only one.",
    )
    within_epochs: Positive | None = Field(
        None, description="Deadline of `smallest-lr`; without it the whole training."
    )
    if_not_reached: Literal["none", "last"] = Field(
        "none",
        description="A run that never reaches the threshold has no selected checkpoint, or, "
        "marked as such, its last one.",
    )

    stop_after: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="End a run so many evaluations after the one that reaches the threshold. Saves "
        "time and cuts the trajectory's overfit end off; without it every run goes to its end.",
    )
    wise_ft: Annotated[list[Share], AfterValidator(distinct)] = Field(
        [],
        description="Measure selected checkpoints also with these shares of their update, from 0, "
        "the base, to 1; no training (WiSE-FT, arXiv 2109.01903). Table `wise_ft` has the items.",
    )

    @model_validator(mode="after")
    def _deadline_has_rule(self) -> Selection:
        if self.within_epochs is not None and self.hyperparameters != "smallest-lr":
            raise ValueError("`within_epochs` belongs to `hyperparameters: smallest-lr`")
        return self


TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]


class Benchmarks(Strict):
    """The lm-evaluation-harness runs on the base and on tuned models."""

    rows: Name | None = Field(
        None,
        description="Dataset whose folder TASK/SPLIT.jsonl holds the rows, in the hub's columns; "
        "without it they come from the hub at pinned revisions.",
    )
    tasks: dict[TaskName, Task] = Field(
        default_factory=dict,
        description="The tasks by their names in the harness's registry, with settings.",
    )
    refusals: Refusals | None = Field(
        None, description="Ask harmful prompts too, and count the answers that refuse."
    )
    models: Literal["selected", "budgets"] = Field(
        "selected",
        description="What is scored beside the base: the selected checkpoints, or the end of every "
        "one of `training.budgets` with the chosen setting, the selected among them.",
    )
    batch_size: Count = Field(16, description="Sequences per forward pass.")
    sandbox: Literal["bubblewrap", "none"] = Field(
        "bubblewrap",
        description="Where model-written programs run. Without a working sandbox HumanEval is "
        "not scored. `none` runs them unprotected: only on a machine you can lose.",
    )


class Study(Strict):
    """One study: a base model, new knowledge, probes of the old, a sweep and a selection rule."""

    title: str = Field(description="Heading of the report.")
    description: str = Field("", description="What is asked, in a sentence or two.")
    seeds: Annotated[list[Seed], AfterValidator(distinct)] = Field(
        [0], min_length=1, description="One training per seed; three let the report say more."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of forward and backward passes; the weights that are trained stay "
        "float32. auto: bfloat16 where the GPU or the processor multiplies it in hardware, else "
        "float32.",
    )
    datasets: dict[Name, Dataset] = Field(description="Origins of the tables, by name.")
    base: Base
    prompt: Prompt = Prompt()
    train: Annotated[list[Table], BeforeValidator(several)] = Field(
        min_length=1, description="Table or tables of the new knowledge."
    )
    train_limit: Count | None = Field(None, description="At most so many evenly spaced rows.")
    probes: dict[Name, Probe] = Field(min_length=1, description="Question-answer sets, by name.")
    general_text: GeneralText | None = Field(
        None, description="Measure the forgetting cross-entropy on this text."
    )
    measurement: Measurement = Measurement()
    training: Training = Training()
    methods: list[Method] = Field(min_length=1, description="The sweep.")
    selection: Selection
    benchmarks: Benchmarks = Benchmarks()

    @model_validator(mode="after")
    def _old_is_not_trained_on(self) -> Study:
        self._text_is_not_trained_on()
        for name, probe in self.probes.items():
            place = ("probes", name, "table")
            if probe.knowledge == "old" and (both := set(probe.table) & set(self.train)):
                raise AtKey(place, f"{min(both)} is trained on, so it is no old knowledge")
            for number, method in enumerate(self.methods):
                replay = method.mitigation and method.mitigation.replay
                if replay and replay.table in probe.table:
                    raise AtKey(
                        place,
                        f"methods.{number} replays {replay.table}, so the probe would not tell "
                        "what is forgotten; replay another table",
                    )
        return self

    def _text_is_not_trained_on(self) -> None:
        if TEXT_PROBE in self.probes:
            raise AtKey(("probes", TEXT_PROBE), "the name belongs to the section general_text")
        if ALL_PROBES in self.probes:
            raise AtKey(("probes", ALL_PROBES), "the name belongs to what all probes say together")
        replays = [m.mitigation.replay for m in self.methods if m.mitigation]
        trained = {*self.train, *(replay.table for replay in replays if replay)}
        if self.general_text and self.general_text.table in trained:
            raise AtKey(
                ("general_text", "table"),
                f"{self.general_text.table} is trained on, so it would not tell what is forgotten; "
                "take another table",
            )

    @model_validator(mode="after")
    def _budgets_are_there_and_whole(self) -> Study:
        if self.benchmarks.models == "budgets" and not self.training.budgets:
            raise ValueError("benchmarks.models: `budgets` needs training.budgets")
        if self.training.budgets and self.selection.stop_after is not None:
            raise AtKey(
                ("selection", "stop_after"),
                "it would end the trunk before the longest of training.budgets leaves it; take it "
                "out",
            )
        return self

    @model_validator(mode="after")
    def _fits_into_the_training(self) -> Study:
        epochs, training = self.training.epochs, self.training
        if self.measurement.every_epochs > epochs:
            raise AtKey(
                ("measurement", "every_epochs"),
                f"{self.measurement.every_epochs:g} is more than training.epochs, {epochs:g}, so "
                "that nothing would be measured on the way; make it smaller",
            )
        within = self.selection.within_epochs
        if within is not None and within > epochs:
            raise AtKey(
                ("selection", "within_epochs"),
                f"{within:g} is more than training.epochs, {epochs:g}, so that it would be no "
                "deadline; make it smaller, or leave it out",
            )
        share, warmup = training.warmup_share, training.warmup_epochs
        if share is None and warmup is None and training.warmup_steps is None and epochs <= 1:
            raise AtKey(
                ("training", "epochs"),
                f"{epochs:g} leaves nothing after the warm-up, which is 1 epoch by default; set "
                "training.warmup_epochs to less",
            )
        if warmup is not None and warmup >= epochs:
            raise AtKey(
                ("training", "warmup_epochs"),
                f"{warmup:g} leaves nothing of training.epochs, {epochs:g}; make it smaller",
            )
        if share == 1:
            raise AtKey(
                ("training", "warmup_share"),
                "the warm-up takes all steps, and the rate is never at its peak; make it smaller",
            )
        return self

    @model_validator(mode="after")
    def _system_messages_are_used(self) -> Study:
        for name, dataset in self.datasets.items():
            if dataset.columns.system and not self.prompt.chat:
                raise ValueError(
                    f"datasets.{name}.columns: `system` needs `prompt: {{chat: true}}`: other "
                    "templates have no place for it"
                )
        return self

    @model_validator(mode="after")
    def _processes_can_share_a_run(self) -> Study:
        for number, method in enumerate(self.methods):
            keys = ("methods", number, "processes")
            if method.processes is None:
                if method.nodes:
                    raise AtKey(
                        ("methods", number, "nodes"),
                        "nodes need `processes` to be spread over them; give these too, or neither",
                    )
                continue
            if method.processes % (method.nodes or 1):
                raise AtKey(
                    ("methods", number, "nodes"),
                    f"{method.processes} processes cannot be spread evenly over {method.nodes} "
                    "nodes; take `processes` a multiple of `nodes`",
                )
            if method.processes == 1:
                continue
            if method.method == "hybrid":
                raise AtKey(
                    keys, "the two parts of method hybrid are trained in one process; take 1"
                )
            if method.method == "full" and self.training.optimizer == "adafactor":
                raise AtKey(
                    keys,
                    "adafactor needs whole matrices, and method full in several processes has "
                    "parts of them; take 1, or training.optimizer: adamw or lionw",
                )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Study:
        origins = [(keys, table.split("/", 1)[0]) for keys, table in self.tables()]
        if self.benchmarks.rows:
            origins.append((("benchmarks", "rows"), self.benchmarks.rows))
        for keys, name in origins:
            if name not in self.datasets:
                known = ", ".join(sorted(self.datasets))
                raise AtKey(keys, f"`{name}` is not among the datasets ({known})")
        probe = self.probes.get(self.selection.probe)
        if probe is None or probe.knowledge != "new":
            raise AtKey(
                ("selection", "probe"),
                f"`{self.selection.probe}` is not a probe of new knowledge",
            )
        return self

    def columns(self, table: str) -> Columns:
        """What the dataset of a table calls its columns."""
        return self.datasets[table.split("/", 1)[0]].columns

    def tables(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Every use of a table, with the keys at which it stands."""
        documents = self.base.pretrain.documents if self.base.pretrain else []
        found: list[tuple[tuple[str | int, ...], str]] = [
            *((("train", number), table) for number, table in enumerate(self.train)),
            *(
                (("probes", name, "table", number), table)
                for name, probe in self.probes.items()
                for number, table in enumerate(probe.table)
            ),
            *(
                (("base", "pretrain", "documents", number), table)
                for number, table in enumerate(documents)
            ),
        ]
        for number, method in enumerate(self.methods):
            for name in ("replay", "ewc"):
                if section := method.mitigation and getattr(method.mitigation, name):
                    keys = ("methods", number, "mitigation", name, "table")
                    found.append((keys, section.table))
        if self.general_text:
            found.append((("general_text", "table"), self.general_text.table))
        if self.benchmarks.refusals:
            found.append((("benchmarks", "refusals", "table"), self.benchmarks.refusals.table))
        return found
