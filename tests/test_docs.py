"""
What README.md, README.ko.md, CONTRIBUTING.md and docs/*.md tell a reader to do or to look at, held against the project: commands, options,
keys of the YAML, files, links. README.ko.md is held against README.md.
"""

import ast
import dataclasses
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from conftest import ROOT, read_table

from finetuning.config import arguments
from finetuning.config.arguments import REFUSALS, JudgeArguments, MergeArguments, ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.parser import Parser
from finetuning.config.renames import RENAMES
from finetuning.judge.rubric import load_rubric
from finetuning.report.__main__ import ScoreArguments
from finetuning.training.arguments import TrainingArguments

DOCS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"})  # which names what was before
TRAINING = (ScriptArguments, TrainingArguments, ModelArguments)
STEPS: dict[str, tuple[type, ...]] = {
    "1_train_full_fine_tuning.py": TRAINING,
    "2_merge_lora.py": (MergeArguments,),
    "3_test.py": (arguments.TestArguments,),
    "4_openai_test.py": (JudgeArguments,),
    "finetuning.report": (ScoreArguments,),
}
OPTIONS = {field.name for kinds in STEPS.values() for kind in kinds for field in dataclasses.fields(kind)}
KEYS = OPTIONS | RENAMES.keys() | {"base"}
# keys of messages, of a request to a server and of generation_config.json, which stand in the documents as well
OTHER_KEYS = {"content", "skip_special_tokens", "tool_choice", "use_cache"}
LAUNCHERS = (
    "python",
    "python3",
    "torchrun",
    "make",
    "pip",
    "papermill",
    "source",
    "vllm",
    ".venv/bin/pip",
    ".venv/bin/python",
)


@dataclasses.dataclass
class Document:
    """A Markdown file in parts; a line that a backslash continues is one line."""

    path: Path
    blocks: list[tuple[str, str]]  # the language of a fence ("" for an indented block) and the text
    spans: list[str]  # `code` within the prose
    prose: str  # everything else

    @classmethod
    def read(cls, path: Path) -> "Document":
        text = path.read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
        text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
        indented = re.findall(r"(?<=\n\n)(?: {4}.*\n+)+", text)
        text = re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "", text)
        blocks = [(language, code.replace("\\\n", " ")) for language, code in [*fences, *(("", b) for b in indented)]]
        spans = [re.sub(r"\s+", " ", span).replace(r"\|", "|") for span in re.findall(r"`([^`]+)`", text)]
        return cls(path, blocks, spans, re.sub(r"`[^`]+`", "", text))

    def commands(self) -> Iterator[str]:
        """Every line and span that begins with the name of a program, without its comment and its variables."""
        headers = [line.partition("  ")[2] for _, block in self.blocks for line in block.splitlines()[:1]]
        for line in [*(line for _, block in self.blocks for line in block.splitlines()), *headers, *self.spans]:
            for command in re.split(r"\s+#\s|&&", line.strip() + " ")[: None if "&&" in line else 1]:
                words = re.sub(r"^(\s*[A-Z_]+=\S* )+", "", command).strip()
                if words.split(" ")[0] in LAUNCHERS and " " in words:
                    yield words


DOCUMENTS = [Document.read(path) for path in DOCS]


def per_document(test):
    """One case of a test for each document."""
    return pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.path.name)(test)


@per_document
def test_every_command_can_be_run(document, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for command in document.commands():
        words = shlex.split(re.sub(r"<[^>]*>", "x", command).replace(" ...", ""))
        try:
            check_command(words, tmp_path)
        except (AssertionError, SystemExit) as error:
            raise AssertionError(f"{document.path.name}: {command}") from error


def check_command(words: list[str], output_dir: Path) -> None:
    """Parse the options of one command as its program would; AssertionError or SystemExit where that fails."""
    program, *rest = words
    if program == "torchrun":
        parsed = torch.distributed.run.get_args_parser().parse_args([*rest, "no_script"])
        if parsed.training_script != "no_script":
            check_arguments(parsed.training_script, parsed.training_script_args[:-1], output_dir)
    elif Path(program).name in ("python", "python3"):
        script, *rest = rest[1:] if rest[0] == "-m" else rest
        check_arguments(script, rest, output_dir)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "papermill":
        assert {rest[i + 1] for i, word in enumerate(rest) if word == "-p"} <= set(read_notebook_parameters())
    elif Path(program).name == "pip":
        assert all((ROOT / rest[i + 1]).is_file() for i, word in enumerate(rest) if word in ("-r", "-c"))


def check_arguments(script: str, rest: list[str], output_dir: Path) -> None:
    """Parse the arguments of a script or module of this project; one without a dataclass must hold each option's name."""
    script = script.removeprefix("./")
    kinds = STEPS.get(script)
    if kinds is not None:
        needed = ["--output_dir", str(output_dir)] if kinds is TRAINING else []
        Parser(kinds).parse_args_and_config([*needed, *rest])
    elif script not in ("venv", "pip"):
        file = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
        assert all(f'"{word}"' in file.read_text(encoding="utf-8") for word in rest if word.startswith("--"))
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))


