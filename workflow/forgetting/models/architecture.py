"""What a base model is made of, told by its files alone: nothing is loaded, no library imported.

A mistake in a study is then found while its jobs are planned. A folder's safetensors begin with a
header of names and shapes; a model that is trained here has the layers of its settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from forgetting.config.base_model import SmallModelConfig
from forgetting.errors import InputError
from forgetting.io import read_foreign_json
from forgetting.models.config_file import (
    check_special_tokens,
    check_tokenizer,
    has_dropout_config,
    is_renamed,
    read_config,
    text_config_section,
)
from forgetting.models.layers import EMBEDDINGS, Kind, Layer, adapts_experts, check_agreement

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
)
LARGEST_HEADER = 100 * 10**6  # of the format's own definition


SAME_LEAVES = {
    *("gemma3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe"),
    *("dots1", "gpt_neox", "minimax"),
}
"""Types whose weights are renamed when they are loaded, but for the last part of their names, and
whose experts are put together as `_fused` does (each is tested)."""

HEADS = ("lm_head", "embed_out")
"""Names of the LM head in files; GPT-NeoX has the second."""

FUSED = {
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj", "gate_up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w2", "down_proj"), "down_proj"),
}
"""Matrices of an expert, and the tensor of all experts in which they are put together."""


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model.

    Attributes:
        layers: every weight.
        complete: has the loaded model these modules, and no others?
        has_leaves: whether the last part of the names identifies the layers of the loaded model.
        blocks: number of transformer blocks, if it is known.
        context: longest sequence that the model reads, in tokens, if there is a limit.
        rows: rows of the input embedding, if they are known.
    """

    layers: Sequence[Layer]
    is_complete: bool
    has_leaves: bool
    blocks: int | None
    context: int | None
    rows: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by the name of its module."""
        return {layer.name: layer.shape for layer in self.layers}

    def within(self, pattern: str) -> list[Layer]:
        """Return the weights in modules whose names end in a pattern."""
        return [layer for layer in self.layers if _is_within(layer.name, pattern)]


def _is_within(name: str, pattern: str) -> bool:
    parts = name.split(".")
    modules = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    # Files of a model without its head leave the model's own name out.
    whole = [f"{prefix}{module}" for module in modules for prefix in ("", "model.", "transformer.")]
    return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in whole)


def _is_embedding(name: str) -> bool:
    return "emb" in name or name.rpartition(".")[2] in ("wte", "wpe")


def layers_of(shapes: Mapping[str, tuple[int, ...]], *, multimodal: bool = False) -> list[Layer]:
    """Return the layers of a model with weights of these names and shapes.

    Of a multimodal model, text reaches the module that holds the input embedding, and the LM head.
    """
    embedding = _input_embedding(shapes)
    within = f"{embedding.rpartition('.')[0]}." if embedding and multimodal else ""
    layers = []
    for name, shape in _fused(shapes).items():
        kind: Kind = "other"
        module, parameter = name, "weight"
        if "experts" in name.split(".") and len(shape) == 3:
            kind = "tensor"
            module, _, parameter = name.rpartition(".")
        elif name.rpartition(".")[2] in HEADS:
            kind, module = "head", "lm_head"
        elif len(shape) == 2:
            kind = "embedding" if _is_embedding(name) else "linear"
        reads_text = name.startswith(within) or kind == "head"
        layers.append(Layer(module, shape, kind, parameter, reads_text))
    if embedding and not any(layer.kind == "head" for layer in layers):
        # The file has a tied weight once.
        layers.append(Layer("lm_head", shapes[embedding], "tied head"))
    return adapts_experts(layers)


def _fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Put experts together, as transformers does when it loads them: (experts, rows, columns)."""
    found: dict[str, tuple[int, ...]] = {}
    numbers: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        prefix, _, rest = name.partition(".experts.")
        number, _, leaf = rest.partition(".")
        if not number.isdigit() or leaf not in FUSED or len(shape) != 2:
            found[name] = shape
            continue
        whole = f"{prefix}.experts.{FUSED[leaf]}"
        numbers.setdefault(whole, set()).add(number)
        rows = shape[0] * (2 if FUSED[leaf] == "gate_up_proj" and leaf != "gate_up_proj" else 1)
        found[whole] = (len(numbers[whole]), rows, shape[1])
    return found


