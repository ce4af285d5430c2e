"""Files that users give: which files of a model's folder count, and the digests of contents.

Rules take these digests as parameters, so that a changed content is seen whatever its date, and a
new date alone reruns nothing. Nothing here imports a library of models, since every rule file does.
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
"""What transformers and tokenizers read of a model's folder: configurations, weights, chat
templates and vocabularies. Other formats of weights are not read."""

NOT_MODEL_FILES = (
    *(".*", "README*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "CHANGELOG*"),
    *("requirements*.txt", "trainer_state.json", "*_results.json"),
)
"""Files that those patterns match though nobody reads them: documentation, logs of a training."""

DIGEST_CACHE = Path(".snakemake", "content_digests.json")
"""Digests that are known, in the folder in which Snakemake runs."""

SETTLED_SECONDS = 2.0
"""A file that changed more recently may change again without another time stamp."""


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
    """Return every file that is part of the model in a folder, in the order of their names.

    Among them are the shards that an index of the weights names, also in subfolders.
    """
    found = {
        path
        for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
        if is_model_file(path.relative_to(folder).as_posix()) and path.is_file()
    }
    # Without an index, or with one that is refused where the weights are read, there are no more.
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        named = read_foreign_json(folder / "model.safetensors.index.json")["weight_map"].values()
        inside = (folder / name for name in named if ".." not in Path(name).parts)
        found |= {path for path in inside if path.is_file() and path.is_relative_to(folder)}
    return sorted(found)


def model_identity(folder: Path) -> tuple[dict[str, str], str]:
    """Return the digest of every file of a model, by name, and one of them all."""
    digests = sha256_of_each(model_files(folder))
    files = {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()}
    return files, hashlib.sha256(json.dumps(files).encode()).hexdigest()


def content_digest(files: Mapping[str, Path], cache: Path = DIGEST_CACHE) -> str:
    """Return one digest of the names and contents of files.

    A file is read only if its size, times, inode or the target of its link differ from those at
    which it was read before. Several processes may use the cache at the same time; a cache that
    cannot be read or written is ignored.
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
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read_cache(cache: Path) -> dict[str, object]:
    try:
        found = read_foreign_json(cache)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
