"""The model types that the library knows are those of the installed transformers.

Run as a program, this file writes them:

    PYTHONPATH=workflow python tests/unit/models/test_model_types.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING

# transformers has no public list of the models whose weights it renames at loading.
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from forgetting.models import config_file

UPDATE = (
    "transformers has other model types: run "
    "`PYTHONPATH=workflow python tests/unit/models/test_model_types.py` and commit model_types.json"
)
CONVERSIONS = set(_build_checkpoint_conversion_mapping())
"""Model types and classes whose weights transformers renames or merges."""


def _is_renamed(model_type: str, model_class: str) -> bool:
    """Return whether weights of the type, its language model, or one of their classes change."""
    sections = CONFIG_MAPPING[model_type].sub_configs.values()
    types = {model_type, *(getattr(section, "model_type", None) for section in sections)}
    classes = {model_class, *(MODEL_MAPPING_NAMES.get(name) for name in types)}
    return bool((types | classes) & CONVERSIONS)


def _types_of_transformers() -> dict[str, list[str]]:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    renamed = [name for name, model_class in causal.items() if _is_renamed(name, model_class)]
    return {"causal": sorted(causal), "renamed": sorted(renamed)}


def test_model_types_are_those_of_transformers() -> None:
    assert _types_of_transformers() == config_file.MODEL_TYPES, UPDATE


if __name__ == "__main__":
    content = json.dumps(_types_of_transformers(), indent=2) + "\n"
    Path(config_file.__file__).with_name("model_types.json").write_text(content, encoding="utf-8")
