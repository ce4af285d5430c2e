"""Evaluate the base model, and interpolations between it and a tuned model (WiSE-FT)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetting.config.job_params import EvaluateBaseParams, EvaluateWiseFtParams
from forgetting.data.checks import SourceLocator
from forgetting.data.table_files import Row
from forgetting.data.tables import joined_text, read_prepared
from forgetting.data.tokenize import encode_pair
from forgetting.errors import InputError
from forgetting.evaluation.divergence import (
    BasePredictions,
    append_divergence,
    compute_base_predictions,
    cut_blocks,
    load_base_predictions,
    save_base_predictions,
)
from forgetting.evaluation.metrics import mean_score
from forgetting.evaluation.probes import check_context_length, evaluate_probes
from forgetting.evaluation.rouge import check_references, length_notes, unknown_probe_warnings
from forgetting.models.adapters import adapter_layers, is_tied
from forgetting.models.loading import (
    Model,
    autocast,
    check_causal,
    check_finite,
    get_device,
    load_base,
    load_tokenizer,
    read_base,
    resolve_precision,
)
from forgetting.models.tuned import load_tuned
from forgetting.system import describe_computation


@dataclass(frozen=True)
class LoadedBase:
    """The base model of a study on the device that evaluates it.

    Attributes:
        parameters: number of weights in its record.
    """

    folder: Path
    parameters: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: torch.dtype

    @classmethod
    def load(cls, record: Path, precision: str) -> LoadedBase:
        """Load the model that a record names; `precision` is that of the study."""
        base, device = read_base(record), get_device()
        folder, parameters = Path(base["path"]), base["parameters"]
        model, tokenizer = load_base(folder, device, parameters), load_tokenizer(folder)
        dtype = resolve_precision(precision, device)
        return cls(folder, parameters, model, tokenizer, device, dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which models compute in the study's precision."""
        return autocast(self.device, self.precision)


def evaluate_base(
    base: LoadedBase,
    params: EvaluateBaseParams,
    probe_files: Sequence[Path],
    text: Path | None,
    predictions_file: Path | None,
) -> pd.DataFrame:
    """Score the base on every probe, the zero point of forgetting.

    Args:
        base: the model.
        params: settings of the study.
        probe_files: prepared questions, NAME.jsonl of each probe.
        text: table of the general text, if the study has one.
        predictions_file: receives the base's predictions on that text.

    Returns:
        The columns of `evaluate_probes` and `append_divergence`, and reference_tokens, the tokens
        of each reference answer.

    Raises:
        InputError: a weight is not finite, the model sees its targets, a question is longer than
            the context, a reference answer is longer than the generated ones, or the selection
            metric is not finite.
    """
    check_finite(base.model, base.folder)
    check_causal(base.model, base.folder)
    probes = _read_probes(probe_files)
    where = SourceLocator(probe_files[0].parents[1])
    model, tokenizer, config = base.model, base.tokenizer, params.evaluation
    check_context_length(model, tokenizer, probes, params.prompt, config, where)
    # One of the targets is the end of the sequence, which nobody has to generate.
    lengths = {
        name: [
            encode_pair(tokenizer, params.prompt, row["question"], row["answer"]).targets - 1
            for row in rows
        ]
        for name, rows in probes.items()
    }
    if params.must_reach and params.metric.startswith("rouge"):
        check_references(lengths[params.watched], params.watched, config.max_new_tokens)
    with base.autocast():
        items = evaluate_probes(model, tokenizer, probes, params.prompt, config)
        items["reference_tokens"] = [length for name in probes for length in lengths[name]]
        predictions = _predict_text(base, params, text)
        if predictions and predictions_file:
            save_base_predictions(predictions, predictions_file)
        items = append_divergence(items, model, predictions)
    if not math.isfinite(mean_score(items, params.watched, params.metric)):
        raise InputError(
            f"selection.metric: {params.metric} of the base on {params.watched} is no finite "
            "number; choose another metric or probe"
        )
    items.attrs["computed"] = describe_computation(base.device, base.precision)
    return items


