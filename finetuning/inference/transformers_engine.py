"""
Answers with torch and transformers alone, by the loop of decoding.py, or by the library's where that is not exact.
"""

import collections
import itertools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.utils.rnn import pad_sequence
from transformers import BitsAndBytesConfig, PreTrainedModel

from finetuning.data.prompts import Prompt, seed_of
from finetuning.errors import InputError
from finetuning.hardware import available_memory, choose_attention
from finetuning.inference.answers import Answer, AnswerReader
from finetuning.inference.decoding import Decoder, unsupported_reason
from finetuning.inference.pair_decoding import PairDecoder
from finetuning.models.config import auto_class, base_of, describe_failure, is_capped, load_model_config
from finetuning.models.files import is_adapter, list_weight_files
from finetuning.models.loading import load_adapter
from finetuning.ranks import get_local_rank, get_local_world_size

MAX_SLOTS = 128
PAIRS_AT_ONCE = 16  # prompts of an encoder-decoder model in a beam search, which ends when the last of them has
SLOTS_WITHOUT_HEADS = 16  # of models whose memory cannot be told from their heads
READ_AT_ONCE = 1 << 24  # bytes

# Takes prompts, and how many are answered at once; gives each with its new tokens, or None if a logit is not finite.
Generate = Callable[[list[Prompt], int], Iterator[tuple[Prompt, list[int] | None]]]


