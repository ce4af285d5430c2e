"""Test that prompts, answers and scores equal those of the lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forgetting.benchmarks import evaluate
from forgetting.benchmarks import tasks as benchmark_tasks
from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.programs import (
    PassRate,
    Program,
    describe,
    pass_at_k,
    read_programs,
    read_rates,
)
from forgetting.benchmarks.registry import benchmark
from forgetting.benchmarks.sandbox import Outcome, search_sandbox
from forgetting.benchmarks.scores import BenchmarkResult, program_items, score_programs
from forgetting.benchmarks.task_definitions import read_task_definition
from forgetting.benchmarks.tasks import TaskSpec, load_task, without_code_eval
from forgetting.data.hub import HUB_DATASETS
from forgetting.errors import InputError
from support.models import byte_tokenizer, random_llama, write_rows

REAL_DATA = Path(
    os.environ.get("FORGETTING_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "humaneval").is_dir(), reason=f"there is no real data in {REAL_DATA}"
)

Rows = list[dict[str, Any]]


def _sums(numbers: range) -> Rows:
    return [
        {
            "question": f"Ann has {n} apples and buys {n + 1} more. How many has she now?",
            "answer": f"She has {n} + {n + 1} = {2 * n + 1} apples.\n#### {2 * n + 1}",
        }
        for n in numbers
    ]


def _functions() -> Rows:
    return [
        {
            "task_id": f"made/{n}",
            "prompt": f'def add_{n}(x):\n    """Return x plus {n}."""\n',
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + n}\n",
            "entry_point": f"add_{n}",
        }
        for n in range(4)
    ]


def _endings(numbers: range) -> Rows:
    return [
        {
            "ind": n,
            "activity_label": "Cooking",
            "ctx_a": f"A man takes {n} eggs. [header] He breaks them.",
            "ctx_b": "then he",
            "ctx": "",
            "endings": ["fries them [title] well.", "flies away.", "sings.", "reads an egg."],
            "source_id": str(n),
            "split": "val",
            "split_type": "indomain",
            "label": str(n % 4),
        }
        for n in numbers
    ]


def _pronouns(numbers: range) -> Rows:
    return [
        {
            "sentence": f"The cup {n} fell off the table because the _ was wet.",
            "option1": "cup",
            "option2": "table",
            "answer": str(1 + n % 2),
        }
        for n in numbers
    ]


def _facts(numbers: range) -> Rows:
    return [
        {
            "id": f"fact-{n}",
            "question": f"Which of these is hot? (number {n})",
            "choices": {"text": ["ice", "the sun", "a lake", "snow"], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        }
        for n in numbers
    ]


ROWS: dict[str, dict[str, Rows]] = {
    "gsm8k": {"train": _sums(range(100, 112)), "test": _sums(range(1, 6))},
    "humaneval": {"test": _functions()},
    "hellaswag": {"train": _endings(range(50, 60)), "validation": _endings(range(7))},
    "winogrande": {"train": _pronouns(range(50, 60)), "validation": _pronouns(range(6))},
    "arc_challenge": {
        "train": _facts(range(50, 60)),
        "validation": _facts(range(90, 95)),
        "test": _facts(range(6)),
    },
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, since models of this size gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the made-up rows as files."""
    return write_rows(tmp_path_factory.mktemp("benchmarks"), ROWS)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Return a tokenizer of bytes, which encodes any text."""
    return byte_tokenizer()


def _tiny_model(context: int = 2048) -> Any:
    return random_llama(context, layers=2)


@pytest.fixture(scope="session")
def model() -> Any:
    """Return a random model whose answers differ between questions."""
    return _tiny_model()


def _serve(monkeypatch: pytest.MonkeyPatch, rows: dict[str, dict[str, Rows]]) -> None:
    """Serve these rows from a stub of the hub, under the names of the real datasets."""
    import datasets

    names = {read_task_definition(task).dataset: task for task in HUB_DATASETS}

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        splits = rows[names[path, name]]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(found) for split, found in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the made-up rows from a stub of the hub."""
    _serve(monkeypatch, ROWS)


