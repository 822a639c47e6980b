"""The files of a model: what is wrong with one, and which model they are."""

import os
import shutil

import pytest
import torch
from conftest import ROOT

from finetuning.data.chat import load_tokenizer
from finetuning.errors import InputError
from finetuning.inference.answers import check_prompts
from finetuning.inference.transformers_engine import load_model
from finetuning.models.files import check_model_files, fingerprint_model

DEMO = str(ROOT / "demo/model")


def test_other_weights_have_another_fingerprint(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    assert fingerprint_model(str(folder)) == fingerprint_model(DEMO)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2] + bytes(len(weights) - len(weights) // 2))
    assert fingerprint_model(str(folder)) != fingerprint_model(DEMO)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("model.safetensors", 200_000, "model.safetensors is cut off, or damaged: 200,000 of"),
        ("model.safetensors", 3, "model.safetensors holds no weights in the format safetensors, or is cut off"),
        ("model.safetensors", 0, "model.safetensors is empty; copy or download it again"),
        ("model.safetensors", POINTER, "model.safetensors is a pointer of git-lfs.* `git lfs pull`"),
        ("tokenizer.json", POINTER, "tokenizer.json is a pointer of git-lfs"),
        ("tokenizer.json", 900, "tokenizer.json is no JSON, or is cut off"),
        ("tokenizer.json", "{}", "could not load the tokenizer of"),
        ("config.json", "<html>\n404", "config.json is no JSON, or is cut off .it begins with `<html>`."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}', "lacks model-2.safetensors"),
        ("adapter_config.json", "{}", "adapter_config.json names no base model"),
    ],
)
def test_a_damaged_file_of_a_model_is_named_in_one_line(tmp_path, name, content, said):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    if isinstance(content, int):
        os.truncate(folder / name, content)
    else:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=said) as raised:
        load_tokenizer(str(folder))
        check_prompts([], str(folder), load_tokenizer(DEMO), 8)
        load_model(str(folder), torch.float32)
    assert "\n" not in str(raised.value)


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_model_files(str(tmp_path))
    (tmp_path / "config.json").write_text("{ ")
    with pytest.raises(InputError, match="is no JSON, or is cut off"):
        check_model_files(str(tmp_path))
