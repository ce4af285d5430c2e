"""Test that shared prefixes change no log-likelihood, choice or score of the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.hflm import SharedPrefixLM
from forgetting.benchmarks.tasks import TaskSpec, load_task
from forgetting.config.expand import Method
from forgetting.data.microworld import build_world
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("hellaswag", "winogrande", "arc_challenge")
SPLITS = {"hellaswag": "validation", "winogrande": "validation", "arc_challenge": "test"}


@pytest.fixture(scope="module")
def world_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a few rows of the microworld for each task."""
    folder = tmp_path_factory.mktemp("rows")
    for task, splits in build_world(0).benchmarks.items():
        for split, rows in splits.items():
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    return folder


def _requests(rows: Path, limit: int) -> list[Any]:
    found = []
    for name in TASKS:
        task = load_task(TaskSpec(name), rows / name)
        task.build_all_requests(limit=limit)
        found += task.instances
    return found


def _both(model: Any, tokenizer: Any, requests: list[Any], size: int) -> list[Any]:
    return [
        kind(pretrained=model, tokenizer=tokenizer, batch_size=size).loglikelihood(
            requests, disable_tqdm=True
        )
        for kind in (HFLM, SharedPrefixLM)
    ]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_loglikelihoods_equal_the_harness(
    base: Any, tokenizer: PreTrainedTokenizerBase, world_rows: Path, tuning: Method, size: int
) -> None:
    """The model has float64 and an adapter; WinoGrande's choices differ in the context."""
    model = attach_adapter(base, tuning.model_copy(update={"dropout": 0.0}), 0).double().eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.5)
    theirs, ours = _both(model, tokenizer, _requests(world_rows, 12), size)
    assert len(theirs) == len(ours) == 12 * (4 + 2 + 4)
    for (value, greedy), (mine, said) in zip(theirs, ours, strict=True):
        assert mine == pytest.approx(value, abs=1e-9)
        assert said is greedy


@pytest.mark.parametrize("begins", [None, True, False])
def test_tokens_equal_the_harness(
    base: Any, tokenizer: PreTrainedTokenizerBase, begins: bool | None
) -> None:
    """Contexts have trailing spaces, a beginning-of-sequence token, or repeated texts."""
    begin = tokenizer.decode(tokenizer.eos_token_id)
    contexts = ["Who wrote it?", "Who wrote it?  ", f"{begin}Who wrote it?", "  ", "A\n"]
    pairs = [(context, end) for context in contexts for end in (" Jane", "Jane Eyre", " Jane")]
    theirs, ours = (
        kind(pretrained=base, tokenizer=tokenizer, batch_size=1, add_bos_token=begins)
        for kind in (HFLM, SharedPrefixLM)
    )
    ours._encode_pairs(pairs)
    for pair in pairs:
        assert ours._encode_pair(*pair) == theirs._encode_pair(*pair)


def test_truncation_equals_the_harness(
    base: Any, tokenizer: PreTrainedTokenizerBase, world_rows: Path
) -> None:
    requests = _requests(world_rows, 3)
    for request in requests:
        context, continuation = request.arguments
        request.arguments = (context * 40, continuation)
    theirs, ours = _both(base.double().eval(), tokenizer, requests, 4)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-9)


def test_question_is_read_once(
    base: Any, tokenizer: PreTrainedTokenizerBase, world_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model reads fewer tokens; the harness serves models without custom masks."""
    requests, fed = _requests(world_rows, 8), 0
    forward = base.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal fed
        fed += (args[0] if args else kwargs["input_ids"]).numel()
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", counted)
    counts = []
    for kind in (HFLM, SharedPrefixLM):
        fed = 0
        lm = kind(pretrained=base, tokenizer=tokenizer, batch_size=1)
        lm.loglikelihood(requests, disable_tqdm=True)
        counts.append(fed)
    assert counts[1] < 0.7 * counts[0]
    monkeypatch.setattr("forgetting.benchmarks.hflm.supports_custom_mask", lambda _: False)
    fed = 0
    lm.loglikelihood(requests, disable_tqdm=True)
    assert fed == counts[0]


@pytest.mark.real_data
def test_scores_on_real_rows_equal_the_harness(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This covers HellaSwag, WinoGrande and ARC with a real model at several batch sizes."""
    folder = real_data / "stories260K"
    model, tokenizer = load_base(folder, torch.device("cpu")).eval(), load_tokenizer(folder)
    specs = [TaskSpec(name, limit=25) for name in TASKS]
    ours = [run_benchmarks(model, tokenizer, specs, real_data, size) for size in (1, 7, 64)]
    monkeypatch.setattr("forgetting.benchmarks.hflm.SharedPrefixLM", HFLM)
    theirs = run_benchmarks(model, tokenizer, specs, real_data, 16)
    for result in ours:
        pd.testing.assert_frame_equal(result.scores, theirs.scores)
        pd.testing.assert_frame_equal(result.items, theirs.items)
        for mine, other in zip(
            result.responses["response"], theirs.responses["response"], strict=True
        ):
            assert json.loads(mine) == pytest.approx(json.loads(other), rel=1e-4)
