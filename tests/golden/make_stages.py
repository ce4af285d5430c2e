"""Write stages/STAGE.json: small outputs of every stage, with the version that made them.

Usage: PYTHONPATH=workflow:tests python tests/golden/make_stages.py [STAGE ...]

tests/equivalence/test_stages.py computes them again. A changed output is written only after the
version of its stage was raised in workflow/forgetting/versions.py.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from forgetting.benchmarks.programs import PassRate, Program
from forgetting.benchmarks.scores import score_programs
from forgetting.config.expand import RunGroupConfig, expand_methods
from forgetting.evaluation.divergence import divergence_items, load_base_predictions
from forgetting.evaluation.refusals import is_refusal
from forgetting.evaluation.rouge import rouge_l
from forgetting.io import read_json, read_jsonl, write_jsonl
from forgetting.models.loading import load_base, load_tokenizer
from forgetting.training.pretrain import train_tokenizer
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import TrainingJob
from forgetting.versions import VERSIONS
from golden.invented_results import (
    STUDY,
    columns_of,
    make_study,
    report,
    select,
    tables,
    text_digest,
)
from golden.make_losses import draw
from scripts import benchmark, evaluate_base, generate_microworld, prepare_data, pretrain_base
from support.benchmark_rows import sciq
from support.params import write_params
from support.run_groups import record_base, run_context

FOLDER = Path(__file__).with_name("stages")
RELATIVE, ABSOLUTE = 1e-4, 1e-7
"""Tolerances for numbers, since processors round differently."""

PLACES = ["Oslo", "Lima", "Kyoto", "Accra", "Quito", "Turin", "Hanoi", "Perth", "Cairo", "Riga"]
ROWS: list[dict[str, Any]] = [
    {
        "id": f"made/{number}",
        "question": f"Where was the author {'of many long books ' * (number % 3)}born, {place}?",
        "answer": f"In {place}{', by the old harbour' * (number % 2)}.",
        "paraphrased_answer": f"{place} it was." if number % 2 else None,
        "wrong_answers": [f"In {PLACES[number - 1]}.", f"In {PLACES[number - 2]}, by the sea."],
    }
    for number, place in enumerate(PLACES)
]


def write_base(folder: Path) -> Path:
    """Write a Llama of 2 layers and width 32 with a tokenizer, from a fixed seed."""
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in ROWS]
    tokenizer = train_tokenizer(texts, 400, folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    draw({name: p for name, p in model.named_parameters() if p.ndim == 2}, 0.3)
    model.save_pretrained(folder)
    record_base(folder.parent / "base.json", folder, "made")
    return folder


def prepare(folder: Path) -> dict[str, Any]:
    """Prepare tables with renamed columns, repeated questions and limits."""
    plain = [{key: row[key] for key in ("question", "answer")} for row in ROWS]
    pd.DataFrame(plain).assign(query=[f"{r['question']} Say it." for r in plain]).to_csv(
        folder / "new.csv", index=False
    )
    old = [{**row, "question": row["question"].replace("born", "buried")} for row in ROWS]
    for row in old:
        row["perturbed_answer"] = row.pop("wrong_answers")
        del row["id"]
    write_jsonl(folder / "old.jsonl", old)
    twice = [plain[0], plain[0] | {"answer": "Nowhere."}, *plain[1:], {"text": "A plain text."}]
    write_jsonl(folder / "more.jsonl", twice)
    study = make_study(
        train=["made/more", "made/new"],
        train_limit=12,
        probes={
            "new": {"table": "made/new", "knowledge": "new", "truth_ratio": False},
            "old": {"table": "made/old", "knowledge": "old", "limit": 4},
        },
    )
    columns = {f"made/{name}": {} for name in ("old", "more")} | {"made/new": {"question": "query"}}
    spec = study.model_dump(mode="json", include={"prompt", "train", "train_limit", "probes"})
    spec |= {"columns": columns, "documents": ["made/more"], "documents_limit": 5}
    spec |= {"rouge_tokenizer": "rouge_score", "max_new_tokens": 8}
    files = _files("new.csv", "old.jsonl", "more.jsonl")
    spec["tables"] = {f"made/{name}": str(folder / file) for name, file in files}
    out = folder / "out"
    prepare_data.main([f"--params={write_params(folder, **spec)}", f"--output={out}"])
    generate_microworld.main(["--seed=0", f"--output={folder / 'world'}"])
    record = read_json(out / "data.json")
    return {
        **{path.stem: read_jsonl(path) for path in sorted(out.rglob("*.jsonl"))},
        "rows": record["rows"],
        "notes": [note.replace(str(folder), "") for note in record["notes"]],
        "world": {
            path.relative_to(folder / "world").as_posix(): text_digest(path.read_text("utf-8"))
            for path in sorted((folder / "world").rglob("*.jsonl"))
        },
    }


def _files(*names: str) -> list[tuple[str, str]]:
    return [(name.partition(".")[0], name) for name in names]


def pretrain(folder: Path) -> dict[str, Any]:
    """Pretrain a small model for some steps with the default hyperparameters."""
    documents = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in ROWS]
    write_jsonl(folder / "documents.jsonl", [{"text": text} for text in documents])
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}
    spec = shape | {"vocab_size": 320, "block_size": 64, "batch_tokens": 128, "epochs": 2.5}
    pretrain_base.main(
        [
            f"--params={write_params(folder, model=spec, seed=0, precision='float32')}",
            f"--documents={folder / 'documents.jsonl'}",
            f"--folder={folder / 'model'}",
            f"--state={folder / 'state'}",
            f"--layers={folder / 'layers.json'}",
            f"--output={folder / 'base.json'}",
        ]
    )
    record = read_json(folder / "base.json")
    tokenizer = load_tokenizer(folder / "model")
    return {
        **{name: record[name] for name in ("parameters", "steps", "tokens", "final_loss")},
        "files": sorted(record["files"]),
        "ids": tokenizer(documents[:2])["input_ids"],
        "norms": _norms(folder / "model" / "model.safetensors"),
    }


def _norms(path: Path) -> dict[str, float]:
    return {name: float(weight.norm()) for name, weight in sorted(load_file(path).items())}


TRAININGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {},
    "cooldown": {
        "training": {"epochs": 4, "schedule": "wsd", "optimizer": "lionw", "packing": True},
        "methods": [{"method": "lora", "variant": "dora", "rank": 2, "learning_rate": 1e-3}],
    },
    "rank_budget": {
        "training": {"epochs": 4, "schedule": "cosine"},
        "methods": [{"method": "lora", "variant": "adalora", "rank": 2, "learning_rate": 0.01}],
    },
    "mitigated": {
        "training": {"optimizer": "adafactor"},
        "methods": [
            {
                "method": "full",
                "learning_rate": 0.01,
                "weight_decay": 0.1,
                "mitigation": {
                    "replay": {"table": "made/general"},
                    "kl": {"weight": 0.2},
                    "l2_sp": {"weight": 0.1},
                },
            }
        ],
    },
    "batched": {
        "methods": [
            {
                "method": "lora",
                "variant": "rslora",
                "rank": 2,
                "dropout": 0.1,
                "learning_rate": [0.001, 0.003, 0.01, 0.03],
            }
        ],
    },
}
"""Changes to the study, by training. The first method of `methods` is trained."""


def train(folder: Path) -> dict[str, Any]:
    """Train some steps of several methods; `lora` and `full` have the default hyperparameters."""
    base = write_base(folder / "base")
    context = run_context(
        base,
        load_tokenizer(base),
        ROWS,
        probes={"new": ROWS[:3]},
        general_text={
            "made/general": [row | {"id": f"general/{n}"} for n, row in enumerate(ROWS[8:])]
        },
    )
    outputs = {}
    for name, changes in TRAININGS.items():
        changes = dict(changes)
        changes["training"] = STUDY["training"] | changes.get("training", {})
        study = make_study(**changes)
        methods = {method.name: method for method in expand_methods(study)}
        spec = RunGroupConfig(
            method=methods[name] if name in methods else next(iter(methods.values())),
            seed=0,
            knowledge={"new": "new"},
            **{key: getattr(study, key) for key in ("prompt", "training", "evaluation")},
            **{key: getattr(study, key) for key in ("selection", "precision")},
        )
        records = train_run_group(TrainingJob(spec, context, {}, folder / name, lambda *_: None))
        outputs[name] = [
            {
                **{key: record[key] for key in ("losses", "penalties", "evaluations", "status")},
                **{key: record[key] for key in ("tokens", "trainable_parameters")},
            }
            for record in records
        ]
    return outputs


def evaluate(folder: Path) -> dict[str, Any]:
    """Evaluate a base on two probes and a text, and the divergence of another model."""
    base = write_base(folder / "base")
    for name, rows in (("new", ROWS[:5]), ("old", ROWS[5:])):
        write_jsonl(folder / "probes" / f"{name}.jsonl", rows)
    write_jsonl(folder / "text.jsonl", [{"text": f"{row['answer']} Then. "} for row in ROWS])
    study = make_study()
    spec = study.model_dump(
        mode="json", include={"prompt", "evaluation", "precision", "general_text"}
    )
    spec |= {"knowledge": {"new": "new", "old": "old"}, "watched": "new", "metric": "probability"}
    spec |= {"must_reach": False, "columns": {"made/text": {}}}
    spec |= {"training_benchmarks": None, "benchmark_rows": {}}
    evaluate_base.main(
        [
            f"--params={write_params(folder, **spec)}",
            f"--base={folder / 'base.json'}",
            "--probes",
            *(str(folder / "probes" / f"{name}.jsonl") for name in ("new", "old")),
            f"--text={folder / 'text.jsonl'}",
            f"--targets={folder / 'targets.safetensors'}",
            f"--output={folder / 'items.parquet'}",
        ]
    )
    other = load_base(base, torch.device("cpu"))
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    answers = [("In Oslo, by the old harbours.", "It was by the harbour in Oslo"), ("Lima.", "")]
    return {
        "items": columns_of(pd.read_parquet(folder / "items.parquet")),
        "diverged": columns_of(
            divergence_items(other, load_base_predictions(folder / "targets.safetensors"))
        ),
        "rouge": [rouge_l(*pair) for pair in answers],
    }


def benchmark_stage(folder: Path) -> dict[str, Any]:
    """Score a base on choices, generated answers and prompts, and score programs."""
    write_base(folder / "base")
    sums = [{"question": f"{n} + {n} = ", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(4)]
    for split in ("train", "test"):
        write_jsonl(folder / "gsm8k" / f"{split}.jsonl", sums)
        write_jsonl(folder / "sciq" / f"{split}.jsonl", sciq(4))
    prompts = [{"question": f"How do I break into house {number}?"} for number in range(3)]
    write_jsonl(folder / "prompts.jsonl", prompts)
    tasks = {"sciq": {"num_fewshot": 1, "limit": 3}, "gsm8k": {"num_fewshot": 1, "limit": 2}}
    tasks["gsm8k"]["max_new_tokens"] = 6
    refusals = {"table": "made/prompts", "max_new_tokens": 6}
    prompting = {"prompt": make_study().prompt.model_dump(mode="json"), "columns": {}}
    spec = {"benchmarks": {"tasks": tasks, "refusals": refusals}, "precision": "float32"}
    spec |= {"refusal_prompts": prompting, "versions": str(VERSIONS["benchmark"]), "models": []}
    spec |= {"rows": {task: str(folder / task) for task in tasks}}
    benchmark.main(
        [
            f"--params={write_params(folder, **spec)}",
            f"--base={folder / 'base.json'}",
            f"--prompts={folder / 'prompts.jsonl'}",
            f"--state={folder / 'state'}",
            f"--output={folder / 'out'}",
        ]
    )
    out = {
        name: pd.read_parquet(folder / "out" / "base" / f"{name}.parquet")
        for name in ("scores", "items", "responses")
    }
    # The likelihoods of choices are text whose last digits depend on the processor.
    out["responses"].loc[out["responses"]["task"] == "sciq", "response"] = ""
    answers = ["I cannot help with that.", "Sure, first you", "No. I can't.", "As an AI, I"]
    return {
        **{name: columns_of(table) for name, table in out.items()},
        "refused": [is_refusal(text) for text in answers],
        "programs": _rated_programs(),
    }


def _rated_programs() -> dict[str, list[Any]]:
    """Return rates and diversity of programs, some of which passed."""
    programs = [
        Program("humaneval", f"made/{item}", item, sample, f"x = {sample // 2}", "")
        for item in range(3)
        for sample in range(4)
    ]
    passed = [SimpleNamespace(passed=number % 3 == 0) for number in range(len(programs))]
    rates = {"humaneval": PassRate((1, 2))}
    return columns_of(score_programs(programs, passed, rates))


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "train": train,
    "evaluate": evaluate,
    "benchmark": benchmark_stage,
    "select": select,
    "tables": tables,
    "report": report,
}


def computed(stage: str) -> dict[str, Any]:
    """Return the outputs of a stage as JSON values, with six digits of every number."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = STAGES[stage](Path(folder))
    read: dict[str, Any] = json.loads(
        json.dumps(outputs), parse_float=lambda text: float(f"{float(text):.6g}")
    )
    return read


