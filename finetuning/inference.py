"""
Answers from a checkpoint: which settings they are made with, and what becomes of the tokens.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.chat import control_token_ids, decode_answer, end_token_ids
from finetuning.configs import TestArguments
from finetuning.decoding import Decoder, seed_of, why_not_exact
from finetuning.errors import InputError
from finetuning.hardware import choose_attention
from finetuning.memory import available_memory

OWN_KEYS = ("repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty")
SAMPLING_KEYS = ("temperature", "top_p", "top_k")
PLAIN_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
MOST_SLOTS = 128


def fingerprint_model(name_or_path: str) -> str:
    """Hash of what a model's folder holds: its configs in full, of each weight file the size and 64 evenly spaced pieces.

    A Hub id stands for itself.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*config.json")):
        digest.update(path.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*model*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(64):
                file.seek(size * piece // 64)
                digest.update(file.read(16_384))
    return digest.hexdigest()[:16]


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what makes token ids of messages: the vocabulary, its merges and the chat template."""
    return hash_text([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])


def load_model(name_or_path: str, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    """Load a model, or an adapter on its base model, for inference.

    Raises:
        InputError: There is no such model.
    """
    settings = {"dtype": dtype, "attn_implementation": choose_attention(None, dtype)[0], **kwargs}
    if torch.cuda.is_available():  # one process spreads a large model over all GPUs; of several, each has its own
        several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
        settings["device_map"] = {"": int(os.environ["LOCAL_RANK"])} if several else "auto"
    try:
        if (Path(name_or_path) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name_or_path, **settings)
            if (Path(name_or_path) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(name_or_path)
        else:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, **settings)
    except OSError as error:
        raise InputError(f"could not load the model {name_or_path}: {str(error).splitlines()[0]}") from error
    return model.eval()


def build_generation_config(
    args: TestArguments, tokenizer: PreTrainedTokenizerBase, own_config: GenerationConfig
) -> tuple[GenerationConfig, dict[str, str]]:
    """Settings of generation, and where each came from: a flag, else what the checkpoint declares, else a default.

    Generation stops at every end token, whoever declares it. Sampling settings of the checkpoint count only where
    `do_sample` is set.
    """
    settings: dict = {"do_sample": args.do_sample, "max_new_tokens": args.max_new_tokens}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    sources = {key: "default" if getattr(args, key) == defaults[key] else "flag" for key in settings}
    for key in OWN_KEYS + (SAMPLING_KEYS if args.do_sample else ()):
        value, source = getattr(args, key), "flag"
        if value is None:
            value, source = getattr(own_config, key, None), "checkpoint"
        if value is None and key in PLAIN_SAMPLING and args.do_sample:
            value, source = (
                PLAIN_SAMPLING[key],
                "default",
            )  # transformers would sample from 50 tokens unless told otherwise
        if value is not None:
            settings[key], sources[key] = value, source
    config = GenerationConfig(
        eos_token_id=end_token_ids(tokenizer, own_config),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        stop_strings=args.stop,
        **settings,
    )
    return config, {**sources, **({"stop_strings": "flag"} if args.stop else {})}


def describe_generation(config: GenerationConfig, seed: int) -> dict:
    """The settings that make an answer what it is."""
    keys = ("do_sample", "max_new_tokens", "eos_token_id", "stop_strings", *OWN_KEYS, *SAMPLING_KEYS)
    settings = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    return {**settings, "seed": seed} if config.do_sample else settings


@dataclass
class Answer:
    """What a model answered to one prompt; `finish_reason` is stop, length or error."""

    index: int
    prediction: str | None
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: str
    error: str | None = None


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]]) -> list[list[int]]:
    """Token ids of each prompt, up to where the model's answer begins."""
    return [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]


def choose_num_slots(model: PreTrainedModel, longest: int) -> int:
    """Sequences that are decoded at once: as many as keep the cache under a third of the free memory, at most 128."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * config.num_hidden_layers * heads * head_dim * longest * model.dtype.itemsize
    free = available_memory(model.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return MOST_SLOTS if free is None else max(1, min(MOST_SLOTS, int(free / 3 / per_sequence)))


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    names: list[str],
    generation_config: GenerationConfig,
    batch_size: int | None,
    seed: int,
) -> Iterator[Answer]:
    """Answer prompts, longest first, so that memory runs out at once or not at all.

    Greedy answers do not depend on the batch but for rounding. Sampled ones depend on the seed and the sample alone, not on
    the batch, the order or a start in the middle. A prompt that does not fit the model's context with its answer gives an
    error and no answer. Where memory runs out, the batch is halved.

    Args:
        encoded: Prompts as `encode_prompts` gives them.
        names: What a sample's random numbers depend on, its id.
        batch_size: Prompts answered at once; None for as many as memory allows.

    Yields:
        One answer after the other, as they finish; `index` is the place in `encoded`.
    """
    end_ids = generation_config.eos_token_id
    control_ids = control_token_ids(tokenizer, end_ids)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = float("inf") if context is None else context - generation_config.max_new_tokens
    todo = []
    for index, ids in enumerate(encoded):
        if len(ids) <= longest:
            todo.append(index)
            continue
        error = (
            f"{len(ids)} prompt tokens and {generation_config.max_new_tokens} new ones exceed the context of {context}"
        )
        yield Answer(index, None, len(ids), 0, "error", error)
    if not todo:
        return
    length = max(len(encoded[index]) for index in todo) + generation_config.max_new_tokens
    batch_size = batch_size or choose_num_slots(model, length)
    reason = why_not_exact(model, generation_config, length)
    generate = _decode if reason is None else _generate_batches
    while todo:
        finished = set()
        try:
            for index, new_ids in generate(model, tokenizer, encoded, todo, names, generation_config, batch_size, seed):
                finished.add(index)
                yield _to_answer(index, len(encoded[index]), new_ids, tokenizer, generation_config, control_ids)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise InputError(
                    "out of memory with a single prompt; a smaller --max_new_tokens or a GPU with more memory is needed"
                ) from None
            batch_size //= 2
            torch.cuda.empty_cache()
        todo = [index for index in todo if index not in finished]


def _decode(model, tokenizer, encoded, todo, names, config, batch_size, seed) -> Iterator[tuple[int, list[int]]]:
    decoder = Decoder(model, config, batch_size, tokenizer)
    seeds = [seed_of(seed, names[index]) for index in todo]
    for place, new_ids in decoder.generate([encoded[index] for index in todo], seeds):
        yield todo[place], new_ids


def _generate_batches(
    model, tokenizer, encoded, todo, names, config, batch_size, seed
) -> Iterator[tuple[int, list[int]]]:
    """The library's own loop, in batches of like length; one by one where it samples, so that no batch has a say."""
    model.generation_config = config
    order = sorted(todo, key=lambda index: -len(encoded[index]))
    size = 1 if config.do_sample else batch_size
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        torch.manual_seed(seed_of(seed, names[batch[0]]))
        inputs = tokenizer.pad({"input_ids": [encoded[index] for index in batch]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, tokenizer=tokenizer)
        yield from zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)


def _to_answer(index, num_prompt_tokens, new_ids, tokenizer, config, control_ids) -> Answer:
    end = next((place for place, token_id in enumerate(new_ids) if token_id in config.eos_token_id), None)
    if end is not None:
        new_ids = new_ids[: end + 1]
    text = decode_answer(tokenizer, new_ids, control_ids)
    stops = [text.index(stop) for stop in config.stop_strings or [] if stop in text]
    return Answer(
        index,
        prediction=text[: min(stops)].strip() if stops else text,
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=len(new_ids),
        finish_reason="stop" if end is not None or stops else "length",
    )


def hash_text(content) -> str:
    """Short hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
