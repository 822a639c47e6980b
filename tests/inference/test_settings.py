"""Settings of generation, and where each comes from."""

import pytest
from conftest import ROOT
from transformers import GenerationConfig

from finetuning.config.arguments import TestArguments as Arguments  # by its own name pytest would take it for a test
from finetuning.errors import InputError
from finetuning.inference.settings import build_generation_config, ignored_settings
from finetuning.models.config import load_generation_config

DEMO = str(ROOT / "demo/model")


def test_what_is_not_set_comes_from_the_checkpoint(tokenizer):
    own = GenerationConfig(temperature=0.6, top_p=0.9, repetition_penalty=1.05, eos_token_id=[1, 3])
    greedy, sources = build_generation_config(Arguments(), tokenizer, own)
    assert not greedy.do_sample and greedy.temperature is None
    assert (greedy.repetition_penalty, sources["repetition_penalty"]) == (1.05, "checkpoint")
    sampled, sources = build_generation_config(Arguments(do_sample=True, top_p=0.5), tokenizer, own)
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.6, 0.5, 0)
    assert [sources[key] for key in ("temperature", "top_p", "top_k", "max_new_tokens")] == [
        "checkpoint",
        "flag",
        "default",
        "default",
    ]
    assert len(greedy.eos_token_id) == 2
    own.temperature = 0.0
    with pytest.raises(InputError, match="temperature: 0 .from the checkpoint. cannot be sampled at"):
        build_generation_config(Arguments(do_sample=True), tokenizer, own)


def test_what_a_checkpoint_declares_beyond_these_settings_is_named():
    assert ignored_settings(load_generation_config(DEMO, trust_remote_code=False, revision="main")) == {}
    own = GenerationConfig(temperature=0.6, min_p=0.05, suppress_tokens=[7], eos_token_id=[1, 3], max_length=40)
    own.output_attentions = False
    assert ignored_settings(own) == {"min_p": 0.05, "suppress_tokens": [7]}
