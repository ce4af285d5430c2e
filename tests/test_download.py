"""Tables from the hub: JSON lines as they are, parquet as JSON lines; the network stays out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forgetting.records import read_jsonl, write_jsonl
from scripts import download_table

ROWS = [{"text": " = Title = \n"}, {"text": ""}, {"text": " Größe – 1 <br> \n"}]


@pytest.mark.parametrize("form", [".jsonl", "-00000-of-00001.parquet"])
def test_a_table_is_written_as_json_lines(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / f"test{form}"
    if published.suffix == ".parquet":
        pd.DataFrame(ROWS).to_parquet(published)
    else:
        write_jsonl(published, ROWS)

    def fetch(dataset: str, revision: str, names: list[str]) -> Path:
        assert (dataset, revision) == ("owner/texts", "0" * 40)
        assert f"raw/test{form}" in names
        return published

    monkeypatch.setattr(download_table, "fetch_file", fetch)
    output = tmp_path / "out.jsonl"
    arguments: dict[str, Any] = {
        "dataset": "owner/texts",
        "revision": "0" * 40,
        "table": "raw/test",
        "output": output,
    }
    download_table.main([f"--{key}={value}" for key, value in arguments.items()])
    assert read_jsonl(output) == ROWS
