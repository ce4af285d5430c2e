"""The contenders of the scoring benchmark: each does one kind of work on one loaded model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from lm_eval.models.huggingface import HFLM
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from forgetting.benchmarks.hflm import SharedPrefixLM
from forgetting.benchmarks.tasks import TaskSpec, load_task
from forgetting.config.data import PromptConfig
from forgetting.config.evaluation import EvaluationConfig
from forgetting.data.table_files import Row
from forgetting.data.tables import read_probe_rows
from forgetting.data.tokenize import encode_pair, encode_prompt
from forgetting.evaluation.prefix_tree import answer_logprobs
from forgetting.evaluation.probes import generate
from forgetting.io import read_jsonl
from forgetting.models.forward import collate, length_batches, token_logprobs
from forgetting.models.loading import Model, get_device, load_tokenizer
from forgetting.training.pretrain import train_tokenizer
from models import SHAPES, random_model

TASKS = ("hellaswag", "arc_challenge", "winogrande")
TOFU_BATCH, TOFU_LENGTH = 30, 200
PROMPT = PromptConfig()
FACTS = ("real_authors_perturbed", "world_facts_perturbed")
SETS = (*FACTS, "forget10_perturbed", "retain_perturbed")


@dataclass
class Bench:
    """What all contenders share.

    Attributes:
        facts: questions of the truth ratio; rows: those that are answered too.
        differences: the largest difference between two contenders, by kind of work.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    data: Path
    limit: int
    facts: list[Row]
    rows: list[Row]
    differences: dict[str, float] = field(default_factory=dict)
    found: dict[str, list[float]] = field(default_factory=dict)

    @cached_property
    def requests(self) -> dict[str, list[Any]]:
        """What the harness asks of a model, by task."""
        disable_progress_bars()
        made = {}
        for name in TASKS:
            task = load_task(TaskSpec(name), self.data / name)
            task.build_all_requests(limit=self.limit)
            made[name] = task.instances
        return made

    def note(self, work: str, values: Sequence[float], tokens: Sequence[int]) -> None:
        """Compare log-likelihoods with those that another contender found, per token."""
        before = self.found.setdefault(work, list(values))
        worst = max(
            abs(one - two) / count for one, two, count in zip(values, before, tokens, strict=True)
        )
        self.differences[work] = max(worst, self.differences.get(work, 0.0))


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of a contender; on a GPU those of the clock."""
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    started = clock()
    run()
    return clock() - started


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """The data, a tokenizer of its texts, and a model that has learned when an answer ends."""
    tofu = options.data / "tofu"
    sets = {
        name: read_probe_rows(tofu / f"{name}.jsonl", f"tofu/{name}", wrong_answers=True)
        for name in SETS
    }
    rows = [row for name in SETS for row in sets[name][: options.questions]]
    texts = [f"{row['question']} {row['answer']}" for rows in sets.values() for row in rows]
    texts += [row["ctx"] for row in read_jsonl(options.data / "hellaswag" / "validation.jsonl")]
    train_tokenizer(texts, min(2048, SHAPES[options.shape].vocab_size), folder)
    tokenizer = load_tokenizer(folder)
    model = random_model(options.shape, tokenizer, get_device())
    teach(model, tokenizer, rows, options.epochs)
    model.save_pretrained(folder)
    facts = [row for name in FACTS for row in sets[name][: options.questions]]
    return Bench(model, tokenizer, options.data, options.limit, facts, rows)


def teach(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], epochs: int
) -> None:
    """Teach answers and their ends, so that generations have the lengths of answers."""
    examples = [encode_pair(tokenizer, PROMPT, row["question"], row["answer"]) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for indices in length_batches([len(example.ids) for example in examples], 16):
            batch = collate([examples[i] for i in indices], tokenizer.pad_token_id, model.device)
            loss = -token_logprobs(model, batch).sum() / batch.targets
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def _choices(bench: Bench, kind: type, task: str, size: int) -> None:
    lm = kind(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=size)
    found = lm.loglikelihood(bench.requests[task], disable_tqdm=True)
    lengths = [max(1, len(r.args[1].split())) for r in bench.requests[task]]
    bench.note(task, [value for value, _ in found], lengths)


def choices_by_harness(bench: Bench, task: str, size: int) -> None:
    """Log-likelihoods of all choices by the harness's own model."""
    _choices(bench, HFLM, task, size)


def choices_once(bench: Bench, task: str) -> None:
    """The same with each question read once, at the study's default batch size."""
    _choices(bench, SharedPrefixLM, task, 16)


def _answers(bench: Bench) -> list[list[Any]]:
    return [
        [
            encode_pair(bench.tokenizer, PROMPT, row["question"], text)
            for text in (row["answer"], *row["wrong_answers"])
        ]
        for row in bench.facts
    ]


def logprobs_by_harness(bench: Bench, size: int) -> None:
    """Right and wrong answers, each with its question, through the harness's own model."""
    examples = [example for several in _answers(bench) for example in several]
    lm = HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=size)
    asked = [(("", ""), e.ids[: e.prompt], e.ids[e.prompt :]) for e in examples]
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    means = [value / e.targets for (value, _), e in zip(found, examples, strict=True)]
    bench.note("truth ratio", means, [1] * len(means))


def logprobs_once(bench: Bench) -> None:
    """The same with each question read once, at the study's default batch size."""
    found = answer_logprobs(bench.model, _answers(bench), bench.tokenizer.pad_token_id, 64)
    means = [value for several in found for value in several]
    bench.note("truth ratio", means, [1] * len(means))


def generate_as_tofu(bench: Bench, least: int = 0) -> None:
    """Batches of 30 in the order of the file, padded on the left, until all have ended.

    `least` is so many tokens that no answer ends before.
    """
    prompts = [encode_prompt(bench.tokenizer, PROMPT, row["question"]) for row in bench.rows]
    pad = bench.tokenizer.pad_token_id
    for start in range(0, len(prompts), TOFU_BATCH):
        several = prompts[start : start + TOFU_BATCH]
        length = max(map(len, several))
        ids = torch.tensor([[pad] * (length - len(one)) + one for one in several])
        mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in several])
        bench.model.generate(
            input_ids=ids.to(bench.model.device),
            attention_mask=mask.to(bench.model.device),
            do_sample=False,
            max_new_tokens=TOFU_LENGTH,
            min_new_tokens=least,
            eos_token_id=bench.tokenizer.eos_token_id,
            pad_token_id=pad,
        )


def generate_ended(bench: Bench) -> list[list[int]]:
    """This project's answers: each leaves when it ends, and another takes its place."""
    questions = [row["question"] for row in bench.rows]
    settings = EvaluationConfig(max_new_tokens=TOFU_LENGTH, batch_size=64)
    return generate(bench.model, bench.tokenizer, questions, PROMPT, settings)


def rouge_score(pairs: Sequence[tuple[str, str]]) -> None:
    """The package that TOFU's script calls."""
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for reference, generated in pairs:
        scorer.score(target=reference, prediction=generated)
