"""
Answers from a checkpoint: batched, padded on the left, longest prompts first.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.chat import control_token_ids, decode_answer, end_token_ids
from finetuning.configs import TestArguments
from finetuning.errors import InputError
from finetuning.hardware import choose_attention

SAMPLING_KEYS = ("temperature", "top_p", "top_k")


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


def load_model(name_or_path: str, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    """Load a model, or an adapter on its base model, for inference.

    Raises:
        InputError: There is no such model.
    """
    settings = {"dtype": dtype, "attn_implementation": choose_attention(None, dtype)[0], **kwargs}
    if torch.cuda.is_available():
        settings["device_map"] = "auto"
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
) -> GenerationConfig:
    """Settings of generation: what is set in `args`, else what the checkpoint declares, with every end token."""
    settings = {}
    for key in ("repetition_penalty", *(SAMPLING_KEYS if args.do_sample else ())):
        value = getattr(args, key)
        value = getattr(own_config, key, None) if value is None else value
        if value is not None:
            settings[key] = value
    if args.do_sample:  # transformers would sample from 50 tokens unless told otherwise
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings}
    return GenerationConfig(
        do_sample=args.do_sample,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=end_token_ids(tokenizer, own_config),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        **settings,
    )


def describe_generation(config: GenerationConfig, seed: int) -> dict:
    """The settings that make an answer what it is."""
    keys = ("do_sample", "max_new_tokens", "eos_token_id", "repetition_penalty", *SAMPLING_KEYS)
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


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    generation_config: GenerationConfig,
    batch_size: int,
    seed: int,
) -> Iterator[list[Answer]]:
    """Answer prompts in batches of like length, longest first, so that memory runs out at once or not at all.

    Greedy answers do not depend on the batch but for rounding; sampled ones depend on the seed and on which prompts are
    in the batch. A prompt that does not fit the model's context with its answer gives an error and no answer.

    Yields:
        The answers of one batch, in no particular order; `index` is the place in `prompts`.
    """
    end_ids = generation_config.eos_token_id
    control_ids = control_token_ids(tokenizer, end_ids)
    encoded = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = float("inf") if context is None else context - generation_config.max_new_tokens
    too_long = [index for index, ids in enumerate(encoded) if len(ids) > longest]
    if too_long:
        yield [
            Answer(
                index,
                prediction=None,
                num_prompt_tokens=len(encoded[index]),
                num_new_tokens=0,
                finish_reason="error",
                error=f"{len(encoded[index])} prompt tokens and {generation_config.max_new_tokens} new ones exceed the "
                f"context of {context}",
            )
            for index in too_long
        ]
    model.generation_config = generation_config
    order = sorted(set(range(len(prompts))) - set(too_long), key=lambda index: -len(encoded[index]))
    start = 0
    while start < len(order):
        batch = order[start : start + batch_size]
        torch.manual_seed(seed)
        try:
            sequences = _generate(model, tokenizer, [encoded[index] for index in batch])
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise InputError(
                    "out of memory with a single prompt; a smaller --max_new_tokens or a GPU with more memory is needed"
                ) from None
            batch_size = max(1, batch_size // 2)
            torch.cuda.empty_cache()
            continue
        start += len(batch)
        yield [
            _to_answer(index, len(encoded[index]), new_ids, tokenizer, end_ids, control_ids)
            for index, new_ids in zip(batch, sequences, strict=True)
        ]


@torch.inference_mode()
def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: list[list[int]]) -> list[list[int]]:
    """New token ids of each prompt, still with what stands after the end token."""
    inputs = tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(model.device)
    output = model.generate(**inputs)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _to_answer(index, num_prompt_tokens, new_ids, tokenizer, end_ids, control_ids) -> Answer:
    end = next((place for place, token_id in enumerate(new_ids) if token_id in end_ids), None)
    if end is not None:
        new_ids = new_ids[: end + 1]
    return Answer(
        index,
        prediction=decode_answer(tokenizer, new_ids, control_ids),
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=len(new_ids),
        finish_reason="length" if end is None else "stop",
    )


def hash_text(content) -> str:
    """Short hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
