"""
Reads the arguments of a step from YAML files and the command line, and finds everything that is wrong with them at once.

A YAML holds one `key: value` a line. `base: other.yaml` puts its keys under those of another file, whose path is
relative to the file that names it; the command line goes over both. Keys that older versions of trl and transformers
used are understood, and the new name is printed. Imports without torch.
"""

import dataclasses
import difflib
import enum
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

try:
    from trl import TrlParser
except ModuleNotFoundError:  # requirements-judge.txt, for steps 4 and 5
    from finetuning.config.plain_parser import PlainParser as TrlParser

from finetuning.config.arguments import OTHER_STEPS
from finetuning.config.checks import find_faults
from finetuning.config.renames import FSDP_CONFIG_KEYS, RENAMES, Change
from finetuning.credentials import MASK, hide, holds_secret, is_secret, mask_arguments, remember
from finetuning.errors import fail, to_line
from finetuning.ranks import print_main

# variables that Python, its libraries or the launcher read when they start, which is before any YAML is read
READ_AT_START = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|XDG|OMP|GOMP|KMP|MKL|OPENBLAS|NUMEXPR|PYTHON|LD|MPL|TORCHELASTIC|TORCHINDUCTOR|TRITON)[A-Z_]*"
    r"|TORCH_LOGS|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PATH|TMPDIR"
)
UNWRITABLE = re.compile("[\x00\ud800-\udfff]")  # no file and no tokenizer takes these
# what YAML 1.1 reads as another number than the one that stands there: 010 is 8, and 1:30 is 90
TRAP = re.compile(r"[-+]?0[0-7_]+|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")

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


@dataclass(frozen=True)
class Setting:
    """A value and where it was set. `written` is how an older name of the key stood there."""

    key: str
    value: object
    source: str
    text: str | None = None
    written: str | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a setting and what to write instead; `meant` is the key that was misspelt.

    It is printed as one line, any secret in it masked.
    """

    source: str
    key: str | None
    text: str
    meant: str | None = None

    def __str__(self) -> str:
        parts = [self.source, self.key, self.text]
        return to_line(hide(": ".join(part for part in parts if part)))


def read_yaml(path: Path, problems: list[Problem], including: tuple[Path, ...] = ()) -> list[Setting]:
    """Settings of a YAML file and of those under it, in the order in which later ones win.

    Args:
        path: The file.
        problems: What is wrong with the files is added here.
        including: The files that name this one as their base, to refuse a circle.
    """
    here = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problems.append(Problem(f"{here}:{_line_of(error)}", None, f"not valid YAML: {_explain(error)}"))
        return []
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(Problem(f"{here}:{line}", None, "not a text in UTF-8; save the file in that encoding"))
        return []
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = f"holds the character U+{error.character:04X}, which no YAML may; delete it"
        problems.append(Problem(f"{here}:{line}", None, fault))
        return []
    except RecursionError:
        problems.append(Problem(here, None, "not valid YAML: brackets within brackets, too deep to read"))
        return []
    except OSError as error:
        problems.append(Problem(here, None, f"cannot be read: {error.strerror}"))
        return []
    if node is None or node.tag == "tag:yaml.org,2002:null":
        problems.append(Problem(here, None, "the file is empty; write `key: value` lines"))
        return []
    if not isinstance(node, yaml.MappingNode):
        problems.append(
            Problem(f"{here}:{node.start_mark.line + 1}", None, "write `key: value` lines, no list or text")
        )
        return []
    settings, base = [], []
    for key, value_node, line in _entries(node, here, problems):
        source = f"{here}:{line}"
        try:
            value = loader.construct_object(value_node, deep=True)
        except yaml.MarkedYAMLError as error:
            problems.append(Problem(f"{here}:{_line_of(error)}", key, f"cannot be read: {error.problem}"))
            continue
        except RecursionError:
            problems.append(Problem(source, key, "cannot be read: brackets within brackets, too deep"))
            continue
        except (ValueError, KeyError, AttributeError):  # of PyYAML, for `!!int x`, `!!bool x` and `!!timestamp x`
            kind = value_node.tag.rpartition(":")[2]
            problems.append(Problem(source, key, f"cannot be read as {kind}; put it in quotes if it is a text"))
            continue
        if key != "base":
            scalar = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            settings.append(Setting(key, value, source, text=scalar))
        elif not isinstance(value, str):
            problems.append(Problem(source, key, f"needs the path of a YAML file, got {show(value)}"))
        elif not os.path.isfile(path.parent / value):  # Path.is_file raises for a path that is too long
            problems.append(Problem(source, key, f"no such file: {value}; paths are relative to this file"))
        elif (path.parent / value).resolve() in [p.resolve() for p in (*including, path)]:
            circle = " -> ".join(str(p) for p in (*including, path, path.parent / value))
            problems.append(Problem(source, key, f"the files name each other in a circle: {circle}"))
        else:
            base = read_yaml(path.parent / value, problems, (*including, path))
    return base + settings


def _line_of(error: yaml.MarkedYAMLError) -> int:
    """The line of a fault; of quotes and brackets that are never closed, where they open."""
    opened = re.search("simple key|quoted scalar|flow", error.context or "")
    mark = error.context_mark if opened else error.problem_mark
    return mark.line + 1


def _explain(error: yaml.MarkedYAMLError) -> str:
    said = ", ".join(part for part in (error.context, error.problem) if part)
    advice = next((f"; {advice}" for part, advice in SYNTAX if part in said), "")
    return said + advice


def _entries(node: yaml.MappingNode, file: str, problems: list[Problem]) -> Iterator[tuple[str, yaml.Node, int]]:
    """Keys, values and lines of a file; a key that stands twice is a problem."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(f"{file}:{line}", None, "a key must be a word"))
            continue
        key = key_node.value
        if key in seen:
            problems.append(
                Problem(f"{file}:{line}", key, f"stands twice, first in line {seen[key]}; keep one of them")
            )
            continue
        seen[key] = line
        yield key, value_node, line


