"""Models and adapters that are damaged or do not fit each other: one line says so, and nothing is made up in silence."""

import contextlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAIN, make_run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.config.arguments import MergeArguments, ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.errors import InputError
from finetuning.models.loading import load_adapter, record_base
from finetuning.runs import read_json, write_json
from finetuning.training.arguments import TrainingArguments
from finetuning.training.merging import find_adapter, partial_folder
from finetuning.training.model import check_model
from finetuning.training.report import Report

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


@pytest.mark.slow
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


def test_an_adapter_is_added_to_no_other_weights_than_it_was_trained_on(adapter, tmp_path):
    """However these are spread over files; those of other models have the same names and shapes."""
    record_base(adapter, BASE)
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
    model.save_pretrained(other, max_shard_size="600KB")
    assert len(list(other.glob("*.safetensors"))) > 1
    change_config(adapter, base_model_name_or_path=str(other))
    load_adapter(str(adapter), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(other, max_shard_size="600KB")
    with pytest.raises(InputError, match="other holds other weights .* bring the base model back as it was"):
        load_adapter(str(adapter), dtype=torch.float32)


MERGE = runpy.run_path(str(ROOT / "2_merge_lora.py"), run_name="imported")


@pytest.mark.parametrize("name", ["merged", "merged.partial"])
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("gone")], ids=["folder", "file", "link"])  # fmt: skip
def test_a_merged_model_takes_the_place_of_nothing(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} exists; delete it or choose another --merged_dir"):
        partial_folder(tmp_path / "merged").__enter__()
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
        assert find_adapter(run, args)[1:] == (str(run / "checkpoint-2"), run / "checkpoint-2-merged")


def test_a_single_target_of_an_adapter_is_a_name():
    args = ModelArguments(model_name_or_path=BASE, use_peft=True, lora_target_modules=["k_proj"])
    assert args.lora_target_modules == ["k_proj"]


def test_an_adapter_is_no_model_to_train(adapter):
    with pytest.raises(InputError, match="is an adapter; merge it with 2_merge_lora.py"):
        check_model(str(adapter))
    check_model(BASE)


def test_quantised_weights_are_neither_trained_nor_merged_into(adapter, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "quantised")
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    run = make_run(tmp_path / "run", {})
    adapter.rename(run / "checkpoint-2")
    change_config(run / "checkpoint-2", base_model_name_or_path=str(base))
    for refuse in (
        lambda: check_model(str(base)),
        lambda: MERGE["main"](MergeArguments(output_dir=str(run), model_name="checkpoint-2")),
    ):
        with pytest.raises(InputError, match="quantised holds quantised weights"):
            refuse()


def test_a_revision_of_a_folder_is_refused():
    with pytest.raises(InputError, match="model_revision: v9 has no effect, as .* is a folder"):
        check_model(BASE, revision="v9")
    check_model(BASE, revision="main")


def test_a_folder_where_none_can_be_made_is_one_line():
    for make in (lambda: partial_folder(Path("/proc/run")).__enter__(), lambda: Report().save(Path("/proc/run"))):
        with pytest.raises(InputError, match="no folder can be made there; choose another place"):
            make()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def published(tmp_path, monkeypatch) -> str:
    """A model with code of its own, which the cache of the Hub has."""
    repository = tmp_path / "hub" / "models--org--odd"
    folder = shutil.copytree(BASE, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    for revision in ("v9", "main"):  # trl looks up the class of a model at main, whatever its revision is
        (repository / "refs" / revision).write_text("0" * 40)
    (folder / "odd.py").write_text(CODE)
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    changes = {"model_type": "odd", "architectures": ["OddModel"], "auto_map": classes, "dtype": "float32"}
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setattr("sys.path", sys.path.copy())  # which the library appends to
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):  # which the arguments set
        monkeypatch.setenv(name, "false")
    return "org/odd"


@pytest.mark.slow
def test_resuming_and_merging_run_the_code_of_the_base_as_training_did(published, tmp_path, capsys):
    train = runpy.run_path(str(ROOT / TRAIN), run_name="imported")["main"]
    run = tmp_path / "run"

    def train_adapter() -> None:
        train(
            ScriptArguments(dataset_name=str(ROOT / "demo/data"), dataset_train_split="train[:20]", preview_rows=0),
            TrainingArguments(
                output_dir=str(run), max_steps=2, save_steps=1, learning_rate=0.01, per_device_train_batch_size=1,
                max_length=128, report_to="none", disable_tqdm=True, trust_remote_code=True,
            ),
            ModelArguments(
                model_name_or_path=published, model_revision="v9", use_peft=True, lora_target_modules=["q_proj"],
                dtype="float32", attn_implementation="sdpa",
            ),
        )  # fmt: skip

    train_adapter()
    shutil.rmtree(run / "checkpoint-2")
    record = read_json(run / "run.json") | {"finished": None}
    write_json(run / "run.json", record)
    train_adapter()
    assert f"going on from {run}/checkpoint-1" in capsys.readouterr().out
    merge = MergeArguments(output_dir=str(run), num_prompts=1)
    MERGE["main"](merge)
    assert (
        "checkpoint-2: code that comes with the model may be run (trust_remote_code, as in t" in capsys.readouterr().out
    )
    merged = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2-merged", trust_remote_code=True)
    assert type(merged).__name__ == "OddModel"
    shutil.rmtree(run / "checkpoint-2-merged")
    write_json(run / "run.json", record | {"config": record["config"] | {"trust_remote_code": False}})
    with pytest.raises(InputError, match="comes with code of its own"):
        MERGE["main"](merge)
    assert not list(run.glob("*merged*"))
