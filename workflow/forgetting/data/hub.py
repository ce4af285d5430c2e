"""Downloads from the Hugging Face hub, at pinned revisions; no other module uses a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from forgetting.inputs import MODEL_FILES, NOT_MODEL_FILES
from forgetting.records import InputError, replacing


@dataclass(frozen=True)
class HubRows:
    """Where a benchmark's rows are published."""

    dataset: str
    config: str | None
    revision: str
    splits: tuple[str, ...]


HUB_ROWS = {
    "gsm8k": HubRows(
        "openai/gsm8k", "main", "740312add88f781978c0658806c59bc2815b9866", ("train", "test")
    ),
    "humaneval": HubRows(
        "openai/openai_humaneval",
        "openai_humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ("test",),
    ),
    "hellaswag": HubRows(
        "Rowan/hellaswag",
        "default",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        ("train", "validation"),
    ),
    "winogrande": HubRows(
        "allenai/winogrande",
        "winogrande_xl",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        ("train", "validation"),
    ),
    "arc_challenge": HubRows(
        "allenai/ai2_arc",
        "ARC-Challenge",
        "210d026faf9955653af8916fad021475a3f00453",
        ("train", "test"),
    ),
}

ADVICE = "check the network and the name, or give a local folder instead"


def fetch_table(dataset: str, revision: str, table: str, target: Path) -> None:
    """Write a table of a dataset's repository as JSON lines.

    It is the file TABLE.jsonl or TABLE.json (lines, or one array of rows); or TABLE.parquet, in one
    file or many, named TABLE-00000-of-00114.parquet and so on as the hub's own tools name them.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(dataset, name, repo_type="dataset", revision=revision))

    def fetch_lines() -> Path | None:
        for name in (f"{table}.jsonl", f"{table}.json"):
            try:
                return fetch(name)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
        return None

    try:
        with replacing(target) as temporary:
            if found := fetch_lines():
                _copy_lines(found, temporary)
                return
            part = re.compile(re.escape(table) + r"(-\d+-of-\d+(-[0-9a-f]+)?)?\.parquet")
            listed = HfApi().list_repo_files(dataset, repo_type="dataset", revision=revision)
            shards = sorted(filter(part.fullmatch, listed))
            if not shards:
                names = f"{table}.jsonl, {table}.json, {table}.parquet"
                raise InputError(f"{dataset} at {revision} has none of {names}")
            with temporary.open("w", encoding="utf-8") as file:
                for shard in shards:
                    file.writelines(_lines(fetch(shard)))
    except InputError:
        raise
    except Exception as error:
        raise _unreachable(dataset, revision, error) from None


def _copy_lines(path: Path, target: Path) -> None:
    """Copy a file of JSON lines; of an array every row becomes a line."""
    with path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"["):
            shutil.copyfile(path, target)
            return
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path.name}: neither lines of JSON nor an array ({error})") from None
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _lines(path: Path) -> Iterator[str]:
    """The rows of a parquet file as JSON, a few in memory; dates and the like become text."""
    for batch in pq.ParquetFile(path).iter_batches(1000):
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=str) + "\n"


def fetch_rows(origin: HubRows, split: str) -> list[dict[str, Any]]:
    """All rows of one split, in the published columns."""
    import datasets

    try:
        rows = datasets.load_dataset(
            origin.dataset, origin.config, split=split, revision=origin.revision
        )
    except Exception as error:
        raise _unreachable(origin.dataset, origin.revision, error) from None
    return [dict(row) for row in rows]


def fetch_model(model: str, revision: str, folder: Path) -> None:
    """Download a model's safetensors, tokenizer and configuration into a folder."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            model,
            revision=revision,
            local_dir=folder,
            allow_patterns=[*MODEL_FILES],
            ignore_patterns=[*NOT_MODEL_FILES],
        )
    except Exception as error:
        raise _unreachable(model, revision, error) from None
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{model} at {revision} has no safetensors; other formats are not read")


def _unreachable(name: str, revision: str, error: Exception) -> InputError:
    told = str(error).strip().splitlines()
    return InputError(
        f"{name} at {revision} cannot be fetched from the hub: {ADVICE} "
        f"({told[0] if told else type(error).__name__})"
    )
