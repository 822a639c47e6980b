"""
Reads the arguments of a step from YAML files and the command line, and finds all that is wrong with them at once.

The command line goes over the files. Keys that older versions of trl and transformers used are understood, and the new
name is printed. Imports without torch.
"""

import dataclasses
import enum
import json
import os
import re
import sys
import typing
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

try:
    from trl import TrlParser
except ModuleNotFoundError:  # requirements-judge.txt, for steps 4 and 5
    from finetuning.config.plain_parser import PlainParser as TrlParser

from finetuning.config.arguments import OTHER_STEPS
from finetuning.config.checks import find_faults
from finetuning.config.renames import FSDP_CONFIG_KEYS, RENAMES, Change
from finetuning.config.values import UNWRITABLE, convert, find_nearest
from finetuning.config.yaml_file import Problem, Setting, read_value, read_yaml
from finetuning.credentials import MASK, holds_secret, is_secret, mask_arguments, remember
from finetuning.errors import fail
from finetuning.ranks import print_main

COMMAND_LINE = "command line"
# variables that Python, its libraries or the launcher read when they start, which is before any YAML is read
READ_AT_START = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|XDG|OMP|GOMP|KMP|MKL|OPENBLAS|NUMEXPR|PYTHON|LD|MPL|TORCHELASTIC|TORCHINDUCTOR"
    r"|TRITON)[A-Z_]*|TORCH_LOGS|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PATH|TMPDIR"
)
NO_SECRETS = "a token or key does not belong in a file; delete it, and export HF_TOKEN, WANDB_API_KEY or OPENAI_API_KEY"