def read_notebook_parameters() -> list[str]:
    cells = json.loads((ROOT / "5_score_notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    cell = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return [line.split(" = ")[0] for line in cell["source"]]


@per_document
def test_every_option_and_key_within_the_prose_exists(document):
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("benchmarks/*.py"))
    launcher = {
        option for action in torch.distributed.run.get_args_parser()._actions for option in action.option_strings
    }
    for span in document.spans:
        for option in re.findall(r"(?<!\S)--[\w-]+", span):
            known = option[2:] in OPTIONS or option in launcher or f'"{option}"' in benchmarks
            assert known or option in ("--help", "--config", "--print_config"), span
        for key in re.findall(r"^([a-z]\w*): \S", span):
            assert key in KEYS | OTHER_KEYS, span


@per_document
def test_every_yaml_and_python_snippet_is_read(document, tmp_path):
    for language, block in document.blocks:
        rubric = re.match(r"# (\S+) .*--rubric (\S+)", block)
        if rubric:
            (tmp_path / rubric[1]).write_text(block, encoding="utf-8")
            load_rubric(str(tmp_path / rubric[2]))
        elif language == "yaml":
            assert yaml.safe_load(block).keys() <= KEYS
        elif language == "python":
            ast.parse(block)


@per_document
def test_every_file_and_module_that_is_named_exists(document):
    text = document.path.read_text(encoding="utf-8")
    folders = "finetuning|tests|docs|benchmarks|experiments|recipes|demo|\\.ci"
    for name in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./*-]*\w|\b[0-5]_\w+\.(?:py|yaml|ipynb)\b", text):
        assert list(ROOT.glob(name)), f"{document.path.name} names {name}"
    rooms = "|".join(path.parent.name for path in ROOT.glob("finetuning/*/__init__.py"))
    for name in re.findall(rf"`((?:finetuning\.)?(?:{rooms})\.(?!html)[\w.]+)[`(]", text):
        module, _, attribute = ("finetuning." + name.removeprefix("finetuning.")).rpartition(".")
        is_module = (ROOT / f"{module}.{attribute}".replace(".", "/")).with_suffix(".py").is_file()
        assert is_module or hasattr(importlib.import_module(module), attribute), f"{document.path.name} names {name}"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S), flags=re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_what_has_moved_is_where_the_changelog_says():
    for _, now in read_table("CHANGELOG.md", "before"):
        module = re.search(r"finetuning[\w.]+", now)[0]
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_the_table_of_checks_names_those_that_can_refuse():
    rows = read_table("docs/preflight.md", "check")
    assert [check.strip("`") for check, refused, _ in rows if refused] == list(REFUSALS)


ENGLISH, KOREAN = (Document.read(ROOT / name) for name in ("README.md", "README.ko.md"))


def test_the_korean_readme_has_the_headings_and_commands_of_the_english_one():
    def outline(document: Document) -> list[str]:
        return re.findall(r"^(#+|\*\*\d)", document.path.read_text(encoding="utf-8"), flags=re.M)

    def code(document: Document) -> list[str]:
        commands = [re.sub(r"<[^>]*>", "<>", command) for command in document.commands()]
        return commands + [block for language, block in document.blocks if language]

    def names(document: Document) -> list[str]:
        files = next(block for _, block in reversed(document.blocks) if "Makefile" in block)
        return [line.split("   ")[0].strip() for line in files.splitlines()]

    assert outline(ENGLISH) == outline(KOREAN)
    assert code(ENGLISH) == code(KOREAN)
    assert names(ENGLISH) == names(KOREAN)
    assert re.findall(r"\]\((\S+)\)", ENGLISH.prose) == re.findall(r"\]\((\S+)\)", KOREAN.prose)


def test_the_korean_readme_has_the_figures_of_the_english_one():
    def figures(document: Document) -> list[list[str]]:
        """The numbers of each section, in no order, as the two languages put them in different places."""
        sections = re.split(r"^#|^\*\*\d", document.prose, flags=re.M)
        return [sorted(re.findall(r"\d[\d.,]*\d|\d", section)) for section in sections]

    assert figures(ENGLISH) == figures(KOREAN)