def _untouched(name: str) -> Any:
    """Return the harness's task exactly as defined."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = (Path(lm_eval.__file__).parent / "tasks" / benchmark(name).definition).parent
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with without_code_eval(name == "humaneval"):
        return manager.load([name])["tasks"][name]


def _prompts(task: Any) -> list[Any]:
    task.build_all_requests()
    return [(instance.request_type, instance.doc_id, instance.args) for instance in task.instances]


SPECS = [
    TaskSpec("gsm8k", limit=4, max_gen_toks=24),
    TaskSpec("humaneval", limit=3, max_gen_toks=24),
    TaskSpec("hellaswag"),
    TaskSpec("winogrande", limit=5),
    TaskSpec("arc_challenge"),
]


@pytest.mark.parametrize("name", list(HUB_DATASETS))
@pytest.mark.parametrize("shots", [None, 0, 2])
def test_prompts_are_those_of_the_hub_definition(
    name: str, shots: int | None, rows_dir: Path, hub: None
) -> None:
    """Local rows give exactly the requests of the definition."""
    if name == "humaneval" and shots:
        pytest.skip("the task is defined without examples")
    theirs = _untouched(name)
    if shots is not None:
        theirs.set_config("num_fewshot", shots)
    elif theirs.config.num_fewshot is None:
        theirs.set_config("num_fewshot", 0)
    theirs.set_fewshot_seed(seed=1234)
    ours = load_task(TaskSpec(name, num_fewshot=shots), rows_dir / name)
    assert _prompts(ours) == _prompts(theirs)


def test_hub_dataset_is_used_without_rows(rows_dir: Path, hub: None) -> None:
    """Without a folder the task takes its rows from the hub, and they are the same."""
    from_hub = load_task("winogrande")
    from_files = load_task("winogrande", rows_dir / "winogrande")
    assert _prompts(from_hub) == _prompts(from_files)


def _harness_results(model: Any, tokenizer: Any, tasks: list[Any], **options: Any) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        **options,
    )


def _assert_same(ours: BenchmarkResult, theirs: Any, tasks: list[str]) -> None:
    """Assert that every metric, standard error and item equals the harness's."""
    for task in tasks:
        table = ours.scores[ours.scores.task == task].set_index("metric")
        result = theirs["results"][task]
        keys = {key for key in result if "," in key and "_stderr," not in key}
        assert set(table.index) == keys
        for key in keys:
            metric, kind = key.split(",")
            assert table.value[key] == result[key]
            assert table.stderr[key] == pytest.approx(result[f"{metric}_stderr,{kind}"], rel=1e-12)
            assert table.n[key] == result["sample_len"]
        items = ours.items[ours.items.task == task].set_index(["metric", "item"]).value
        for sample in theirs["samples"][task]:
            for metric in sample["metrics"]:
                assert items[f"{metric},{sample['filter']}", sample["doc_id"]] == sample[metric]
        hashes = {sample["doc_id"]: sample["prompt_hash"] for sample in theirs["samples"][task]}
        answers = ours.responses[ours.responses.task == task]
        assert dict(zip(answers.item, answers.prompt_hash, strict=True)) == hashes


def test_scores_equal_simple_evaluate(
    model: Any, tokenizer: Any, rows_dir: Path, hub: None
) -> None:
    """Scores, errors and items are those of the harness's own entry point and definitions."""
    scored = ["gsm8k", "hellaswag", "winogrande", "arc_challenge"]
    ours = run_benchmarks(
        model,
        tokenizer,
        [TaskSpec(name, limit=5, max_gen_toks=24 if name == "gsm8k" else None) for name in scored],
        rows_dir,
        batch_size=4,
    )
    tasks = [_untouched(name) for name in scored]
    assert ours.examples == {task.config.task: task.config.num_fewshot or 0 for task in tasks}
    theirs = _harness_results(
        model, tokenizer, tasks, limit=5, gen_kwargs={"max_gen_toks": 24}, log_samples=True
    )
    _assert_same(ours, theirs, scored)
    main = ours.scores[ours.scores.main].set_index("task").metric.to_dict()
    assert main == {name: benchmark(name).main_metric for name in scored}


