"""Layers of a base model, read from its files alone, without loading it or importing transformers.

Preflight checks use them to find mistakes in a study before any job starts. Safetensors begin with
a header of names and shapes, which transformers may rename or merge when it loads them. The job
that registers or pretrains a base records the layers of the loaded model; later plans read these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from forgetting.digests import file_damage, sha256
from forgetting.errors import InputError
from forgetting.io import read_foreign_json, write_json
from forgetting.models.config_file import (
    MODEL_TYPES,
    check_special_tokens,
    check_tokenizer,
    has_dropout_config,
    read_config,
    text_config_section,
)
from forgetting.models.layers import Kind, Layer, mark_expert_layers

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
)
MAX_HEADER_BYTES = 100 * 10**6  # defined by the safetensors format


SAME_LEAF_TYPES = {
    *("gemma3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe"),
    *("dots1", "gpt_neox", "minimax"),
}
"""Types whose weights transformers renames when it loads them, except for the last part of a name.

Their experts are merged as in `_merge_experts`. Each type is tested.
"""

EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "wte")
"""Names of the input embedding in files."""

HEADS = ("lm_head", "embed_out")
"""Names of the LM head in files; GPT-NeoX uses the second."""

EXPERT_MATRIX = re.compile(
    r"(.*\.experts)\.\d+\.(w1|w2|w3|gate_proj|up_proj|gate_up_proj|down_proj)"
)
"""A matrix of one expert: name of the module of all experts, and of the matrix."""


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model.

    Attributes:
        layers: every weight.
        is_complete: whether the loaded model has exactly these modules.
        has_leaves: whether the last part of the names identifies the layers of the loaded model.
        blocks: number of transformer blocks, if known.
        context: longest sequence that the model reads, in tokens, if limited.
    """

    layers: Sequence[Layer]
    is_complete: bool
    has_leaves: bool
    blocks: int | None
    context: int | None

    def within(self, pattern: str) -> list[Layer]:
        """Return the weights in modules whose names end in a pattern."""
        return [layer for layer in self.layers if _is_within(layer.name, pattern)]


def _is_within(name: str, pattern: str) -> bool:
    parts = name.split(".")
    modules = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    # Files of a model without a head omit the prefix of the model.
    names = [f"{prefix}{module}" for module in modules for prefix in ("", "model.", "transformer.")]
    return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in names)


def _is_embedding(name: str) -> bool:
    return "emb" in name or name.rpartition(".")[2] in ("wte", "wpe")


def layers_of(shapes: Mapping[str, tuple[int, ...]], *, multimodal: bool = False) -> list[Layer]:
    """Return the layers of a model with weights of these names and shapes.

    In a multimodal model, text reaches the LM head and the module that holds the input embedding.
    """
    embedding = _input_embedding(shapes)
    text_prefix = f"{embedding.rpartition('.')[0]}." if embedding and multimodal else ""
    layers = []
    for name, shape in _merge_experts(shapes).items():
        kind: Kind = "other"
        module, parameter = name, "weight"
        if "experts" in name.split(".") and len(shape) == 3:
            kind = "tensor"
            module, _, parameter = name.rpartition(".")
        elif name.rpartition(".")[2] in HEADS:
            kind, module = "head", "lm_head"
        elif len(shape) == 2:
            kind = "embedding" if _is_embedding(name) else "linear"
        reads_text = name.startswith(text_prefix) or kind == "head"
        layers.append(Layer(module, shape, kind, parameter, reads_text))
    if embedding and not any(layer.kind == "head" for layer in layers):
        # Files store a tied weight once.
        layers.append(Layer("lm_head", shapes[embedding], "tied head"))
    return mark_expert_layers(layers)


def _merge_experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Merge experts as transformers does when it loads them: (experts, rows, columns)."""
    merged: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = EXPERT_MATRIX.fullmatch(name)
        if match is None or len(shape) != 2:
            merged[name] = shape
            continue
        experts, leaf = match.groups()
        is_down = leaf in ("w2", "down_proj")
        path = f"{experts}.{'down_proj' if is_down else 'gate_up_proj'}"
        count = merged.get(path, (0,))[0] + (leaf not in ("w3", "up_proj"))
        rows = shape[0] if is_down or leaf == "gate_up_proj" else 2 * shape[0]
        merged[path] = (count, rows, shape[1])
    return merged


def _input_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the name of the input embedding: a usual one, or any that looks like an embedding."""
    usual = [name for name in shapes if name.rpartition(".")[2] in EMBEDDINGS]
    others = [name for name in shapes if _is_embedding(name)]
    return next(iter([*usual, *others]), None)


