"""Attention by rows: packed rows give what each gives alone, no mask of all tokens is made, and no checkpoint knows."""

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3MoeConfig,
)

from finetuning.inference.transformers_engine import load_model
from finetuning.training.attention import ROW_ATTENTION, find_fallback

LENGTHS = [5, 40, 1, 17]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = {
    "grouped heads": LlamaConfig(**SIZES),
    "a window shorter than a row": MistralConfig(**SIZES, sliding_window=8),
    "layers with and without a window": Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "learned positions": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0),
    "experts": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def build(config, attention=ROW_ATTENTION):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def pack(lengths):
    """Token ids of rows, one by one, and the batch in which they lie end to end."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (1, length), generator=generator) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return rows, {"input_ids": torch.cat(rows, dim=1), "position_ids": positions, "use_cache": False}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_rows_have_the_logits_and_gradients_of_each_alone(config):
    rows, batch = pack(LENGTHS)
    model, library = build(config), build(config, "eager")
    packed = model(**batch).logits[0].split(LENGTHS)
    sum(logits.square().mean() for logits in packed).backward()
    alone = [library(input_ids=row, use_cache=False).logits[0] for row in rows]
    sum(logits.square().mean() for logits in alone).backward()
    for mine, expected in zip(packed, alone, strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)
    mine, expected = gradients(model), gradients(library)
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(mine[name], gradient, atol=1e-5), name


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("attention", "made"), [(ROW_ATTENTION, False), ("sdpa", True)])
def test_no_tensor_of_tokens_times_tokens_is_made(attention, made):
    lengths = [100] * 8
    model, (_, batch) = build(CONFIGS["grouped heads"], attention).base_model, pack(lengths)
    with LargestTensor() as largest:
        model(**batch).last_hidden_state.sum().backward()
    assert (largest.elements >= sum(lengths) ** 2) == made


def test_recomputed_activations_give_the_same_gradients():
    model, (_, batch) = build(CONFIGS["a window shorter than a row"]).train(), pack(LENGTHS)
    model(**batch).logits.square().mean().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).logits.square().mean().backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("name", ["grouped heads", "a window shorter than a row"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_of_each_alone(name, side):
    rows, _ = pack(LENGTHS)
    model, longest = build(CONFIGS[name]), max(LENGTHS)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(longest - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[i, own], mask[i, own] = row[0], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        assert torch.allclose(logits[i][mask[i].bool()], model(input_ids=row).logits[0], atol=1e-5)


def test_a_saved_model_does_not_name_it(tmp_path):
    build(CONFIGS["grouped heads"]).save_pretrained(tmp_path)
    assert ROW_ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_models_whose_attention_cannot_go_by_rows_are_named():
    def fallback(config):
        with torch.device("meta"):
            return find_fallback(AutoModelForCausalLM.from_config(config))

    assert fallback(AutoConfig.from_pretrained(ROOT / "demo/model")) is None
    bloom = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    assert fallback(bloom) == ("eager", "the model has no sdpa")
    lfm2 = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention"])
    assert fallback(lfm2) == ("sdpa", "its layers are of conv")
    capped = AutoConfig.for_model("gemma2", **SIZES)
    assert fallback(capped) == ("eager", "sdpa leaves out the cap of the model's attention logits")


def test_step_3_loads_a_model_with_capped_attention_logits_so_that_they_are_capped(tmp_path):
    """sdpa has no cap, and would leave it out without a word."""
    config = AutoConfig.for_model("gemma2", **SIZES, attn_logit_softcapping=0.01)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=10)  # large logits, which the cap makes small
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 20)[None]
    by_sdpa = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")(ids).logits
    logits = model(ids).logits
    assert not torch.allclose(by_sdpa, logits, atol=1e-4)
    assert torch.allclose(load_model(str(tmp_path), torch.float32)(ids).logits, logits, atol=1e-6)
