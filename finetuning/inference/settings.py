"""
Settings of generation: what a model answers with, where each setting comes from, and what it declares in vain.
"""

import dataclasses

from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetuning.config.arguments import NOT_OF_ENGINE, TestArguments
from finetuning.data.chat import end_token_ids
from finetuning.errors import InputError
from finetuning.models.config import OF_DECODERS

OWN_KEYS = (
    "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "num_beams", "length_penalty", "early_stopping",
)  # fmt: skip
PLAIN_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # transformers would take 50 tokens as its top_k


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
    plain = PLAIN_SAMPLING if args.do_sample else {}
    for key in (*OWN_KEYS, *plain):
        found = {"flag": getattr(args, key), "checkpoint": getattr(own_config, key, None), "default": plain.get(key)}
        source, value = next(((s, v) for s, v in found.items() if v is not None), ("default", None))
        _check_setting(key, value, engine, args.do_sample)
        if value is not None:
            settings[key], sources[key] = value, source
    config = GenerationConfig(
        eos_token_id=end_token_ids(tokenizer, own_config),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        stop_strings=args.stop,
        **{key: getattr(own_config, key) for key in OF_DECODERS},
        **settings,
    )
    return config, {**sources, **({"stop_strings": "flag"} if args.stop else {})}


def _check_setting(key: str, value, engine: str, do_sample: bool) -> None:
    """Refuse a checkpoint's setting that this engine lacks. Flags were checked by the parser."""
    neutral = NOT_OF_ENGINE.get(engine, {})
    if key in neutral and value not in (None, neutral[key]):
        raise InputError(
            f"the checkpoint's generation_config.json has {key}: {value}, which the engine {engine} does not know; use "
            f"--engine transformers, or change it with --{key} {neutral[key]}"
        )
    if key == "temperature" and value == 0:
        raise InputError("temperature: 0 (from the checkpoint) cannot be sampled at; add --temperature, as in 0.7")
    if key == "num_beams" and do_sample and (value or 1) > 1:
        raise InputError(
            f"do_sample and num_beams: {value} (from the checkpoint) exclude each other; add --num_beams 1"
        )


def ignored_settings(own_config: GenerationConfig) -> dict:
    """What a checkpoint declares beyond the settings of step 3, which has no effect here. What is off never has."""
    others = {"do_sample", "max_new_tokens", "max_length", "use_cache", "transformers_version"}
    known, declared = others.union(OWN_KEYS, PLAIN_SAMPLING), own_config.to_diff_dict().items()
    shown = {k: v for k, v in declared if v is not False and k[0] != "_"}
    return {k: v for k, v in shown.items() if k not in known and not k.endswith("token_id")}


def describe_generation(config: GenerationConfig, seed: int) -> dict:
    """The settings that make an answer what it is."""
    keys = ("do_sample", "max_new_tokens", "eos_token_id", "stop_strings", *OWN_KEYS, *OF_DECODERS, *PLAIN_SAMPLING)
    settings = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    return {**settings, "seed": seed} if config.do_sample else settings
