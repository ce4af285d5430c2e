"""A small pretraining: sixty documents of the micro-world, a model of width 32."""

from __future__ import annotations

import hashlib
from pathlib import Path

from forgetting.config.base_model import SmallModelConfig
from forgetting.data.microworld import build_world
from forgetting.data.microworld.entities import WorldSizes

SPEC = SmallModelConfig(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    vocab_size=600,
    block_size=64,
    batch_tokens=256,
    epochs=1.5,
)


def some_documents() -> list[str]:
    """Return sixty documents of a small micro-world."""
    sizes = WorldSizes(gsm8k_train=12, humaneval_train=12, hellaswag_train=12, winogrande_train=12)
    return build_world(0, sizes).documents[:60]


def file_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a folder, by name."""
    files = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
