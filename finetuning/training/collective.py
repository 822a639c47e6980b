"""
What the ranks of a run do together: learn what the first one has found, and end together.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from finetuning.errors import InputError
from finetuning.ranks import is_main_process
from finetuning.training.checkpoints import cause_of

Value = TypeVar("Value")


def on_main_process(function: Callable[[], Value]) -> Value:
    """Call a function on the first rank only; every rank gets its result, or its InputError."""
    outcome: list = [None, None]  # the result, and what is wrong
    if is_main_process():
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome
    if problem is not None:
        raise InputError(problem)
    return result


def gather(value: Value) -> list[Value]:
    """The value of each rank, on all ranks."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def failing_together(folder: Path) -> Iterator[None]:
    """End all ranks in one line where one of them cannot write (a full disk, mostly), so that none waits for it.

    Raises:
        InputError: A rank could not write into the folder.
    """
    problem = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        cause = cause_of(error)
        # torch's writer has no error of its own
        if not isinstance(cause, (OSError, SafetensorError)) and "inline_container" not in str(cause):
            raise
        problem = str(cause).strip().splitlines()[0]
    problems = [text for text in gather(problem) if text]
    if problems:
        raise InputError(
            f"{folder} could not be saved ({problems[0]}); make room on the disk, or keep fewer "
            "checkpoints with save_total_limit: the same command goes on from the checkpoint before it"
        )
