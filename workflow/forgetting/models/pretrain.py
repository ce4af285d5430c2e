"""A small Llama-architecture base model, trained from scratch on a list of documents.

Documents are packed whole into blocks of fixed length. Each attends to itself only and starts at
position 0, so a packed document is learnt exactly as it would be alone, and as a benchmark will
show it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from forgetting.encoding.packing import IGNORED, collate, pack
from forgetting.models.attention import quick_attention
from forgetting.records import replacing_folder
from forgetting.sections.base import SmallModel

END = "<|end|>"
PADDING = "<|pad|>"
PROGRESS_SECONDS = 2.0
# The roles in plain words on lines of their own, as `data` writes them into documents.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize + ':\\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Progress:
    """Where a pretraining stands after a step."""

    step: int
    total: int
    loss: float
    tokens_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"pretraining step {self.step}/{self.total}, loss {self.loss:.3f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.seconds_left:.0f} s left"
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


def learning_rate_at(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: linear rise, then half a cosine down to a tenth of it."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


def _schedule_blocks(
    lengths: Sequence[int], spec: SmallModel, generator: torch.Generator
) -> list[list[int]]:
    """Documents of all blocks of all epochs, each epoch in an order of its own."""
    blocks: list[list[int]] = []
    whole, rest = divmod(spec.epochs, 1.0)
    for share in [1.0] * int(whole) + ([rest] if rest > 0 else []):
        order = torch.randperm(len(lengths), generator=generator).tolist()
        packed = pack(lengths, spec.block, order[: max(1, round(share * len(order)))])
        mixed = torch.randperm(len(packed), generator=generator).tolist()
        blocks.extend(packed[place] for place in mixed)
    return blocks


def _new_model(spec: SmallModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=spec.context,
        # Llama's 0.02 suits widths of thousands; a narrow model learns twice as fast from this.
        initializer_range=spec.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _optimizer(model: LlamaForCausalLM, spec: SmallModel) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.98), fused=True)


def _loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], bfloat16: bool) -> torch.Tensor:
    """Mean cross-entropy in nats over the tokens that have a label."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        hidden = model.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        labels = batch["labels"]
        scored = labels != IGNORED
        logits = model.lm_head(hidden[scored])
    return torch.nn.functional.cross_entropy(logits.float(), labels[scored])


def pretrain(
    documents: Sequence[str],
    spec: SmallModel,
    out_dir: Path,
    seed: int,
    on_progress: Callable[[Progress], None] | None = None,
    bfloat16: bool = False,
) -> Pretrained:
    """Train tokenizer and model from scratch and save both to `out_dir` in Hugging Face's form.

    The folder appears whole or not at all. On a CPU the result is the same bit for bit whenever
    documents, spec, seed and number of threads are.

    Args:
        documents: texts; each is followed by an end-of-sequence token and cut at `spec.block`.
        on_progress: is told about a step every few seconds, and about the last one.
        bfloat16: multiply in bfloat16 (autocast); the weights stay float32.

    Raises:
        ValueError: there are no documents.
    """
    if not documents:
        raise ValueError("there are no documents to train on")
    started = time.monotonic()
    with replacing_folder(out_dir) as partial:
        tokenizer = train_tokenizer(documents, spec.vocabulary, partial)
        ids = [
            [*tokens, tokenizer.eos_token_id][: spec.block]
            for tokens in tokenizer(list(documents))["input_ids"]
        ]
        model = _new_model(spec, tokenizer, seed)
        if torch.cuda.is_available():
            model.to("cuda")
        generator = torch.Generator().manual_seed(seed)
        blocks = _schedule_blocks([len(tokens) for tokens in ids], spec, generator)
        size = max(1, spec.batch_tokens // spec.block)
        batches = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        tokens, loss = _fit(
            model,
            [[[ids[d] for d in block] for block in batch] for batch in batches],
            spec,
            tokenizer.pad_token_id,
            on_progress,
            bfloat16,
        )
        model.to("cpu").save_pretrained(partial)
    return Pretrained(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=len(batches),
        tokens=tokens,
        seconds=time.monotonic() - started,
        final_loss=loss,
    )


def _fit(
    model: LlamaForCausalLM,
    batches: Sequence[Sequence[Sequence[Sequence[int]]]],
    spec: SmallModel,
    padding: int,
    on_progress: Callable[[Progress], None] | None,
    bfloat16: bool,
) -> tuple[int, float]:
    """Train the model on the batches; returns the tokens seen and the last step's loss."""
    optimizer = _optimizer(model, spec)
    started = told = time.monotonic()
    precision = torch.bfloat16 if bfloat16 else torch.float32
    seen, value = 0, math.nan
    for step, documents in enumerate(batches):
        batch = collate(documents, spec.block, padding)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * learning_rate_at(step, len(batches), spec.warmup)
        with quick_attention(model, batch["attention_mask"], precision) as mask:
            loss = _loss(model, batch | {"attention_mask": mask}, bfloat16)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(len(tokens) for block in documents for tokens in block)
        now, last = time.monotonic(), step + 1 == len(batches)
        if on_progress and (last or now - told >= PROGRESS_SECONDS):
            value, told = loss.item(), now
            pace = (now - started) / (step + 1)
            on_progress(
                Progress(
                    step=step + 1,
                    total=len(batches),
                    loss=value,
                    tokens_per_second=seen / (now - started),
                    seconds_left=pace * (len(batches) - step - 1),
                )
            )
    return seen, loss.item()