def base_notes(items: pd.DataFrame, params: EvaluateBaseParams) -> list[str]:
    """Return warnings on the scores of the base, and a line on each probe."""
    notes = length_notes(items, params.evaluation.max_new_tokens)
    notes += unknown_probe_warnings(items, params.knowledge)
    lines = [f"base, {line}, n={count}" for line, count in _recalls(items, params.knowledge)]
    return [*(f"warning: {note}" for note in notes), *lines]


def interpolated_weights(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return theta0 + alpha * (theta - theta0), exact at 0 and 1.

    See Wortsman et al. (2022, arXiv 2109.01903). For an adapter whose update is scale*B*A, the
    result equals the adapter with alpha * scale.
    """
    return {
        name: torch.lerp(base[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def interpolated_models(
    base: PreTrainedModel, tuned: Model, alphas: Sequence[float]
) -> Iterator[tuple[float, PreTrainedModel]]:
    """Yield each alpha with the interpolated model, which replaces the weights of `base`.

    Adapters are merged first, so that one definition serves every variant: a smaller scale of a
    dora adapter would keep the tuned magnitudes.

    Raises:
        InputError: an adapter updates a weight that input embedding and LM head share.
    """
    if isinstance(tuned, PeftModel):
        if any(is_tied(tuned, layer) for layer in adapter_layers(tuned)):
            raise InputError(
                "target_modules: the input embedding and the LM head share their weights, so that "
                "to merge the adapter of one would change both; interpolate other methods"
            )
        tuned = tuned.merge_and_unload()
    # Copies on the host, so that the device holds at most two models.
    start, end = ({n: t.cpu().clone() for n, t in m.state_dict().items()} for m in (base, tuned))
    for alpha in alphas:
        base.load_state_dict(interpolated_weights(start, end, alpha))
        yield alpha, base


def evaluate_wise_ft(
    base: LoadedBase,
    checkpoint: Path,
    params: EvaluateWiseFtParams,
    probe_files: Sequence[Path],
    predictions_file: Path | None,
) -> Iterator[pd.DataFrame]:
    """Yield the items of a checkpoint with each share of its update, and column `share`.

    Args:
        base: the base model, whose weights are replaced.
        checkpoint: folder of the tuned weights.
        params: settings of the study.
        probe_files: prepared questions, NAME.jsonl of each probe.
        predictions_file: the base's predictions on the general text, if the study has one.
    """
    probes = _read_probes(probe_files)
    tuned = load_tuned(base.folder, checkpoint, base.device, base.parameters)
    predictions = load_base_predictions(predictions_file) if predictions_file else None
    for share, scaled in interpolated_models(base.model, tuned, params.shares):
        with base.autocast():
            items = evaluate_probes(
                scaled, base.tokenizer, probes, params.prompt, params.evaluation
            )
            items = append_divergence(items, scaled, predictions)
        items.insert(0, "share", share)
        for line, _ in _recalls(items, probes):
            print(f"{share:g} of the update, {line}", flush=True)
        yield items


def _read_probes(files: Sequence[Path]) -> dict[str, list[Row]]:
    return {path.stem: read_prepared(path) for path in files}


def _predict_text(
    base: LoadedBase, params: EvaluateBaseParams, path: Path | None
) -> BasePredictions | None:
    """Return the base's predictions on the general text, if the study has one."""
    text = params.general_text
    if text is None or path is None:
        return None
    joined = joined_text(path, params.columns[text.table])
    blocks = cut_blocks(base.tokenizer, joined, text.block, text.limit)
    return compute_base_predictions(base.model, blocks, text.batch_size)


def _recalls(items: pd.DataFrame, probes: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Yield a line with the mean ROUGE-L recall on each probe, and the number of its items."""
    for name in probes:
        recall = items.loc[items["probe"] == name, "rougeL_recall"]
        yield f"{name}: ROUGE-L recall {recall.mean():.3f}", len(recall)
