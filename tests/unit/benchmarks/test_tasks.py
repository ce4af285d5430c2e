"""Tasks of the lm-evaluation-harness: found without importing it, scored as by it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.registry import (
    main_metric,
    required_splits,
    task_with_same_dataset,
)
from forgetting.benchmarks.task_definitions import AGGREGATIONS, read_task_definition
from forgetting.benchmarks.tasks import TaskSpec, load_task
from forgetting.data.hub import BUILT_IN_BENCHMARKS, HUB_DATASETS
from forgetting.errors import InputError
from support.models import byte_tokenizer, random_llama, write_rows

SCIQ = [
    {
        "question": f"What is number {n}?",
        "support": "Numbers are even or odd.",
        "correct_answer": "even" if n % 2 == 0 else "odd",
        "distractor1": "red",
        "distractor2": "cold",
        "distractor3": "loud",
    }
    for n in range(6)
]
LAMBADA = [{"text": f"The {word} saw the {word}"} for word in ("cat", "old man", "tree")]
TRUTHFUL = [
    {
        "question": f"What is number {n}?",
        "mc1_targets": {"choices": ["even", "odd", "red"], "labels": [1, 0, 0]},
        "mc2_targets": {
            "choices": ["even", "2k", "odd", "red", "cold"][: 3 + n],
            "labels": [1, 1, 0, 0, 0][: 3 + n],
        },
    }
    for n in range(3)
]
COINS = [
    {"question": f"Ann has {n} coins.", "answer": f"{n} coins.\n#### {n}"} for n in range(1, 4)
]
ROWS = {
    "sciq": {"test": SCIQ, "train": SCIQ, "validation": SCIQ},
    "lambada_openai": {"test": LAMBADA},
    "gsm8k_cot": {"test": COINS},
    "truthfulqa_mc1": {"validation": TRUTHFUL},
    "truthfulqa_mc2": {"validation": TRUTHFUL},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows of three tasks of different kinds."""
    return write_rows(tmp_path_factory.mktemp("rows"), ROWS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a random model."""
    return random_llama(context=8192)


def test_every_kind_of_task_scores_as_in_the_harness(
    model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices, a likelihood and a generated answer score as in the harness."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = list(ROWS)
    specs = [TaskSpec(name, max_gen_toks=8 if name == "gsm8k_cot" else None) for name in names]
    ours = run_benchmarks(model, tokenizer, specs, folder, batch_size=4)
    origins = {read_task_definition(name).dataset: ROWS[name] for name in names}

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        splits = origins[path, name].items()
        return datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s, rows in splits})

    monkeypatch.setattr(datasets, "load_dataset", load)
    folders = {str(Path(read_task_definition(name).path).parent) for name in names}
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_path=sorted(folders), include_defaults=False),
        gen_kwargs={"max_gen_toks": 8},
        bootstrap_iters=0,
    )
    for name in names:
        table = ours.scores[ours.scores.task == name].set_index("metric")
        result = theirs["results"][name]
        assert set(table.index) == {k for k in result if "," in k and "_stderr," not in k}
        assert set(table.index) <= {*read_task_definition(name).metrics}
        for key in table.index:
            assert table.value[key] == pytest.approx(result[key], rel=1e-5)
        assert table.main.sum() == 1
    chance = ours.scores.set_index(["task", "metric"]).chance
    assert chance["sciq", "acc,none"] == 0.25  # four choices
    assert chance["truthfulqa_mc1", "acc,none"] == pytest.approx(1 / 3)
    # Two true answers of three, four and five.
    assert chance["truthfulqa_mc2", "acc,none"] == pytest.approx((2 / 3 + 2 / 4 + 2 / 5) / 3)
    assert chance.isna()["lambada_openai", "perplexity,none"]
    assert ours.examples == {**dict.fromkeys(ROWS, 0), "gsm8k_cot": 8}


def test_main_metric_is_chosen_by_the_study() -> None:
    """A metric has a filter or none; the message on an unknown metric lists the known ones."""
    assert main_metric("sciq", None) == "acc,none"
    assert main_metric("sciq", "acc_norm") == "acc_norm,none"
    assert main_metric("gsm8k_cot", "exact_match,flexible-extract").endswith("flexible-extract")
    with pytest.raises(InputError, match="sciq has no metric f1, but acc,none, acc_norm,none"):
        main_metric("sciq", "f1")
    for name, known in BUILT_IN_BENCHMARKS.items():
        assert main_metric(name, known.main_metric) == known.main_metric


def test_aggregations_equal_those_of_the_harness() -> None:
    """This covers every registered metric, and aggregations of a definition."""
    from lm_eval.api.metrics import mean, nanmean
    from lm_eval.api.registry import aggregation_registry, get_metric_aggregation, metric_registry

    known = {name: get_metric_aggregation(name) for name in metric_registry if name != "bypass"}
    means = {name for name, aggregate in known.items() if aggregate in (mean, nanmean)}
    assert set(AGGREGATIONS) == set(known) - means
    assert all(aggregation_registry[AGGREGATIONS[name]] is known[name] for name in AGGREGATIONS)
    assert not read_task_definition("lambada_openai").is_mean("perplexity,none")
    assert read_task_definition("lambada_openai").is_mean("acc,none")
    assert read_task_definition("gsm8k").is_mean("exact_match,strict-match")
    assert not read_task_definition("wikitext").is_mean("word_perplexity,none")


@pytest.mark.parametrize("name", list(HUB_DATASETS))
def test_built_in_benchmarks_equal_their_definitions(name: str) -> None:
    """The file defines the task; dataset, splits, columns and main metric are those of the task."""
    known, rows, read = BUILT_IN_BENCHMARKS[name], HUB_DATASETS[name], read_task_definition(name)
    assert read.config["task"] == name
    assert read.dataset[0] == rows.dataset
    assert read.dataset[1] in (None, rows.config)
    assert set(rows.splits) == set(required_splits(name, num_fewshot=1))
    assert known.main_metric in read.metrics
    assert known.columns and 0.0 <= known.chance < 1.0


def test_unknown_task_is_reported_with_similar_names() -> None:
    """A new process shows that planning does not import the harness."""
    program = (
        "import sys\n"
        "from forgetting.benchmarks.registry import benchmark\n"
        "from forgetting.io import InputError\n"
        "for name in ('helaswag', 'mmlu', 'squadv2', 'arc_easy', 'mmlu_abstract_algebra'):\n"
        "    try:\n        print(name, benchmark(name).split)\n"
        "    except InputError as error:\n        print(error)\n"
        "assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "no task helaswag; did you mean hellaswag" in lines[0]
    assert "a group of them; name its tasks, such as mmlu_" in lines[1]
    assert "defined by a Python class" in lines[2]
    assert lines[3:] == ["arc_easy test", "mmlu_abstract_algebra test"]


def test_tasks_on_the_same_dataset_share_rows() -> None:
    """The microworld's rows serve every task on the five datasets.

    Examples in the definition need no split.
    """
    assert (task_with_same_dataset("gsm8k_cot"), task_with_same_dataset("arc_easy")) == (
        "gsm8k",
        "arc_challenge",
    )
    assert task_with_same_dataset("sciq") is None
    assert required_splits("gsm8k") == ["test", "train"]
    assert required_splits("gsm8k_cot") == ["test"]
    assert required_splits("sciq") == ["test"] and required_splits("sciq", 2) == ["test", "train"]


NEEDED_PACKAGES = {"ifeval": "langdetect", "minerva_math_algebra": "math_verify"}
"""Packages of definitions that the environment does not have."""


@pytest.mark.parametrize("name", NEEDED_PACKAGES)
def test_definition_with_missing_package_is_refused(name: str, folder: Path) -> None:
    """The message names the package and has no traceback."""
    if find_spec(NEEDED_PACKAGES[name]):
        pytest.skip(f"{NEEDED_PACKAGES[name]} is installed")
    with pytest.raises(InputError, match=f"'{name}': its definition needs a Python package"):
        load_task(name, folder)
