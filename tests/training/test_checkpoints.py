"""What a checkpoint holds besides its weights, and what is said where it is damaged, or made to do harm."""

import inspect
import io
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import trl.trainer.utils
from conftest import CONFIG, ROOT, SMALL, TRAIN, run_step
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Seq2SeqTrainer
from trl import SFTTrainer

import finetuning.training.trainer
from finetuning.errors import InputError
from finetuning.runs import list_checkpoints
from finetuning.training.arguments import TrainingArguments
from finetuning.training.checkpoints import (
    MetadataUnpickler,
    SafeReader,
    check_resumable,
    check_weights,
    delete_older_checkpoints,
    saved_shapes,
)
from finetuning.training.records import open_run
from finetuning.training.trainer import Resumable, ResumableSFTTrainer, failing_together

OVERRIDDEN = {  # private methods of the libraries, and the parameters that ours take
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
}


def test_every_private_method_that_is_overridden_is_still_there():
    """A method that a library has renamed would leave ours behind without a word."""
    ours = {name for name, value in vars(Resumable).items() if callable(value) and name.startswith("_")}
    assert ours - {"__init__", "_complete"} == OVERRIDDEN.keys()
    assert list(inspect.signature(Seq2SeqTrainer._get_train_sampler).parameters) == ["self", "train_dataset"]
    for name, parameters in OVERRIDDEN.items():
        assert list(inspect.signature(getattr(SFTTrainer, name)).parameters) == parameters, name
        assert list(inspect.signature(getattr(ResumableSFTTrainer, name)).parameters) == parameters, name
    assert "_prepare_dataset" in vars(SFTTrainer), "batches.RowPreparation calls it"
    assert list(inspect.signature(DefaultLoadPlanner.load_bytes).parameters) == ["self", "read_item", "value"]
    assert "read_metadata" in vars(FileSystemReader)


def test_a_renamed_name_of_trl_fails_loudly(monkeypatch):
    source = inspect.getsource(finetuning.training.trainer).split("class Resumable(")[0]
    exec(source, {})
    monkeypatch.delattr(trl.trainer.utils, "_use_triton")
    with pytest.raises(AssertionError, match="has renamed _use_triton"):
        exec(source, {})


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
        ("trainer_state.json", rewrite(global_step="7")),
        ("trainer_state.json", rewrite(log_history=[{"step": 1, "num_tokens": "many"}])),
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


def build_model(kind: str):
    """A tiny model: with tied embeddings, one that is saved under other names than it computes with, or an adapter."""
    if kind == "mixture of experts":
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model")
    if kind == "adapter":
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        return get_peft_model(model, config)
    return model


@pytest.mark.parametrize("kind", ["tied", "mixture of experts", "adapter"])
def test_a_checkpoint_is_complete_only_with_every_tensor(tmp_path, kind):
    model = build_model(kind)
    options = {} if kind == "adapter" else {"max_shard_size": "600KB" if kind == "tied" else "1KB"}
    model.save_pretrained(tmp_path, **options)
    shapes = saved_shapes(model)
    check_weights(tmp_path, shapes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sum(len(load_file(file)) for file in files) == len(shapes)
    assert len(files) > 1 or kind == "adapter"
    tensors = load_file(files[0])
    name = next(iter(tensors))
    for changed in (
        {**tensors, name: tensors[name][:1]},
        {other: tensors[other] for other in tensors if other != name},
    ):
        save_file(changed, files[0])
        with pytest.raises(InputError, match=re.escape(f"lacks 1 of the {len(shapes)} tensors of the model ({name})")):
            check_weights(tmp_path, shapes)
    for file in files:
        file.unlink()
    with pytest.raises(InputError):
        check_weights(tmp_path, shapes)


class Attribute:
    """An attribute of something, as Python 3.11.2 pickles the members of enums."""

    def __init__(self, of, name: str):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_attributes_in_an_optimizer_state_are_members_of_its_enums_and_nothing_else():
    member = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))
    assert MetadataUnpickler(io.BytesIO(member)).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for of, name in ((_MEM_FORMAT_ENCODING, "__class__"), (Metadata, "__init__"), (torch.Size, "numel")):
        with pytest.raises(pickle.UnpicklingError, match="is no part of an optimizer state"):
            MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(of, name)))).load()


