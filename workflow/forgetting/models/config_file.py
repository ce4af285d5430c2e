"""Read and check config.json, generation_config.json and the tokenizer's files of a model.

The files are read as JSON, because importing transformers takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forgetting.errors import InputError
from forgetting.io import read_foreign_json

MODEL_TYPES: dict[str, list[str]] = read_foreign_json(Path(__file__).with_name("model_types.json"))
"""Model types of transformers that have a causal language model (`causal`), and those of them whose
weights transformers renames or merges when it loads them (`renamed`).

tests/unit/models/test_model_types.py compares them with transformers, and writes them.
"""

CAUSAL_WHEN: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"),
            *("ernie", "megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm"),
            *("roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        ),
        ("is_decoder", True),
    ),
    "xlm": ("causal", True),
    "xlnet": ("attn_type", "uni"),
}
"""Types that transformers lists as causal, but that are causal only with this key and value."""

ENCODER_DECODERS = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"),
    *("pegasus", "plbart", "prophetnet", "whisper"),
}
"""Types that have an encoder unless config.json says otherwise."""

INTEGER_KEYS = re.compile(
    r"(hidden|vocab|intermediate|embedding|moe_intermediate)_size|(max|n)_position(_embedding)?s"
    r"|num_\w+|n_(embd|head|inner|layer)|d_(model|ff|kv)|ffn_dim|head_dim|sliding_window"
)
NUMBER_KEYS = re.compile(r"(?!use_)\w*(_eps|_epsilon|dropout|_pdrop)|rope_theta|initializer_range")
BOOLEAN_KEYS = re.compile(
    r"tie_word_embeddings|is_(encoder_)?decoder|use_cache|(attention|mlp)_bias"
)
"""Keys whose values have the same type in every model type."""

SPECIAL_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
PLACEHOLDER_KEYS = ("image_token", "audio_token", "video_token")
"""Keys of tokenizer_config.json for tokens that represent images or sound."""


def has_dropout_config(config: Mapping[str, Any]) -> bool:
    """Return whether a model with this config.json applies dropout in training.

    Dropout of classification and summary heads is ignored (GPT-NeoX, GPT-2).
    """
    return any(
        isinstance(value, float) and value > 0
        for name, value in config.items()
        if "drop" in name and not name.startswith(("classifier", "summary"))
    )


def text_config_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of the language model, as transformers' `get_text_config()` does.

    Multimodal types have them in a section of their config.json.
    """
    section = config.get("text_config")
    if not isinstance(section, dict):
        return config
    return {"model_type": config.get("model_type"), **section}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a causal language model that can be trained here.

    Raises:
        InputError: names the file, the key and the expected value.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if not path.is_file():
        if adapter.is_file():
            raise InputError(
                f"{adapter}: the folder holds an adapter without its base; merge it "
                "(peft's merge_and_unload, then save_pretrained) and give the merged model"
            )
        raise InputError(f"{folder}: no config.json there, so it is no model")
    if adapter.is_file():
        raise InputError(
            f"{adapter}: transformers would put this adapter on the model when it loads it; remove "
            "the adapter's files if the weights are merged already, otherwise merge it first "
            "(peft's merge_and_unload, then save_pretrained)"
        )
    config = _read_object(path)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{path}: expected a JSON object with `model_type`, as transformers has")
    if kind not in MODEL_TYPES["causal"]:
        raise InputError(
            f"{path}: transformers has no causal language model of type {kind}; code that comes "
            "with a model is not run"
        )
    _check_causal(path, config)
    for key in ("quantization_config", "compression_config"):
        if config.get(key) or text_config_section(config).get(key):
            raise InputError(
                f"{path}: {key}: quantized weights are not supported, since weights are trained "
                "in float32; take the model that is not quantized"
            )
    _check_types(path, config)
    _check_types(path, text_config_section(config))
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_foreign_json(path)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object with `model_type`, as transformers has")
    return content