def test_programs_equal_predict_only(model: Any, tokenizer: Any, rows_dir: Path, hub: None) -> None:
    """HumanEval's programs and tests are those that the harness would have run."""
    ours = run_benchmarks(model, tokenizer, [SPECS[1]], rows_dir, batch_size=4)
    theirs = _harness_results(
        model,
        tokenizer,
        [_untouched("humaneval")],
        limit=3,
        gen_kwargs={"max_gen_toks": 24},
        predict_only=True,
        confirm_run_unsafe_code=True,
    )
    samples = theirs["samples"]["humaneval"]
    assert [p.program for p in ours.programs] == [s["filtered_resps"][0][0] for s in samples]
    assert [p.tests for p in ours.programs] == [s["target"] for s in samples]
    assert [p.task_id for p in ours.programs] == ["made/0", "made/1", "made/2"]
    assert ours.scores.empty and ours.items.empty and len(ours.responses) == 3


def test_tasks_score_alike_together_and_separately(
    model: Any, tokenizer: Any, rows_dir: Path
) -> None:
    """Neither other tasks nor the batch size change a score."""
    together = run_benchmarks(model, tokenizer, SPECS, rows_dir, batch_size=16)
    for spec in SPECS:
        alone = run_benchmarks(model, tokenizer, [spec], rows_dir, batch_size=1)
        mine = together.scores[together.scores.task == spec.name].reset_index(drop=True)
        assert mine.equals(alone.scores) or mine.empty
        texts = together.responses[together.responses.task == spec.name].response.tolist()
        for text, again in zip(texts, alone.responses.response, strict=True):
            if text.startswith("[") and spec.name not in ("gsm8k", "humaneval"):
                assert json.loads(text) == pytest.approx(json.loads(again), rel=1e-4)
            else:
                assert text == again


def test_zero_adapter_scores_like_the_base(model: Any, tokenizer: Any, rows_dir: Path) -> None:
    """A PeftModel is accepted, and an untrained adapter changes nothing."""
    from peft import LoraConfig, get_peft_model

    base = run_benchmarks(_tiny_model(), tokenizer, SPECS, rows_dir)
    adapted = get_peft_model(_tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    tuned = run_benchmarks(adapted, tokenizer, SPECS, rows_dir)
    assert tuned.scores.equals(base.scores)
    assert tuned.responses.equals(base.responses)
    assert tuned.programs == base.programs


def test_evaluation_leaves_no_trace(tokenizer: Any, rows_dir: Path) -> None:
    """Training mode, random state and tokenizer are restored."""
    model = _tiny_model().train()
    state, pad = torch.get_rng_state(), tokenizer.pad_token
    run_benchmarks(model, tokenizer, [SPECS[3]], rows_dir)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.pad_token == pad


def test_truncated_prompts_are_noted(tokenizer: Any, rows_dir: Path) -> None:
    """The note counts the truncated prompts exactly."""
    specs = [TaskSpec("gsm8k", limit=3, max_gen_toks=8), TaskSpec("arc_challenge", limit=2)]
    result = run_benchmarks(_tiny_model(context=128), tokenizer, specs, rows_dir)
    assert result.notes == [
        "gsm8k: 3 of 3 prompts are longer than the model's context (128 tokens, 8 of them "
        "reserved for the answer) and lost their beginning."
    ]


def test_truncation_is_counted_at_the_boundary(tokenizer: Any, rows_dir: Path) -> None:
    """The note agrees with the harness about the first prompt that does not fit."""
    spec = TaskSpec("gsm8k", num_fewshot=0, limit=1, max_gen_toks=8)
    row = ROWS["gsm8k"]["test"][0]
    length = len(tokenizer(f"Question: {row['question']}\nAnswer:").input_ids)
    fits = run_benchmarks(_tiny_model(context=length + 8), tokenizer, [spec], rows_dir)
    cut = run_benchmarks(_tiny_model(context=length + 7), tokenizer, [spec], rows_dir)
    assert fits.notes == [] and len(cut.notes) == 1


def test_answers_longer_than_the_context_are_refused(tokenizer: Any, rows_dir: Path) -> None:
    """HumanEval's 1024 tokens do not fit a small model; the error comes before any computation."""
    with pytest.raises(InputError, match="1024 tokens, but the model's context has 512"):
        run_benchmarks(_tiny_model(context=512), tokenizer, [TaskSpec("humaneval")], rows_dir)


def test_task_with_missing_folder_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'gsm8k': there is no folder .*gsm8k with its rows"):
        run_benchmarks(model, tokenizer, [TaskSpec("gsm8k")], tmp_path)


@pytest.mark.parametrize("name", HUB_DATASETS)
def test_registry_equals_what_the_task_reads(name: str, rows_dir: Path) -> None:
    """Examples in the prompt and the longest answer are those of the definition."""
    from lm_eval.models.huggingface import HFLM

    task = load_task(name, rows_dir / name)
    known = benchmark(name)
    assert task.config.num_fewshot == known.num_fewshot
    assert (task.OUTPUT_TYPE == "generate_until") == (known.max_gen_toks is not None)
    if known.max_gen_toks:
        lm = SimpleNamespace(max_gen_toks=HFLM.max_gen_toks.fget(None))  # type: ignore[attr-defined]
        assert evaluate._max_gen_toks(task, lm) == known.max_gen_toks


def test_missing_download_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub, one sentence names dataset and remedy within seconds."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/nonexistent")
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"'openai/gsm8k' is neither .* JSON lines"):
        load_task("gsm8k")
    assert time.monotonic() - begin < 10


