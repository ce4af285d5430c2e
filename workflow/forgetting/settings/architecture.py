"""What a base model is made of, told by its files alone: nothing is loaded, no library imported.

A mistake in a study is then found while its jobs are planned. A folder's safetensors begin with a
header of names and shapes; a model that is trained here has the layers of its settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forgetting.records import InputError, read_foreign_json
from forgetting.sections.base import SmallModel
from forgetting.settings.agreement import check_agreement

PARTS = {"attention": {"self_attn", "attn", "attention"}, "mlp": {"mlp", "feed_forward"}}
"""What modules are called that hold the linear layers of the attention, and of the MLP."""

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
)
LARGEST_HEADER = 100 * 10**6  # of the format's own definition


def drops_out(config: Mapping[str, Any]) -> bool:
    """Does a model drop out in training, as its config.json tells?

    That also tells of other heads than the one for the next token (GPT-NeoX, GPT-2).
    """
    return any(
        isinstance(value, float) and value > 0
        for name, value in config.items()
        if "drop" in name and not name.startswith(("classifier", "summary"))
    )


@dataclass(frozen=True)
class Architecture:
    """The layers of a model.

    Attributes:
        shapes: of every weight, by the name of the module that has it.
        complete: has the loaded model these modules, and no others?
        blocks: number of transformer blocks, if it is known.
        context: longest sequence that the model reads, in tokens, if there is a limit.
    """

    shapes: Mapping[str, tuple[int, ...]]
    complete: bool
    blocks: int | None
    context: int | None

    def adapted(self, targets: str | list[str]) -> dict[str, tuple[int, ...]]:
        """Matrices that get an adapter, as far as they are known."""
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) == 2}
        if isinstance(targets, list):
            return {n: s for n, s in matrices.items() if any(_ends_in(n, t) for t in targets)}
        if targets in PARTS:
            return {n: s for n, s in matrices.items() if PARTS[targets] & set(n.split("."))}
        return {name: shape for name, shape in matrices.items() if not _is_embedding(name)}

    def has_layer(self, name: str) -> bool:
        """Is there a layer that can be adapted, of this name?"""
        return any(len(shape) > 1 and _ends_in(own, name) for own, shape in self.shapes.items())

    def has_module(self, pattern: str) -> bool:
        """Is there a module with weights whose name ends in a pattern?"""
        found = {
            ".".join(parts[:depth])
            for parts in (name.split(".") for name in self.shapes)
            for depth in range(1, len(parts) + 1)
        }
        # Files of a model without its head leave the model's own name out.
        whole = {f"{prefix}{name}" for name in found for prefix in ("", "model.", "transformer.")}
        return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in whole)


def _ends_in(name: str, target: str) -> bool:
    return any(
        whole == target or whole.endswith(f".{target}")
        for whole in (name, f"model.{name}", f"transformer.{name}")
    )


def _is_embedding(name: str) -> bool:
    return "emb" in name or name.rpartition(".")[2] in ("wte", "wpe", "lm_head")


def small_model(spec: SmallModel) -> Architecture:
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
        for number in range(spec.layers)
        for name, shape in block.items()
    }
    shapes |= {"model.embed_tokens": (spec.vocabulary, width), "model.norm": (width,)}
    shapes["lm_head"] = (spec.vocabulary, width)
    return Architecture(shapes, True, spec.layers, spec.context)


def read_architecture(folder: Path) -> Architecture:
    """The layers of a model in a folder in Hugging Face form; nothing of its files may be missing.

    Raises:
        InputError: names the file, and what is expected.
    """
    config = _read_config(folder)
    if (adapter := folder / "adapter_config.json").is_file():
        raise InputError(
            f"{adapter}: an adapter beside a whole model, on which transformers would put it; take "
            "its files out, or merge it into the base and give the merged model"
        )
    shapes = read_shapes(folder)
    if not any(True for name in TOKENIZERS for _ in folder.glob(name)):
        raise InputError(
            f"{folder}: no tokenizer there; copy tokenizer.json and tokenizer_config.json of the "
            "model into it"
        )
    if "quantization_config" not in config:
        check_agreement(folder / "config.json", config, shapes)
    mixed = any("experts" in name.split(".") for name in shapes)
    if mixed:
        # Experts and their router have other names and shapes once they are loaded.
        shapes = {n: s for n, s in shapes.items() if PARTS["attention"] & set(n.split("."))}
    if "quantization_config" in config:
        shapes = {}
    embeddings = [shape for name, shape in shapes.items() if _is_embedding(name)]
    if embeddings and not any(_ends_in(name, "lm_head") for name in shapes):
        shapes["lm_head"] = embeddings[0]  # tied: the file has the weight once
    blocks = config.get("num_hidden_layers") or config.get("n_layer")
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return Architecture(
        shapes,
        bool(shapes) and not mixed and not _is_renamed(config),
        blocks if isinstance(blocks, int) else None,
        context if isinstance(context, int) else None,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json there, so it is no model")
    try:
        config = read_foreign_json(path)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"{path}: expected a JSON object with `model_type`, as transformers has")
    if (known := _causal_models()) and kind not in known:
        raise InputError(
            f"{path}: transformers has no causal language model of type {kind}; code that comes "
            "with a model is not run"
        )
    return dict(config)


def has_chat_template(folder: Path) -> bool:
    """Has the tokenizer of a folder a chat template?"""
    if any(True for _ in folder.glob("chat_template*")):
        return True
    try:
        return bool(read_foreign_json(folder / "tokenizer_config.json").get("chat_template"))
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight in a folder, by module, from the headers of its safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _shards(folder):
        for name, entry in _header(path).items():
            if name.endswith(".weight"):
                shapes[name.removesuffix(".weight")] = tuple(entry["shape"])
    return shapes


def count_parameters(folder: Path) -> int:
    """Numbers in all weights of a folder."""
    count = 0
    for path in _shards(folder):
        for entry in _header(path).values():
            size = 1
            for length in entry["shape"]:
                size *= length
            count += size
    return count


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
            f"{index}: {outside[0]} is not in the model's folder; expected names of files in it"
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


def _causal_models() -> set[str]:
    """Types of all causal language models that transformers has; none if it cannot be told."""
    table = re.search(
        r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = .*?^\)",
        _text_of_transformers("models/auto/modeling_auto.py"),
        re.MULTILINE | re.DOTALL,
    )
    return set(re.findall(r'\("([\w.-]+)",', table[0])) if table else set()


def _is_renamed(config: Mapping[str, Any]) -> bool:
    """Does transformers give the weights of this type other names when it loads them?"""
    text = _text_of_transformers("conversion_mapping.py")
    names = [config["model_type"], *(config.get("architectures") or [])]
    return not text or any(f'"{name}"' in text for name in names)


def _text_of_transformers(name: str) -> str:
    """A file of the library as text, since to import it takes seconds."""
    spec = find_spec("transformers")
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else ""
