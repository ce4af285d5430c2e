"""Models of one base that are scored in one process, each as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from forgetting.benchmarks import evaluate, scorer
from forgetting.benchmarks.hflm import SharedPrefixLM
from forgetting.benchmarks.registry import SCORE_FILES
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.config.expand import Method
from forgetting.config.methods import RankBudgetConfig
from forgetting.digests import visible_files
from forgetting.errors import InputError
from forgetting.io import read_json, write_json, write_jsonl
from forgetting.models.adapters import attach_adapter
from forgetting.models.loading import load_base
from forgetting.models.tuned import AdapterSwapper, load_tuned, merged_adapter, save_weights
from scripts import benchmark
from support.benchmark_rows import FUNCTIONS, SUMS, sciq
from support.params import write_params
from support.run_groups import digests_in, record_base

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 17, 33, 21, 8]])
SCIQ = sciq(5)
ROWS = {
    "sciq": {"train": SCIQ, "validation": SCIQ, "test": SCIQ},
    "gsm8k": {"train": SUMS, "test": SUMS},
    "humaneval": {"test": FUNCTIONS},
}
TASKS = {
    "sciq": {"num_fewshot": 2, "limit": 4},
    "gsm8k": {"num_fewshot": 2, "limit": 3, "max_new_tokens": 5},
    "humaneval": {"samples": 2, "temperature": 1.0, "max_new_tokens": 5},
}
PROMPTS = {"prompt": {}, "columns": {"question": "goal"}}


def _tuned(base: Path, folder: Path, tuning: Method, seed: int) -> Path:
    """Write a checkpoint with changed weights and return its folder."""
    model = attach_adapter(load_base(base, CPU), tuning, seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_weights(model, folder)
    return folder


def _untied(base: Path, folder: Path) -> Path:
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    with merged_adapter(model, torch.float32):
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "adalora"])
def test_swapped_adapter_equals_a_newly_loaded_model(
    base_folder: Path, tmp_path: Path, tuning: Method, variant: str, embeddings: str, tied: bool
) -> None:
    """Adapters, the base and a whole model take turns; only a whole model rereads the base."""
    base = base_folder if tied else _untied(base_folder, tmp_path / "untied")
    changes: dict[str, Any] = {"variant": variant, "embeddings": embeddings}
    if variant == "adalora":
        changes |= {"rank_budget": RankBudgetConfig(), "initial_rank": 6}
    kind = tuning.model_copy(update=changes)
    whole = tuning.model_copy(update={"kind": "full", "embeddings": "trained"})
    adapters = [_tuned(base, tmp_path / f"seed{seed}", kind, seed) for seed in (1, 2)]
    full = _tuned(base, tmp_path / "full", whole, 3)

    order = [adapters[0], adapters[1], None, adapters[0], full, adapters[1], None]
    models, reads = AdapterSwapper(base, CPU), []
    for checkpoint in order:
        with models.load(checkpoint) as model:
            model.tie_weights()  # as the harness does
            found = _logits(model)
        alone = load_tuned(base, checkpoint, CPU) if checkpoint else load_base(base, CPU)
        alone.tie_weights()
        assert torch.equal(found, _logits(alone)), checkpoint
        reads.append(models.bases_read)
    assert reads == [1, 1, 1, 1, 1, 2, 2]  # The whole model replaced the base.
    assert not torch.equal(_logits(load_tuned(base, adapters[0], CPU)), _logits(alone))


Scored = tuple[dict[str, Any], list[str]]
"""Parameters of the program, and its options."""


@pytest.fixture
def method(base_folder: Path, tmp_path: Path, tuning: Method) -> Scored:
    """Return a method of two adapters, a whole model and a run without a checkpoint."""
    for task, splits in ROWS.items():
        for split, rows in splits.items():
            write_jsonl(tmp_path / "rows" / task / f"{split}.jsonl", rows)
    write_jsonl(tmp_path / "harm.jsonl", [{"goal": "Do it."}, {"goal": "Say it, please."}])
    whole = tuning.model_copy(update={"kind": "full", "embeddings": "trained"})
    for seed, kind in enumerate((tuning, tuning, whole)):
        _tuned(base_folder, tmp_path / "checkpoints" / f"seed{seed}", kind, seed)
    choice = [
        {
            "seed": seed,
            "run": f"m/seed{seed}/lr1",
            "step": 7 if seed < 3 else None,
            "reason": "so",
            "files": digests_in(tmp_path / "checkpoints" / f"seed{seed}"),
        }
        for seed in range(4)
    ]
    write_json(tmp_path / "selection.json", choice)
    record_base(tmp_path / "base.json", base_folder, "abc")
    refusals = {"table": "harm/harm", "max_new_tokens": 4}
    spec = {
        "benchmarks": {"tasks": TASKS, "refusals": refusals},
        "precision": "float32",
        "refusal_prompts": PROMPTS,
        "rows": {task: str(tmp_path / "rows" / task) for task in TASKS},
    }
    options = [
        f"--base={tmp_path / 'base.json'}",
        f"--prompts={tmp_path / 'harm.jsonl'}",
        f"--selection={tmp_path / 'selection.json'}",
        f"--checkpoints={tmp_path / 'checkpoints'}",
    ]
    return spec, options


def _score(method: Scored, folder: Path, *names: str, versions: str = "0") -> None:
    spec, options = method
    params = write_params(folder, **spec, models=list(names), versions=versions)
    benchmark.main(
        [
            *options,
            f"--params={params}",
            f"--state={folder / 'state'}",
            f"--output={folder / 'results'}",
        ]
    )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in visible_files(folder)}


def test_scores_equal_those_of_separate_processes(method: Scored, tmp_path: Path) -> None:
    """Prompts, examples, sampled programs, refusals and record are byte-identical."""
    names = [f"seed{seed}" for seed in range(4)]
    _score(method, tmp_path / "together", *names)
    for name in names:
        _score(method, tmp_path / "separate", name)
    together, separate = (
        _bytes(tmp_path / which / "results") for which in ("together", "separate")
    )
    assert len(together) == len(names) * len(SCORE_FILES)
    assert together == separate
    results = tmp_path / "together" / "results"
    responses = [pd.read_parquet(results / name / "responses.parquet") for name in names]
    assert set(responses[0]["task"]) == {*TASKS, "refusals"}
    assert not responses[0].equals(responses[1])
    assert not responses[0].equals(responses[2])
    record = read_json(results / "seed3" / "record.json")
    assert record["model"] == {"run": "m/seed3/lr1", "step": None, "checkpoint": None}
    assert record["notes"] == ["no benchmarks: so"]
    assert responses[3].empty


def test_base_and_tokenizer_are_read_once(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    method: Scored,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks are loaded once for all models, and the choices of an item are tokenized once."""
    loaded, encoded = [], []
    load, encode = evaluate.load_task, SharedPrefixLM.encode_texts
    monkeypatch.setattr(
        evaluate, "load_task", lambda spec, *more: loaded.append(spec.name) or load(spec, *more)
    )
    monkeypatch.setattr(
        SharedPrefixLM,
        "encode_texts",
        lambda lm, texts: encoded.extend(texts) or encode(lm, texts),
    )
    _score(method, tmp_path, "seed0", "seed1", "seed2")
    assert loaded == list(TASKS)

    specs = [TaskSpec("sciq", num_fewshot=2)]
    questions = evaluate.load_tasks(tokenizer, specs, tmp_path / "rows")
    counts = []
    for _ in range(2):
        encoded.clear()
        result = evaluate.evaluate_tasks(load_base(base_folder, CPU), questions)
        counts.append(len(encoded))
        assert len(result.items) == 2 * len(SCIQ)  # acc and acc_norm
    assert counts[0] == 5 * len(SCIQ)
    assert counts[1] == 0


