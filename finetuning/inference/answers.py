"""
Answers from a checkpoint: the settings they are made with, and what becomes of the tokens. The engine
`transformers` is here, over finetuning/inference/decoding.py; the others are in openai_engine.py and vllm_engine.py.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import bitsandbytes
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetuning.config.arguments import NOT_OF_ENGINE, TestArguments
from finetuning.data.chat import control_token_ids, decode_answer, end_token_ids
from finetuning.data.prompts import Prompt
from finetuning.errors import InputError
from finetuning.hardware import available_memory, choose_attention
from finetuning.inference.decoding import Decoder, seed_of, why_not_exact
from finetuning.models.config import base_of, describe_failure, load_generation_config, load_model_config
from finetuning.models.loading import load_adapter
from finetuning.ranks import get_local_rank, get_local_world_size
from finetuning.runs import read_json

OWN_KEYS = ("repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty")
SAMPLING_KEYS = ("temperature", "top_p", "top_k")
PLAIN_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
MOST_SLOTS = 128
SLOTS_WITHOUT_HEADS = 16  # of models whose memory cannot be told from their heads
READ_AT_ONCE = 1 << 24  # bytes


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
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(64):
                file.seek(size * piece // 64)
                digest.update(file.read(16_384))
    return digest.hexdigest()[:16]


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what makes token ids of messages: the vocabulary, its merges and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return hash_text([vocabulary, tokenizer.chat_template])


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*model*.bin")])


def read_ahead(name_or_path: str) -> threading.Thread:
    """Read a model's weights into the system's file cache, beside what else is done, so that loading it finds them there.

    Nothing is kept by this process: with less free memory the system forgets them again.
    """

    def read() -> None:
        for folder in dict.fromkeys((Path(name_or_path), Path(base_of(name_or_path)))):
            for path in weight_files(folder):
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
        InputError: There is no such model, or it is no causal language model.
    """
    load_model_config(name_or_path, **{key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs})
    attention, _ = choose_attention(None, dtype)
    settings = {"dtype": dtype, **kwargs}
    if attention != "sdpa":  # which is the library's own choice, where the model has it
        settings["attn_implementation"] = attention
    if device_map is None and torch.cuda.is_available():
        several = get_local_world_size() > 1
        device_map = {"": get_local_rank()} if several else "auto"
    if device_map is not None:
        offloaded = tempfile.mkdtemp(prefix="offloaded_weights_")
        settings |= {"device_map": device_map, "offload_folder": offloaded}
    if load_in_8bit or load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        if (Path(name_or_path) / "adapter_config.json").is_file():
            model = load_adapter(name_or_path, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, **settings)
    # there is none, or it is no causal language model, or its config names what the library does not have
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"could not load the model {name_or_path}: {describe_failure(error)}") from error
    if load_in_4bit:
        for (
            module
        ) in model.modules():  # bitsandbytes 0.50 packs rows for CPUs with bfloat16, and fails at an odd length
            if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64:
                module.support_avx512bf16_for_cpu = False
    if device_map is not None:
        weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
    return model.eval()


def build_generation_config(
    args: TestArguments, tokenizer: PreTrainedTokenizerBase, own_config: GenerationConfig, engine: str = "transformers"
) -> tuple[GenerationConfig, dict[str, str]]:
    """Settings of generation, and where each came from: a flag, else what the checkpoint declares, else a default.

    Generation stops at every end token, whoever declares it. Sampling settings of the checkpoint count only where
    `do_sample` is set.

    Raises:
        InputError: The checkpoint declares a setting that the engine does not know.
    """
    settings: dict = {"do_sample": args.do_sample, "max_new_tokens": args.max_new_tokens}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    sources = {key: "default" if getattr(args, key) == defaults[key] else "flag" for key in settings}
    for key in OWN_KEYS + (SAMPLING_KEYS if args.do_sample else ()):
        value, source = getattr(args, key), "flag"
        if value is None:
            value, source = getattr(own_config, key, None), "checkpoint"
        if value is None and key in PLAIN_SAMPLING and args.do_sample:
            # transformers would sample from 50 tokens unless told otherwise
            value, source = PLAIN_SAMPLING[key], "default"
        neutral = NOT_OF_ENGINE.get(engine, {})
        if key in neutral and value not in (None, neutral[key]):
            raise InputError(
                f"the checkpoint's generation_config.json has {key}: {value}, which the engine {engine} does not know; use "
                f"--engine transformers, or change it with --{key} {neutral[key]}"
            )
        if key == "temperature" and value == 0:
            raise InputError("temperature: 0 (from the checkpoint) cannot be sampled at; add --temperature, as in 0.7")
        if key == "num_beams" and args.do_sample and (value or 1) > 1:
            raise InputError(
                f"do_sample and num_beams: {value} (from the checkpoint) exclude each other; add --num_beams 1"
            )
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


