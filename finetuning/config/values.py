"""
The value of a setting as the type of its key, or what that type needs. Imports without torch.
"""

import dataclasses
import difflib
import enum
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from finetuning.config.yaml_file import Setting, quote

UNWRITABLE = re.compile("[\x00\ud800-\udfff]")  # no file and no tokenizer takes these
# what YAML 1.1 reads as another number than the one that stands there: 010 is 8, and 1:30 is 90
TRAP = re.compile(r"[-+]?0[0-7_]+|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")
NAMES = {
    bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list of texts",
    dict: "a mapping",
}  # fmt: skip
_UNFIT = object()  # stands for a value that is not of a type


def convert(setting: Setting, field: dataclasses.Field, hint) -> object:
    """The value as the type of its key.

    A number or a date under a text key is the text that stands in the file (`model_revision: 1.0`), a text under a key
    of lists is a list of one, and `1e3` is an integer; everything else must have the type already.

    Raises:
        ValueError: It has not; the text says what is needed.
    """
    value = setting.value
    if any(isinstance(v, str) and UNWRITABLE.search(v) for v in (value if isinstance(value, list) else [value])):
        raise ValueError("holds a NUL or half a character, which no text may; delete it")
    hints = list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    kinds = [typing.get_origin(kind) or kind for kind in hints] + [bool] * (field.metadata.get("const") is True)
    choices = _choices(field, kinds)
    if choices is not None:
        return None if value is None and types.NoneType in kinds else _choose(setting, choices)
    for kind in sorted(kinds, key=lambda kind: kind is str):  # text is what is left when nothing else fits
        fitting = _fit(value, setting.text, kind)
        if fitting is _UNFIT:
            continue
        if isinstance(fitting, (int, float)) and TRAP.fullmatch(setting.text or ""):
            raise ValueError(f"{setting.text} is {fitting} in YAML; write the number that is meant, without 0 or :")
        if isinstance(fitting, str) and dict in kinds and setting.key != "deepspeed":  # which is refused as such
            _check_json(fitting)
        return fitting
    wanted = " or ".join(dict.fromkeys(NAMES[kind] for kind in kinds if kind in NAMES))
    raise ValueError(f"needs {wanted}, got {quote(value)}" if wanted else "cannot be set here; leave it out")


def find_nearest(word: object, known: Iterable[str]) -> str | None:
    """The one of the known words that another one may be a misspelling of."""
    return next(iter(difflib.get_close_matches(str(word).lower(), known, n=1)), None)


def _choices(field: dataclasses.Field, kinds: list) -> list[str] | None:
    if "choices" in field.metadata:
        return [str(choice) for choice in field.metadata["choices"]]
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return [str(member.value) for member in enums[0]] if enums else None


def _choose(setting: Setting, choices: list[str]) -> str:
    value = setting.value
    if isinstance(value, bool):  # YAML reads a bare `no` as false
        value = str(value).lower() if str(value).lower() in choices else setting.text
    if isinstance(value, str) and value in choices:
        return value
    nearest = find_nearest(value, choices)
    listed = ", ".join(choices) if len(choices) <= 12 else f"the {len(choices)} that --help lists"
    raise ValueError(f"{quote(value)} is none of {listed}" + (f"; write {nearest}" if nearest else ""))


def _fit(value, text: str | None, kind: type) -> object:
    """A value as one of a type, or _UNFIT. `text` is how it stands in the file."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int and isinstance(value, float) and value.is_integer():  # 1e3
        return int(value)
    if kind is str and not isinstance(value, (str, bool, types.NoneType)):
        return _UNFIT if text is None else text
    if kind is list and isinstance(value, str):
        return [value]
    fits = {
        types.NoneType: value is None,
        bool: isinstance(value, bool),
        int: is_number and isinstance(value, int),
        float: is_number and -math.inf < value < math.inf,
        str: isinstance(value, str),
        list: isinstance(value, list) and all(isinstance(v, str) for v in value),
        dict: isinstance(value, dict),
    }
    return value if fits.get(kind) else _UNFIT


def _check_json(text: str) -> None:
    """Refuse a text in place of a mapping that is neither JSON nor a file with JSON."""
    try:
        written = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        is_mapping = isinstance(json.loads(written), dict)
    except (OSError, ValueError):
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"needs a mapping, or a JSON file with one, got {quote(text)}")
