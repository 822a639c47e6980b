"""
`run.json`, the record of a run: what was trained, on what data, with which libraries, on which hardware.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset

from finetuning.config.arguments import ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.credentials import hide, without_secrets
from finetuning.data.fingerprints import fingerprint_rows
from finetuning.errors import InputError, make_folder
from finetuning.models.files import is_adapter
from finetuning.ranks import get_world_size
from finetuning.runs import (
    ADAPTER_CONFIG,
    BASE,
    EDA,
    INCOMPLETE,
    PREFLIGHT_FILE,
    RUN_FILE,
    TRAINER_STATE_FILE,
    checkpoint_step,
    is_planned,
    last_checkpoint,
    read_json,
    read_run,
    write_json,
)
from finetuning.training.arguments import TrainingArguments
from finetuning.wording import describe_differences

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "wandb")
# What may change between a run and its continuation: where it is logged and saved, and how the same global batch is
# spread over devices. Everything else would make the checkpoints of one folder incomparable. Data is compared by its
# content, whatever its path.
MAY_CHANGE = set(
    """
    output_dir overwrite resume_from_checkpoint logging_steps logging_dir report_to run_name save_steps save_strategy
    save_total_limit eval_steps eval_strategy disable_tqdm log_level per_device_train_batch_size
    gradient_accumulation_steps per_device_eval_batch_size dataloader_num_workers fsdp fsdp_config use_cpu local_rank
    attn_implementation gradient_checkpointing activation_checkpointing dtype preflight_only allow preview_rows
    do_eval bf16 fp16 tf32 dataset_test_split dataset_num_proc dataset_name dataset_config dataset_train_split
    dataset_eval_split hub_token token save_dtype rounding
    """.split()
)


# The optimizer of a checkpoint goes on with its own values of these settings, whatever the arguments say.
OPTIMIZER_SETTINGS = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def git_commit() -> str | None:
    """Commit of this repository, with `-dirty` where tracked files have changed; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    describe = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None


def describe_hardware() -> dict:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "world_size": get_world_size(),
        "devices": devices or ["cpu"],
        "num_cpus": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def build_record(
    arguments: tuple[TrainingArguments, ModelArguments, ScriptArguments],
    chat_template: str,
    train_rows: Dataset,
    eval_rows: Dataset | None,
) -> dict:
    """The record as it stands before the first step."""
    training_args, model_args, script_args = arguments
    config = {**training_args.to_dict(), **dataclasses.asdict(model_args), **dataclasses.asdict(script_args)}
    hardware = describe_hardware()
    batch_size = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * hardware["world_size"]
    splits = {"train": train_rows} if eval_rows is None else {"train": train_rows, "eval": eval_rows}
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": now(),
        "finished": None,
        "config": without_secrets(config),
        "global_batch_size": batch_size,
        "data": {split: {"rows": len(rows), "hash": fingerprint_rows(rows)} for split, rows in splits.items()},
        "chat_template": chat_template,
        "hardware": hardware,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "git_commit": git_commit(),
    }


def find_differences(old: dict, new: dict) -> str:
    """The settings and data that make the checkpoints of two runs incomparable, as `key was ... and is ...`."""

    def comparable_part(record: dict) -> dict:
        settings = {key: value for key, value in record["config"].items() if key not in MAY_CHANGE}
        return {**settings, "global_batch_size": record["global_batch_size"], "chat_template": record["chat_template"],
                "rows of train": record["data"]["train"]["hash"]}  # fmt: skip

    old, new = comparable_part(old), comparable_part(new)
    # a setting that the older version did not have was off
    keys = [key for key in old.keys() | new.keys() if old.get(key) or new.get(key)]
    return describe_differences({key: old.get(key) for key in keys}, {key: new.get(key) for key in keys})


def compare_origin(checkpoint: Path, record: dict) -> None:
    """Print how this run differs from the run that made the checkpoint that it goes on from.

    Raises:
        InputError: They differ in a setting of the optimizer, where the new value would have no effect.
    """
    origin = checkpoint.resolve().parent
    if not (origin / RUN_FILE).is_file():
        print(f"resume_from_checkpoint: no {RUN_FILE} beside {checkpoint} says what it was trained on", flush=True)
        return
    old = read_run(origin)
    for key in OPTIMIZER_SETTINGS:
        was, is_now = old["config"].get(key), record["config"].get(key)
        if was != is_now:
            raise InputError(
                f"{key}: {is_now} has no effect, as the optimizer of {checkpoint} goes on with {was}; set it so, or "
                "start with a new optimizer from the weights alone, by model_name_or_path"
            )
    if differences := find_differences(old, record):
        print(f"{checkpoint} is of another run: {differences}", flush=True)


