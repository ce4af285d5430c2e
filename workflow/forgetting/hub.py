"""Downloads from the Hugging Face hub, at pinned revisions; no other module uses a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.records import InputError


@dataclass(frozen=True)
class HubRows:
    """Where a benchmark's rows are published."""

    dataset: str
    config: str
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


def fetch_file(dataset: str, revision: str, names: Sequence[str]) -> Path:
    """The first of `names` that the dataset's repository has, in the local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(dataset, name, repo_type="dataset", revision=revision))
        except LocalEntryNotFoundError as error:
            raise _unreachable(dataset, revision, error) from None
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise _unreachable(dataset, revision, error) from None
    raise InputError(f"{dataset} at {revision} has none of {', '.join(names)}")


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
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"],
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
