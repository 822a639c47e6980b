"""Models and adapters that are damaged or do not fit each other: one line that says so, and nothing made up in silence."""

import contextlib
import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.configs import MergeArguments
from finetuning.errors import InputError
from finetuning.loading import load_adapter
from finetuning.model_arguments import ModelArguments
from finetuning.training import check_model

BASE = str(ROOT / "demo" / "model")


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """An adapter that changes what its base model answers."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    change_config(tmp_path / "adapter", base_model_name_or_path=BASE)
    return tmp_path / "adapter"


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def lose_one(weights: dict) -> None:
    del weights[min(weights)]


def break_one(weights: dict) -> None:
    weights[min(weights)][0, 0] = float("nan")


def rename_all(weights: dict) -> None:
    for name in list(weights):
        weights[name.removeprefix("base_model.model.")] = weights.pop(name)


def base_of_another_size(folder: Path) -> None:
    config = AutoConfig.from_pretrained(BASE)
    config.hidden_size, config.head_dim = 64, 16
    AutoModelForCausalLM.from_config(config).save_pretrained(folder.parent / "other")
    change_config(folder, base_model_name_or_path=str(folder.parent / "other"))


def base_of_fewer_layers(folder: Path) -> None:
    config = AutoConfig.from_pretrained(BASE)
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(folder.parent / "other")
    change_config(folder, base_model_name_or_path=str(folder.parent / "other"))


DAMAGE = [
    (lambda f: change_config(f, r=8), "does not fit its base model"),
    (lambda f: change_config(f, r=0), "does not fit its base model"),
    (lambda f: change_config(f, target_modules=["c_attn"]), "does not fit its base model"),
    (lambda f: change_config(f, target_modules=["q_proj", "v_proj"]), "lacks base_model.model.model.layers.0.self_attn.v_"),
    (lambda f: change_config(f, target_modules=["v_proj"]), "lacks base_model.model.model.layers.0.self_attn.v_"),
    (lambda f: change_config(f, use_dora=True), "lacks base_model.model"),
    (lambda f: change_config(f, modules_to_save=["norm"]), "there is no 'base_model.model.model.layers.0.input_layernorm.weight'"),
    (lambda f: change_config(f, base_model_name_or_path="/nowhere"), "/nowhere"),
    (lambda f: change_weights(f, lose_one), "lacks base_model.model"),
    (lambda f: change_weights(f, rename_all), "lacks base_model.model"),
    (lambda f: change_weights(f, break_one), "holds values that are no numbers"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 100), "cut off"),
    (base_of_another_size, "size mismatch"),
    (base_of_fewer_layers, "which has no place in its base model"),
]  # fmt: skip


@pytest.mark.parametrize("damage, said", DAMAGE, ids=[case[1][:40] for case in DAMAGE])
def test_an_adapter_that_does_not_fit_is_refused(adapter, damage, said):
    assert load_adapter(str(adapter), dtype=torch.float32).peft_config["default"].r == 2
    damage(adapter)
    with pytest.raises(InputError) as error:
        load_adapter(str(adapter), dtype=torch.float32)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda weights: weights.pop("model.norm.weight"), "1 weights are missing, model.norm.weight first"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight has another shape"),
    ],
)
def test_weights_that_a_model_lacks_are_not_made_up(base, tmp_path, change, said):
    base.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


MERGE = runpy.run_path(str(ROOT / "2_merge_lora.py"), run_name="imported")


@pytest.mark.parametrize("name", ["merged", "merged.partial"])
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("gone")], ids=["folder", "file", "link"])  # fmt: skip
def test_a_merged_model_takes_the_place_of_nothing(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} exists; delete it or choose another --merged_dir"):
        MERGE["make_partial_folder"](tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("checkpoint-2", {"peft_type": "IA3"}, "is an adapter of type IA3, and only LoRA adapters can be merged"),
        ("checkpoint-*", {}, None),
        ("{run}/checkpoint-2/.", {}, None),
        (None, {}, None),
        ("", {}, "no model ``"),
        ("checkpoint-3", {}, "no model `checkpoint-3`"),
        ("base", {}, "is no LoRA adapter"),
    ],
)
def test_the_adapter_to_merge_is_found_or_the_reason_said(adapter, tmp_path, name, changes, said):
    run = make_run(tmp_path / "run", {})
    adapter.rename(run / "checkpoint-2")
    (run / "checkpoint-2" / "trainer_state.json").write_text("{}")
    change_config(run / "checkpoint-2", **changes)
    args = MergeArguments(model_name=name and name.format(run=run))
    with contextlib.nullcontext() if said is None else pytest.raises(InputError, match=said):
        assert MERGE["find_adapter"](run, args)[1:] == (str(run / "checkpoint-2"), run / "checkpoint-2-merged")


def test_a_single_target_of_an_adapter_is_a_name():
    args = ModelArguments(model_name_or_path=BASE, use_peft=True, lora_target_modules=["k_proj"])
    assert args.lora_target_modules == ["k_proj"]


def test_an_adapter_is_no_model_to_train(adapter):
    with pytest.raises(InputError, match="is an adapter; merge it with 2_merge_lora.py"):
        check_model(str(adapter))
    check_model(BASE)
