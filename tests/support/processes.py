"""Process groups for tests, whose processes are forked from one that has imported the library."""

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
from forgetting.training.run_group import train_run_group
from forgetting.training.training_job import RunContext, TrainingJob

PATIENCE = 600.0
"""Seconds after which a process group is considered to hang, and is ended."""

# pytest's import mode names test modules from the root of the repository. Processes that unpickle a
# function of a test import its module by that name.
sys.path.append(str(Path(__file__).resolve().parents[2]))

# One process imports the library; the others are forked from it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forgetting.training.run_group"])


class Stopped(Exception):
    """Ends a run in a process of a group as if the process had been killed."""


def run_in_processes(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns in each process of a group.

    The first process that fails ends the others; its error is raised with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = FORKS.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
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
    """Return all answers in the order of the pipes, or the first failure alone."""
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
    """An error in a process."""

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
    # A regular exit of the interpreter would wait for the other processes of the group.
    sys.stdout.flush()
    os._exit(0)


def train_in_group(
    config: RunGroupConfig, context: RunContext, state: Path, stop_at: int | None = None
) -> list[dict[str, Any]]:
    """Train a run group in this process of a group; all processes stop after step `stop_at`."""

    def log(run: str, run_state: Any, schedule: Any) -> None:
        if run_state.step == stop_at:
            raise Stopped

    process_group = ProcessGroup.init()
    try:
        return train_run_group(
            TrainingJob(
                config, replace(context, process_group=process_group), {"base": "b"}, state, log
            )
        )
    finally:
        process_group.destroy()


def train(
    world_size: int,
    config: RunGroupConfig,
    context: RunContext,
    state: Path,
    stop_at: int | None = None,
) -> dict[str, Any] | None:
    """Train the only run of a run group; return its record, or None if it was stopped."""
    arguments = (config, context, state, stop_at)
    try:
        if world_size == 1:
            by_rank = [train_in_group(*arguments)]
        else:
            by_rank = run_in_processes(world_size, train_in_group, *arguments)
    except Stopped:
        return None
    assert all(records == by_rank[0] for records in by_rank)
    (record,) = by_rank[0]
    return record


def weights(record: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint of a finished run."""
    (file,) = Path(record["folder"], f"step-{step:07d}").glob("*model.safetensors")
    return load_file(file)
