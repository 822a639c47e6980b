"""
A run is one folder. What stands where in it, how the steps find it, and its record `run.json`.

    run.json                                what was run, written by step 1 and read by all that follow
    preflight.json  eda/*.png               what was found in the data before training
    checkpoint-148/                         complete: from_pretrained needs nothing else; may be renamed
    predictions/<checkpoint>.jsonl .json    written by step 3
    qa_evaluation_results/<checkpoint>.jsonl .json    written by step 4
    report.html                             written by step 5

Imports without torch.
"""

import fnmatch
import hashlib
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

from pydantic import TypeAdapter

from finetuning.errors import InputError, naming
from finetuning.schemas import ANY_OBJECT, RUN_RECORD, check

OUTPUTS = Path("outputs")
RUN_FILE = "run.json"
PREFLIGHT_FILE = "preflight.json"
EDA = "eda"
PREDICTIONS = "predictions"
EVALUATIONS = "qa_evaluation_results"
HUMAN_AGREEMENT_FILE = "human_agreement.json"  # among the evaluations: scores of people, and how far the judge agrees
TRAINER_STATE_FILE = "trainer_state.json"  # in a checkpoint that training can go on from, which a merged one is not
ADAPTER_CONFIG = "adapter_config.json"  # in an adapter, in place of a model's config.json
PRECISION_FILE = "precision.json"  # beside weights: in which form they are, and what of the update survives others
INCOMPLETE = "INCOMPLETE"  # stands in a checkpoint's folder while it is written
BASE = "base"
MAX_NAME_LENGTH = 220  # bytes; file systems take 255, endings included
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def to_json(content, **options) -> str:
    """JSON that every reader takes: NaN and infinity, which JSON does not have, are null."""
    options |= {"ensure_ascii": False, "allow_nan": False}
    try:
        return json.dumps(content, **options)
    except ValueError:
        return json.dumps(_without_nan(content), **options)


def _without_nan(content):
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_whole(path: Path, text: str, errors: str = "replace") -> None:
    """Write a text so that a reader, or a start after a kill, finds the old file or the new one and never a part.

    Args:
        errors: What becomes of half a character, which a text of a model or the name of a file may hold.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(partial):
        partial.write_text(text, encoding="utf-8", errors=errors)
        os.replace(partial, path)


def write_json(path: Path, content: dict) -> None:
    """Write content as JSON, as `write_whole` does."""
    write_whole(path, to_json(content, indent=2) + "\n", errors="backslashreplace")  # which JSON reads as it was


def read_json(path: Path, schema: TypeAdapter = ANY_OBJECT, remedy: str = "make it again") -> dict:
    """What a JSON file holds.

    Args:
        remedy: What to do if it holds something else.

    Raises:
        InputError: It is no JSON, or does not fit the schema; names the line or the key.
    """
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno} is no JSON ({error.msg}); {remedy}") from None
    except (ValueError, RecursionError):  # no text, or nested without end
        raise InputError(f"{path} is no JSON; {remedy}") from None
    return check(content, schema, str(path), remedy)


def shorten(name: str) -> str:
    """The name itself, or where no file could have it, its beginning and a hash of all of it."""
    data = name.encode()
    if len(data) <= MAX_NAME_LENGTH:
        return name
    return f"{data[:120].decode(errors='ignore')}%-{hashlib.sha256(data).hexdigest()[:16]}"  # no quoted name holds %-


def file_name(name: str) -> str:
    """The name of a file or folder for a model or judge of any name, and for no other one.

    >>> file_name("gpt-5.4-mini"), file_name("Qwen/Qwen3-32B"), file_name("..")
    ('gpt-5.4-mini', 'Qwen%2FQwen3-32B', '.%2E')
    """
    quoted = quote(name, safe=" ")
    if quoted.endswith((".", " ")):  # the folder itself, the one above, or what Windows leaves out
        quoted = f"{quoted[:-1]}%{ord(quoted[-1]):02X}"
    return shorten(quoted)


def audit_file(evaluations: Path, judge: str, kind: str = "reference") -> Path:
    """Where a judge's scores of texts of one kind are, by which it is audited; how it does stands beside the first."""
    return evaluations / "audit" / file_name(judge) / f"{kind}.jsonl"


