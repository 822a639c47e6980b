"""The adapter that step 1 trains."""

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.config.model_arguments import ModelArguments
from finetuning.errors import InputError
from finetuning.training.model import build_adapter_config, check_adapter_names

MODEL = str(ROOT / "demo/model")


@pytest.mark.parametrize(
    "key, names",
    [
        ("target_modules", ["q_proj", "q_porj"]),
        ("modules_to_save", ["embd_tokens"]),
        ("target_parameters", ["a.weight"]),
    ],
)
def test_a_name_that_an_adapter_would_leave_out_in_silence_is_refused(key, names):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
    check_adapter_names(model, LoraConfig(target_modules=["v_proj", "self_attn.k_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match=f"lora_{key}: {names[-1]} is nowhere in the model"):
        check_adapter_names(model, LoraConfig(**{"target_modules": ["v_proj"], key: names}))


@pytest.mark.parametrize("trained, tied", [(["embed_tokens"], True), (["lm_head"], True), (["q_proj"], False)])
def test_tied_embeddings_stay_tied_under_an_adapter(trained, tied):
    args = ModelArguments(model_name_or_path=MODEL, use_peft=True, lora_target_modules=["v_proj"], lora_modules_to_save=trained)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
    assert build_adapter_config(args, [], model).ensure_weight_tying == tied
