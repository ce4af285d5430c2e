"""The Hugging Face hub: known datasets and built-in benchmarks, and downloads.

hub_datasets.yaml lists datasets with revisions and sizes. No other module uses the network.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from forgetting.digests import sha256
from forgetting.errors import InputError, disk_fault
from forgetting.inputs import is_model_file
from forgetting.io import atomic_folder, atomic_write, read_foreign_json

WEIGHT_FILES = ".safetensors"
USE_LOCAL_FOLDER = "or give a local folder instead"
HUB_DATASETS_FILE = Path(__file__).with_name("hub_datasets.yaml")


@dataclass(frozen=True)
class HubDataset:
    """The published rows of a benchmark.

    Attributes:
        dataset, config: name and configuration on the hub.
        revision: commit.
        splits: the splits that the task reads.
    """

    dataset: str
    config: str | None
    revision: str
    splits: tuple[str, ...]


@dataclass(frozen=True)
class BuiltInBenchmark:
    """Facts about a benchmark that its definition in the harness does not hold.

    Attributes:
        definition: file below the harness's folder of tasks.
        main_metric: the metric that is plotted, as `metric,filter`.
        chance: score of blind guessing.
        columns: the columns that the task reads.
    """

    definition: str
    main_metric: str
    chance: float
    columns: tuple[str, ...]


_CONTENT: dict[str, Any] = yaml.load(
    HUB_DATASETS_FILE.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
)
HUB_DATASETS = {
    task: HubDataset(row["dataset"], row["config"], row["revision"], tuple(row["splits"]))
    for task, row in _CONTENT["benchmarks"].items()
}
"""Datasets of the built-in benchmarks."""

BUILT_IN_BENCHMARKS = {
    task: BuiltInBenchmark(
        row["definition"], row["main_metric"], row["chance"], tuple(row["columns"])
    )
    for task, row in _CONTENT["benchmarks"].items()
}

BENCHMARK_SIZES: dict[str, dict[str, Any]] = {
    task: row["size"] for task, row in _CONTENT["benchmarks"].items()
}
"""Sizes of the built-in benchmarks: arguments of `TaskSize`."""

HUB_TABLE_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    (dataset, table): size
    for dataset, tables in _CONTENT["tables"].items()
    for table, size in tables.items()
}
"""Sizes of published tables by dataset and table: arguments of `TableSize`."""


def fetch_table(dataset: str, revision: str, table: str, target: Path) -> None:
    """Write a table of a dataset's repository as JSON lines.

    The table is the file TABLE.jsonl or TABLE.json (lines, or one array of rows), or TABLE.parquet,
    which may be split into TABLE-00000-of-00114.parquet and so on.

    Raises:
        InputError: the hub does not provide the table, or its content differs from its digest.
    """
    with atomic_write(target) as temporary, _hub_error_messages(dataset, revision):
        published = _published(dataset, revision, "dataset")
        shard_name = re.compile(re.escape(table) + r"(-\d+-of-\d+(-[0-9a-f]+)?)?\.parquet")
        shards = sorted(filter(shard_name.fullmatch, published))
        json_files = [name for name in (f"{table}.jsonl", f"{table}.json") if name in published]
        if not json_files and not shards:
            names = f"{table}.jsonl, {table}.json, {table}.parquet"
            raise InputError(f"{dataset} at {revision} has none of {names}; check the name")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            fetch = partial(_fetch, dataset, revision, published, Path(folder))
            if json_files:
                _copy_lines(fetch(json_files[0]), temporary)
                return
            with temporary.open("w", encoding="utf-8") as file:
                for shard in shards:
                    path = fetch(shard)
                    file.writelines(_lines(path))
                    path.unlink()


def _fetch(
    repository: str,
    revision: str,
    published: Mapping[str, Any],
    folder: Path,
    name: str,
    kind: str = "dataset",
) -> Path:
    """Download one file of a repository into a folder, and verify it."""
    from huggingface_hub import hf_hub_download

    path = Path(
        hf_hub_download(repository, name, repo_type=kind, revision=revision, local_dir=folder)
    )
    _verify(path, published[name], repository, revision)
    return path


def _published(name: str, revision: str, kind: str) -> dict[str, Any]:
    """Return the sizes and digests that the hub publishes for a repository's files, by path."""
    from huggingface_hub import HfApi, RepoFile

    tree = HfApi().list_repo_tree(name, repo_type=kind, revision=revision, recursive=True)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for path in files:
        if path.startswith("/") or ".." in Path(path).parts:
            raise InputError(f"{name} at {revision}: the file {path} is outside its repository")
    return files