# Values


def convert(setting: Setting, field: dataclasses.Field, hint) -> object:
    """The value as the type of its key; raises ValueError that says what is needed.

    A number or a date under a text key is the text that stands in the file (`model_revision: 1.0`); everything else
    must have the type already.
    """
    value = setting.value
    if any(isinstance(v, str) and UNWRITABLE.search(v) for v in (value if isinstance(value, list) else [value])):
        raise ValueError("holds a NUL or half a character, which no text may; delete it")
    kinds = [*_kinds(hint), *([bool] if field.metadata.get("const") is True else [])]
    choices = _choices(field, kinds)
    if choices is not None:
        if isinstance(value, bool):  # YAML reads a bare `no` as false
            value = str(value).lower() if str(value).lower() in choices else setting.text
        if value is None and type(None) in kinds:
            return None
        if value not in choices:
            nearest = _nearest(value, choices)
            listed = ", ".join(choices) if len(choices) <= 12 else f"the {len(choices)} that --help lists"
            raise ValueError(f"{show(value)} is none of {listed}" + (f"; write {nearest}" if nearest else ""))
        return value
    for kind in sorted(kinds, key=lambda kind: kind is str):  # text is what is left when nothing else fits
        fits, converted = _try(value, setting.text, kind)
        if fits and isinstance(converted, (int, float)) and TRAP.fullmatch(setting.text or ""):
            raise ValueError(f"{setting.text} is {converted} in YAML; write the number that is meant, without 0 or :")
        mapping = any((typing.get_origin(kind) or kind) is dict for kind in kinds)
        if fits and mapping and isinstance(converted, str) and setting.key != "deepspeed":  # which is refused as such
            _check_json(converted)
        if fits:
            return converted
    wanted = _describe(kinds)
    raise ValueError(f"needs {wanted}, got {show(value)}" if wanted else "cannot be set here; leave it out")