def open_run(
    run: Path, record: dict, overwrite: bool, requested: str | None, look_only: bool = False
) -> tuple[Path | None, bool]:
    """Decide where training starts, before anything is loaded, and delete checkpoints that were not saved completely.

    Args:
        record: The record of what is about to be run.
        requested: `resume_from_checkpoint`: a path, `true` for the last checkpoint, `false` for none, or None, which
            goes on with a run that was stopped before its end.
        look_only: Delete nothing.

    Returns:
        The checkpoint to go on from, or None to start from the beginning; and whether the run is finished already.

    Raises:
        InputError: The folder holds another run, or the requested checkpoint does not exist or is of another kind.
    """
    switch = (requested or "").lower()
    check_folder(run, record["config"])
    if overwrite and run.exists():  # what is in the folder is deleted when training begins, not before
        check_overwrite(run, record["config"])
        return None, False
    checkpoint = None
    if requested is not None and switch not in ("true", "false"):
        checkpoint = Path(requested)
        check_requested(checkpoint, record["config"])
        if checkpoint.resolve().parent != run.resolve():
            compare_origin(checkpoint, record)
    if not (run / RUN_FILE).is_file():
        if switch == "true":
            raise InputError(f"resume_from_checkpoint: there is no run in {run} to resume")
        return checkpoint, False
    if switch == "false":
        raise InputError(f"{run} holds a run that resume_from_checkpoint: false would mix with; use --overwrite true")
    old, planned = read_run(run), is_planned(run)
    if not planned and (differences := find_differences(old, record)):
        raise InputError(
            f"{run} holds another run: {differences}. Choose another output_dir, "
            "or start over with --overwrite true, which deletes it"
        )
    was, is_now = (precision_of(settings["config"]) for settings in (old, record))
    if was != is_now and not planned and old["finished"] is None:
        print(f"bf16: {run} has computed in {was}, and goes on in {is_now}; set bf16 or fp16 to say which", flush=True)
    for marker in [] if look_only else run.glob(f"checkpoint-*/{INCOMPLETE}"):
        shutil.rmtree(marker.parent)
    last = last_checkpoint(run)
    if checkpoint is None:
        return last, old["finished"] is not None
    if last is not None and checkpoint_step(last.name) > checkpoint_step(checkpoint.name):
        raise InputError(
            f"{run} has {last.name}, which is later than {checkpoint}; delete it, or choose another output_dir"
        )
    return checkpoint, False


def precision_of(config: dict) -> str:
    return "bfloat16" if config.get("bf16") else "float16" if config.get("fp16") else "float32"


def check_folder(run: Path, config: dict) -> None:
    """Refuse an output_dir that is a file, or what the run reads."""
    if run.exists() and not run.is_dir():
        raise InputError(f"output_dir: {run} is a file; choose a folder")
    for key in ("model_name_or_path", "dataset_name"):
        if run.resolve() == Path(config[key]).resolve():
            raise InputError(f"output_dir: {run} is {key} itself; choose another output_dir")


def check_overwrite(run: Path, config: dict) -> None:
    """Refuse to delete what the run starts from, and a folder that holds no run."""
    for path in (config["model_name_or_path"], config["dataset_name"]):
        if run.resolve() in [Path(path).resolve(), *Path(path).resolve().parents]:
            raise InputError(f"overwrite would delete {path}, which this run starts from; choose another output_dir")
    if {f.name for f in run.iterdir()} - {PREFLIGHT_FILE, EDA} and not (run / RUN_FILE).is_file():
        raise InputError(
            f"{run} is not empty and holds no run, so overwrite does not delete it; choose another output_dir"
        )


def check_requested(checkpoint: Path, config: dict) -> None:
    """Refuse a path that is no complete checkpoint, or one of another kind of training."""
    if not (checkpoint / TRAINER_STATE_FILE).is_file() or (checkpoint / INCOMPLETE).exists():
        raise InputError(f"resume_from_checkpoint: {checkpoint} is no complete checkpoint")
    use_peft = bool(config.get("use_peft"))
    if is_adapter(checkpoint) != use_peft:
        kind = "a whole model" if use_peft else "an adapter"
        raise InputError(f"resume_from_checkpoint: {checkpoint} is {kind}, and use_peft is {str(use_peft).lower()}")
    if use_peft and (rank := read_json(checkpoint / ADAPTER_CONFIG).get("r")) != config["lora_r"]:
        raise InputError(f"resume_from_checkpoint: {checkpoint} has lora_r: {rank}, and not {config['lora_r']}")


def delete_run(run: Path) -> None:
    """Delete a run, but not what preflight has just written, nor the logs that W&B may have begun."""
    for path in run.iterdir() if (run / RUN_FILE).is_file() else ():
        if path.name not in (PREFLIGHT_FILE, EDA, "wandb"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_plan(run: Path, record: dict) -> str:
    """Make the folder one that steps 3 to 5 find a run in, with the model that it starts from, unless one is there.

    Returns:
        What to say of it.
    """
    if not is_planned(run):
        return "nothing is written, the folder holds a run"
    parallelism = {"kind": "planned", "world_size": record["hardware"]["world_size"]}
    save_record(run, record, parallelism=parallelism)
    test = f"python 3_test.py --output_dir {shlex.quote(str(run))} --model_name {BASE}"
    return f"see {run / EDA}. The model as it is can be tested before: {test}"


def save_record(run: Path, record: dict, **changes) -> None:
    make_folder(run)
    write_json(run / RUN_FILE, hide({**record, **changes}))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