class Parser(TrlParser):
    """TrlParser that refuses what it does not understand, all of it at once, and knows where each value came from.

    Args:
        dataclass_types: The arguments of the step.

    Attributes:
        settings: The settings that were given, by key.
        print_config: Whether `--print_config true` was given.
    """

    def __init__(self, dataclass_types: Iterable[type]):
        as_module = Path(sys.argv[0]).name == "__main__.py"  # which argparse would show as it is
        prog = f"python -m finetuning.{Path(sys.argv[0]).parent.name}" if as_module else None
        super().__init__(dataclass_types, allow_abbrev=False, prog=prog)
        self.add_argument(
            "--config", metavar="FILE", help="YAML with any of these keys; the command line goes over it."
        )
        self.add_argument(
            "--print_config",
            "--print-config",
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
        self.problems: list[Problem] = []
        self.source = COMMAND_LINE  # of what is set nowhere

    def add_argument(self, *names, limits=None, **options):
        """As argparse's, without the limits of an argument, which it does not know."""
        return super().add_argument(*names, **options)

    def error(self, message: str):
        if "invalid dict value" in message:
            message += "; write a mapping in the YAML"
        _fail_with([*self.problems, Problem(COMMAND_LINE, None, message.removeprefix("argument "))])

    def _report(self, source: str, key: str | None, text: str, meant: str | None = None) -> None:
        self.problems.append(Problem(source, key, text, meant))

    def parse_args_and_config(self, args: list[str] | None = None) -> tuple:
        """An object of each dataclass; ends the process with status 2 where anything is wrong with the arguments."""
        given = sys.argv[1:] if args is None else args
        words = [part for arg in given for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        config = _find_config(words)
        if config is not None:
            self.source = str(config)
            self._read_config(config)
        words, keys = self._modernise(words)
        doubtful = self._find_doubtful(keys)
        for action in self._actions:
            if action.dest in self.settings:  # so far those of the files, which the command line goes over
                action.default = self.settings[action.dest].value
            elif action.required and action.dest not in keys | doubtful:
                self._report(self.source, action.dest, "is not set; it has no default")
            action.required = False
        namespace, unknown = self.parse_known_args(words)
        for key in keys & self.fields.keys():
            self._take(key, getattr(namespace, key))
        if args is None:  # loggers write the command line into their files
            sys.argv[1:] = mask_arguments(sys.argv[1:])
        self.print_config = namespace.print_config == "true"
        self._report_unknown(unknown)
        known = {key: v for key, v in vars(namespace).items() if key in self.fields and key not in doubtful}
        self.problems += [self._problem_of(keys, text) for keys, text in find_faults(self.dataclass_types, known)]
        if self.problems:
            _fail_with(self.problems)
        arguments = self._build(namespace)
        for note in self.notes:
            print_main(note)
        return arguments

    def _find_doubtful(self, keys: set[str]) -> set[str | None]:
        """Keys that have a problem, and those besides `keys` that may stand in a file that could not be read."""
        doubtful = {key for problem in self.problems for key in (problem.key, problem.meant)}
        if any(problem.key in (None, "base") for problem in self.problems):
            doubtful |= self.fields.keys() - self.settings.keys() - keys
        return doubtful

    def _build(self, namespace: Namespace) -> tuple:
        try:
            return tuple(
                kind(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init})
                for kind in self.dataclass_types
            )
        except (ValueError, TypeError, ImportError) as error:  # what the libraries raise for a setting or a want
            text = " ".join(str(error).split())
            keys = [key for key in self.settings if re.search(rf"\b{re.escape(key)}\b", text)]
            if not keys:  # a library that looks into a mapping knows the keys in it only
                keys = [key for key in self.settings if "dict" in str(self.hints[key])]
                text = ": ".join([*keys[:1], text])
            _fail_with([self._problem_of(keys[:1], text)])

    # The files

    def _read_config(self, config: Path) -> None:
        settings = read_yaml(config, self.problems)
        for setting in self._understand(setting for setting in settings if setting.key != "env"):
            self.settings[setting.key] = dataclasses.replace(setting, value=self._convert(setting))
        for setting in settings:
            if setting.key == "env":
                self._set_environment(setting)

    def _understand(self, settings: Iterable[Setting]) -> Iterable[Setting]:
        """The settings under today's keys; unknown ones and secrets are left out and reported."""
        understood: dict[str, Setting] = {}
        for setting in settings:
            change = self._change_of(setting.key, setting.value)
            if holds_secret(setting.key, setting.value):
                self._report(setting.source, setting.key, NO_SECRETS)
            elif change is None and setting.key not in self.fields:
                self._report_unknown_key(setting.source, setting.key)
            else:
                for new in self._apply(change, setting):
                    first = understood.get(new.key)
                    is_second = first is not None and _place_of(first.source)[0] == _place_of(new.source)[0]
                    understood[new.key] = self._join(first, new, setting.key) if first and is_second else new
        return understood.values()

    def _join(self, first: Setting, second: Setting, key: str) -> Setting:
        """What two settings of one key in a file are together: both have another, older name, or one of them has."""
        if second.key == "fsdp_config" and isinstance(first.value, dict) and isinstance(second.value, dict):
            return dataclasses.replace(second, value={**first.value, **second.value})
        if first.value != second.value:
            text = f"sets the same as {first.written or first.key} ({first.source}); keep one of them"
            self._report(second.source, key, text)
        return second

    def _change_of(self, key: str, value) -> Change | None:
        change = RENAMES.get(key)
        return change if change is not None and change.new_key in self.fields and change.applies(value) else None

    def _apply(self, change: Change | None, setting: Setting) -> list[Setting]:
        """The settings that one with an older name or value is today, of which a note is made."""
        if change is None:
            return [setting]
        try:
            values = change.convert(setting.value)
        except ValueError as error:
            self._report(setting.source, setting.key, str(error))
            return []
        self.notes.append(f"{setting.source}: {setting.key}: {change.describe(values)}")
        text = setting.text if change.renames_only else None
        written = f"{setting.key}: {json.dumps(setting.value, ensure_ascii=False, default=str)}"
        return [Setting(key, value, setting.source, text, written) for key, value in values.items()]

    def _convert(self, setting: Setting) -> object:
        """The value as the type of its key, or None where it is of another, which is reported."""
        try:
            value = convert(setting, self.fields[setting.key], self.hints[setting.key])
        except ValueError as error:
            old = setting.written.partition(":")[0] + " -> " if setting.written else ""
            self._report(setting.source, old + setting.key, str(error), meant=setting.key)
            return None
        if setting.key == "fsdp_config" and isinstance(value, dict):
            for key in value.keys() - FSDP_CONFIG_KEYS:
                self._report(setting.source, f"fsdp_config.{key}", _suggest(find_nearest(key, FSDP_CONFIG_KEYS)))
        return value

    def _report_unknown_key(self, source: str, key: str) -> None:
        name = key.removeprefix("--").replace("-", "_").lower()
        script = next(
            (s for s, kind in OTHER_STEPS.items() if name in {f.name for f in dataclasses.fields(kind)}), None
        )
        if name == "<<":
            self._report(source, key, "files are not merged by <<; write `base: other.yaml`")
        elif name in self.fields and not is_secret(name):  # in capitals, or with dashes
            self._report(source, key, _suggest(name), meant=name)
        elif name in FSDP_CONFIG_KEYS:
            self._report(source, key, "belongs under fsdp_config")
        elif script is not None:
            self._report(source, key, f"is a key of {script}, not of this step")
        else:
            names = {field: field for field in self.fields if not is_secret(field)}
            renamed = {old: change.new_key for old, change in RENAMES.items() if change.renames_only}
            names |= {old: new for old, new in renamed.items() if new in self.fields}
            nearest = find_nearest(name, names)
            meant = None if nearest is None else names[nearest]
            self._report(source, key, _suggest(meant), meant)

    def _set_environment(self, setting: Setting) -> None:
        if not isinstance(setting.value, dict):
            self._report(setting.source, "env", "must hold `NAME: value` lines")
            return
        for name, value in setting.value.items():
            fault = _find_fault_of_variable(str(name), value)
            if fault is None:
                os.environ[str(name)] = str(value)
            else:
                self._report(setting.source, f"env.{name}", fault)

    # The command line

    def _modernise(self, args: list[str]) -> tuple[list[str], set[str]]:
        """Replace older names on the command line; gives the arguments, and the keys that they set."""
        modern: list[str] = []
        keys: set[str] = set()
        words = iter(enumerate(args, 1))
        for index, arg in words:
            if not arg.startswith("--"):
                modern.append(arg)
                continue
            name, equals, text = arg[2:].partition("=")
            key = name.replace("-", "_")
            separate = not equals and index < len(args) and not args[index].startswith("--")
            text = args[index] if separate else text
            value = read_value(text)
            change = self._change_of(key, value)
            if change is None:
                modern.append(arg)
                keys.add(key.removeprefix("no_") if key not in self.fields else key)
                continue
            if separate:
                next(words)
            for setting in self._apply(change, Setting(key, value, COMMAND_LINE, text)):
                keys.add(setting.key)
                if setting.value is not None:
                    plain = change.renames_only and not isinstance(value, bool)
                    modern += [f"--{setting.key}", text if plain else _as_text(setting.value)]
        return modern, keys

    def _take(self, key: str, value) -> None:
        """Make a value of the command line a setting, unless it is a secret that stands under another name."""
        self.settings[key] = Setting(key, value, COMMAND_LINE)
        if is_secret(key):
            remember(value)
        elif holds_secret(key, value):
            self._report(COMMAND_LINE, key, NO_SECRETS)

    def _report_unknown(self, words: list[str]) -> None:
        """One problem for each key that is not known, whose values come with it, and for each word without a key."""
        for previous, word in zip(["", *words], words, strict=False):
            if word.startswith("--"):
                self._report_unknown_key(COMMAND_LINE, "--" + word[2:].partition("=")[0].replace("-", "_"))
            elif not previous.startswith("--"):
                self._report(COMMAND_LINE, None, f"{word} follows no --key that takes it")

    # Reports

    def _problem_of(self, keys: Iterable[str], text: str) -> Problem:
        sources = {self.settings[key].source for key in keys if key in self.settings} or {self.source}
        return Problem(", ".join(sorted(sources, key=_place_of)), None, text)

    def describe(self, arguments: tuple, hardware: Mapping[str, str]) -> list[str]:
        """One line for each value that is not a default: the key, the value, where it came from.

        Args:
            hardware: Why the hardware changed values, by their keys.
        """
        rows = []
        for holder in arguments:
            for field in dataclasses.fields(holder):
                setting, value = self.settings.get(field.name), getattr(holder, field.name)
                if is_secret(field.name) and setting is not None:
                    rows.append((field.name, MASK, setting.source))
                elif field.name in hardware:
                    wanted = f"; {setting.source} says {_as_text(setting.value)}" if setting else ""
                    rows.append((field.name, _as_text(value), f"hardware: {hardware[field.name]}{wanted}"))
                elif setting is not None and setting.value != _default_of(field):
                    written = f", written as {setting.written}" if setting.written else ""
                    rows.append((field.name, _as_text(setting.value), setting.source + written))
        width = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return [f"{key:{width[0]}}  {value:{width[1]}}  {source}" for key, value, source in sorted(rows)]


def _fail_with(problems: Iterable[Problem]) -> NoReturn:
    """Print every problem on a line of its own, and exit with status 2."""
    lines = [str(problem) for problem in sorted(dict.fromkeys(problems), key=lambda problem: _place_of(problem.source))]
    fail(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines]))


