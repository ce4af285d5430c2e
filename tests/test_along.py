"""Benchmarks over the course of a training: its checkpoints' answers, and the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks import along as module
from forgetting.benchmarks.along import Along, AlongSpec
from forgetting.benchmarks.beside import apart, beside
from forgetting.benchmarks.harness import BenchmarkResult, run_benchmarks
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.models.loading import load_base
from forgetting.models.merged import merged
from forgetting.models.tuned import load_checkpoint
from forgetting.records import InputError, write_jsonl
from forgetting.results.churn import churn_table
from forgetting.results.course import course_items, course_table
from forgetting.sections.measurement import Measurement
from forgetting.sections.method import Setting
from forgetting.sections.prompt import Prompt
from forgetting.sections.selection import Selection
from forgetting.sections.task import Task
from forgetting.sections.training import Training
from forgetting.settings.plan import Tuning
from forgetting.training.cohort import cohort_items, train_cohort
from forgetting.training.materials import CohortSpec, Materials
from task_rows import sciq

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SUMS = [{"question": f"{n} + {n} = ", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(6)]
SCIQ = sciq(6)
ROWS = {
    "sciq": {"train": SCIQ, "validation": SCIQ, "test": SCIQ},
    "gsm8k": {"train": SUMS, "test": SUMS},
}
TASKS = {
    "sciq": Task(num_fewshot=1, limit=5),
    "gsm8k": Task(num_fewshot=2, limit=3, max_new_tokens=5),
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Rows of two tasks, one of choices and one of generated answers."""
    for task, splits in ROWS.items():
        for split, rows in splits.items():
            write_jsonl(tmp_path / "rows" / task / f"{split}.jsonl", rows)
    return {task: tmp_path / "rows" / task for task in TASKS}