def _verify(path: Path, published: Any, name: str, revision: str) -> None:
    """Compare a file with its published digest: SHA-256 of large files, git's id of others.

    Raises:
        InputError: the digests differ.
    """
    if published.lfs:
        expected, actual = published.lfs.sha256, sha256(path)
    else:
        content = path.read_bytes()
        expected = published.blob_id
        # Git identifies a file by this digest.
        header = b"blob %d\0" % len(content)
        actual = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    if actual != expected:
        raise InputError(
            f"{name} at {revision}: {published.path} was downloaded with another content than the "
            f"hub publishes (digest {actual[:12]} in place of {expected[:12]}); run it again, and "
            "check proxies and the disk if it recurs"
        )


def _copy_lines(path: Path, target: Path) -> None:
    """Copy a file of JSON lines, or write each row of a JSON array as a line."""
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
    """Yield the rows of a parquet file as lines of JSON; dates and similar types become strings."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(1000):
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=str) + "\n"


def fetch_rows(origin: HubDataset, split: str) -> list[dict[str, Any]]:
    """Return all rows of one split, in the published columns.

    Raises:
        InputError: the hub does not provide them, or their content differs from its digest.
    """
    import datasets

    # A temporary cache, so that tables built from a damaged file are not reused.
    with (
        _hub_error_messages(origin.dataset, origin.revision),
        tempfile.TemporaryDirectory() as cache,
    ):
        try:
            rows = datasets.load_dataset(
                origin.dataset,
                origin.config,
                split=split,
                revision=origin.revision,
                cache_dir=cache,
            )
            return [dict(row) for row in rows]
        finally:
            _verify_cache(origin.dataset, origin.revision)


def _verify_cache(dataset: str, revision: str) -> None:
    """Verify the files of a dataset in the hub library's cache, and remove a damaged file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=dataset, repo_type="dataset")
    folder = Path(constants.HF_HUB_CACHE, name, "snapshots", revision)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    published = _published(dataset, revision, "dataset") if files else {}
    for path in files:
        if entry := published.get(path.relative_to(folder).as_posix()):
            try:
                _verify(path, entry, dataset, revision)
            except InputError:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise


def fetch_model(model: str, revision: str, folder: Path) -> None:
    """Download the files of a model into a folder, which is created atomically.

    Raises:
        InputError: the hub does not provide the model, its content differs from its digests, or
            files are missing.
    """
    from huggingface_hub import snapshot_download

    with atomic_folder(folder) as temporary, _hub_error_messages(model, revision):
        published = _published(model, revision, "model")
        weights = _weight_files(model, revision, published, temporary)
        others = {name for name in published if is_model_file(name)}
        names = sorted({*weights, *(name for name in others if not name.endswith(WEIGHT_FILES))})
        snapshot_download(
            model,
            revision=revision,
            local_dir=temporary,
            allow_patterns=[glob.escape(name) for name in names],
        )
        for name in names:
            if not (temporary / name).is_file():
                raise InputError(f"{model} at {revision}: the hub lists {name}, but gives no file")
            _verify(temporary / name, published[name], model, revision)
        # The hub library's record of the download does not belong to the model.
        shutil.rmtree(temporary / ".cache", ignore_errors=True)