def _place_of(source: str) -> tuple[str, int]:
    """File and line of a source, by which sources are sorted."""
    place = re.match(r"(.*?):(\d+)(, |$)", source)
    return (place[1], int(place[2])) if place else (source, 0)


def _find_config(words: list[str]) -> Path | None:
    """The YAML that a command line names."""
    if "--config" not in words:
        return None
    if words.count("--config") > 1:
        fail("--config: stands twice; to layer files, write `base: other.yaml` in one of them")
    place = words.index("--config") + 1
    if place == len(words):
        fail("--config: needs the path of a YAML file")
    path = Path(words[place])
    if not os.path.isfile(path):  # Path.is_file raises for a path that is too long
        fault = "is a folder; name a YAML file in it" if os.path.isdir(path) else "no such file"
        _fail_with([Problem(str(path), None, fault)])
    return path


def _find_fault_of_variable(name: str, value) -> str | None:
    """Why a variable of the environment cannot be set, or None where it can."""
    if holds_secret(name, value):
        return NO_SECRETS
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or not isinstance(value, (str, int, float)):
        return "needs a NAME and one value"
    if READ_AT_START.fullmatch(name):
        return f"is read before this file is, so it would have no effect; export it before the command: {name}=..."
    return "holds a NUL or half a character; delete it" if UNWRITABLE.search(str(value)) else None


def _suggest(nearest: str | None) -> str:
    return "unknown key" + (f"; did you mean {nearest}?" if nearest else "; --help lists all keys")


def _default_of(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _as_text(value) -> str:
    value = value.value if isinstance(value, enum.Enum) else value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
