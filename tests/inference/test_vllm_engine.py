"""The engine `vllm`, where it is installed (docs/generation.md): its answers are those of `transformers`."""

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetuning.config.arguments import TestArguments as Arguments
from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import encode_prompts
from finetuning.data.samples import load_test_samples
from finetuning.errors import InputError
from finetuning.inference.answers import AnswerReader
from finetuning.inference.settings import build_generation_config
from finetuning.inference.transformers_engine import TransformersEngine, load_model
from finetuning.models.config import load_generation_config

pytest.importorskip("vllm")

from finetuning.inference.vllm_engine import VllmEngine

DEMO = str(ROOT / "demo/model")
CONFIG = {"dataset_name": str(ROOT / "demo/data"), "dataset_test_split": "test"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """An engine in processes of its own takes a minute to start on a small CPU."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def adapter(tmp_path) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    lora = LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False, base_model_name_or_path=DEMO)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def answers_of(path: str, name: str, number: int = 16, **settings):
    tokenizer = load_tokenizer(DEMO)
    config, _ = build_generation_config(Arguments(**settings), tokenizer, load_generation_config(path), name)
    reader = AnswerReader(tokenizer, config)
    prompts = encode_prompts(tokenizer, load_test_samples(CONFIG)[:number])
    if name == "vllm":
        longest = max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens
        engine = VllmEngine(path, reader, torch.float32, longest, None, 0, {})
    else:
        engine = TransformersEngine(load_model(path, torch.float32), reader, None, 0)
    answers = {answer.id: answer for answer in engine.answer(prompts)}
    engine.close()
    return [answers[prompt.id] for prompt in prompts]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}, {"stop": ["."]}], ids=["plain", "penalised", "stop"])  # fmt: skip
def test_answers_are_those_of_transformers(settings):
    vllm, transformers = (answers_of(DEMO, name, max_new_tokens=40, **settings) for name in ("vllm", "transformers"))
    assert [answer.prediction for answer in vllm] == [answer.prediction for answer in transformers]
    assert [answer.finish_reason for answer in vllm] == [answer.finish_reason for answer in transformers]
    if "stop" not in settings:  # vllm goes on to the end of the token that has the stop string
        assert vllm == transformers


def test_an_adapter_is_served_without_a_merge(adapter):
    served = answers_of(adapter, "vllm", max_new_tokens=24)
    assert served == answers_of(adapter, "transformers", max_new_tokens=24)
    assert served != answers_of(DEMO, "transformers", max_new_tokens=24)


def test_a_sampled_answer_depends_on_its_sample_only():
    few, many = (answers_of(DEMO, "vllm", number, max_new_tokens=16, do_sample=True) for number in (3, 12))
    assert few == many[:3]


def test_an_adapter_that_vllm_cannot_serve_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    lora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, base_model_name_or_path=DEMO)
    get_peft_model(model, lora).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="plain LoRA only"):
        answers_of(str(tmp_path), "vllm")
