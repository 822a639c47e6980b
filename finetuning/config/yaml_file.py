"""
A YAML with the settings of a step, one `key: value` a line, with the line of each and all that is wrong with the file.

`base: other.yaml` puts a file's keys over those of another file, whose path is relative to it. Imports without torch.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from finetuning.credentials import hide
from finetuning.errors import to_line

# What a YAML error says, and what to write instead.
SYNTAX = (
    ("'\\t'", "indent with spaces, not tabs"),
    ("expected ':'", "write `key: value`, with a space after the colon"),
    ("mapping values", "put a text with a colon in quotes, and begin all keys in the same column"),
    ("another document", "a file is one document: take out the `---` between them"),
    ("cannot start any token", "put the text in quotes"),
    ("end of stream", "close the quotes"),
    ("expected ',' or", "close the bracket"),
    ("unknown escape", "double the backslash, or use single quotes"),
    ("undefined alias", "put a text that begins with * in quotes"),
)


@dataclass(frozen=True)
class Setting:
    """A value of a key, and where it was set.

    Attributes:
        source: A file and line, or "command line".
        text: The value as it stands there, if it is no list or mapping.
        written: How it stands there, if the key is an older name.
    """

    key: str
    value: object
    source: str
    text: str | None = None
    written: str | None = None


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


def quote(value) -> str:
    """A value as a message quotes it."""
    if isinstance(value, str):
        return f'the text "{value}"' if len(value) < 60 else f'the text "{value[:57]}..."'
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)[:60]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads `2e-5` as the number it is in YAML 1.2, and takes no key twice."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                text = f"{key.value} stands twice, first in line {lines[key.value]}; keep one of them"
                raise yaml.constructor.ConstructorError(problem=text, problem_mark=key.start_mark)
            lines[str(key.value)] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_value(text: str) -> object:
    """A value of the command line, as YAML reads it; a key without a value is a switch."""
    try:
        return yaml.load(text, _Loader) if text else True
    except yaml.YAMLError:
        return text


def read_yaml(path: Path, problems: list[Problem], including: tuple[Path, ...] = ()) -> list[Setting]:
    """Settings of a YAML file and of those under it, in the order in which later ones win.

    Args:
        problems: What is wrong with the files is added here.
        including: The files that name this one as their base, to refuse a circle.
    """
    parsed = _parse(path)
    if isinstance(parsed, Problem):
        problems.append(parsed)
        return []
    loader, node = parsed
    base: list[Setting] = []
    settings: list[Setting] = []
    for entry in _entries(path, loader, node):
        if isinstance(entry, Problem):
            problems.append(entry)
        elif entry.key != "base":
            settings.append(entry)
        elif isinstance(below := _find_base(entry, (*including, path)), Problem):
            problems.append(below)
        else:
            base = read_yaml(below, problems, (*including, path))
    return base + settings


def _parse(path: Path) -> tuple[_Loader, yaml.MappingNode] | Problem:
    """The loader of a file and the mapping in it, whose values are not made yet."""
    here, line = str(path), None
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            return loader, node
        if node is None or node.tag == "tag:yaml.org,2002:null":
            fault = "the file is empty; write `key: value` lines"
        else:
            line, fault = node.start_mark.line + 1, "write `key: value` lines, no list or text"
    except yaml.MarkedYAMLError as error:
        line, fault = _line_of(error), f"not valid YAML: {_explain(error)}"
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fault = "not a text in UTF-8; save the file in that encoding"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = f"holds the character U+{error.character:04X}, which no YAML may; delete it"
    except RecursionError:
        fault = "not valid YAML: brackets within brackets, too deep to read"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    return Problem(here if line is None else f"{here}:{line}", None, fault)


def _line_of(error: yaml.MarkedYAMLError) -> int:
    """The line of a fault; of quotes and brackets that are never closed, where they open."""
    opened = re.search("simple key|quoted scalar|flow", error.context or "")
    mark = error.context_mark if opened else error.problem_mark
    return 1 if mark is None else mark.line + 1


def _explain(error: yaml.MarkedYAMLError) -> str:
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return said + next((f"; {advice}" for part, advice in SYNTAX if part in said), "")


def _entries(path: Path, loader: _Loader, node: yaml.MappingNode) -> Iterator[Setting | Problem]:
    """The keys of a file with their values, or what is wrong with one; of a key that stands twice, the first."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        source, key = f"{path}:{line}", key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            yield Problem(source, None, "a key must be a word")
        elif key in seen:
            yield Problem(source, key, f"stands twice, first in line {seen[key]}; keep one of them")
        else:
            seen[key] = line
            try:
                value = loader.construct_object(value_node, deep=True)
                yield Setting(key, value, source, value_node.value if isinstance(value_node, yaml.ScalarNode) else None)
            except yaml.MarkedYAMLError as error:
                yield Problem(f"{path}:{_line_of(error)}", key, f"cannot be read: {error.problem}")
            except RecursionError:
                yield Problem(source, key, "cannot be read: brackets within brackets, too deep")
            except (ValueError, KeyError, AttributeError):  # of PyYAML, for `!!int x`, `!!bool x` and `!!timestamp x`
                kind = value_node.tag.rpartition(":")[2]
                yield Problem(source, key, f"cannot be read as {kind}; put it in quotes if it is a text")


def _find_base(setting: Setting, files: tuple[Path, ...]) -> Path | Problem:
    """The file that `base` names, the last of these files, each of which names the next one."""
    if not isinstance(setting.value, str):
        return Problem(setting.source, "base", f"needs the path of a YAML file, got {quote(setting.value)}")
    base = files[-1].parent / setting.value
    if not os.path.isfile(base):  # Path.is_file raises for a path that is too long
        return Problem(setting.source, "base", f"no such file: {setting.value}; paths are relative to this file")
    if base.resolve() in [file.resolve() for file in files]:
        circle = " -> ".join(str(file) for file in (*files, base))
        return Problem(setting.source, "base", f"the files name each other in a circle: {circle}")
    return base
