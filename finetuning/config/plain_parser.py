"""
A command line of dataclasses without trl, for a machine that only judges and scores (requirements-judge.txt).

It takes what TrlParser takes of the dataclasses of steps 4 and 5; a test holds their arguments against each other.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class PlainParser(argparse.ArgumentParser):
    """A parser with an argument for each field: texts, numbers, switches and lists, each None where it may be."""

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.dataclass_types = list(dataclass_types)
        for kind in self.dataclass_types:
            hints = typing.get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if field.init:
                    self._add_field(field, hints[field.name])

    def _add_field(self, field: dataclasses.Field, hint) -> None:
        names = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        options = {key: value for key, value in field.metadata.items() if key != "limits"}
        if field.default_factory is not dataclasses.MISSING:
            options["default"] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            options["default"] = field.default
        else:
            options["required"] = True
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        is_optional = isinstance(hint, types.UnionType) and len(kinds) == 1
        kind = kinds[0] if is_optional else hint
        if typing.get_origin(kind) is list:
            options |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        elif kind is bool:
            options["type"] = _read_switch
            if not is_optional:
                options |= {"nargs": "?", "const": True}
        else:
            options["type"] = _or_none(kind) if is_optional and kind is not str else kind
        self.add_argument(*names, **options)
        if kind is bool and field.default is True:
            off = [f"--no{name[1:]}" if "-" in name[2:] else f"--no_{name[2:]}" for name in names]
            self.add_argument(*off, action="store_false", dest=field.name, default=False, help=options.get("help"))


def _read_switch(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


def _or_none(kind: type) -> Callable:
    def read(text: str):
        return None if text.lower() in ("none", "null") else kind(text)

    read.__name__ = kind.__name__  # which argparse says where it cannot be read
    return read
