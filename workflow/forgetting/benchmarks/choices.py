"""Which choice of an item a model takes, by the metric that is reported of the task.

The harness scores one list of log-likelihoods in several ways, each of which may choose another
answer. With l the log-likelihood of a choice in nats, given the prompt, the chosen one has the
largest

- `acc_norm`: l / number of its characters
- `acc_bytes`: l / number of its bytes in UTF-8
- `acc_mutual_info`: l - its log-likelihood without the question
- every other metric, `acc` among them: l

as `ConfigurableTask.process_results` of lm-evaluation-harness 0.4 has it, the first of equals. So
an item of accuracy scores 1 exactly where the chosen one is right, and what agreement with the base
tells is of the same answers as the accuracy beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def chosen(task: Any, sample: Mapping[str, Any], metric: str) -> int | None:
    """The number of the choice; None where the model was not asked to choose.

    Of a single continuation that is scored: 1 if each of its tokens is the likeliest, else 0.

    Args:
        task: the harness's.
        sample: what it logs of an item.
        metric: `name,filter`.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(sample["resps"][0][0][1])
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    likelihoods = np.array([float(answer[0][0]) for answer in sample["resps"]])
    return likeliest(likelihoods, task.doc_to_choice(sample["doc"]), metric.partition(",")[0])


def likeliest(likelihoods: np.ndarray, choices: list[str], metric: str) -> int:
    """The number of the choice that a metric takes.

    Args:
        likelihoods: of the choices in nats, (choices,); twice as many with those without the
            question behind them, which `acc_mutual_info` has the harness ask for.
    """
    with_question, without = likelihoods[: len(choices)], likelihoods[len(choices) :]
    if metric == "acc_mutual_info":
        return int(np.argmax(with_question - without))
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }
    # Of an empty choice, the harness's quotient of nothing by nothing is no number either.
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(np.argmax(with_question / np.array(lengths.get(metric, 1.0), dtype=float)))