def ignored_settings(own_config: GenerationConfig) -> dict:
    """What a checkpoint declares beyond the settings of step 3, which has no effect here."""
    known = {
        *OWN_KEYS,
        *SAMPLING_KEYS,
        "do_sample",
        "max_new_tokens",
        "max_length",
        "use_cache",
        "transformers_version",
    }
    declared = own_config.to_diff_dict()
    return {
        key: value
        for key, value in declared.items()
        if key not in known and not key.endswith("token_id") and key[0] != "_"
    }


def describe_generation(config: GenerationConfig, seed: int) -> dict:
    """The settings that make an answer what it is."""
    keys = ("do_sample", "max_new_tokens", "eos_token_id", "stop_strings", *OWN_KEYS, *SAMPLING_KEYS)
    settings = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    return {**settings, "seed": seed} if config.do_sample else settings


@dataclass
class Answer:
    """What a model answered to one prompt; `finish_reason` is stop, length or error."""

    id: str
    prediction: str | None
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: str
    removed_tokens: dict[str, int] = field(default_factory=dict)  # control tokens that were taken out, by name
    error: str | None = None

    @classmethod
    def failed(cls, prompt: Prompt, error: str) -> "Answer":
        return cls(prompt.id, None, len(prompt.token_ids), 0, "error", error=error)


def check_prompts(
    prompts: list[Prompt], model: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **kwargs
) -> tuple[list[Prompt], list[Answer]]:
    """Prompts that a model can take, and answers of kind `error` for the others.

    Args:
        model: Folder or Hub id.
        kwargs: Of AutoConfig.from_pretrained.
    """
    config = load_model_config(model, **kwargs).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or float("inf")
    # an adapter may bring embeddings of new tokens, which its base's config does not know
    vocabulary = config.vocab_size if base_of(model) == model else max(config.vocab_size, len(tokenizer))
    good, faulty = [], []
    for prompt in prompts:
        error = prompt.error
        if error is None and not prompt.token_ids:
            error = "the chat template makes no token of this sample"
        elif error is None and max(prompt.token_ids) >= vocabulary:
            error = f"token {max(prompt.token_ids)} is not in the model's vocabulary of {vocabulary}"
        elif error is None and len(prompt.token_ids) + max_new_tokens > context:
            error = (
                f"{len(prompt.token_ids)} prompt tokens and {max_new_tokens} new ones exceed the context of {context}"
            )
        if error is None:
            good.append(prompt)
        else:
            faulty.append(Answer.failed(prompt, error))
    return good, faulty


