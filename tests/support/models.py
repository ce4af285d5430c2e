"""Small models with random weights, a byte tokenizer, and files of benchmark rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, so that it encodes any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {letter: n for n, letter in enumerate(alphabet, start=1)}
    bytes_as_tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_as_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_as_tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_as_tokens, eos_token="</s>")


def random_llama(context: int, layers: int = 1) -> LlamaForCausalLM:
    """Return a model with the same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def write_rows(
    folder: Path, tasks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
) -> Path:
    """Write TASK/SPLIT.jsonl files into the folder, and return it."""
    for task, splits in tasks.items():
        (folder / task).mkdir()
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(lines)
    return folder