def read_model_layers(folder: Path, record: Path | None = None) -> ModelLayers:
    """Return the layers of a model in a folder in Hugging Face format.

    Args:
        folder: holds the model.
        record: where `write_layers` may have recorded the layers of the loaded model.

    Raises:
        InputError: a file is missing or invalid; names the file and the expected content.
    """
    config = read_config(folder)
    shapes = read_shapes(folder)
    if not any(True for name in TOKENIZERS for _ in folder.glob(name)):
        raise InputError(
            f"{folder}: no tokenizer there; copy tokenizer.json and tokenizer_config.json of the "
            "model into it"
        )
    text = text_config_section(config)
    embedding = _input_embedding(shapes)
    if embedding and len(shapes[embedding]) == 2:
        check_special_tokens(folder, config, shapes[embedding][0])
        check_tokenizer(folder, shapes[embedding][0])
    blocks = text.get("num_hidden_layers") or text.get("n_layer")
    context = text.get("max_position_embeddings") or text.get("n_positions")
    recorded = _recorded_layers(record, folder) if record else None
    is_complete = recorded is not None or config["model_type"] not in MODEL_TYPES["renamed"]
    return ModelLayers(
        recorded or layers_of(shapes, multimodal=text is not config),
        is_complete,
        is_complete or config["model_type"] in SAME_LEAF_TYPES,
        blocks if isinstance(blocks, int) else None,
        context if isinstance(context, int) else None,
    )


def write_layers(path: Path, folder: Path, layers: Iterable[Layer], parameters: int) -> None:
    """Record the layers of a loaded model, as JSON.

    Args:
        path: of the record.
        folder: of the model, whose config.json determines the layers.
        layers: all weights of the model.
        parameters: number of parameters of the model.
    """
    content = [asdict(layer) for layer in layers]
    config = sha256(folder / "config.json")
    write_json(path, {"config": config, "parameters": parameters, "layers": content})


def _recorded_layers(record: Path, folder: Path) -> list[Layer] | None:
    """Return the recorded layers, or None without an intact record of a model of this config."""
    if file_damage(record):
        return None
    content = read_foreign_json(record)
    if content["config"] != sha256(folder / "config.json"):
        return None
    return [Layer(**layer | {"shape": tuple(layer["shape"])}) for layer in content["layers"]]


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight in a folder, by module, from the safetensors' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        for name, entry in _header(path).items():
            # Merged experts are named tensors of their module, without the suffix `weight`.
            is_expert_tensor = ".experts." in name and len(entry["shape"]) == 3
            if name.endswith(".weight") or is_expert_tensor:
                shapes[name.removesuffix(".weight")] = tuple(entry["shape"])
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model: a single file, or those that an index names."""
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
    if outside := [name for name in names if _is_outside(folder, name)]:
        raise InputError(
            f"{index}: names {outside[0]}, which is not in this folder; copy all files of the "
            "model into it, and name them relative to it"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{index}: {missing[0]} is not in the folder, and {len(missing) - 1} more are not; "
            "copy all files of the model"
        )
    return [folder / name for name in names]


def _is_outside(folder: Path, name: str) -> bool:
    """Return whether a name in an index leaves the folder; links inside it may lead anywhere."""
    path = Path(name)
    return path.is_absolute() or ".." in path.parts or folder == folder / path


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file: shape and offsets of every tensor, by name.

    The file begins with the length of its header in 8 bytes and the header, a JSON object.

    Raises:
        InputError: the file has no valid header, or another size than the header implies.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
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
            f"{path}: has {size:,} bytes, but its header implies {8 + length + end:,}; fetch it "
            "again"
        )
    return dict(header)


def _is_shape(shape: Iterable[object]) -> bool:
    return all(isinstance(length, int) and length >= 0 for length in shape)


def rows_are_independent(config: Mapping[str, Any]) -> bool:
    """Return whether each row of a batch has the same result whatever the other rows are.

    Dropout of the base prevents this, because its masks depend on the batch. So do experts, because
    the batch changes the order in which they process rows.
    """
    return not has_dropout_config(config) and not any("expert" in name for name in config)
