"""
What is wrong with a setting: where it stands, its key, and what to write instead. Imports without torch.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from finetuning.credentials import hide
from finetuning.errors import fail, to_line


@dataclass(frozen=True)
class Problem:
    """A fault of a setting, which is printed as one line, any secret in it masked.

    Attributes:
        source: A file and line, or "command line".
        key: The key as it stands there.
        meant: The key of the step that it stands for, if that is another.
    """

    source: str
    key: str | None
    text: str
    meant: str | None = None

    def __str__(self) -> str:
        return to_line(hide(": ".join(part for part in (self.source, self.key, self.text) if part)))


def fail_with(problems: Iterable[Problem]) -> NoReturn:
    """Print every problem on a line of its own, and exit with status 2."""
    lines = [str(problem) for problem in sorted(dict.fromkeys(problems), key=lambda problem: place_of(problem.source))]
    fail(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines]))


def place_of(source: str) -> tuple[str, int]:
    """File and line of a source, by which sources are sorted."""
    place = re.match(r"(.*?):(\d+)(, |$)", source)
    return (place[1], int(place[2])) if place else (source, 0)


def quote(value) -> str:
    """A value as a message quotes it."""
    if isinstance(value, str):
        return f'the text "{value}"' if len(value) < 60 else f'the text "{value[:57]}..."'
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)[:60]


def find_nearest(word: object, known: Iterable[str]) -> str | None:
    """The one of the known words that another one may be a misspelling of."""
    return next(iter(difflib.get_close_matches(str(word).lower(), known, n=1)), None)
