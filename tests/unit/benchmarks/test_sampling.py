"""Sampled answers: distribution, reproducibility, independence of batch and order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.hflm import sample_seed, sample_top_p
from forgetting.benchmarks.programs import PassRate, Program, pass_at_k
from forgetting.benchmarks.sandbox import Outcome
from forgetting.benchmarks.scores import program_items, score_programs
from forgetting.benchmarks.tasks import SamplingConfig, TaskSpec
from support.models import byte_tokenizer, random_llama, write_rows

FUNCTIONS = [
    {
        "task_id": f"made/{n}",
        "prompt": f"def add_{'very_' * n}{n}(x):\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + n}\n",
        "entry_point": f"add_{n}",
    }
    for n in range(3)
]
SAMPLING = SamplingConfig(5, temperature=1.5, top_p=0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows of HumanEval and return their folder."""
    return write_rows(tmp_path_factory.mktemp("rows"), {"humaneval": {"test": FUNCTIONS}})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a random model in double precision, so that rounding changes no answer."""
    return random_llama(context=512).double()


def _programs(model: Any, tokenizer: Any, folder: Path, **settings: Any) -> list[Program]:
    size, seed = settings.pop("batch_size", 4), settings.pop("seed", 1234)
    spec = TaskSpec("humaneval", max_gen_toks=12, **{"sampling": SAMPLING, **settings})
    return run_benchmarks(model, tokenizer, [spec], folder, size, seed).programs


def test_sampled_answer_depends_on_neither_batch_nor_order(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    """Batch size, number of samples and order of rows do not change an answer."""
    found = _programs(model, tokenizer, folder, batch_size=1)
    assert [(p.item, p.sample) for p in found] == [(i, s) for i in range(3) for s in range(5)]
    assert len({p.program for p in found}) > 10  # the samples differ
    for size in (7, 64):
        assert _programs(model, tokenizer, folder, batch_size=size) == found
    fewer = _programs(model, tokenizer, folder, sampling=SamplingConfig(2, 1.5, 0.95))
    assert fewer == [p for p in found if p.sample < 2]
    (tmp_path / "humaneval").mkdir()
    lines = (folder / "humaneval" / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "humaneval" / "test.jsonl").write_text("".join(reversed(lines)))
    turned = _programs(model, tokenizer, tmp_path)
    assert {p.program for p in turned} == {p.program for p in found}
    other = _programs(model, tokenizer, folder, seed=7)
    assert {p.program for p in other} != {p.program for p in found}


def test_sampling_at_zero_temperature_equals_greedy(
    model: Any, tokenizer: Any, folder: Path
) -> None:
    """Prompts, stops and truncation equal those of the harness."""
    greedy = _programs(model, tokenizer, folder, sampling=None)
    cold = _programs(model, tokenizer, folder, sampling=SamplingConfig(2, 1e-6, 1.0))
    assert [p.program for p in cold if p.sample == 0] == [p.program for p in greedy]
    assert [p.program for p in cold if p.sample == 1] == [p.program for p in greedy]


def test_sampled_answer_ends_at_the_first_stop(
    model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop may span several tokens. Nothing after it is generated or kept."""
    import forgetting.benchmarks.hflm as sampling

    text = tokenizer.encode("  ok\nprint(1)", add_special_tokens=False)
    calls = 0

    def scripted(logits: Any, numbers: Any, *_: Any) -> Any:
        nonlocal calls
        calls += 1
        return torch.full((len(logits),), text[min(calls, len(text)) - 1])

    monkeypatch.setattr(sampling, "sample_top_p", scripted)
    spec = TaskSpec("humaneval", limit=1, max_gen_toks=100, sampling=SamplingConfig(3))
    found = run_benchmarks(model, tokenizer, [spec], folder, 4).programs
    assert [p.program for p in found] == [FUNCTIONS[0]["prompt"] + "  ok"] * 3
    assert calls == len("  ok\nprint")


def test_sample_top_p_follows_the_renormalised_softmax() -> None:
    """Frequencies of the kept tokens are their renormalised softmax at the temperature."""
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = sample_top_p(logits.expand(10_000, -1), numbers, 1.0, 0.9)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    # 0.5 and 0.3 reach 0.8, so that the 0.15 which passes 0.9 is the last that is kept.
    expected = torch.tensor([0.0, 0.5, 0.15, 0.3]) / 0.95
    assert torch.allclose(shares, expected, atol=2e-4)
    hot = sample_top_p(logits.expand(10_000, -1), numbers, 2.0, 1.0)
    roots = torch.tensor([0.05, 0.5, 0.15, 0.3]).sqrt()
    assert torch.allclose(torch.bincount(hot) / 10_000, roots / roots.sum(), atol=2e-4)


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53])
def test_sample_top_p_at_extreme_numbers_stays_in_the_nucleus(number: float) -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    drawn = sample_top_p(logits, torch.full((8,), number, dtype=torch.float64), 0.7, 0.5)
    ranks = (logits > logits.gather(1, drawn[:, None])).sum(1)
    heaps = torch.softmax(logits / 0.7, 1).sort(descending=True).values.cumsum(1)
    for rank, heap in zip(ranks.tolist(), heaps, strict=True):
        assert rank == (0 if number == 0.0 else int((heap < 0.5).sum()))


def test_sample_seed_differs_by_seed_prompt_and_sample() -> None:
    streams = [sample_seed(s, p, n) for s in range(3) for p in ("a", "b") for n in range(3)]
    assert len(set(streams)) == len(streams) and min(streams) >= 0


def test_program_items_are_pass_at_k_and_diversity() -> None:
    """Items have Chen's estimator and the number of different answers that pass or fail."""
    texts = ["a", "a", "b", "c", "c", "d"]
    programs = [Program("humaneval", "h/0", 0, n, text, "") for n, text in enumerate(texts)]
    outcomes = [Outcome("passed" if text in "ab" else "failed") for text in texts]
    rates = {"humaneval": PassRate((1, 4))}
    items = program_items(programs, outcomes, rates).set_index("metric").value.to_dict()
    assert items == {
        "pass@1,create_test": pytest.approx(0.5),
        "pass@4,create_test": pytest.approx(pass_at_k(6, 3, 4)),
        "distinct_passing,create_test": 2.0,
        "distinct_failing,create_test": 2.0,
    }
    scores = score_programs(programs, outcomes, rates)
    assert scores.metric[scores.main].tolist() == ["pass@1,create_test"]
    one = program_items(programs[:1], outcomes[:1], rates)
    assert one.metric.tolist() == ["pass@1,create_test"]
