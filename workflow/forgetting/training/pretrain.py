"""Train a small base model of Llama's architecture from scratch on a list of documents.

Pretraining is full fine-tuning of a model with random weights on packed text. Documents are packed
whole into sequences, and each attends to itself only. A document is therefore learned as it would
be in a sequence of its own, and as a benchmark presents it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from forgetting.config.base_model import SmallModelConfig
from forgetting.config.methods import Hyperparameters
from forgetting.config.training import TrainingConfig
from forgetting.data.dataset import pack_dataset
from forgetting.data.tokenize import Example, encode_texts
from forgetting.errors import InputError
from forgetting.io import atomic_folder, content_key, remove_folder
from forgetting.models.loading import Model, get_device
from forgetting.schedule import LrSchedule
from forgetting.training.checkpoints import TrainState, discard_damaged
from forgetting.training.run_config import RunConfig
from forgetting.training.trainer import train_run
from forgetting.versions import VERSIONS

END = "<|end|>"
PADDING = "<|pad|>"
CHECKPOINTS = 10
"""Number of checkpoints during a pretraining; it resumes from the newest."""

# Each role is a word on a line of its own, as in the generated documents (`data.microworld`).
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize + ':\\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Pretrained:
    """Size and cost of a pretrained model, and its final loss in nats per token."""

    parameters: int
    steps: int
    tokens: int
    seconds: float
    final_loss: float


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on texts and save it so that `AutoTokenizer` loads it from `out`.

    Digits and line ends are always separate tokens. A number then has the same tokens in every
    context, and a prompt that ends in a line end has the same tokens with and without its answer.

    Returns:
        The tokenizer as loaded from `out`; it adds no special tokens by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PADDING,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def pretraining_config(config: SmallModelConfig) -> TrainingConfig:
    """Return the training configuration of a pretraining."""
    sequences = max(1, config.batch_tokens // config.block_size)
    return TrainingConfig(
        epochs=config.epochs,
        batch_size=sequences,
        micro_batch_size=sequences,
        max_length=config.block_size,
        packing=True,
        schedule="cosine",
        min_lr_ratio=0.1,
        warmup_ratio=config.warmup,
        betas=(0.9, 0.98),
    )


def new_model(
    config: SmallModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> LlamaForCausalLM:
    """Return a small Llama with random weights of a seed, for the vocabulary of a tokenizer."""
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        # Llama's 0.02 suits widths of thousands; a narrow model learns twice as fast with this.
        initializer_range=config.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(architecture)


def _examples(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, training: TrainingConfig
) -> Sequence[Example]:
    """Tokenize and pack the documents; one of a single token has no target and is left out."""
    ids = [tokens[: training.max_length] for tokens in encode_texts(tokenizer, documents)]
    return pack_dataset([Example(tokens, 1) for tokens in ids if len(tokens) > 1], training)


def pretrain(
    documents: Sequence[str],
    config: SmallModelConfig,
    output: Path,
    state: Path,
    seed: int,
    log: Callable[[TrainState, LrSchedule], None] = lambda *_: None,
    precision: torch.dtype = torch.float32,
) -> Pretrained:
    """Train a tokenizer and a model from scratch and save both in Hugging Face's format.

    A killed pretraining resumes from its newest checkpoint. On a CPU, equal documents, config, seed
    and number of threads give identical bytes.

    Args:
        documents: texts; an end-of-sequence token follows each, and `config.block_size` limits it.
        output: folder of the model, which is written atomically.
        state: folder of the checkpoints, which is removed at the end.
        log: called after every step.
        precision: of matrix products (autocast); the weights stay float32.

    Raises:
        ValueError: there are no documents.
        InputError: the loss diverges.
    """
    if not documents:
        raise ValueError("there are no documents to train on")
    checkpoints = _checkpoint_folder(documents, config, state, seed, precision)
    with atomic_folder(output) as partial, torch.random.fork_rng():
        tokenizer = train_tokenizer(documents, config.vocab_size, partial)
        model = new_model(config, tokenizer, seed).to(get_device())
        training = pretraining_config(config)
        examples = _examples(documents, tokenizer, training)
        run = RunConfig(
            hyperparameters=Hyperparameters(
                learning_rate=config.learning_rate, weight_decay=config.weight_decay
            ),
            seed=seed,
            training=training,
            schedule=LrSchedule.plan(len(examples), training, config.epochs / CHECKPOINTS),
            base_value=0.0,
            threshold=math.inf,
            stop_after_evaluations=None,
            precision=precision,
            pad=tokenizer.pad_token_id,
        )
        final = train_run(model, examples, run, _skip_evaluation, checkpoints, log)
        if final.status == "diverged":
            raise InputError(
                f"base.pretrain: the loss diverged after {final.step} of {run.schedule.steps} "
                "steps; take a smaller learning_rate or a longer warmup"
            )
        model.to("cpu").save_pretrained(partial)
    remove_folder(state)
    return Pretrained(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=final.step,
        tokens=final.tokens,
        seconds=final.seconds,
        final_loss=final.losses[-1],
    )


def _checkpoint_folder(
    documents: Sequence[str],
    config: SmallModelConfig,
    state: Path,
    seed: int,
    precision: torch.dtype,
) -> Path:
    """Return the checkpoint folder of this pretraining; remove the folders of others."""
    key = content_key(
        {
            "documents": list(documents),
            "spec": config.model_dump(),
            "seed": seed,
            "precision": str(precision),
            "version": VERSIONS["pretrain"],
        }
    )
    folder = state / key
    for other in state.glob("*"):
        if other != folder:
            remove_folder(other)
    folder.mkdir(parents=True, exist_ok=True)
    discard_damaged([folder])
    return folder


def _skip_evaluation(_: Model) -> tuple[pd.DataFrame, float]:
    """Return no items: a pretraining has no probes, and only its newest checkpoint is kept."""
    return pd.DataFrame(), math.nan
