"""The demo model in llama.cpp: a real OpenAI-compatible server whose answers can be compared with transformers'."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from judge_servers import serve_gguf
from safetensors.torch import load_file

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: Path, path: Path) -> None:
    """A Llama checkpoint with a byte-level BPE that splits digits, in float32."""
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    generation = json.loads((model / "generation_config.json").read_text())
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    kind = gguf.TokenType
    shown = {i: kind.USER_DEFINED if token.startswith("#") else kind.CONTROL for i, token in added.items()}
    writer.add_token_list(vocabulary)
    writer.add_token_types([shown.get(i, kind.NORMAL) for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    end, end_of_text = generation["eos_token_id"]
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.to(torch.float32).numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp turns neighbours, transformers turns halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(_name_of(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name_of(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{PARTS[part.removesuffix('.weight')]}.weight"


def serve_model(model: Path, folder: Path, name: str) -> str:
    """Serve a checkpoint under a name until the process ends; gives the base URL."""
    path = folder / f"{name}.gguf"
    write_gguf(model, path)
    return serve_gguf(path, name)