@pytest.fixture
def along(folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> Along:
    return Along(AlongSpec(tasks=TASKS, batch_size=4), folders, tokenizer)


@pytest.fixture
def trained(
    tmp_path: Path,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tuning: Tuning,
) -> Any:
    """Train four runs of an adapter, asking benchmarks or not, fused or not; their records."""
    rates = [Setting(learning_rate=rate) for rate in (1e-2, 2e-2, 3e-2, 4e-2)]

    def train(name: str, along: Along | None, fused: str = "never") -> list[dict[str, Any]]:
        materials = Materials(
            base=base_folder,
            tokenizer=tokenizer,
            train=rows[:8],
            probes={"new": rows[:2]},
            base_value=0.1,
            device=CPU,
            precision=torch.float32,
            along=along,
        )
        spec = CohortSpec(
            tuning=tuning.model_copy(update={"settings": rates}),
            seed=0,
            prompt=Prompt(),
            training=Training(epochs=2.0, batch_size=4, warmup_epochs=0.0, fused=fused),
            measurement=Measurement(max_new_tokens=4),
            selection=Selection(probe="new"),
            precision="float32",
            knowledge={"new": "new"},
        )
        inputs = {"base": "a", "train": "b", "code": "c"}
        return train_cohort(spec, materials, inputs, tmp_path / name, lambda *_: None)

    return train


def _weights(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    (file,) = Path(record["folder"], f"step-{record['steps']:07d}").glob("*model.safetensors")
    return load_file(file)


def _answers(result: BenchmarkResult) -> pd.DataFrame:
    main = result.scores[result.scores["main"].astype(bool)]
    items = result.items.merge(main[["task", "metric"]])
    return items.merge(result.responses[["task", "item", "response", "choice"]])


def test_asking_does_not_change_what_is_learnt(trained: Any, along: Along) -> None:
    """Bit for bit: weights, losses, the probes' points; dropout's random numbers among them."""
    asked, silent = trained("asked", along), trained("silent", None)
    for one, other in zip(asked, silent, strict=True):
        assert one["losses"] == other["losses"]
        assert one["points"] == other["points"]
        ours, theirs = _weights(one), _weights(other)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    items, benchmarks = cohort_items(asked)
    plain, none = cohort_items(silent)
    pd.testing.assert_frame_equal(items, plain, check_dtype=False)
    assert len(benchmarks) == 4 * 2 * 8  # runs, evaluations, items
    assert none.empty


def test_the_answers_are_those_of_the_checkpoint(
    trained: Any, along: Along, folders: dict[str, Path], base_folder: Path
) -> None:
    """What a benchmark job finds of it: prompts, choices, generated answers, log-likelihoods."""
    record = trained("asked", along)[1]
    _, found = cohort_items([record])
    found = found[found["step"] == record["steps"]]
    checkpoint = Path(record["folder"], f"step-{record['steps']:07d}")
    model = load_checkpoint(base_folder, checkpoint, CPU)
    specs = [TaskSpec.of(name, task) for name, task in TASKS.items()]
    with merged(model, torch.float32):
        expected = _answers(run_benchmarks(model, along.tokenizer, specs, folders, 4))
    columns = ["task", "item", "metric", "value", "response", "choice"]
    assert set(found[found["task"] == "sciq"]["choice"]) <= {0, 1, 2, 3}
    assert found[found["task"] == "gsm8k"]["choice"].isna().all()
    pd.testing.assert_frame_equal(
        found[columns].sort_values(["task", "item"], ignore_index=True),
        expected[columns].sort_values(["task", "item"], ignore_index=True),
    )


def test_a_fused_cohort_gives_the_answers_of_its_runs_alone(trained: Any, along: Along) -> None:
    _, fused = cohort_items(trained("fused", along, fused="auto"))
    _, alone = cohort_items(trained("alone", along))
    key = ["run", "step", "task", "item", "value"]
    pd.testing.assert_frame_equal(fused[key], alone[key])


def test_a_finished_cohort_asks_nothing_again(
    trained: Any, along: Along, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = cohort_items(trained("asked", along))

    def refuse(self: Along, model: Any) -> pd.DataFrame:
        raise AssertionError("asked again")

    monkeypatch.setattr(Along, "__call__", refuse)
    _, after = cohort_items(trained("asked", along))
    pd.testing.assert_frame_equal(before, after)


def test_other_rows_are_told_by_the_digest(
    along: Along, folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    """By which runs are asked anew; so are other settings."""
    fewer = {"sciq": TASKS["sciq"].model_copy(update={"limit": 2})}
    spec = AlongSpec(tasks=fewer, batch_size=4)
    assert Along(spec, {"sciq": folders["sciq"]}, tokenizer).digest != along.digest
    write_jsonl(folders["gsm8k"] / "test.jsonl", SUMS[1:])
    again = Along(along.spec, folders, tokenizer)
    assert again.digest != along.digest


def test_a_metric_that_is_no_mean_over_items_is_refused(
    along: Along, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(model: Any, questions: Any) -> BenchmarkResult:
        result = answer(model, questions)
        result.scores["value"] += 0.25
        return result

    answer = module.answer
    monkeypatch.setattr(module, "answer", worse)
    with pytest.raises(InputError, match=r"benchmarks\.along: the metric of (sciq|gsm8k)"):
        along(load_base(base_folder, CPU))


def test_items_of_probes_and_benchmarks_come_apart_again() -> None:
    probes = pd.DataFrame({"probe": ["new"], "item": ["a/1"], "value": [0.5]})
    asked = pd.DataFrame(
        {"task": ["t"], "item": [3], "metric": ["acc,none"], "value": [1.0], "response": ["[]"]}
    ).assign(choice=pd.array([2], dtype="Int64"))
    ours, theirs = apart(beside(probes, asked))
    pd.testing.assert_frame_equal(ours, probes, check_dtype=False)
    pd.testing.assert_frame_equal(theirs, asked, check_dtype=False)
    assert apart(probes)[1].empty


@pytest.fixture
def course(trained: Any, along: Along, folders: dict[str, Path], base_folder: Path) -> Any:
    """The course of four runs, the base's scores, and the records."""
    records = trained("asked", along)
    model = load_base(base_folder, CPU)
    whole = [
        TaskSpec.of(name, task.model_copy(update={"limit": None})) for name, task in TASKS.items()
    ]
    result = run_benchmarks(model, along.tokenizer, whole, folders, 4)
    _, found = cohort_items(records)
    place = {"run": "base", "step": 0}
    items, responses = result.items.assign(**place), result.responses.assign(**place)
    return course_items([found], items, responses), result.scores.assign(**place), records


def test_the_course_begins_with_the_base_on_the_same_items(course: Any) -> None:
    items, scores, records = course
    table = course_table(items, scores, records)
    base = table[table["run"] == "base"].set_index("task")
    assert base["n"].to_dict() == {"sciq": 5, "gsm8k": 3}
    assert base["chance"].to_dict() == {"sciq": 0.25, "gsm8k": 0.0}
    assert (base["step"] == 0).all()
    last = table[(table["run"] == records[0]["run"]) & (table["task"] == "sciq")].iloc[-1]
    own = items[(items["run"] == records[0]["run"]) & (items["task"] == "sciq")]
    own = own[own["step"] == 4]
    assert last["value"] == own["value"].mean()
    assert last["tokens"] == records[0]["tokens"]
    assert last["low"] <= last["value"] <= last["high"]


def test_the_course_of_churn_goes_on_where_a_checkpoint_was_benchmarked(course: Any) -> None:
    """Of an untouched model nothing is churned; a job's answers, of more items, have their rows."""
    items, _, records = course
    base = items[items["run"] == "base"]
    run = records[0]["run"]
    untouched = base.assign(run=run, step=2, epoch=1.0)
    tuned = items[(items["run"] == run) & (items["step"] == 4)]
    probes, _ = cohort_items(records)
    more = [part.assign(item=part["item"] + 100) for part in (base, tuned)]
    scored = pd.concat([base, tuned, *more]).drop(columns="epoch")
    churn = churn_table(
        probes, scored.drop(columns="value"), scored, pd.concat([base, untouched, tuned])
    )
    still = churn[churn["step"] == 2]
    assert set(still["probe"]) == set(TASKS)
    assert (still["agreement"] == 1.0).all()
    assert (still["gained"] + still["lost"] == 0.0).all()
    last = churn[churn["step"] == 4].groupby(["asked", "probe"])["n"].sum()
    assert last["training"].to_dict() == {"sciq": 5, "gsm8k": 3}
    assert last["job"].to_dict() == {"sciq": 10, "gsm8k": 6}
    assert set(churn["epoch"]) == {1.0, 2.0}
    assert not churn.duplicated(["run", "step", "probe", "answer", "asked"]).any()
