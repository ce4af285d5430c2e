"""The guides in docs/how-to work: their code is added to a copy of the library and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE_VARIANT = """\
from forgetting.config.expand import Method
from forgetting.config.methods import MethodConfig
from forgetting.models.adapters import attach_adapter
from forgetting.study.run_groups import is_plain_lora
from transformers import LlamaConfig, LlamaForCausalLM

config = MethodConfig(method="lora", variant="gaussian", rank=[2], learning_rate=[1e-3])
method = Method(name="gaussian-r2", kind="lora", label="gaussian 2", variant=config.variant,
                rank=2, alpha=4.0, hyperparameters=[])
shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2)
model = attach_adapter(LlamaForCausalLM(LlamaConfig(**shape)), method, seed=0)
assert model.peft_config["default"].init_lora_weights == "gaussian"
assert is_plain_lora(method) and method.scale == 2.0
"""
USE_MITIGATION = """\
import torch
from forgetting.config.methods import MethodConfig
from forgetting.config.mitigations import MitigationConfig
from forgetting.training.mitigations import build_mitigations

mitigation = MitigationConfig(l1={"weight": 0.5})
assert mitigation.name == "l10.5"
built = build_mitigations(torch.nn.Linear(2, 1), mitigation, {}, (), seed=0)
model = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.constant_(model.weight, -3.0)
(penalty,) = built.weight_penalties
assert penalty(model).item() == 3.0
try:
    MethodConfig(
        method="lora", variant="dora", rank=[2], learning_rate=[1.0], mitigation=mitigation
    )
except ValueError as error:
    assert "mitigation.l1 needs the weight update" in str(error)
else:
    raise AssertionError("dora has no linear update")
"""
USE_METRIC = """\
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.evaluation.probes import evaluate_probes
from forgetting.results.trajectories import aggregate_items
from support.models import byte_tokenizer, random_llama

row = {"id": "p/0", "question": "Who?", "answer": "x", "paraphrased_answer": None,
       "wrong_answers": []}
tokenizer = byte_tokenizer()
tokenizer.pad_token = tokenizer.eos_token
config = EvaluationConfig(max_new_tokens=4)
prompt = PromptConfig()
items = evaluate_probes(random_llama(context=128), tokenizer, {"p": [row]}, prompt, config)
assert items["exact_match"].tolist() == [0.0]
row["answer"] = items["generated"][0]
items = evaluate_probes(random_llama(context=128), tokenizer, {"p": [row]}, prompt, config)
assert items["exact_match"].tolist() == [1.0]
means = aggregate_items(items, {"p": "new"}).set_index("metric")
assert means.loc["exact_match", "value"] == 1.0 and means.loc["exact_match", "high"] == 1.0
"""
USE_BENCHMARK = """\
import sys
from pathlib import Path

from forgetting.benchmarks.evaluate import run_benchmarks
from forgetting.benchmarks.tasks import TaskSpec
from forgetting.data.hub import HUB_DATASETS
from forgetting.pipeline.resources.workload import task_size
from support.models import byte_tokenizer, random_llama, write_rows

wrong = {f"distractor{n}": text for n, text in enumerate(["red", "cold", "loud"], start=1)}
rows = [{"question": f"Is {n} even?", "support": "", "correct_answer": "even"} | wrong
        for n in range(3)]
folder = write_rows(Path(sys.argv[1]), {"sciq": {"test": rows}})
result = run_benchmarks(random_llama(context=256), byte_tokenizer(), [TaskSpec("sciq")], folder)
(score,) = result.scores[result.scores["main"]].to_dict("records")
assert (score["metric"], score["chance"], score["n"]) == ("acc_norm,none", 0.25, 3)
assert task_size("sciq").count == 1000 and HUB_DATASETS["sciq"].splits == ("train", "test")
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Return a copy of the library, which a test may extend."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "workflow" / "forgetting", tmp_path / "forgetting", ignore=ignored)
    return tmp_path / "forgetting"


def _blocks(guide: str, language: str = "python") -> list[str]:
    """Return the code of a guide, block by block."""
    text = (ROOT / "docs" / "how-to" / guide).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _insert(path: Path, before: str, code: str) -> None:
    """Insert code before the one place where a line occurs."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"{code}{before}"), encoding="utf-8")


def _use(library: Path, code: str, *arguments: str) -> None:
    """Run code with the extended library."""
    path = os.pathsep.join([str(library.parent), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_variant_is_added_by_one_entry(library: Path) -> None:
    (entry,) = _blocks("add-a-method.md")
    _insert(library / "config" / "variants.py", '    "rslora": Variant(\n', entry)
    _use(library, USE_VARIANT)


def test_mitigation_is_added_in_two_files(library: Path) -> None:
    section, builder = _blocks("add-a-mitigation.md")
    config = library / "config" / "mitigations.py"
    _insert(config, "class MitigationConfig(ConfigModel):\n", f"{section}\n\n")
    _insert(config, "    suffix: Name | None = Field(\n", "    l1: L1Config | None = None\n")
    penalties = library / "training" / "mitigations.py"
    penalties.write_text(penalties.read_text(encoding="utf-8") + f"\n\n{builder}", encoding="utf-8")
    _use(library, USE_MITIGATION)


def test_metric_is_added_by_one_entry(library: Path) -> None:
    (entry,) = _blocks("add-a-metric.md")
    _insert(library / "evaluation" / "metrics.py", '    "generated_tokens": ProbeMetric(', entry)
    _use(library, USE_METRIC)


def test_benchmark_is_added_by_one_entry(library: Path, tmp_path: Path) -> None:
    _, entry = _blocks("add-a-benchmark.md", "yaml")
    _insert(library / "data" / "hub_datasets.yaml", "\ntables:\n", entry)
    (tmp_path / "rows").mkdir()
    _use(library, USE_BENCHMARK, str(tmp_path / "rows"))


@pytest.mark.parametrize("guide", sorted((ROOT / "docs" / "how-to").glob("*.md")), ids=str)
def test_guide_names_files_that_exist(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    named = re.findall(r"`((?:workflow|tests|config|profiles)/[\w./-]+\.\w+)`", text)
    named = [name for name in named if "NAME" not in name]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    touched = text.split("## Files you touch")[1].split("##")[0]
    assert 1 <= len(re.findall(r"^\d\. ", touched, flags=re.MULTILINE)) <= 3
