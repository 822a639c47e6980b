"""Tiny encoder-decoder models of random weights, with tokenizers trained on the demo's text, made without a network."""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartTokenizer,
    LEDConfig,
    LEDTokenizer,
    MBartConfig,
    MBartTokenizer,
    MT5Config,
    PegasusConfig,
    PegasusTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5GemmaConfig,
    T5Tokenizer,
)

ROOT = Path(__file__).parents[1]
WORDS = 400
KINDS = ("bart", "mbart", "t5", "mt5", "led", "t5gemma", "pegasus")


@cache
def texts() -> list[str]:
    rows = json.loads((ROOT / "demo/data/test_dataset.json").read_text(encoding="utf-8"))
    return [message["content"] for row in rows for message in row["messages"]]


@cache
def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@cache
def pieces(*special: str) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(vocab_size=WORDS, special_tokens=[*special, "▁"], unk_token="<unk>")
    tokenizer.train_from_iterator(texts(), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]


SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def make(kind: str, folder: Path, spread: float | None = None) -> str:
    """Write a model of random weights, of a standard deviation, and its tokenizer; gives the folder's path."""
    if kind in ("bart", "led"):
        vocab, merges = byte_pairs()
        tokenizer = (BartTokenizer if kind == "bart" else LEDTokenizer)(vocab=vocab, merges=merges)
        positions = (
            {"max_position_embeddings": 512}
            if kind == "bart"
            else {
                "max_encoder_position_embeddings": 512,
                "max_decoder_position_embeddings": 128,
                "attention_window": 64,
            }
        )
        config = (BartConfig if kind == "bart" else LEDConfig)(**SIZES, **positions)
    elif kind == "mbart":
        tokenizer = MBartTokenizer(vocab=[*pieces("<s>", "<pad>", "</s>", "<unk>")], src_lang="en_XX", tgt_lang="en_XX")
        config = MBartConfig(
            **SIZES, max_position_embeddings=512, decoder_start_token_id=tokenizer.convert_tokens_to_ids("en_XX")
        )
    elif kind == "pegasus":
        tokenizer = PegasusTokenizer(vocab=[*pieces("<pad>", "</s>", "<unk>")], offset=0)
        config = PegasusConfig(**SIZES, max_position_embeddings=512)
    elif kind == "t5gemma":  # whose tokenizer writes no end
        vocab, merges = byte_pairs()
        plain = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **names)
        module = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        config = T5GemmaConfig(encoder=module | ids, decoder=module | ids, **ids)
    else:
        tokenizer = T5Tokenizer(vocab=[*pieces("<pad>", "</s>", "<unk>")], extra_ids=10)
        config = (T5Config if kind == "t5" else MT5Config)(**T5_SIZES, decoder_start_token_id=0)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    if kind == "mt5":  # whose published weights have a head of their own, though the library's config ties it
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    if spread is not None:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=spread)
        if kind == "t5gemma":  # or its first token, whose embedding is the head's too, would be all that it writes
            model.get_decoder().embed_tokens.weight.data.mul_(0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