def _weight_files(
    model: str, revision: str, published: Mapping[str, Any], folder: Path
) -> Collection[str]:
    """Return the files of a model's weights: a single one, or those that an index names.

    Raises:
        InputError: there are none, or the repository lacks one.
    """
    index = f"model{WEIGHT_FILES}.index.json"
    if f"model{WEIGHT_FILES}" in published:
        return [f"model{WEIGHT_FILES}"]
    if index not in published:
        raise InputError(
            f"{model} at {revision} has neither model.safetensors nor {index}; other formats are "
            "not read"
        )
    path = _fetch(model, revision, published, folder, index, kind="model")
    try:
        named = {str(name) for name in read_foreign_json(path)["weight_map"].values()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{model} at {revision}: {index} is not the index of a model: expected `weight_map`"
        ) from None
    if missing := sorted(named - set(published)):
        raise InputError(
            f"{model} at {revision}: {index} names {missing[0]}, which is not a file of the "
            "repository; take another revision"
        )
    return named


@contextmanager
def _hub_error_messages(name: str, revision: str) -> Iterator[None]:
    """Raise `InputError`, one line with a remedy, in place of any exception in the block."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (fault := disk_fault(error)) is not None:
            where = getattr(error, "filename", None) or name
            raise InputError(f"{where}: not written: {fault}") from None
        raise InputError(f"{name} at {revision}: {_reason(name, error)}") from None


def _reason(name: str, error: BaseException) -> str:
    """Return why the hub does not provide a repository, and the remedy."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    page = f"https://huggingface.co/{name}"
    gated = any("gated dataset" in str(cause) for cause in causes)
    if gated or _first_of_type(causes, errors.GatedRepoError):
        return (
            f"the hub gives it to those only who accepted its conditions; accept them at {page} "
            f"(for a dataset at https://huggingface.co/datasets/{name}), log in with `hf auth "
            f"login`, {USE_LOCAL_FOLDER}"
        )
    if _first_of_type(causes, errors.RevisionNotFoundError):
        return (
            "the hub has this repository, but no such revision; take one of the commits that its "
            "page lists under `Files`, `History`"
        )
    if _first_of_type(causes, errors.RepositoryNotFoundError):
        return (
            "the hub has no such repository, or it is private; check OWNER/NAME, log in with `hf "
            f"auth login` if it is private, {USE_LOCAL_FOLDER}"
        )
    response = getattr(_first_of_type(causes, errors.HfHubHTTPError), "response", None)
    if _first_of_type(causes, errors.RemoteEntryNotFoundError):
        file = str(response.url).partition("/resolve/")[2].partition("/")[2] if response else ""
        return f"the hub lists the file {file}, but does not have it; try again later"
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return (
            f"the hub refuses the access (HTTP {status}); log in with `hf auth login`, or remove "
            "HF_TOKEN if its token is not valid any more"
        )
    if status is not None:
        return f"the hub answers with HTTP {status}; try again later, {USE_LOCAL_FOLDER}"
    if any(_is_network(cause) for cause in causes):
        return (
            f"the hub cannot be reached ({_error_line(error)}); check the network, the proxy and "
            f"HF_ENDPOINT, {USE_LOCAL_FOLDER}"
        )
    return f"it cannot be fetched from the hub ({_error_line(error)}); {USE_LOCAL_FOLDER[3:]}"


def _first_of_type(
    causes: Sequence[BaseException], kind: type[BaseException]
) -> BaseException | None:
    return next((cause for cause in causes if isinstance(cause, kind)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_network(error: BaseException) -> bool:
    """Return whether an exception reports that a connection failed.

    The exceptions of HTTP libraries share a prefix of their module name, but no base class.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    transport = any(
        kind.__module__.startswith("http") and kind.__name__ == "TransportError"
        for kind in type(error).__mro__
    )
    return transport or isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))


def _error_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