def _check_json(text: str) -> None:
    """Refuse a text in place of a mapping that is neither JSON nor a file with JSON."""
    try:
        written = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        is_mapping = isinstance(json.loads(written), dict)
    except (OSError, ValueError):
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"needs a mapping, or a JSON file with one, got {show(text)}")


def _kinds(hint) -> list:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _choices(field: dataclasses.Field, kinds: list) -> list[str] | None:
    if "choices" in field.metadata:
        return [str(choice) for choice in field.metadata["choices"]]
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return [str(member.value) for member in enums[0]] if enums else None


def _try(value, text: str | None, kind) -> tuple[bool, object]:
    origin = typing.get_origin(kind) or kind
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        whole = isinstance(value, float) and value.is_integer()  # 1e3
        return (isinstance(value, int) and not isinstance(value, bool)) or whole, int(value) if whole else value
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value), value
    if kind is str:
        plain = isinstance(value, str) or (text is not None and value is not None and not isinstance(value, bool))
        return plain, value if isinstance(value, str) else text
    if origin is list:
        values = [value] if isinstance(value, str) else value
        return isinstance(values, list) and all(isinstance(v, str) for v in values), values
    if origin is dict:
        return isinstance(value, dict), value
    return False, None


def _describe(kinds: list) -> str:
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list of texts",
        dict: "a mapping",
    }
    known = [names[origin] for kind in kinds if (origin := typing.get_origin(kind) or kind) in names]
    return " or ".join(dict.fromkeys(known))


def show(value) -> str:
    """A value as a message quotes it."""
    if isinstance(value, str):
        return f'the text "{value}"' if len(value) < 60 else f'the text "{value[:57]}..."'
    if value is None:
        return "nothing"
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def _nearest(word, known) -> str | None:
    matches = difflib.get_close_matches(str(word).lower(), [str(k) for k in known], n=1)
    return matches[0] if matches else None


# The parser

_REFUSED = object()  # stands for a value that was reported


