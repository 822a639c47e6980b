"""Which models these steps are for, and where the configs of one come from."""

import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from transformers import BartConfig, BertConfig, ViTConfig, WhisperConfig

from finetuning.data.chat import load_tokenizer
from finetuning.errors import InputError
from finetuning.inference.transformers_engine import load_model
from finetuning.models.config import find_base, load_model_config, loading_options
from finetuning.runs import read_json, write_json

DEMO = str(ROOT / "demo/model")


@pytest.mark.parametrize(
    "config, said",
    [
        (WhisperConfig(d_model=8, vocab_size=32), "a model of type whisper"),
        (
            BartConfig(d_model=8, vocab_size=32, architectures=["BartForSequenceClassification"]),
            "a BartForSequenceClassification",
        ),
        (BertConfig(hidden_size=8, vocab_size=32, architectures=["BertForMaskedLM"]), "a BertForMaskedLM"),
        (ViTConfig(hidden_size=8), "a model of type vit"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_of_another_kind_is_refused_by_its_config(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"is {said}, and no model that writes text"):
        load_model(str(tmp_path), torch.float32)


def test_the_base_of_an_adapter_is_looked_up_at_the_revision_that_it_names(tmp_path):
    adapter = {"base_model_name_or_path": "org/model", "revision": "v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert find_base(str(tmp_path), trust_remote_code=True) == (
        "org/model",
        {"trust_remote_code": True, "revision": "v2"},
    )


@pytest.mark.parametrize("load", [load_tokenizer, load_model_config, lambda path, **options: load_model(path, torch.float32, **options)])  # fmt: skip
def test_code_that_comes_with_a_model_of_others_runs_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys, load):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", sys.path.copy())  # which the library appends to
    ran, model = tmp_path / "ran", shutil.copytree(DEMO, tmp_path / "model")
    (model / "odd.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('it has run')")
    for file, changes in (
        ("config.json", {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Tokenizer", None]}}),
    ):
        write_json(model / file, read_json(model / file) | changes)
    config = {"trust_remote_code": True}
    with pytest.raises(InputError, match="code of its own; read that code, and let it run with --trust_remote_code"):
        load(str(model), **loading_options(config, "other--model", in_run=False, trust_remote_code=False))
    assert capsys.readouterr().out == "" and not ran.exists()
    with pytest.raises(InputError, match="it has run"):
        load(str(model), **loading_options(config, "checkpoint-5", in_run=True, trust_remote_code=False))
    assert (
        "checkpoint-5: code that comes with the model may be run (trust_remote_code, as in training)"
        in capsys.readouterr().out
    )
    assert loading_options({}, "other--model", in_run=False, trust_remote_code=True)["trust_remote_code"]
    assert not loading_options({}, "base", in_run=True, trust_remote_code=False)["trust_remote_code"]