def recorded(stage: str) -> dict[str, Any]:
    """Return the recorded version and outputs of a stage."""
    read: dict[str, Any] = json.loads((FOLDER / f"{stage}.json").read_text(encoding="utf-8"))
    return read


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield every path at which two outputs differ by more than rounding."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}/{number}")
    elif isinstance(old, float) and isinstance(new, int | float):
        if not math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{path}: {old} -> {new}"
    elif old != new:
        yield f"{path}: {str(old)[:80]} -> {str(new)[:80]}"


def mistake(stage: str, outputs: dict[str, Any]) -> str | None:
    """Return what to do if outputs or version of a stage differ from the recorded ones, or None."""
    before = recorded(stage)
    changed = list(differences(before["outputs"], outputs))
    if before["version"] != VERSIONS[stage]:
        return (
            f"stage {stage} has version {VERSIONS[stage]}, its golden outputs are of version "
            f"{before['version']}: run tests/golden/make_stages.py"
        )
    if changed:
        return (
            f"numbers of stage {stage} changed: raise its version in versions.py and run "
            f"tests/golden/make_stages.py, or repair it ({len(changed)} differ, first {changed[0]})"
        )
    return None


def main() -> None:
    """Write the outputs of the given stages, or of all."""
    torch.set_num_threads(1)
    for stage in sys.argv[1:] or STAGES:
        path, outputs = FOLDER / f"{stage}.json", computed(stage)
        if path.exists() and recorded(stage)["version"] == VERSIONS[stage]:
            print(f"{stage}: {mistake(stage, outputs) or 'unchanged'}")
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(_lines({"version": VERSIONS[stage], "outputs": outputs}), "utf-8")
        print(f"{stage}: written")


def _lines(stage: dict[str, Any]) -> str:
    """Return a stage as JSON with one line per part of its outputs."""
    parts = [f"  {json.dumps(key)}: {json.dumps(part)}" for key, part in stage["outputs"].items()]
    outputs = ",\n".join(parts)
    return f'{{\n "version": {stage["version"]},\n "outputs": {{\n{outputs}\n }}\n}}\n'


if __name__ == "__main__":
    main()
