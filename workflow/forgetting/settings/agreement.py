"""Do config.json and the weights tell of one model? As far as names and shapes say.

What is compared is certain for any type of model, or belongs to types whose layers are plain; the
job that loads the model sees the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from forgetting.records import InputError

Shape = tuple[int, ...]
Told = tuple[str | None, int | None]
"""A key of config.json and the length that it gives; of an unknown one, nothing."""

EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "wte")
PLAIN = {"gemma", "gemma2", "llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3"}
"""Types whose blocks are those of a Llama, whatever their norms and biases."""


def check_agreement(path: Path, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Refuse weights that are not those of the model in config.json.

    Args:
        path: of config.json.
        config: what it holds.
        shapes: of the weights beside it, by the name of their module.

    Raises:
        InputError: names the file, the key and the weight.
    """
    expected = _lengths(config)
    for name, shape in shapes.items():
        told = expected.get(name) or next(
            (lengths for end, lengths in expected.items() if name.endswith(f".{end}")), ()
        )
        for (key, length), found in zip(told, shape, strict=False):
            if length is not None and length != found:
                raise InputError(
                    f"{path}: {key} is {length}, where the weights have {found} ({name}, "
                    f"{' x '.join(map(str, shape))}), so they are of another model; copy "
                    "config.json and all safetensors from the same one"
                )
    if config["model_type"] in PLAIN:
        _check_blocks(path, config, shapes)


def _check_blocks(path: Path, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Fewer than the configuration says; whatever is beyond them is not loaded."""
    wanted = config.get("num_hidden_layers")
    numbers = [re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in shapes]
    blocks = len({int(number[1]) for number in numbers if number})
    if _is_count(wanted) and blocks < wanted:
        raise InputError(
            f"{path}: num_hidden_layers is {wanted}, and there are weights of {blocks} blocks; "
            "copy config.json and all safetensors from the same model"
        )


def _lengths(config: Mapping[str, Any]) -> dict[str, tuple[Told, Told]]:
    """Lengths of matrices, by the end of their names."""
    width = _first(config, "hidden_size", "n_embd", "d_model")
    # Moshi's embedding has a row more.
    rows = _first(config, "vocab_size") if config["model_type"] != "moshi" else (None, None)
    # Some project narrower embeddings to the width of the blocks.
    narrow = _first(config, "word_embed_proj_dim", "embedding_size", "input_embedding_size")
    table = (rows, width if narrow[0] is None else narrow)
    expected = dict.fromkeys(EMBEDDINGS, table)
    if config["model_type"] not in PLAIN:
        return expected
    expected["lm_head"] = table
    inner = _first(config, "intermediate_size")
    expected |= {f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    expected["mlp.down_proj"] = (width, inner)
    heads, few = (_first(config, f"num_{kind}_heads") for kind in ("attention", "key_value"))
    across, within = _product(config, heads), _product(config, few)
    expected |= {"self_attn.q_proj": (across, width), "self_attn.o_proj": (width, across)}
    return expected | {f"self_attn.{name}_proj": (within, width) for name in "kv"}


def _product(config: Mapping[str, Any], heads: Told) -> Told:
    """Length of all heads together; of unknown heads, none."""
    size = config.get("head_dim")
    if heads[1] is None or not _is_count(size):
        return None, None
    return f"{heads[0]} x head_dim", heads[1] * size


def _first(config: Mapping[str, Any], *names: str) -> Told:
    """The first of several keys that gives a number."""
    return next(
        ((name, config[name]) for name in names if _is_count(config.get(name))), (None, None)
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
