"""The one kind of error that steps report without a traceback, and how they report it."""

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from finetuning.credentials import hide
from finetuning.ranks import get_local_rank

# What would command a terminal, or turn the direction in which a line is read; line ends and tabs are let through.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # would break the line, or colour it


class InputError(ValueError):
    """A fault in what the user gave (a path, a file, a setting). Its text says what is wrong and what to do."""


# Errors of an operating system that lets nothing be written: no space, no quota, a read-only file system, a limit, no
# permission, or a file where a folder has to be and the reverse
UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
}  # fmt: skip


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Give the name of a file to an error of the operating system that has none, as that of a write to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: It is in a file system such as /proc, which says that it does not exist and lets none be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise InputError(f"{folder} cannot be made: no folder can be made there; choose another place") from None


def to_plain(text: str) -> str:
    """A text on whose lines nothing commands the terminal: what would is shown as an escape."""
    return COMMANDS.sub(_escape, text)


class PlainOutput:
    """A stream on which no text of a model, a judge or a dataset commands the terminal: it is shown as an escape."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(to_plain(text))

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def to_line(text: str) -> str:
    """A text as one line, with what a terminal would obey, of names in data or files, as escapes."""
    return CONTROL.sub(_escape, text)


def _escape(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


def fail(message: str) -> NoReturn:
    """Say once a machine what is wrong and what to do, and exit with status 2."""
    if get_local_rank() != 0:
        # torchrun stops all ranks as soon as one has failed: the first one of this machine is given the time to speak,
        # and ends this wait with its own end. If it has nothing to say, the fault is of this rank alone.
        time.sleep(10)
    print(f"error: {hide(message)}", file=sys.stderr, flush=True)
    sys.exit(2)
