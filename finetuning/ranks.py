"""
Which process this is of those that torchrun has started, and what only the first one does. Imports without torch.
"""

import os


def _read(name: str, alone: int) -> int:
    """A number that torchrun sets; `alone` without it, and where some other launcher has left no number there."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else alone


def get_world_size() -> int:
    """The number of processes on all machines together."""
    return _read("WORLD_SIZE", 1)


def get_local_world_size() -> int:
    """The number of processes on this machine."""
    return _read("LOCAL_WORLD_SIZE", 1)


def get_rank() -> int:
    """The number of this process among all of them; the first one is 0."""
    return _read("RANK", 0)


def get_local_rank() -> int:
    """The number of this process among those of its machine, which is the number of its device."""
    return _read("LOCAL_RANK", 0)


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return get_rank() == 0


def print_main(text: str) -> None:
    """Print once, however many processes there are."""
    if is_main_process():
        print(text, flush=True)