class AnswerReader:
    """Makes answers of the token ids, or the text, that an engine has generated: the same for every engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.control_ids = control_token_ids(tokenizer, config.eos_token_id)

    def read(self, prompt: Prompt, new_ids: list[int]) -> Answer:
        """Cut at the first end token, take control tokens out, and cut at the first stop string."""
        end = next((place for place, token_id in enumerate(new_ids) if token_id in self.config.eos_token_id), None)
        if end is not None:
            new_ids = new_ids[: end + 1]
        removed = collections.Counter(token_id for token_id in new_ids if token_id in self.control_ids)
        text = decode_answer(self.tokenizer, new_ids, self.control_ids)
        whole = self.tokenizer.decode(new_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, at_stop_string = self._cut(text, whole)
        return Answer(
            prompt.id,
            prediction=text,
            num_prompt_tokens=len(prompt.token_ids),
            num_new_tokens=len(new_ids),
            finish_reason="stop" if end is not None or at_stop_string else "length",
            removed_tokens={self.tokenizer.convert_ids_to_tokens(token_id): n for token_id, n in removed.items()},
        )

    def read_text(self, prompt: Prompt, text: str, num_new_tokens: int, stopped: bool) -> Answer:
        """The same for an engine that gives text only, in which control tokens may stand by their names."""
        removed = {}
        for token in self.tokenizer.convert_ids_to_tokens(sorted(self.control_ids)):
            if token in text:
                removed[token] = text.count(token)
        whole = text
        for token in removed:
            text = text.replace(token, "")
        text, at_stop_string = self._cut(text, whole)
        reason = "stop" if stopped or at_stop_string else "length"
        return Answer(prompt.id, text, len(prompt.token_ids), num_new_tokens, reason, removed)

    def _cut(self, text: str, whole: str) -> tuple[str, bool]:
        """The text before the first stop string; such a one may be white space, or stand in `whole` as a control token."""
        stops = self.config.stop_strings or []
        places = [text.index(stop) for stop in stops if stop in text]
        return text[: min(places, default=None)].strip(), any(stop in whole for stop in stops)


class TransformersEngine:
    """Answers with torch and transformers alone."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, batch_size: int | None, seed: int
    ):  # fmt: skip
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.batch_size, self.seed = batch_size, seed
        self.reader = AnswerReader(tokenizer, config)

    def answer(self, prompts: list[Prompt]) -> Iterator[Answer]:
        """Answer prompts, the longest first, so that memory runs out at once or not at all.

        Greedy answers do not depend on the batch but for rounding. Sampled ones depend on the seed and the sample alone,
        not on the batch, the order or a start in the middle. Where memory runs out, the batch is halved. A model whose
        logits are no numbers gives an error for that sample.

        Yields:
            One answer after the other, as they finish.
        """
        if not prompts:
            return
        groups: dict[str | None, list[Prompt]] = collections.defaultdict(list)
        for prompt in prompts:  # each by itself, so that no other prompt has a say in how it is answered
            longest = len(prompt.token_ids) + self.config.max_new_tokens
            groups[why_not_exact(self.model, self.config, longest)].append(prompt)
        for reason, group in groups.items():
            if reason is not None:
                print(f"the library's own loop answers {len(group)} prompts, because of {reason}")
            yield from self._answer_group(group, self._decode if reason is None else self._generate_batches)

    def _answer_group(self, prompts: list[Prompt], generate: Callable) -> Iterator[Answer]:
        longest = max(len(prompt.token_ids) for prompt in prompts) + self.config.max_new_tokens
        size = self.batch_size or choose_num_slots(self.model, longest, self.config.num_beams or 1)
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
        """Let go of the model."""
        del self.model
        clear_device_cache(garbage_collection=True)

    def _decode(self, prompts: list[Prompt], size: int) -> Iterator[tuple[Prompt, list[int] | None]]:
        decoder = Decoder(self.model, self.config, size, self.tokenizer)
        seeds = [seed_of(self.seed, prompt.id) for prompt in prompts]
        for place, new_ids in decoder.generate([prompt.token_ids for prompt in prompts], seeds):
            yield prompts[place], new_ids

    def _generate_batches(self, prompts: list[Prompt], size: int) -> Iterator[tuple[Prompt, list[int]]]:
        """The library's own loop, on prompts of one length, which need no padding; one by one where it samples."""
        self.model.generation_config = self.config
        size = 1 if self.config.do_sample else size
        prompts = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
        for length, alike in itertools.groupby(prompts, key=lambda prompt: len(prompt.token_ids)):
            alike = list(alike)
            for start in range(0, len(alike), size):
                batch = alike[start : start + size]
                torch.manual_seed(seed_of(self.seed, batch[0].id))
                ids = torch.tensor([list(prompt.token_ids) for prompt in batch], device=self.model.device)
                with torch.inference_mode():
                    output = self.model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=self.tokenizer)
                for prompt, new_ids in zip(batch, output[:, length:].tolist(), strict=True):
                    yield prompt, self._without_padding(new_ids)

    def _without_padding(self, new_ids: list[int]) -> list[int]:
        """What stands behind an answer that ended before the others of its batch."""
        padding = self.config.pad_token_id
        while (
            new_ids
            and new_ids[-1] == padding
            and (padding not in self.config.eos_token_id or new_ids[-2:-1] == [padding])
        ):
            new_ids = new_ids[:-1]
        return new_ids


def choose_num_slots(model: PreTrainedModel, longest: int, num_beams: int = 1) -> int:
    """Sequences that are decoded at once: as many as keep the cache under a third of the free memory, at most 128."""
    config = model.config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        return SLOTS_WITHOUT_HEADS
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * config.num_hidden_layers * heads * head_dim * longest * model.dtype.itemsize
    free = available_memory(model.device, get_local_world_size())
    return MOST_SLOTS if free is None else max(1, min(MOST_SLOTS, int(free / 3 / per_sequence / num_beams)))


def why_not_vllm(path: str) -> str | None:
    """Why vllm cannot serve a model or adapter as it is, or None where it can; what it says at the start is another matter."""
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        config = read_json(adapter)
        if config.get("modules_to_save") or config.get("use_dora") or config.get("peft_type") != "LORA":
            return f"{path} is more than plain LoRA; merge it with 2_merge_lora.py"
    own_config = load_generation_config(path)
    for key, neutral in NOT_OF_ENGINE["vllm"].items():
        if getattr(own_config, key, None) not in (None, neutral):
            return f"the generation_config.json of {path} has {key}"
    return None


def hash_text(content) -> str:
    """Short hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
