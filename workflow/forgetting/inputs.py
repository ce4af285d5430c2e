"""Files that users give: which files of a folder belong to a model, and digests of contents.

Rules take these digests as parameters. A changed content is then noticed whatever its date, and a
new date alone reruns nothing. Every rule file imports this module, so it must not import torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from forgetting.digests import sha256, sha256_of_each
from forgetting.errors import InputError
from forgetting.io import content_key, read_foreign_json, write_atomically

MODEL_FILES = (
    *("*.json", "*.safetensors"),
    *("*.jinja", "additional_chat_templates/*.jinja"),
    *("*.model", "*.model.v*", "*.spm", "*.bpe", "*.tiktoken", "*.codes", "*.vocab", "vocab.*"),
    *("*.txt", "*.tokenizer"),
)
"""Patterns of the files that transformers and tokenizers read from a model's folder:
configurations, weights, chat templates and vocabularies. Other formats of weights are not read."""

NOT_MODEL_FILES = (
    *(".*", "README*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "CHANGELOG*"),
    *("requirements*.txt", "trainer_state.json", "*_results.json"),
)
"""Files that match the patterns but are not read: documentation and training logs."""

DIGEST_CACHE = Path(".snakemake", "content_digests.json")
"""Cache of digests, relative to the folder in which Snakemake runs."""

SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again without a new time stamp."""


def is_model_file(name: str) -> bool:
    """Return whether a file, named relative to its model's folder, is part of the model."""
    if any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in NOT_MODEL_FILES):
        return False
    # `*` of fnmatch matches `/` as well.
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in MODEL_FILES
    )


def model_files(folder: Path) -> list[Path]:
    """Return the files of the model in a folder, sorted by name.

    They include the shards that the index of the weights names, also in subfolders.
    """
    files = {
        path
        for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
        if is_model_file(path.relative_to(folder).as_posix()) and path.is_file()
    }
    # Loading the weights reports an index that cannot be read.
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        shards = read_foreign_json(folder / "model.safetensors.index.json")["weight_map"].values()
        inside = (folder / name for name in shards if ".." not in Path(name).parts)
        files |= {path for path in inside if path.is_file() and path.is_relative_to(folder)}
    return sorted(files)


def model_identity(folder: Path) -> tuple[dict[str, str], str]:
    """Return the digest of every file of a model, by name, and one digest over all of them."""
    digests = sha256_of_each(model_files(folder))
    files = {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()}
    return files, hashlib.sha256(json.dumps(files).encode()).hexdigest()


def content_digest(files: Mapping[str, Path], cache: Path = DIGEST_CACHE) -> str:
    """Return one digest of the names and contents of files.

    A file is read only if its size, times, inode or link target changed since it was read before.
    Several processes may use the cache at the same time. A cache that cannot be read or written is
    ignored.

    Args:
        files: path of each file, by name.
        cache: file of the digests that were computed before.
    """
    known = _read_cache(cache)
    digests, new = {}, {}
    for name, path in files.items():
        target, stamp = str(path.resolve()), _file_stamp(path)
        entry = known.get(target)
        if isinstance(entry, list) and entry[:-1] == stamp and isinstance(entry[-1], str):
            digests[name] = entry[-1]
            continue
        started = time.time_ns()
        digests[name] = sha256(path)
        changed = stamp[-1]
        if started - changed > SETTLED_SECONDS * 1e9 and _file_stamp(path) == stamp:
            new[target] = [*stamp, digests[name]]
    if new:
        with suppress(OSError, InputError):
            write_atomically(cache, json.dumps(_read_cache(cache) | new), recorded=False)
    return content_key(digests)


def _file_stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read_cache(cache: Path) -> dict[str, object]:
    try:
        content = read_foreign_json(cache)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
