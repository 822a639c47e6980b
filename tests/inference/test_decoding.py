"""The decode loop gives, token for token, what `model.generate` gives for each prompt alone."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetuning.data.prompts import seed_of
from finetuning.inference.decoding import Decoder, SlotCache, unsupported_reason
from finetuning.inference.onednn import onednn_products

VOCABULARY = 997
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 8, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama, grouped queries": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=16)),
    "gemma, one key head": (GemmaForCausalLM, GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=16)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2)),
}
FIRST, *OTHERS = MODELS
GREEDY = GenerationConfig(max_new_tokens=12, eos_token_id=[3, 5, 7], pad_token_id=0, do_sample=False)


@pytest.fixture(autouse=True)
def onednn_for_small_layers(monkeypatch):
    monkeypatch.setattr("finetuning.inference.onednn.MIN_WEIGHTS", 0)


def build(model_class, config):
    """Random weights, large enough that a next token depends on all that came before."""
    torch.manual_seed(1)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def make_prompts(number=15):
    generator = random.Random(0)
    lengths = [1, 2, 700, *(generator.choice([3, 5, 30, 31, 300]) for _ in range(number - 3))]
    return [[generator.randrange(10, VOCABULARY) for _ in range(length)] for length in lengths]


def alone(model, prompt: list[int], config: GenerationConfig = GREEDY) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def decode(model, prompts: list[list[int]], num_slots: int, config: GenerationConfig = GREEDY) -> dict[int, list[int]]:
    """The new tokens of each prompt, by its place; without stop strings no tokenizer is needed."""
    seeds = [seed_of(0, str(i)) for i in range(len(prompts))]
    return dict(Decoder(model, config, num_slots, tokenizer=None).generate(prompts, seeds))


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_tokens_are_those_of_generate_for_each_prompt_alone(name):
    model, prompts = build(*MODELS[name]), make_prompts()
    expected = [alone(model, prompt) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 30  # answers that are worth comparing
    for num_slots in (1, 4, 64):
        assert decode(model, prompts, num_slots) == dict(enumerate(expected)), num_slots


SYSTEM = [*range(40, 59)]  # what prompts begin with
SHARED_PREFIXES = {
    "all": [[*SYSTEM, 60, 61], [*SYSTEM, 62, 63, 64, 65], [*SYSTEM, 66]],
    "equal prompts": [SYSTEM] * 5,
    "a prompt that the others begin with": [SYSTEM, [*SYSTEM, 70, 71], [*SYSTEM, 70, 72]],
    "one token alone": [[40], [40, 41, 42], [40, 41]],
    "one prompt": [SYSTEM],
    "nothing in common": [[11, *SYSTEM], [12, *SYSTEM], [13]],
}


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("prompts", SHARED_PREFIXES.values(), ids=list(SHARED_PREFIXES))
def test_prompts_that_begin_alike_are_answered_as_each_alone(name, prompts):
    model = build(*MODELS[name])
    expected = [alone(model, prompt) for prompt in prompts]
    for num_slots in (2, 64):  # with two, the later ones follow into slots that were used
        assert decode(model, prompts, num_slots) == dict(enumerate(expected)), num_slots


def test_what_all_prompts_begin_with_is_read_once():
    model, read = build(*MODELS[FIRST]), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].tolist()))
    prompts = [[*SYSTEM, 60, number] for number in range(70, 74)]
    decode(model, prompts, 4)
    assert read[:3] == [[[*SYSTEM, 60]], [[0]] * 4, [[73], [72], [71], [70]]]  # once, nothing more of each, first step


def test_linear_layers_multiply_by_onednn_while_they_answer_and_as_before_afterwards():
    model, prompts = build(*MODELS["qwen2"]), make_prompts(4)  # qwen2 has biases
    layer, rows = model.model.layers[0].self_attn.q_proj, torch.randn(3, 5, 64)
    torch.nn.init.normal_(layer.bias)
    with torch.inference_mode(), torch.profiler.profile() as profile, onednn_products(model):
        assert torch.allclose(layer(rows), torch.nn.functional.linear(rows, layer.weight, layer.bias), atol=1e-5)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
    answers = Decoder(model, GREEDY, 4, tokenizer=None).generate(prompts, [0] * 4)
    next(answers)
    assert "forward" in vars(layer) and "forward" in vars(model.lm_head)
    answers.close()  # as when memory runs out
    assert not any("forward" in vars(module) for module in model.modules())
    with onednn_products(model.bfloat16()):  # for which torch asks oneDNN by itself
        assert "forward" not in vars(layer)


@pytest.mark.slow
def test_an_adapter_answers_as_it_does_alone():
    model = build(*MODELS["llama, grouped queries"])
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    prompts = make_prompts(8)
    assert decode(adapter, SHARED_PREFIXES["all"], 2) == {
        i: alone(adapter, prompt) for i, prompt in enumerate(SHARED_PREFIXES["all"])
    }
    expected = [alone(adapter, prompt) for prompt in prompts]
    assert decode(adapter, prompts, 3) == dict(enumerate(expected))
    with adapter.disable_adapter():
        assert [alone(adapter, prompt) for prompt in prompts] != expected


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_penalties_are_those_of_the_library(settings):
    model, prompts = build(*MODELS["llama, tied"]), make_prompts(6)
    config = GenerationConfig(**{**GREEDY.to_dict(), **settings})
    assert decode(model, prompts, 4, config) == dict(enumerate(alone(model, p, config) for p in prompts))


@pytest.mark.slow
def test_sampled_tokens_follow_the_distribution():
    """Over many seeds the first token comes as often as the model says, within top_k and top_p."""
    model, prompt = build(*MODELS["llama, tied"]), make_prompts()[3]
    config = GenerationConfig(
        max_new_tokens=1, eos_token_id=[3], pad_token_id=0, do_sample=True, temperature=2.0, top_k=5
    )
    number = 2000
    drawn = decode(model, [prompt] * number, 500, config).values()
    counts = torch.bincount(torch.tensor([tokens[0] for tokens in drawn]), minlength=VOCABULARY)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1] / 2.0
    top = logits.topk(5)
    expected = torch.zeros(VOCABULARY).index_put((top.indices,), top.values.softmax(-1))
    assert counts[expected == 0].sum() == 0
    assert (counts / number - expected).abs().max() < 4 * (0.25 / number) ** 0.5


def test_a_sliding_window_is_left_to_the_library_where_it_matters():
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=40)
    model = build(MistralForCausalLM, config)
    assert unsupported_reason(model, GREEDY, 400) is not None
    assert unsupported_reason(build(*MODELS["llama, tied"]), GREEDY, 400) is None


@pytest.mark.slow
def test_memory_of_the_cache_is_given_back_to_waiting_prompts():
    """As many slots as there are sequences at once, whatever the number of prompts."""
    model, prompts = build(*MODELS["llama, tied"]), [[11, 12, 13]] * 200
    caches = []
    original = SlotCache.__init__

    def remember(cache, *args):
        original(cache, *args)
        caches.append(cache)

    SlotCache.__init__ = remember
    try:
        assert len(decode(model, prompts, 8)) == 200
    finally:
        SlotCache.__init__ = original
    (cache,) = caches
    assert all(tensor.shape[0] == 8 and tensor.shape[2] == 3 + 12 for layer in cache.layers for tensor in layer)