def is_there(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        InputError: Something else has its name, which would be taken for no file, or be read without end.
    """
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"{path} is no file (but a folder, a pipe, or a link that leads to none); move it away")
    return path.is_file()


def find_run(output_dir: str | None) -> Path:
    """The folder of the run: `output_dir`, or the newest run under outputs/."""
    if output_dir is not None:
        if not is_there(Path(output_dir) / RUN_FILE):
            raise InputError(f"{output_dir} is no run (no {RUN_FILE} in it); run 1_train_full_fine_tuning.py first")
        return Path(output_dir)
    run_files = sorted(OUTPUTS.glob(f"*/{RUN_FILE}"), key=lambda f: f.stat().st_mtime)
    if not run_files:
        raise InputError(f"no run under {OUTPUTS}/; run 1_train_full_fine_tuning.py first, or set --output_dir")
    run = run_files[-1].parent
    print(f"run: {run} (the newest; another one with --output_dir)")
    return run


def read_run(run: Path) -> dict:
    """The record of the run."""
    remedy = "it is written by 1_train_full_fine_tuning.py: take it from a copy, or train again"
    return read_json(run / RUN_FILE, RUN_RECORD, remedy)


def checkpoint_step(name: str) -> int:
    """Training step of a checkpoint, after its name; the base model is step 0, other models are -1.

    >>> checkpoint_step("checkpoint-148"), checkpoint_step("base"), checkpoint_step("Qwen/Qwen2.5-0.5B")
    (148, 0, -1)
    """
    if name == BASE:
        return 0
    match = re.fullmatch(r"checkpoint-(\d+)(-merged)?", name)
    return int(match[1]) if match else -1


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of the run by training step, merged ones after the adapter that they were merged from."""
    folders = [f for f in run.glob("checkpoint-*") if f.is_dir() and not (f / INCOMPLETE).exists()]
    return sorted((f for f in folders if checkpoint_step(f.name) > 0), key=lambda f: (checkpoint_step(f.name), f.name))


def list_resumable(run: Path) -> list[Path]:
    """Complete checkpoints of the run that training can go on from, by training step."""
    return [f for f in list_checkpoints(run) if (f / TRAINER_STATE_FILE).is_file()]


def last_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step that training can go on from."""
    return next(reversed(list_resumable(run)), None)


def list_models(run: Path) -> list[Path]:
    """Folders of the run that hold a complete model: its checkpoints, then those of other names, in their order.

    Raises:
        InputError: One has a name that means something else.
    """
    others = sorted(f for f in run.iterdir() if f.suffix != ".partial" and is_model(f) and checkpoint_step(f.name) < 1)
    for folder in others:
        if folder.name in (BASE, "all"):
            raise InputError(f"{folder} has a name that --model_name keeps for something else; rename it")
    return list_checkpoints(run) + [f for f in others if not (f / INCOMPLETE).exists()]


def is_planned(run: Path) -> bool:
    """Whether nothing of the run would be lost by another one in its folder: none is there, or one without a model."""
    return not (run / RUN_FILE).is_file() or (read_run(run).get("finished") is None and not list_models(run))


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a model, or an adapter."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", ADAPTER_CONFIG))


def name_of(folder: str) -> str:
    """The name of a model after that of its folder: one that can be printed, and that a file can have."""
    return shorten(folder if folder.isprintable() else quote(os.fsencode(folder), safe=" "))


def find_models(run: Path, model_name: str) -> dict[str, str]:
    """Names and paths (or Hub ids) of the models that `model_name` means, in the order of their training steps.

    Args:
        model_name: A folder of the run that holds a model, `base`, `all` (base and every such folder), a glob over the
            folders, the path of a model, or a Hub id.

    Raises:
        InputError: There is no such model in the run, and it is no Hub id.
    """
    folders = {name_of(f.name): str(f) for f in list_models(run)}
    models = {BASE: read_run(run)["config"]["model_name_or_path"], **folders}
    if model_name == "all":
        return models
    if name_of(model_name) in models:
        return {name_of(model_name): models[name_of(model_name)]}
    matching = {name: path for name, path in folders.items() if fnmatch.fnmatchcase(name, model_name)}
    if matching:
        return matching
    if is_model(model_name):
        path = Path(model_name).resolve()
        if path.parent != run.resolve():  # another run's checkpoint-148 is not this one's
            return {name_of(f"{path.parent.name}--{path.name}"): model_name}
        if name_of(path.name) in folders:
            return {name_of(path.name): folders[name_of(path.name)]}
    elif HUB_ID.fullmatch(model_name) and checkpoint_step(Path(model_name).name) < 1 and not os.path.exists(model_name):
        return {model_name.replace("/", "--"): model_name}
    raise InputError(
        f"no model `{name_of(model_name)}`; {run} has {', '.join(models)}. Others are named by their path, or as "
        "owner/name on the Hub"
    )


def names_of_files(folder: Path, model_name: str) -> list[str]:
    """Names of the models with rows in `folder` that `model_name` (a name, a glob or `all`) means, by training step."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder} is no folder; move it away")
    names = sorted((f.stem for f in folder.glob("*.jsonl")), key=lambda name: (checkpoint_step(name), name))
    for name in names:
        if not name.isprintable():
            fault = f"the name of {name}.jsonl holds a line break or the like"
            raise InputError(f"{folder}: {fault}; rename it, or move it away")
    return [name for name in names if model_name == "all" or fnmatch.fnmatchcase(name, model_name)]
