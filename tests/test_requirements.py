import ast
import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT, run
from large_run import write_run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finetuning.config.arguments import JudgeArguments
from finetuning.config.parser import Parser
from finetuning.config.plain_parser import PlainParser
from finetuning.report.__main__ import ScoreArguments

SOURCES = [*ROOT.glob("[1-4]_*.py"), *ROOT.glob("finetuning/**/*.py"), *ROOT.glob("demo/*.py")]


def pinned(file: Path) -> dict[str, str]:
    """Versions by normalised name, of a requirements file and of those that it includes."""
    found = {}
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            found |= pinned(file.parent / line.removeprefix("-r ").strip())
        elif line.strip() and not line.startswith("#"):
            name, version = re.split("[;#]", line)[0].strip().split("==")
            found[canonicalize_name(name)] = version
    return found


def installed_for(names: Iterable[str]) -> dict[str, str]:
    """Versions of these packages and of all that they need in turn, as they are installed here."""
    versions: dict[str, str] = {}
    waiting, seen = [Requirement(name) for name in names], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            distribution = importlib.metadata.distribution(name)
            versions[name] = distribution.version.split("+")[0]  # torch's names its build
            needs = map(Requirement, distribution.requires or [])
            waiting += [need for need in needs if not need.marker or need.marker.evaluate({"extra": extra})]
    return versions


def test_every_package_that_is_imported_is_pinned():
    imported = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    packages = importlib.metadata.packages_distributions()
    optional = {"vllm"}  # docs/generation.md says how to install it
    names = {
        canonicalize_name(packages[module][0])
        for module in imported - set(sys.stdlib_module_names) - {"finetuning", "dialogues"} - optional
    }
    assert sorted(names - pinned(ROOT / "requirements.txt").keys()) == []


def test_nothing_is_used_that_windows_lacks():
    """Signal handlers of asyncio, and modules of Python that are there on Unix only."""
    for source in SOURCES:
        used = {name for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) for name in names_in(node)}
        assert used & {"fcntl", "grp", "pwd", "resource", "termios", "add_signal_handler"} == set(), source


def names_in(node: ast.AST) -> list[str]:
    """The modules that are imported here, or the attribute that is read."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [getattr(node, "module", None) or getattr(node, "attr", "")]


def test_what_is_installed_is_what_is_pinned_and_constrained():
    pins, constraints = pinned(ROOT / "requirements-dev.txt"), pinned(ROOT / "constraints.txt")
    assert constraints == constraints | pins, "run: make constraints"
    installed = installed_for(pins)
    assert installed == {name: constraints.get(name) for name in installed}, "run: make install-dev"


def test_the_constraints_are_those_of_every_machine():
    """No build of torch, and no index or folder that only one machine has."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[\w-]+==[\w.]+( ; [^/]+)?\s+# via .*", line) and "://" not in line, line


# Runs a script as if only the packages of requirements-judge.txt were installed.
ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "trl", "transformers", "datasets", "accelerate", "peft", "evaluate",
                                      "bitsandbytes", "wandb", "tokenizers", "huggingface_hub", "mecab_ko", "nltk"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
sys.path.insert(0, ".")
script = sys.argv[0]
if script.endswith(".py"):
    runpy.run_path(script, run_name="__main__")
else:
    runpy.run_module(script, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("4_openai_test.py", ["--dry_run", "true", "--overwrite", "true"], "plan for"),
        ("4_openai_test.py", ["--limti", "2"], "did you mean limit?"),
        ("finetuning.report", [], "The report is at"),
    ],
)
def test_judging_and_scoring_need_the_packages_of_their_own_list_only(tmp_path, script, arguments, said):
    folder = write_run(tmp_path / "run", 6, ["base", "checkpoint-5"])
    result = run([sys.executable, "-c", ALONE, script, "--output_dir", folder, *arguments], check=False)
    assert said in result.stdout + result.stderr, result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", [JudgeArguments, ScoreArguments])
def test_the_command_line_without_trl_is_that_with_it(kind):
    def arguments(parser) -> list:
        names = ("option_strings", "dest", "nargs", "const", "default", "required", "choices", "help")
        own = [action for action in parser._actions if action.dest not in ("config", "print_config")]
        return [tuple(getattr(action, name) for name in names) for action in own]

    def read(parser, words: list[str]) -> dict:
        return {key: value for key, value in vars(parser.parse_known_args(words)[0]).items() if key in names_of_fields}

    names_of_fields = {field.name for field in dataclasses.fields(kind)}
    plain, trls = PlainParser([kind]), Parser([kind])
    assert arguments(plain) == arguments(trls)
    for words in (
        ["--output_dir", "a"],
        ["--limit", "none", "--max_cost", "2.5"],
        ["--retry_failed", "no"],
        ["--overwrite"],
    ):
        assert read(plain, words) == read(trls, words)
