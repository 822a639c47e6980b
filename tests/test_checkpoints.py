"""What a checkpoint holds besides its weights, and what is said where it is damaged, or made to do harm."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, SMALL, TRAIN, run_step

from finetuning.checkpoints import SafeReader, check_resumable
from finetuning.errors import InputError


class Payload:
    """Unpickled by an ordinary reader, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def checkpoint(fsdp_run, tmp_path) -> Path:
    return Path(shutil.copytree(fsdp_run / "checkpoint-5", tmp_path / "checkpoint-5"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "name, damage",
    [
        *[
            (name, damage)
            for name in (
                "model.safetensors",
                "scheduler.pt",
                "trainer_state.json",
                "optimizer/.metadata",
                "optimizer/__1_0.distcp",
            )
            for damage in (cut, Path.unlink)
        ],
        ("rng_state_1.pth", cut),
        ("trainer_state.json", rewrite(global_step=7)),
        ("trainer_state.json", rewrite(log_history=[{"num_tokens": "many"}])),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named_before_a_model_is_loaded(checkpoint, name, damage):
    check_resumable(checkpoint)
    damage(checkpoint / name)
    with pytest.raises(InputError) as error:
        check_resumable(checkpoint)
    message = str(error.value)
    assert str(checkpoint / name) in message and "\n" not in message
    assert f"delete {checkpoint} to go on from the one before it" in message


def plant(payload: Payload, path: Path) -> None:
    """Put the payload where a reader of this file would unpickle it."""
    if path.suffix == ".distcp":  # a setting of the optimizer, which the index finds at the end of this file
        index = path.parent / ".metadata"
        metadata = SafeReader(path.parent).read_metadata()
        stored = next(key for key in metadata.storage_data if key.fqn == "optimizer.param_groups.0.eps")
        part = metadata.storage_data[stored]
        start = path.stat().st_size
        with path.open("ab") as file:
            torch.save(payload, file)
        part.relative_path, part.offset, part.length = path.name, start, path.stat().st_size - start
        index.write_bytes(pickle.dumps(metadata))
    elif path.name == ".metadata":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path)


@pytest.mark.parametrize("name", ["optimizer/.metadata", "scheduler.pt", "rng_state_0.pth"])
def test_code_in_a_checkpoint_is_found_and_not_run(checkpoint, tmp_path, name):
    plant(Payload(tmp_path / "ran"), checkpoint / name)
    with pytest.raises(InputError, match="holds code"):
        check_resumable(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer/.metadata", "optimizer/__0_0.distcp"])
def test_going_on_from_a_checkpoint_runs_no_code_in_it(copy_of_run, tmp_path, name):
    shutil.rmtree(copy_of_run / "checkpoint-10")
    record = json.loads((copy_of_run / "run.json").read_text())
    (copy_of_run / "run.json").write_text(json.dumps({**record, "finished": None}))
    checkpoint = copy_of_run / "checkpoint-5"
    for planted in ("training_args.bin", name):
        plant(Payload(tmp_path / "ran"), checkpoint / planted)
    arguments = ["--config", CONFIG, *SMALL, "--output_dir", copy_of_run, "--per_device_train_batch_size", 4]
    status, printed = run_step(TRAIN, tmp_path / "printed.txt", *arguments)
    assert not (tmp_path / "ran").exists(), printed
    assert status == 2 and "Traceback" not in printed, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert str(checkpoint / "optimizer") in line and f"delete {checkpoint}" in line
