"""
What docs/design.md says of the house, held against the code: who stands where, who imports whom, who imports torch.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_table

PACKAGE = ROOT / "finetuning"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)


def rooms_by_design() -> dict[str, set[str]]:
    """The rooms that each room may import besides itself."""
    return {
        "ground" if "ground" in room else room.strip("`/"): set(filter(None, imports.split(", ")))
        for room, _, imports in read_table("docs/design.md", "room")
    }


def modules_by_design() -> dict[str, str]:
    """Whether each module imports torch."""
    return {
        name: torch
        for names, _, torch in read_table("docs/design.md", "module")
        for name in re.findall(r"`([\w/]+)`", names)
    }


def room_of(module: str) -> str:
    """The room of a module by its path or dotted name under finetuning."""
    first = re.split(r"[/.]", module)[0]
    return first if first in ROOMS else "ground"


def modules_imported_by(source: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or in a function, by their dotted names under it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: the house imports by full names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("finetuning.") for name in names if name.startswith("finetuning.")}
    return found


def test_each_room_and_module_stands_in_the_tables():
    assert sorted(rooms_by_design()) == sorted(["ground", *ROOMS])
    assert sorted(modules_by_design()) == MODULES


def test_a_room_imports_what_the_table_lets_it():
    allowed = rooms_by_design()
    for source in PACKAGE.rglob("*.py"):
        room = room_of(source.relative_to(PACKAGE).as_posix())
        for module in modules_imported_by(source):
            assert room_of(module) in {room, *allowed[room]}, f"{source.relative_to(ROOT)} imports {module}"


def test_a_script_imports_no_room_of_another_step():
    rooms_of_steps = {
        room: question for room, question, _ in read_table("docs/design.md", "room") if "step" in question
    }
    for script in ROOT.glob("[1-4]_*.py"):
        for room in {room_of(module) for module in modules_imported_by(script)}:
            question = rooms_of_steps.get(f"`{room}/`")
            assert question is None or script.name[0] in question, f"{script.name} imports the room of {question}"


def names_defined_in(module: Path) -> set[str]:
    """The names that a module defines or imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def test_what_benchmarks_experiments_demo_and_notebook_import_is_there():
    """No test runs all of them, and mypy does not read them."""
    cells = json.loads((ROOT / "5_score_notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    sources = {"the notebook": re.sub("^%.*", "", code, flags=re.M)}
    for folder in ("benchmarks", "experiments", "demo"):
        sources |= {str(path): path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")}
    for source, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetuning"):
                place = ROOT / node.module.replace(".", "/")
                for alias in node.names:
                    module = place / f"{alias.name}.py" if place.is_dir() else place.with_suffix(".py")
                    assert module.is_file(), f"{source} imports {node.module}.{alias.name}"
                    assert place.is_dir() or alias.name in names_defined_in(module), f"{source}: {alias.name}"


def test_importing_a_room_does_nothing():
    assert [path for path in PACKAGE.rglob("__init__.py") if path.read_text()] == []


def test_the_tests_mirror_the_rooms():
    assert sorted(path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))) == ROOMS


IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("finetuning." + name.replace("/", "."))
    assert "torch" not in sys.modules, f"finetuning/{name}.py imports torch"
"""


@pytest.mark.slow
def test_modules_that_the_table_lists_without_torch_do_not_import_it():
    names = [name for name, torch in modules_by_design().items() if torch == "no"]
    result = subprocess.run([sys.executable, "-c", IMPORTS, *names], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]
