"""
Files that users write for the judge: a rubric of their own, as a class or in YAML, and YAML in general (the price table
in money.py). Imports without torch.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from finetuning.errors import InputError
from finetuning.judge.form import Criterion, Evaluation, build_schema

RESERVED = frozenset(("id", "model", "score", "overall"))  # columns of the scores that people give (people.py)


def load_rubric(rubric: str | None) -> type[BaseModel]:
    """The criteria to judge by.

    Args:
        rubric: `file.py:ClassName` of a class like `Evaluation`, or a YAML with a line `name: description` for each
            criterion. None means `Evaluation`.

    Raises:
        InputError: There is no such file or class, or a field is no criterion or has no description.
    """
    if rubric is None:
        return Evaluation
    is_yaml = rubric.endswith((".yaml", ".yml"))
    loaded = _read_rubric_yaml(Path(rubric)) if is_yaml else _import_rubric(rubric)
    for name, field in loaded.model_fields.items():
        if (fault := _find_fault(name, field)) is not None:
            raise InputError(f"rubric {rubric}: {fault}")
    if not loaded.model_fields:
        raise InputError(f"rubric {rubric} has no criteria")
    return loaded


def _find_fault(name: str, field: FieldInfo) -> str | None:
    if not (inspect.isclass(field.annotation) and issubclass(field.annotation, Criterion)):
        return f"{name} is no criterion; write it as `{name}: Criterion = Field(...)`"
    limits = build_schema(field.annotation)["properties"]["score"]
    if (limits.get("minimum"), limits.get("maximum")) != (1, 10):
        return f"the score of {name} is not from 1 to 10, as that of all criteria must be"
    if not field.description:
        return f"{name} has no description, which is what the judge is told"
    if not field.description.replace("\n", " ").isprintable():
        return f"the description of {name} holds characters that cannot be sent"
    if name in RESERVED:
        return f"{name} is a column of --human that is no criterion; choose another name"
    return None


def _read_rubric_yaml(path: Path) -> type[BaseModel]:
    content = read_yaml(path, "rubric")
    if not isinstance(content, dict) or not all(isinstance(text, str) for line in content.items() for text in line):
        raise InputError(f"rubric {path}: write a line `name: description` for each criterion")
    node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode) and len(content) < len(node.value):
        raise InputError(f"rubric {path}: a name stands twice; keep one of them")
    for name in content:
        if not name.isidentifier() or name.startswith(("_", "model_")) or hasattr(BaseModel, name):
            raise InputError(f"rubric {path}: {name!r} cannot be a name here; use another, as in tone_of_voice")
    fields: dict[str, Any] = {name: (Criterion, Field(description=text.strip())) for name, text in content.items()}
    return create_model(path.stem, __config__=ConfigDict(extra="forbid"), **fields)


def _import_rubric(rubric: str) -> type[BaseModel]:
    file, _, name = rubric.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"rubric_{Path(file).stem}", file) if file.endswith(".py") else None
    if spec is None or spec.loader is None:
        raise InputError(f"rubric: {rubric} is neither file.py:ClassName nor a YAML of names and descriptions")
    if not Path(file).is_file():
        raise InputError(f"rubric {file}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic looks up the names in annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # of the user's own code
        raise InputError(f"rubric {file} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not _is_model(found):
        own = [name for name, value in vars(module).items() if _is_model(value) and value is not BaseModel]
        raise InputError(f"rubric {file} has no class {name} of pydantic; it has {', '.join(own) or 'none'}")
    return found


def _is_model(value: object) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(value) and issubclass(value, BaseModel)


def read_yaml(path: Path, setting: str):
    """What a YAML file holds.

    Args:
        setting: The setting that names the file, for the message.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{setting} {path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise InputError(f"{setting} {path}: brackets within brackets, too deep to read") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise InputError(f"{setting} {path} is no YAML: {' '.join(str(error).split())}") from error
