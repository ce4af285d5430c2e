"""Base class of sections and references to tables."""

from __future__ import annotations

import pytest

from forgetting.config.data import DatasetConfig, TableRef
from forgetting.config.evaluation import GeneralTextConfig
from forgetting.config.study import StudyConfig


def test_model_copy_refuses_unknown_fields() -> None:
    text = GeneralTextConfig(table="own/text")
    assert text.model_copy(update={"block": 8}).block == 8
    with pytest.raises(KeyError, match="GeneralTextConfig has no field block_size"):
        text.model_copy(update={"block_size": 8})


def test_table_ref_splits_at_the_first_slash() -> None:
    ref = TableRef.parse("code/python/train")
    assert (ref.dataset, ref.table) == ("code", "python/train")
    assert str(ref) == "code/python/train"


def test_table_ref_knows_the_origin() -> None:
    datasets = {
        "own": DatasetConfig(folder="somewhere"),
        "world": DatasetConfig(generate="micro-world"),
        "far": DatasetConfig(hub="someone/something", revision="a" * 40),
    }
    study = StudyConfig.model_construct(datasets=datasets)
    origins = [TableRef(name, "rows").origin(study) for name in datasets]
    assert origins == ["folder", "generated", "hub"]
    assert TableRef("own", "rows").config(study) is datasets["own"]
