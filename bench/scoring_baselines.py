"""Contenders of the scoring benchmark; each does one kind of work on one loaded model."""

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
    """Model and data that all contenders share.

    Attributes:
        facts: questions of the truth ratio.
        rows: questions that are answered.
        differences: the largest difference between two contenders, by kind of work.
        results: log-likelihoods of the first contender, by kind of work.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    data: Path
    limit: int
    facts: list[Row]
    rows: list[Row]
    differences: dict[str, float] = field(default_factory=dict)
    results: dict[str, list[float]] = field(default_factory=dict)

    @cached_property
    def requests(self) -> dict[str, list[Any]]:
        """Return the harness's requests, by task."""
        disable_progress_bars()
        requests = {}
        for name in TASKS:
            task = load_task(TaskSpec(name), self.data / name)
            task.build_all_requests(limit=self.limit)
            requests[name] = task.instances
        return requests

    def compare(self, work: str, values: Sequence[float], tokens: Sequence[int]) -> None:
        """Compare log-likelihoods per token with those of the first contender."""
        first = self.results.setdefault(work, list(values))
        largest = max(
            abs(one - two) / count for one, two, count in zip(values, first, tokens, strict=True)
        )
        self.differences[work] = max(largest, self.differences.get(work, 0.0))


def seconds(run: Callable[[], object]) -> float:
    """Return the processor seconds of a contender; on a GPU those of the clock."""
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    start = clock()
    run()
    return clock() - start


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """Return data, a tokenizer trained on it, and a model that has learned to end answers."""
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
    """Train on answers and their ends, so that generations have the lengths of answers."""
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
    answers = lm.loglikelihood(bench.requests[task], disable_tqdm=True)
    lengths = [max(1, len(r.args[1].split())) for r in bench.requests[task]]
    bench.compare(task, [value for value, _ in answers], lengths)


def choices_by_harness(bench: Bench, task: str, size: int) -> None:
    """Compute log-likelihoods of all choices with the harness's own model."""
    _choices(bench, HFLM, task, size)


def choices_once(bench: Bench, task: str) -> None:
    """Compute log-likelihoods of all choices with shared prefixes, at the default batch size."""
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
    """Compute log-likelihoods of right and wrong answers with the harness's own model."""
    examples = [example for question in _answers(bench) for example in question]
    lm = HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=size)
    requests = [(("", ""), e.ids[: e.prompt_length], e.ids[e.prompt_length :]) for e in examples]
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    means = [value / e.targets for (value, _), e in zip(answers, examples, strict=True)]
    bench.compare("truth ratio", means, [1] * len(means))


def logprobs_once(bench: Bench) -> None:
    """Compute log-likelihoods of answers with shared prefixes, at the default batch size."""
    logprobs = answer_logprobs(bench.model, _answers(bench), bench.tokenizer.pad_token_id, 64)
    means = [value for question in logprobs for value in question]
    bench.compare("truth ratio", means, [1] * len(means))


def generate_as_tofu(bench: Bench, min_new_tokens: int = 0) -> None:
    """Generate as TOFU's script does: left-padded batches of 30 in the order of the file."""
    prompts = [encode_prompt(bench.tokenizer, PROMPT, row["question"]) for row in bench.rows]
    pad = bench.tokenizer.pad_token_id
    for start in range(0, len(prompts), TOFU_BATCH):
        batch = prompts[start : start + TOFU_BATCH]
        length = max(map(len, batch))
        ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch])
        bench.model.generate(
            input_ids=ids.to(bench.model.device),
            attention_mask=mask.to(bench.model.device),
            do_sample=False,
            max_new_tokens=TOFU_LENGTH,
            min_new_tokens=min_new_tokens,
            eos_token_id=bench.tokenizer.eos_token_id,
            pad_token_id=pad,
        )


def generate_ended(bench: Bench) -> list[list[int]]:
    """Generate as this project does: a prompt takes the slot of an answer that has ended."""
    questions = [row["question"] for row in bench.rows]
    settings = EvaluationConfig(max_new_tokens=TOFU_LENGTH, batch_size=64)
    return generate(bench.model, bench.tokenizer, questions, PROMPT, settings)


def rouge_score(pairs: Sequence[tuple[str, str]]) -> None:
    """Score with the package that TOFU's script calls."""
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for reference, generated in pairs:
        scorer.score(target=reference, prediction=generated)
