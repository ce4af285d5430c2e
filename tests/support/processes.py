"""Processes that train together, for tests: started quickly, never waited for long."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from forgetting.config.expand import RunGroupConfig
from forgetting.models.loading import silence_libraries
from forgetting.training.distributed import ProcessGroup
from forgetting.training.run_group import RunContext, train_run_group

PATIENCE = 600.0
"""Seconds after which a team that does not end is ended: it hangs."""

# One process imports the library; the others are copies of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forgetting.training.run_group"])


class Stopped(Exception):
    """Ends a run in a process of a team, as if it had been killed there."""


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of so many processes that find each other.

    The first process that fails ends the others, and its traceback is the error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = FORKS.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = FORKS.Process(target=_work, args=(theirs, environment, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_result(answer) for answer in _answers(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: list[Any]) -> list[Any]:
    """All answers in the order of the pipes, or, as soon as there is one, a failure."""
    waiting, answers = list(pipes), {}
    while waiting:
        ready = wait(waiting, PATIENCE)
        if not ready:
            raise TimeoutError(f"{len(waiting)} of {len(pipes)} processes hang")
        for pipe in ready:
            answers[pipe] = pipe.recv()
            waiting.remove(pipe)
            if isinstance(answers[pipe], Failure):
                return [answers[pipe]]
    return [answers[pipe] for pipe in pipes]


def _result(answer: Any) -> Any:
    if isinstance(answer, Failure):
        raise answer.error from RuntimeError(answer.traceback)
    return answer


@dataclass
class Failure:
    """What went wrong in a process."""

    error: BaseException
    traceback: str


def _work(
    pipe: Any, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    silence_libraries()
    try:
        answer = function(*arguments)
        pickle.dumps(answer)
    except BaseException as error:
        answer = Failure(error, traceback.format_exc())
    pipe.send(answer)
    # Without the end of the interpreter, where a process group waits for the others.
    sys.stdout.flush()
    os._exit(0)


def train_together(
    spec: RunGroupConfig, context: RunContext, state: Path, stop_at: int | None = None
) -> list[dict[str, Any]]:
    """Train a run group in this process and those beside it; all stop after a step if told so."""

    def tell(run: str, progress: Any, schedule: Any) -> None:
        if progress.step == stop_at:
            raise Stopped

    process_group = ProcessGroup.init()
    try:
        return train_run_group(
            [spec], replace(context, process_group=process_group), {"base": "b"}, state, tell
        )
    finally:
        process_group.destroy()


def train(
    size: int, spec: RunGroupConfig, context: RunContext, state: Path, stop_at: int | None = None
) -> dict[str, Any] | None:
    """The record of a run group's only run, trained by so many processes; None if it was "
    "stopped."""
    arguments = (spec, context, state, stop_at)
    try:
        told = (
            [train_together(*arguments)]
            if size == 1
            else together(size, train_together, *arguments)
        )
    except Stopped:
        return None
    assert all(records == told[0] for records in told)
    (record,) = told[0]
    return record


def weights(record: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint of a finished run holds."""
    (file,) = Path(record["folder"], f"step-{step:07d}").glob("*model.safetensors")
    return load_file(file)
