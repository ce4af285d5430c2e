"""The model types in the library agree with the installed transformers.

Run as a program, this file writes them:

    PYTHONPATH=workflow python tests/unit/models/test_model_types.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# transformers has no public list of the models whose weights it renames at loading.
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forgetting.models import model_types

UPDATE = (
    "transformers has other model types: run "
    "`PYTHONPATH=workflow python tests/unit/models/test_model_types.py` and commit model_types.py"
)

CAUSAL = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# The table has model types, in lower case, and classes; other types than causal ones are refused.
RENAMED = tuple(
    sorted(
        name
        for name in _build_checkpoint_conversion_mapping()
        if name in CAUSAL or not name.islower()
    )
)


def test_causal_model_types_are_those_of_transformers() -> None:
    assert model_types.CAUSAL_MODEL_TYPES == CAUSAL, UPDATE


def test_renamed_models_are_those_of_transformers() -> None:
    assert model_types.RENAMED_MODELS == RENAMED, UPDATE


def _with_names(source: str, variable: str, names: Sequence[str]) -> str:
    """Return the source with other names in one of its tuples."""
    before, opening, rest = source.partition(f"{variable} = (\n")
    _, closing, after = rest.partition(")\n")
    lines = "".join(f'    "{name}",\n' for name in names)
    return before + opening + lines + closing + after


if __name__ == "__main__":
    path = Path(model_types.__file__)
    text = _with_names(path.read_text(encoding="utf-8"), "CAUSAL_MODEL_TYPES", CAUSAL)
    path.write_text(_with_names(text, "RENAMED_MODELS", RENAMED), encoding="utf-8")