def _input_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    names = [name for name in shapes if name.rpartition(".")[2] in EMBEDDINGS]
    others = [name for name in shapes if _is_embedding(name)]
    return next(iter([*names, *others]), None)


def small_model(spec: SmallModelConfig) -> ModelLayers:
    """The layers of a model that is trained here, as transformers names those of a Llama."""
    width, inner = spec.hidden_size, spec.intermediate_size
    block = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{name}": shape
        for number in range(spec.num_layers)
        for name, shape in block.items()
    }
    shapes |= {"model.embed_tokens": (spec.vocab_size, width), "model.norm": (width,)}
    return ModelLayers(layers_of(shapes), True, True, spec.num_layers, spec.max_position_embeddings)


def read_model_layers(folder: Path) -> ModelLayers:
    """The layers of a model in a folder in Hugging Face form; nothing of its files may be missing.

    Raises:
        InputError: names the file, and what is expected.
    """
    config = read_config(folder)
    shapes = read_shapes(folder)
    if not any(True for name in TOKENIZERS for _ in folder.glob(name)):
        raise InputError(
            f"{folder}: no tokenizer there; copy tokenizer.json and tokenizer_config.json of the "
            "model into it"
        )
    text = text_config_section(config)
    check_agreement(folder / "config.json", text, shapes)
    embedding = _input_embedding(shapes)
    rows = shapes[embedding][0] if embedding and len(shapes[embedding]) == 2 else None
    if rows is not None:
        check_special_tokens(folder, config, rows)
        check_tokenizer(folder, rows)
    blocks = text.get("num_hidden_layers") or text.get("n_layer")
    context = text.get("max_position_embeddings") or text.get("n_positions")
    complete = not is_renamed(config)
    return ModelLayers(
        layers_of(shapes, multimodal=text is not config),
        complete,
        complete or config["model_type"] in SAME_LEAVES,
        blocks if isinstance(blocks, int) else None,
        context if isinstance(context, int) else None,
        rows,
    )


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight in a folder, by module, from the headers of its safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _shards(folder):
        for name, entry in _header(path).items():
            # Experts that are put together are tensors of their module, not weights of their own.
            experts = ".experts." in name and len(entry["shape"]) == 3
            if name.endswith(".weight") or experts:
                shapes[name.removesuffix(".weight")] = tuple(entry["shape"])
    return shapes


def _shards(folder: Path) -> list[Path]:
    """The files of the weights: a single one, or those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        others = [path.name for form in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(form)]
        raise InputError(
            f"{folder}: no model.safetensors there, nor model.safetensors.index.json; other "
            f"formats{f' ({others[0]})' if others else ''} are not read"
        )
    try:
        names = sorted(set(read_foreign_json(index)["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not the index of a model: expected `weight_map`") from None
    if outside := [name for name in names if _leaves(folder, name)]:
        raise InputError(
            f"{index}: names {outside[0]}, which is not in this folder; copy all files of the "
            "model into it, and name them relative to it"
        )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{index}: {absent[0]} is not in the folder, and {len(absent) - 1} more are not; copy "
            "all files of the model"
        )
    return [folder / name for name in names]


def _leaves(folder: Path, name: str) -> bool:
    """Return whether a name in an index leads out of the folder; a link in it may lead anywhere."""
    path = Path(name)
    return path.is_absolute() or ".." in path.parts or folder == folder / path


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, shapes and places of the tensors in a safetensors file, which is as long as they say.

    The file begins with the length of its header in 8 bytes, and the header, a JSON object.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        if not all(_is_shape(entry["shape"]) for entry in header.values()):
            raise ValueError
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(
            f"{path}: not a safetensors file; is it a link to one (git lfs), or another format?"
        ) from None
    if size != 8 + length + end:
        raise InputError(
            f"{path}: has {size:,} bytes, and its header tells of {8 + length + end:,}; fetch it "
            "again"
        )
    return dict(header)


def _is_shape(shape: Iterable[object]) -> bool:
    return all(isinstance(length, int) and length >= 0 for length in shape)


def rows_are_apart(config: Mapping[str, Any]) -> bool:
    """Does each row of a batch go its own way through a model, as its config.json tells?

    Not with dropout of the base's own, whose masks would be other ones, nor with experts, to which
    rows are sent in another order.
    """
    return not has_dropout_config(config) and not any("expert" in name for name in config)
