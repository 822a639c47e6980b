import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SOURCES = [*ROOT.glob("[1-4]_*.py"), *ROOT.glob("finetuning/**/*.py"), *ROOT.glob("demo/*.py")]


def pinned(file: Path) -> dict[str, str]:
    """Versions by normalised name, of a requirements file and of those that it includes."""
    found = {}
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            found |= pinned(file.parent / line.removeprefix("-r ").strip())
        elif line.strip() and not line.startswith("#"):
            name, version = line.split("#")[0].strip().split("==")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


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
        re.sub(r"[-_.]+", "-", packages[module][0]).lower()
        for module in imported - set(sys.stdlib_module_names) - {"finetuning", "dialogues"} - optional
    }
    assert sorted(names - pinned(ROOT / "requirements.txt").keys()) == []


def test_what_is_installed_is_what_is_pinned():
    versions = pinned(ROOT / "requirements-dev.txt")
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in versions}  # torch's names its build
    assert installed == versions


def read_module_table() -> dict[str, str]:
    """What docs/design.md says of each module: whether it imports torch."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## The modules")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \| .+ \| (yes|no) \|$", text, re.MULTILINE)
    return {name: torch for names, torch in rows for name in re.findall(r"`(\w+)`", names)}


def test_each_module_stands_in_the_table_of_the_design():
    modules = {path.stem for path in ROOT.glob("finetuning/*.py")} - {"__init__"}
    assert sorted(read_module_table()) == sorted(modules)


IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"finetuning.{name}")
    assert "torch" not in sys.modules, f"finetuning/{name}.py imports torch"
"""


def test_modules_that_the_design_lists_without_torch_do_not_import_it():
    names = [name for name, torch in read_module_table().items() if torch == "no"]
    result = subprocess.run([sys.executable, "-c", IMPORTS, *names], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]