def read_ahead(name_or_path: str) -> threading.Thread:
    """Read a model's weights into the system's file cache, in a thread, so that loading it finds them there.

    This process keeps nothing of them, and the system forgets them again where memory is short.
    """

    def read() -> None:
        for folder in dict.fromkeys((Path(name_or_path), Path(base_of(name_or_path)))):
            for path in list_weight_files(folder):
                with path.open("rb", buffering=0) as file:
                    while file.read(READ_AT_ONCE):
                        pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def load_model(
    name_or_path: str,
    dtype: torch.dtype,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: str | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load a model, or an adapter on its base model, for inference.

    Args:
        device_map: How accelerate spreads the layers over GPUs, then memory, then files in a temporary folder. None for
            `auto` where there is a GPU; under torchrun, for each rank its own.
        kwargs: More of from_pretrained's.

    Raises:
        InputError: There is no such model, or it is none that writes text.
    """
    source = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = load_model_config(name_or_path, **source)
    settings: dict = {"dtype": dtype, **kwargs}
    attention, _ = choose_attention(None, dtype)
    if attention != "sdpa":  # which is the library's own choice, where the model has it
        settings["attn_implementation"] = attention
    elif is_capped(config):
        settings["attn_implementation"] = "eager"
    placement: str | dict[str, int] | None = device_map
    if device_map is None and torch.cuda.is_available():
        placement = {"": get_local_rank()} if get_local_world_size() > 1 else "auto"
    if placement is not None:
        settings |= {"device_map": placement, "offload_folder": tempfile.mkdtemp(prefix="offloaded_weights_")}
    if load_in_8bit or load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    load = load_adapter if is_adapter(name_or_path) else auto_class(config).from_pretrained
    try:
        model = load(name_or_path, **settings)
    # no such model, or it is none that writes text, or its config names what the library does not have
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"could not load the model {name_or_path}: {describe_failure(error)}") from error
    if load_in_4bit:
        for module in model.modules():
            # bitsandbytes 0.50 packs rows for CPUs with bfloat16, and fails at an odd length
            if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64:
                module.support_avx512bf16_for_cpu = False
    if placement is not None:
        weakref.finalize(model, shutil.rmtree, settings["offload_folder"], ignore_errors=True)
    return model.eval()


class TransformersEngine:
    """Answers with torch and transformers alone."""

    def __init__(self, model: PreTrainedModel, reader: AnswerReader, batch_size: int | None, seed: int):
        self.model, self.reader, self.batch_size, self.seed = model, reader, batch_size, seed
        self.tokenizer, self.config = reader.tokenizer, reader.config

    def answer(self, prompts: list[Prompt]) -> Iterator[Answer]:
        """Answer prompts, the longest first, so that memory runs out at once or not at all.

        Greedy answers depend on the batch only by rounding. Sampled ones depend on the seed and the sample alone, not
        on the batch, the order or a start in the middle. Where memory runs out, the batch is halved. Logits that are
        NaN or infinite are an error of that sample; the library's own loop does not look at them.
        """
        groups: dict[str | None, list[Prompt]] = collections.defaultdict(list)
        for prompt in prompts:  # the way is chosen for each by itself, so that it does not depend on the other prompts
            longest = len(prompt.token_ids) + self.config.max_new_tokens
            groups[unsupported_reason(self.model, self.config, longest)].append(prompt)
        for reason, group in groups.items():
            if reason is not None:
                print(f"the library's own loop answers {len(group)} prompts, because of {reason}")
            yield from self._answer_group(group, self._decode if reason is None else self._generate_batches)

    def _answer_group(self, prompts: list[Prompt], generate: Generate) -> Iterator[Answer]:
        longest = max(len(prompt.token_ids) for prompt in prompts) + self.config.max_new_tokens
        size = self.batch_size or choose_num_slots(self.model, longest, self.config.num_beams or 1)
        if generate == self._generate_batches and self.config.do_sample:
            size = 1  # the library draws for a whole batch at once, so the others would have a say
        todo = {prompt.id: prompt for prompt in prompts}
        while todo:
            try:
                for prompt, new_ids in generate(list(todo.values()), size):
                    del todo[prompt.id]
                    if new_ids is None:
                        yield Answer.failed(prompt, "the model's logits are not numbers (NaN or infinite)")
                    else:
                        yield self.reader.read(prompt, new_ids)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if size == 1:
                    longest_prompt = max(todo.values(), key=lambda prompt: len(prompt.token_ids))
                    yield Answer.failed(todo.pop(longest_prompt.id), "out of memory with this prompt alone")
                else:
                    size //= 2
                    print(f"out of memory; going on with {size} prompts at once")
                clear_device_cache(garbage_collection=True)

    def close(self) -> None:
        """Give back the memory that the model takes."""
        del self.model
        clear_device_cache(garbage_collection=True)

    def _decode(self, prompts: list[Prompt], size: int) -> Iterator[tuple[Prompt, list[int] | None]]:
        kind = PairDecoder if self.model.config.is_encoder_decoder else Decoder
        decoder = kind(self.model, self.config, size, self.tokenizer)
        seeds = [seed_of(self.seed, prompt.id) for prompt in prompts]
        for place, new_ids in decoder.generate([prompt.token_ids for prompt in prompts], seeds):
            yield prompts[place], new_ids

    def _generate_batches(self, prompts: list[Prompt], size: int) -> Iterator[tuple[Prompt, list[int] | None]]:
        """The library's own loop, on prompts of one length, without padding; an encoder masks its padding."""
        self.model.generation_config = self.config
        pairs, pad = self.model.config.is_encoder_decoder, self.config.pad_token_id
        size = min(size, PAIRS_AT_ONCE) if pairs else size
        prompts = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
        for length, group in itertools.groupby(prompts, key=lambda prompt: 0 if pairs else len(prompt.token_ids)):
            alike = list(group)
            for start in range(0, len(alike), size):
                batch = alike[start : start + size]
                torch.manual_seed(seed_of(self.seed, batch[0].id))
                rows = [torch.tensor(list(prompt.token_ids), device=self.model.device) for prompt in batch]
                ids = pad_sequence(rows, batch_first=True, padding_value=pad)
                mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
                with torch.inference_mode():
                    output = self.model.generate(ids, attention_mask=mask, tokenizer=self.tokenizer)
                for prompt, new_ids in zip(batch, output[:, length or 1 :].tolist(), strict=True):
                    yield prompt, self._without_padding(new_ids)

    def _without_padding(self, new_ids: list[int]) -> list[int]:
        """An answer without the padding behind it, which stands there where others of its batch were longer.

        Where the padding is an end token too, the first one of them is the answer's own, and stays.
        """
        padding = self.config.pad_token_id
        kept = 2 if padding in self.config.eos_token_id else 1
        while new_ids[-kept:] == [padding] * kept:
            new_ids = new_ids[:-1]
        return new_ids


def choose_num_slots(model: PreTrainedModel, longest: int, num_beams: int = 1) -> int:
    """Sequences that are decoded at once: at most MAX_SLOTS, whose cache takes no more than a third of the free memory.

    Args:
        longest: Tokens of the longest prompt and its answer.
    """
    config = model.config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        return SLOTS_WITHOUT_HEADS
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * config.num_hidden_layers * heads * head_dim * longest * model.dtype.itemsize  # bytes
    free = available_memory(model.device, get_local_world_size())
    return MAX_SLOTS if free is None else max(1, min(MAX_SLOTS, int(free / 3 / per_sequence / num_beams)))
