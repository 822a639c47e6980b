"""The one kind of error that steps report without a traceback, and how they report it."""

import os
import sys
import time
from typing import NoReturn

from finetuning.credentials import hide


class InputError(ValueError):
    """A fault in what the user gave (a path, a file, a setting). Its text says what is wrong and what to do."""


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> NoReturn:
    """Say once a machine what is wrong and what to do, and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # torchrun stops all ranks as soon as one has failed: the first one of this machine is given the time to speak,
        # and ends this wait with its own end. If it has nothing to say, the fault is of this rank alone.
        time.sleep(10)
    print(f"error: {hide(message)}", file=sys.stderr, flush=True)
    sys.exit(2)