def test_killed_scoring_job_resumes_at_the_next_model(
    method: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished models are not scored again unless weights, tasks or versions change."""
    names, real = [f"seed{seed}" for seed in range(4)], scorer.Scorer.score
    scored: list[str] = []
    deadly = {"seed2"}

    def score(self: Any, chosen: Any) -> Any:
        if chosen.name in deadly:
            raise InputError("memory ran out")
        scored.append(chosen.name)
        return real(self, chosen)

    monkeypatch.setattr(scorer.Scorer, "score", score)
    with pytest.raises(SystemExit):
        _score(method, tmp_path, *names)
    assert scored == ["seed0", "seed1"]
    before = _bytes(tmp_path / "results")
    for path in (tmp_path / "results").rglob("*.*"):
        path.unlink()
    deadly.clear()
    _score(method, tmp_path, *names)
    assert scored == names
    assert before.items() <= _bytes(tmp_path / "results").items()
    _score(method, tmp_path, *names)
    assert scored == names

    weights = tmp_path / "checkpoints" / "seed1" / "adapter_model.safetensors"
    other = tmp_path / "checkpoints" / "seed0" / "adapter_model.safetensors"
    weights.write_bytes(other.read_bytes())
    choice = read_json(tmp_path / "selection.json")
    choice[1]["files"] = digests_in(weights.parent)
    write_json(tmp_path / "selection.json", choice)
    _score(method, tmp_path, *names)
    assert scored == [*names, "seed1"]
    _score(method, tmp_path, *names, versions="1")
    assert scored == [*names, "seed1", *names]