def test_unreachable_hub_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer puts this process into offline mode, without retries."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    benchmark_tasks._go_offline_if_unreachable.cache_clear()
    benchmark_tasks._go_offline_if_unreachable()
    benchmark_tasks._go_offline_if_unreachable.cache_clear()
    assert constants.HF_HUB_OFFLINE is True
    assert datasets.config.HF_HUB_OFFLINE is True


def test_bad_input_is_reported_with_file_and_remedy(tmp_path: Path, rows_dir: Path) -> None:
    """This covers unknown tasks, bad rows, too few examples and impossible settings."""
    (tmp_path / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(InputError, match=r"test.jsonl, line 2: the column 'answer' is missing"):
        load_task(TaskSpec("gsm8k", num_fewshot=0), tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": \n')
    with pytest.raises(InputError, match=r"test.jsonl, line 1: not a JSON object"):
        load_task(TaskSpec("gsm8k", num_fewshot=0), tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(InputError, match=r"test.jsonl: has no rows"):
        load_task(TaskSpec("gsm8k", num_fewshot=0), tmp_path)
    with pytest.raises(InputError, match=r"train.jsonl: there is no such file"):
        (tmp_path / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
        load_task("gsm8k", tmp_path)
    with pytest.raises(InputError, match="there are 12; lower num_fewshot"):
        load_task(TaskSpec("gsm8k", num_fewshot=12), rows_dir / "gsm8k")
    with pytest.raises(InputError, match="defined without examples"):
        load_task(TaskSpec("humaneval", num_fewshot=1), rows_dir / "humaneval")
    with pytest.raises(InputError, match="has no task no_such_task"):
        load_task("no_such_task")


def test_code_eval_stub_is_removed(rows_dir: Path) -> None:
    """Loading HumanEval leaves no module that imported the stub."""
    before = sys.modules.get("evaluate")
    load_task("humaneval", rows_dir / "humaneval")
    assert sys.modules.get("evaluate") is before
    assert "lm_eval.tasks.humaneval.utils" not in sys.modules


class _Oracle:
    """Model that answers with the canonical solutions, except for the items in `wrong`."""

    def __init__(self, rows: Rows, wrong: set[int]) -> None:
        self.answers = {
            row["prompt"]: "    return 'wrong'\n" if n in wrong else row["canonical_solution"]
            for n, row in enumerate(rows)
        }
        self.rank, self.world_size, self.max_length, self.max_gen_toks = 0, 1, 4096, 256

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.answers[request.args[0]] for request in requests]

    def tok_encode(self, text: str) -> list[int]:
        return list(text.encode())


def _oracle_score(
    monkeypatch: pytest.MonkeyPatch, model: Any, folder: Path, wrong: set[int]
) -> Any:
    sandbox, why = search_sandbox()
    if sandbox is None:
        pytest.skip(f"no sandbox: {why}")
    lines = (folder / "humaneval" / "test.jsonl").read_text().splitlines()
    oracle = _Oracle([json.loads(line) for line in lines], wrong)
    monkeypatch.setattr(evaluate, "_wrap_model", lambda *_: oracle)
    result = run_benchmarks(model, None, [TaskSpec("humaneval")], folder)
    outcomes = sandbox.run_programs([(p.program, p.tests) for p in result.programs], timeout=10)
    return score_programs(result.programs, outcomes).iloc[0]


def test_oracle_solves_every_made_up_function(
    monkeypatch: pytest.MonkeyPatch, model: Any, rows_dir: Path
) -> None:
    """Right solutions pass the sandbox, and a wrong one fails."""
    assert _oracle_score(monkeypatch, model, rows_dir, set()).value == 1.0
    row = _oracle_score(monkeypatch, model, rows_dir, {2})
    assert row.value == 0.75 and row.n == 4 and row.main
    assert row.stderr == pytest.approx(0.25)


@pytest.mark.real_data
@needs_real_data
@pytest.mark.slow
def test_oracle_solves_humaneval(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """All 164 canonical solutions pass; with 41 replaced by nonsense exactly 3/4 do."""
    assert _oracle_score(monkeypatch, model, REAL_DATA, set()).value == 1.0
    assert _oracle_score(monkeypatch, model, REAL_DATA, set(range(0, 164, 4))).value == 0.75


@pytest.mark.real_data
@needs_real_data
def test_real_model_on_real_rows_equals_simple_evaluate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores and items of stories260K on real rows equal the harness's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = REAL_DATA / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ["gsm8k", "hellaswag", "winogrande", "arc_challenge"]
    specs = [TaskSpec(n, limit=6, max_gen_toks=16 if n == "gsm8k" else None) for n in names]
    ours = run_benchmarks(model, tokenizer, specs, REAL_DATA, batch_size=8)
    assert len(ours.notes) == 1 and ours.notes[0].startswith("gsm8k: 6 of 6 prompts")
    rows = {name: _real_rows(name) for name in names}
    for name in ("hellaswag", "winogrande"):  # a split that is loaded, and not drawn from
        rows[name]["train"] = rows[name]["validation"][:2]
    _serve(monkeypatch, rows)
    theirs = _harness_results(
        model,
        tokenizer,
        [_untouched(name) for name in names],
        limit=6,
        gen_kwargs={"max_gen_toks": 16},
    )
    _assert_same(ours, theirs, names)


def _real_rows(name: str) -> dict[str, Rows]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (REAL_DATA / name).glob("*.jsonl")
    }


def test_pass_at_k_is_the_exact_fraction() -> None:
    """Every small case equals 1 - C(n-c, k) / C(n, k), computed exactly."""
    for n in range(1, 12):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-13, abs=1e-15)


def test_pass_at_k_is_stable_for_large_and_tiny_chances() -> None:
    """Binomials with thousands of digits cause neither overflow nor cancellation."""
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, rel=1e-12)
    assert pass_at_k(200, 0, 100) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    """Neither correct answers nor draws may exceed the answers."""
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_answers_to_an_item_are_averaged() -> None:
    """pass@1 of an item is its fraction of right answers; the error is over items."""
    programs = [Program("t", f"t/{i}", i, s, "p", "c") for i in range(3) for s in range(2)]
    passed = [True, True, True, False, False, False]
    outcomes = [Outcome("passed" if ok else "failed") for ok in passed]
    items = program_items(programs, outcomes)
    assert items[items.metric == "pass@1,create_test"].value.tolist() == [1.0, 0.5, 0.0]
    row = score_programs(programs, outcomes).iloc[0]
    assert row.value == pytest.approx(0.5) and row.n == 3
    assert row.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert math.isnan(score_programs(programs[:1], outcomes[:1]).stderr[0])
    assert score_programs([], []).empty
    with pytest.raises(ValueError, match="6 programs, but 1 outcomes"):
        score_programs(programs, outcomes[:1])


def test_programs_survive_json() -> None:
    """The executing job reads what the generating job writes, with the tests once per item."""
    programs = [
        Program("humaneval", f"HumanEval/{item}", item, sample, f"def f(): {sample}", "check(f)")
        for item in range(2)
        for sample in range(3)
    ]
    rates = {"humaneval": PassRate((1, 2), "create_test")}
    described = json.loads(json.dumps(describe(programs, rates)))
    assert read_programs(described) == programs and read_rates(described) == rates
    assert json.dumps(described).count("check(f)") == 2
