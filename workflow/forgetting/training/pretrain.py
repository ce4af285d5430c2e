"""A small Llama-architecture base model, trained from scratch on a list of documents.

Its training is full fine-tuning of a model with random weights on packed text: documents are packed
whole into sequences, and each attends to itself only, so that it is learnt exactly as it would be
alone, and as a benchmark will show it.
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
"""Checkpoints over the whole of a pretraining, from the newest of which it resumes."""

# The roles in plain words on lines of their own, as `data` writes them into documents.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize + ':\\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Pretrained:
    """What a pretraining did."""

    parameters: int
    steps: int
    tokens: int
    seconds: float
    final_loss: float


def train_tokenizer(texts: Iterable[str], vocabulary: int, out: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on texts and save it so that `AutoTokenizer` loads it from `out`.

    Digits and line ends are always tokens of their own: numbers are then read alike wherever they
    stand, and a prompt that ends in a line end has the same tokens with and without its answer.

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
        vocab_size=vocabulary,
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


def pretraining(spec: SmallModelConfig) -> TrainingConfig:
    """Return the settings with which the trainer trains a model from scratch."""
    sequences = max(1, spec.batch_tokens // spec.block_size)
    return TrainingConfig(
        epochs=spec.epochs,
        batch_size=sequences,
        micro_batch_size=sequences,
        max_length=spec.block_size,
        packing=True,
        schedule="cosine",
        min_lr_ratio=0.1,
        warmup_ratio=spec.warmup,
        betas=(0.9, 0.98),
    )


def _new_model(
    spec: SmallModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        max_position_embeddings=spec.max_position_embeddings,
        # Llama's 0.02 suits widths of thousands; a narrow model learns twice as fast from this.
        initializer_range=spec.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def _examples(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, training: TrainingConfig
) -> Sequence[Example]:
    """Return the packed sequences; a document of a single token has nothing to predict."""
    ids = [tokens[: training.max_length] for tokens in encode_texts(tokenizer, documents)]
    return pack_dataset([Example(tokens, 1) for tokens in ids if len(tokens) > 1], training)


def pretrain(
    documents: Sequence[str],
    spec: SmallModelConfig,
    out_dir: Path,
    state: Path,
    seed: int,
    tell: Callable[[TrainState, LrSchedule], None] = lambda *_: None,
    precision: torch.dtype = torch.float32,
) -> Pretrained:
    """Train tokenizer and model from scratch and save both to `out_dir` in Hugging Face's form.

    The folder appears whole or not at all. A training that was killed resumes from its newest
    checkpoint. On a CPU the result is the same bit for bit whenever documents, spec, seed and
    number of threads are.

    Args:
        documents: texts; each is followed by an end-of-sequence token and cut at `spec.block`.
        state: folder of the checkpoints, which is removed at the end.
        tell: called after every step.
        precision: of matrix products (autocast); the weights stay float32.

    Raises:
        ValueError: there are no documents.
        InputError: the loss diverges.
    """
    if not documents:
        raise ValueError("there are no documents to train on")
    checkpoints = _checkpoint_folder(documents, spec, state, seed, precision)
    with atomic_folder(out_dir) as partial, torch.random.fork_rng():
        tokenizer = train_tokenizer(documents, spec.vocab_size, partial)
        model = _new_model(spec, tokenizer, seed).to(get_device())
        training = pretraining(spec)
        examples = _examples(documents, tokenizer, training)
        recipe = RunConfig(
            hyperparameters=Hyperparameters(
                learning_rate=spec.learning_rate, weight_decay=spec.weight_decay
            ),
            seed=seed,
            training=training,
            schedule=LrSchedule.plan(len(examples), training, spec.epochs / CHECKPOINTS),
            threshold=math.inf,
            stop_after_evaluations=None,
            precision=precision,
            pad=tokenizer.pad_token_id,
        )
        done = train_run(model, examples, recipe, 0.0, _measure_nothing, checkpoints, tell)
        if done.status == "diverged":
            raise InputError(
                f"base.pretrain: the loss diverged after {done.step} of {recipe.schedule.steps} "
                "steps; take a smaller learning_rate or a longer warmup"
            )
        model.to("cpu").save_pretrained(partial)
    remove_folder(state)
    return Pretrained(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=done.step,
        tokens=done.tokens,
        seconds=done.seconds,
        final_loss=done.losses[-1],
    )


def _checkpoint_folder(
    documents: Sequence[str], spec: SmallModelConfig, state: Path, seed: int, precision: torch.dtype
) -> Path:
    """Return the folder from which this very training resumes; remove those of any other."""
    decided = {"documents": list(documents), "spec": spec.model_dump(), "seed": seed}
    decided |= {"precision": str(precision), "version": VERSIONS["pretrain"]}
    folder = state / content_key(decided)
    for other in state.glob("*"):
        if other != folder:
            remove_folder(other)
    folder.mkdir(parents=True, exist_ok=True)
    discard_damaged([folder])
    return folder


def _measure_nothing(_: Model) -> tuple[pd.DataFrame, float]:
    """Evaluate nothing: a pretraining has no probes, and its newest checkpoint is kept."""
    return pd.DataFrame(), math.nan