class Parser(TrlParser):
    """TrlParser that refuses what it does not understand, all of it at once, and knows where each value came from.

    Args:
        dataclass_types: The arguments of the step.

    Attributes:
        settings: The settings that were given, by key.
        print_config: Whether `--print_config true` was given.
    """

    def __init__(self, dataclass_types: Iterable[type]):
        super().__init__(dataclass_types, allow_abbrev=False)
        self.add_argument(
            "--config", metavar="FILE", help="YAML with any of these keys; the command line goes over it."
        )
        self.add_argument(
            "--print_config",
            "--print-config",
            action="store",
            nargs="?",
            const="true",
            default="false",
            choices=["true", "false"],
            help="Print every value that is not a default, with where it came from, and exit.",
        )
        self.settings: dict[str, Setting] = {}
        self.print_config = False
        self.fields = {f.name: f for kind in self.dataclass_types for f in dataclasses.fields(kind) if f.init}
        self.hints = {k: v for kind in self.dataclass_types for k, v in typing.get_type_hints(kind).items()}
        self.notes: list[str] = []
        self.source = "command line"
        self._problems: list[Problem] = []

    def add_argument(self, *names, limits=None, **options):
        """As argparse's, without the limits of an argument, which it does not know."""
        return super().add_argument(*names, **options)

    def error(self, message: str):
        if "invalid dict value" in message:
            message += "; write a mapping in the YAML"
        fail_with([*self._problems, Problem("command line", None, message.removeprefix("argument "))])

    def parse_args_and_config(self, args: list[str] | None = None) -> tuple:
        given = [part for arg in (sys.argv[1:] if args is None else args) for part in _arg_parts(arg)]
        problems: list[Problem] = []
        config = self._config_path(given)
        self.source = str(config or "command line")
        settings = [] if config is None else read_yaml(config, problems)
        unread = any(problem.key in (None, "base") for problem in problems)  # so what is not set may stand there
        environment = [s for s in settings if s.key == "env"]
        settings = self._understand([s for s in settings if s.key != "env"], problems)
        given, command_line = self._modernise(given, problems)

        values: dict[str, object] = {}
        doubtful: set[str | None] = set()  # keys whose value is not known
        for setting in settings:
            value = self._check_setting(setting, problems)
            if value is _REFUSED:
                value = None
                doubtful.add(setting.key)
            values[setting.key] = value
            self.settings[setting.key] = dataclasses.replace(setting, value=value)
        for setting in environment:
            self._set_environment(setting, problems)
        self.set_defaults_with_config(**values)
        doubtful |= {key for problem in problems for key in (problem.key, problem.meant)}
        if unread:
            doubtful |= self.fields.keys() - values.keys() - command_line
        for action in self._actions:
            if action.required and action.dest not in command_line | doubtful:
                problems.append(Problem(self.source, action.dest, "is not set; it has no default"))
            action.required = False
        self._problems = problems
        namespace, unknown = self.parse_known_args(given)
        for key in filter(is_secret, command_line & self.fields.keys()):
            remember(getattr(namespace, key))
        if args is None:  # loggers write the command line into their files
            sys.argv[1:] = mask_arguments(sys.argv[1:])
        self.print_config = namespace.print_config == "true"
        for key in command_line & self.fields.keys():
            self.settings[key] = Setting(key, getattr(namespace, key), "command line")
            if not is_secret(key) and holds_secret(key, getattr(namespace, key)):
                problems.append(_no_secrets("command line", key))
        problems.extend(self._unknown_words(unknown))
        known = {key: v for key, v in vars(namespace).items() if key in self.fields and key not in doubtful}
        problems.extend(self._problem_of(keys, text) for keys, text in find_faults(self.dataclass_types, known))
        if problems:
            fail_with(problems)
        try:
            arguments = self._build(namespace)
        except (ValueError, TypeError, ImportError) as error:  # what the libraries raise for a setting or a want
            text = " ".join(str(error).split())
            keys = [key for key in self.settings if re.search(rf"\b{re.escape(key)}\b", text)]
            if not keys:  # a library that looks into a mapping knows the keys in it only
                keys = [key for key in self.settings if "dict" in str(self.hints[key])]
                text = ": ".join([*keys[:1], text])
            fail_with([self._problem_of(keys[:1], text)])
        for note in self.notes:
            print_main(note)
        return arguments

    def _build(self, namespace) -> tuple:
        return tuple(
            kind(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init})
            for kind in self.dataclass_types
        )

    def _config_path(self, args: list[str]) -> Path | None:
        places = [i for i, arg in enumerate(args) if arg == "--config"]
        if not places:
            return None
        if len(places) > 1:
            fail("--config: stands twice; to layer files, write `base: other.yaml` in one of them")
        if places[0] + 1 == len(args):
            fail("--config: needs the path of a YAML file")
        path = Path(args[places[0] + 1])
        if not os.path.isfile(path):  # Path.is_file raises for a path that is too long
            fault = "is a folder; name a YAML file in it" if os.path.isdir(path) else "no such file"
            fail_with([Problem(str(path), None, fault)])
        return path

    def _understand(self, settings: list[Setting], problems: list[Problem]) -> list[Setting]:
        """The settings under today's keys; unknown ones and secrets are left out and reported."""
        understood: dict[str, Setting] = {}
        for setting in settings:
            if holds_secret(setting.key, setting.value):
                problems.append(_no_secrets(setting.source, setting.key))
                continue
            change = self._change_of(setting.key, setting.value)
            if change is None and setting.key not in self.fields:
                problems.append(self._unknown_key(setting.source, setting.key))
                continue
            for new in self._apply(setting, change, problems):
                known = understood.get(new.key)
                same_file = known and known.source.rsplit(":", 1)[0] == new.source.rsplit(":", 1)[0]
                if known and new.key == "fsdp_config" and same_file and isinstance(known.value, dict):
                    new = dataclasses.replace(new, value={**known.value, **new.value})
                elif same_file and known.value != new.value:
                    first = known.written or known.key
                    problems.append(
                        Problem(new.source, setting.key, f"sets the same as {first} ({known.source}); keep one of them")
                    )
                understood[new.key] = new
        return list(understood.values())

    def _change_of(self, key: str, value) -> Change | None:
        change = RENAMES.get(key)
        if change is None or not change.applies(value) or not any(new in self.fields for new in change.new_keys):
            return None
        return change

    def _apply(self, setting: Setting, change: Change | None, problems: list[Problem]) -> list[Setting]:
        if change is None:
            return [setting]
        try:
            values = change.convert(setting.value)
        except ValueError as error:
            problems.append(Problem(setting.source, setting.key, str(error)))
            return []
        written = f"{setting.key}: {json.dumps(setting.value, ensure_ascii=False, default=str)}"
        self.notes.append(f"{setting.source}: {setting.key}: {change.describe(values)}")
        simple = change.renames_only
        return [
            Setting(key, value, setting.source, setting.text if simple else None, written)
            for key, value in values.items()
        ]

    def _check_setting(self, setting: Setting, problems: list[Problem]) -> object:
        try:
            value = convert(setting, self.fields[setting.key], self.hints[setting.key])
        except ValueError as error:
            old = setting.written.partition(":")[0] + " -> " if setting.written else ""
            problems.append(Problem(setting.source, old + setting.key, str(error)))
            return _REFUSED
        if setting.key == "fsdp_config" and isinstance(value, dict):
            for key in value.keys() - FSDP_CONFIG_KEYS:
                text = _suggest(_nearest(key, FSDP_CONFIG_KEYS))
                problems.append(Problem(setting.source, f"fsdp_config.{key}", text))
        return value

    def _unknown_key(self, source: str, key: str) -> Problem:
        name = key.removeprefix("--").replace("-", "_").lower()
        if name == "<<":
            return Problem(source, key, "files are not merged by <<; write `base: other.yaml`")
        if name in self.fields and not is_secret(name):  # in capitals, or with dashes
            return Problem(source, key, _suggest(name), meant=name)
        if name in FSDP_CONFIG_KEYS:
            return Problem(source, key, "belongs under fsdp_config")
        for script, kind in OTHER_STEPS.items():
            if name in {f.name for f in dataclasses.fields(kind)}:
                return Problem(source, key, f"is a key of {script}, not of this step")
        names = {field: field for field in self.fields if not is_secret(field)}
        renamed = {old: change.new_keys[0] for old, change in RENAMES.items() if change.renames_only}
        names |= {old: new for old, new in renamed.items() if new in self.fields}
        meant = names.get(_nearest(name, names))
        return Problem(source, key, _suggest(meant), meant=meant)

    def _set_environment(self, setting: Setting, problems: list[Problem]) -> None:
        if not isinstance(setting.value, dict):
            problems.append(Problem(setting.source, "env", "must hold `NAME: value` lines"))
            return
        for name, value in setting.value.items():
            if holds_secret(str(name), value):
                problems.append(_no_secrets(setting.source, f"env.{name}"))
            elif not re.fullmatch(r"[A-Za-z_]\w*", str(name)) or not isinstance(value, (str, int, float)):
                problems.append(Problem(setting.source, f"env.{name}", "needs a NAME and one value"))
            elif READ_AT_START.fullmatch(str(name)):
                text = (
                    f"is read before this file is, so it would have no effect; export it before the command: {name}=..."
                )
                problems.append(Problem(setting.source, f"env.{name}", text))
            elif UNWRITABLE.search(str(value)):
                problems.append(Problem(setting.source, f"env.{name}", "holds a NUL or half a character; delete it"))
            else:
                os.environ[str(name)] = str(value)

    # The command line

    def _modernise(self, args: list[str], problems: list[Problem]) -> tuple[list[str], set[str]]:
        """Replace older names on the command line; gives the arguments, and the keys that they set."""
        modern, keys = [], set()
        index = 0
        while index < len(args):
            arg = args[index]
            index += 1
            if not arg.startswith("--"):
                modern.append(arg)
                continue
            name, equals, text = arg[2:].partition("=")
            key = name.replace("-", "_")
            separate = not equals and index < len(args) and not args[index].startswith("--")
            text = args[index] if separate else text
            value = _read_value(text)
            change = self._change_of(key, value)
            if change is None:
                modern.append(arg)
                keys.add(key.removeprefix("no_") if key not in self.fields else key)
                continue
            index += separate
            for setting in self._apply(Setting(key, value, "command line", text), change, problems):
                keys.add(setting.key)
                if setting.value is not None:
                    plain = change.renames_only and not isinstance(value, bool)
                    modern += [f"--{setting.key}", text if plain else _as_argument(setting.value)]
        return modern, keys

    def _unknown_words(self, words: list[str]) -> Iterator[Problem]:
        """One problem for each key that is not known, whose values come with it, and for each word without a key."""
        after_key = False
        for word in words:
            if word.startswith("--"):
                key = "--" + word[2:].partition("=")[0].replace("-", "_")
                yield self._unknown_key("command line", key)
            elif not after_key:
                yield Problem("command line", None, f"{word} follows no --key that takes it")
            after_key = word.startswith("--")

    # Reports

    def _problem_of(self, keys, text: str) -> Problem:
        sources = {self.settings[key].source for key in keys if key in self.settings} or {self.source}
        return Problem(", ".join(sorted(sources, key=_place)), None, text)

    def describe(self, arguments: tuple, hardware: Mapping[str, str]) -> list[str]:
        """One line for each value that is not a default: the key, the value, where it came from."""
        defaults = {key: _default(field) for key, field in self.fields.items()}
        rows = []
        for holder in arguments:
            for field in dataclasses.fields(holder):
                setting, value = self.settings.get(field.name), getattr(holder, field.name)
                if is_secret(field.name) and setting is not None:
                    rows.append((field.name, MASK, setting.source))
                elif field.name in hardware:
                    wanted = f"; {setting.source} says {_as_text(setting.value)}" if setting else ""
                    rows.append((field.name, _as_text(value), f"hardware: {hardware[field.name]}{wanted}"))
                elif setting is not None and setting.value != defaults[field.name]:
                    written = f", written as {setting.written}" if setting.written else ""
                    rows.append((field.name, _as_text(setting.value), setting.source + written))
        width = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return [f"{key:{width[0]}}  {value:{width[1]}}  {source}" for key, value, source in sorted(rows)]


def fail_with(problems: list[Problem]) -> typing.NoReturn:
    """Print every problem on a line of its own, and exit with status 2."""
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: _place(problem.source))
    lines = [str(problem) for problem in ordered]
    fail(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines]))


def _place(source: str) -> tuple[str, int]:
    place = re.match(r"(.*?):(\d+)(, |$)", source)
    return (place[1], int(place[2])) if place else (source, 0)


def _arg_parts(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _no_secrets(source: str, key: str) -> Problem:
    text = "a token or key does not belong in a file; delete it, and export HF_TOKEN, WANDB_API_KEY or OPENAI_API_KEY"
    return Problem(source, key, text)


def _suggest(nearest: str | None) -> str:
    return "unknown key" + (f"; did you mean {nearest}?" if nearest else "; --help lists all keys")


def _default(field: dataclasses.Field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _read_value(text: str) -> object:
    """A value of the command line, as YAML reads it; a key without a value is a switch."""
    try:
        return yaml.load(text, _Loader) if text else True
    except yaml.YAMLError:
        return text


def _as_argument(value) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) or value is None else str(value)


def _as_text(value) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