def _check_causal(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse encoders, which see the tokens that they should predict, and encoder-decoders."""
    kind = config["model_type"]
    if config.get("is_encoder_decoder", kind in ENCODER_DECODERS):
        raise InputError(
            f"{path}: is_encoder_decoder is true: {kind} has an encoder for the question and a "
            "decoder for the answer; take a decoder-only model, such as Llama or Qwen"
        )
    if kind in CAUSAL_WHEN:
        key, value = CAUSAL_WHEN[kind]
        if config.get(key) != value:
            raise InputError(
                f"{path}: {key} is not {str(value).lower()}, so that {kind} is an encoder, which "
                "sees the token that it should predict; take a causal model, such as Llama or Qwen"
            )


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a value of the wrong type; lists (a value for each layer) are accepted."""
    for key, value in config.items():
        if value is None or isinstance(value, list | dict):
            continue
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if INTEGER_KEYS.fullmatch(key) and not is_integer:
            expected = "a whole number"
        elif NUMBER_KEYS.fullmatch(key) and not (is_integer or isinstance(value, float)):
            expected = "a number"
        elif BOOLEAN_KEYS.fullmatch(key) and not isinstance(value, bool):
            expected = "true or false"
        else:
            continue
        raise InputError(
            f"{path}: {key} is {value!r}, where {expected} is expected; copy config.json of the "
            "model again"
        )


def check_special_tokens(folder: Path, config: Mapping[str, Any], rows: int) -> None:
    """Refuse ids of special tokens that have no row in the embedding."""
    sections = [
        (folder / "config.json", config),
        (folder / "config.json", text_config_section(config)),
    ]
    generation = folder / "generation_config.json"
    if generation.is_file():
        sections.append((generation, _read_object(generation)))
    for path, section in sections:
        for key in SPECIAL_TOKEN_KEYS:
            value = section.get(key)
            for token in value if isinstance(value, list) else [value]:
                # Some configurations use -1 for none.
                if token is None or token == -1:
                    continue
                if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                    raise InputError(f"{path}: {key} is {token!r}, where a token's id is expected")
                if token >= rows:
                    raise InputError(
                        f"{path}: {key} is {token}, but the embedding has {rows} rows, for ids "
                        f"below {rows}; give the id of a token that the model has"
                    )


def check_tokenizer(folder: Path, rows: int) -> None:
    """Refuse a tokenizer.json with ids that have no row in the embedding.

    Raises:
        InputError: names the file and the token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        tokens = dict(_tokens(read_foreign_json(path)))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return  # The job that loads the tokenizer reports the fault.
    check_ids(path, tokens, rows, placeholders(folder))


def check_ids(path: Path, tokens: Mapping[str, int], rows: int, unused: set[str]) -> None:
    """Raise `InputError` if the id of a token has no row in the embedding.

    Args:
        path: of the tokenizer, for the message.
        tokens: tokens and their ids.
        rows: of the embedding.
        unused: tokens that occur in no text, which may lack a row.
    """
    invalid = {
        t: token_id for t, token_id in tokens.items() if token_id >= rows and t not in unused
    }
    if invalid:
        token = min(invalid, key=lambda token: invalid[token])
        raise InputError(
            f"{path}: the token {token!r} has id {invalid[token]}, but the embedding has {rows} "
            f"rows, for ids below {rows}; take the tokenizer that belongs to the model, or give "
            "the model more rows (resize_token_embeddings, then save_pretrained)"
        )


def _tokens(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the tokens of a tokenizer.json and their ids."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((entry[0], number) for number, entry in enumerate(vocabulary))
    for added in tokenizer.get("added_tokens") or []:
        yield added["content"], int(added["id"])


def placeholders(folder: Path) -> set[str]:
    """Return the tokens of a tokenizer that represent images or sound."""
    try:
        config = read_foreign_json(folder / "tokenizer_config.json")
    except (OSError, ValueError, RecursionError):
        return set()
    extra = config.get("extra_special_tokens") if isinstance(config, dict) else None
    sections = [section for section in (config, extra) if isinstance(section, dict)]
    tokens = [section.get(key) for section in sections for key in PLACEHOLDER_KEYS]
    return {token for token in tokens if isinstance(token, str)}