class Careless(ResumableSFTTrainer):
    """Saves all tensors but one."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        tensors = load_file(f"{output_dir}/model.safetensors")
        tensors.popitem()
        save_file(tensors, f"{output_dir}/model.safetensors")


@pytest.mark.slow
def test_training_ends_where_a_checkpoint_lacks_a_tensor_and_leaves_it_marked(tmp_path, tokenizer):
    rows = Dataset.from_list([{"prompt": "What is red?", "completion": " Blood."}])
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to="none", packing=False)
    trainer = Careless(model=str(ROOT / "demo/model"), args=args, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(InputError, match="checkpoint-1 lacks 1 of the .* tensors .* it stays marked as incomplete"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "INCOMPLETE").exists() and list_checkpoints(tmp_path) == []


def test_a_full_disk_ends_saving_in_one_line(tmp_path):
    """A limit on the size of files stands in for the disk; each writer meets it in its own way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"weight": torch.zeros(100_000)}
    writers = [
        lambda: save_file(tensors, tmp_path / "model.safetensors"),
        lambda: torch.save(tensors, tmp_path / "scheduler.pt"),
        lambda: dcp.save(tensors, checkpoint_id=tmp_path / "optimizer"),
        lambda: (tmp_path / "trainer_state.json").write_text("x" * 400_000),
    ]
    for write in writers:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with (
                pytest.raises(InputError, match="could not be saved .* make room") as error,
                failing_together(tmp_path),
            ):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)


def test_older_checkpoints_make_room_only_for_complete_ones(tmp_path):
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-5-merged").mkdir()
    (tmp_path / "checkpoint-15" / "INCOMPLETE").touch()
    delete_older_checkpoints(tmp_path, None)
    delete_older_checkpoints(tmp_path, 1)
    left = ["checkpoint-10", "checkpoint-15", "checkpoint-5-merged"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == left


def test_what_a_checkpoint_of_another_run_differs_in_is_said(fsdp_run, tmp_path, capsys):
    record = json.loads((fsdp_run / "run.json").read_text())
    record["config"]["output_dir"] = str(tmp_path)
    checkpoint = fsdp_run / "checkpoint-5"

    def go_on(**changes) -> str:
        changed = {**record, "config": record["config"] | changes}
        changed["data"] = {"train": {"rows": 3, "hash": "of other rows"}}
        assert open_run(tmp_path / "other", changed, False, str(checkpoint)) == (checkpoint, False)
        return capsys.readouterr().out

    assert open_run(tmp_path / "other", record, False, str(checkpoint)) == (checkpoint, False)
    assert capsys.readouterr().out == ""
    said = go_on(max_steps=77)
    assert "checkpoint-5 is of another run: max_steps was 10 and is 77; rows of train was" in said
    with pytest.raises(
        InputError, match="learning_rate: 0.1 has no effect, as the optimizer of .* goes on with 0.0005"
    ):
        go_on(learning_rate=0.1)
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint-5")
    assert "no run.json beside" in go_on()


def test_a_run_that_goes_on_in_another_precision_says_so(fsdp_run, tmp_path, capsys):
    stopped = {**json.loads((fsdp_run / "run.json").read_text()), "finished": None}
    (tmp_path / "run.json").write_text(json.dumps(stopped))
    (tmp_path / "checkpoint-5").mkdir()  # without a model in it, what was computed is a plan only
    for computes, said in ((False, ""), (True, f"bf16: {tmp_path} has computed in float32, and goes on in bfloat16")):
        record = {**stopped, "config": {**stopped["config"], "output_dir": str(tmp_path), "bf16": computes}}
        assert open_run(tmp_path, record, False, None) == (None, False)
        printed = capsys.readouterr().out
        assert printed.startswith(said) and bool(printed) == bool(said)
