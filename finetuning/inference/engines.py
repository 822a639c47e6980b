"""
Which engine answers, and a model as an engine takes it.
"""

import contextlib
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from finetuning.config.arguments import NOT_OF_ENGINE, TestArguments
from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import Prompt
from finetuning.data.samples import TestSamples
from finetuning.errors import InputError
from finetuning.hardware import choose_dtype
from finetuning.inference.answers import AnswerReader, Engine
from finetuning.inference.openai_engine import CONCURRENCY, OpenAIEngine, ServedModel
from finetuning.inference.settings import build_generation_config, describe_generation, ignored_settings
from finetuning.inference.transformers_engine import TransformersEngine, load_model
from finetuning.models.config import is_plain_lora, load_generation_config, load_model_config, loading_options
from finetuning.models.files import fingerprint_model, is_adapter
from finetuning.models.rounding import describe_plan, dtype_name, plan_loading, round_loaded
from finetuning.ranks import get_world_size
from finetuning.runs import BASE
from finetuning.wording import MIN_KEPT


@dataclass
class ModelUnderTest:
    """One model, and all that its answers depend on besides the samples."""

    name: str
    path: str  # a folder, or a Hub id
    engine: str  # transformers, vllm or openai
    reader: AnswerReader  # with its tokenizer and its settings of generation
    tokenizer_hash: str  # models with the same one share their prompts
    options: dict  # trust_remote_code and revision, as from_pretrained takes them
    precision: dict  # how its weights are rounded, as models.rounding.plan_loading gives it
    identity: dict  # what its rows are made under
    served: ServedModel | None  # where a server answers; else None


def choose_engine(args: TestArguments, models: list[str]) -> str:
    """What generates: as asked, or what is fastest here and can serve all models.

    Raises:
        InputError: It is not installed, or cannot share its work among ranks.
    """
    several_ranks = get_world_size() > 1
    if args.device_map is not None and several_ranks:
        raise InputError("device_map spreads one process over all GPUs: start it without torchrun, or leave it out")
    if args.base_url is not None:
        return "openai"
    installed = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm":
        if not installed:
            raise InputError("vllm is not installed; docs/generation.md says how to, or use --engine transformers")
        if several_ranks:
            raise InputError("vllm is one process: start it without torchrun, or serve it and give its --base_url")
    if args.engine != "auto":
        return args.engine
    not_in_vllm = [key for key, neutral in NOT_OF_ENGINE["vllm"].items() if getattr(args, key) not in (None, neutral)]
    if not installed or not torch.cuda.is_available() or several_ranks or not_in_vllm:
        return "transformers"
    problem = next(filter(None, map(vllm_problem, models)), None)
    if problem is not None:
        print(f"engine: transformers (vllm is installed, but {problem})")
        return "transformers"
    print("engine: vllm (it is installed, and there is a GPU; another one with --engine)")
    return "vllm"


def vllm_problem(path: str) -> str | None:
    """Why vllm cannot serve a model or adapter as it is, or None where it can, as far as its files say."""
    if is_adapter(path) and not is_plain_lora(path):
        return f"{path} is more than plain LoRA; merge it with 2_merge_lora.py"
    with contextlib.suppress(InputError):  # code of its own, which loading the model asks about
        if load_model_config(path).is_encoder_decoder:
            return f"{path} is an encoder-decoder model"
    own_config = load_generation_config(path)
    for key, neutral in NOT_OF_ENGINE["vllm"].items():
        if getattr(own_config, key, None) not in (None, neutral):
            return f"the generation_config.json of {path} has {key}"
    return None


def prepare_model(
    args: TestArguments, run: Path, record: dict, name: str, path: str, engine: str, served: ServedModel | None
) -> ModelUnderTest:
    """Read all of a model but its weights, and print the settings that it answers with.

    Args:
        record: The run's. Its chat template is used for the run's own models only.
        path: Folder or Hub id of the model.
    """
    in_run = name == BASE or Path(path).parent == run
    options = loading_options(record["config"], name, in_run, args.trust_remote_code)
    if engine != "transformers" and load_model_config(path, **options).is_encoder_decoder:
        raise InputError(
            f"{name} is an encoder-decoder model, which {engine} does not answer with; use --engine transformers"
        )
    tokenizer = load_tokenizer(path, record["chat_template"] if in_run else None, **options)
    own_config = load_generation_config(path, **options)
    config, sources = build_generation_config(args, tokenizer, own_config, engine)
    print(f"{name}: " + ", ".join(f"{key} {getattr(config, key)} ({source})" for key, source in sources.items()))
    if ignored := ignored_settings(own_config):
        print(f"{name}: without effect here, from its generation_config.json: {json.dumps(ignored, default=str)}")
    quantised = "8bit " if args.load_in_8bit else "4bit " if args.load_in_4bit else ""
    dtype, asked = dtype_name(choose_dtype(args.dtype)), args.rounding if engine == "transformers" else "nearest"
    if asked == "stochastic" and dtype == "float32":
        raise InputError(
            "rounding has no effect, as weights are computed with in float32 here; set dtype, or leave it out"
        )
    base = (record["config"]["model_name_or_path"], record["config"].get("model_revision"))
    precision = plan_loading(path, base, "float32" if quantised or served is not None else dtype, asked)
    if precision["rounding"] is not None or min(precision["kept"].values(), default=1) < MIN_KEPT:
        print(f"{name}: {describe_plan(precision)}")
    # in which form they are computed with
    weights = quantised + dtype + (" rounded stochastically" if precision["rounding"] == "stochastic" else "")
    tokenizer_hash = fingerprint_tokenizer(tokenizer)
    identity = {
        "model": fingerprint_model(path),
        "engine": engine,
        "weights": f"served as {served.id}" if served is not None else weights,
        "generation": describe_generation(config, args.seed),
        "chat_template": hash_content(tokenizer.chat_template),
        "tokenizer": tokenizer_hash,
    }
    reader = AnswerReader(tokenizer, config)
    return ModelUnderTest(name, path, engine, reader, tokenizer_hash, options, precision, identity, served)


def start_engine(args: TestArguments, model: ModelUnderTest, samples: TestSamples, prompts: list[Prompt]) -> Engine:
    """The engine with one model in it, ready to answer these prompts.

    Raises:
        InputError: The model cannot be loaded, or vllm cannot be imported.
    """
    if model.served is not None:
        return OpenAIEngine(model.served, samples, model.reader, args.concurrency or CONCURRENCY, args.seed)
    dtype = choose_dtype(args.dtype)
    if model.engine == "vllm":
        try:
            # late, as vllm need not be installed
            from finetuning.inference.vllm_engine import VllmEngine
        except (ImportError, OSError) as error:  # a build for another torch or GPU
            reason = str(error).splitlines()[0]
            raise InputError(f"vllm does not import ({reason}); use --engine transformers") from error
        longest = max(len(prompt.token_ids) for prompt in prompts) + args.max_new_tokens
        return VllmEngine(model.path, model.reader, dtype, longest, args.batch_size, args.seed, model.options)
    quantised = {"load_in_8bit": args.load_in_8bit, "load_in_4bit": args.load_in_4bit}
    loaded = load_model(model.path, dtype, device_map=args.device_map, **quantised, **model.options)
    if model.precision["rounding"] == "stochastic":
        round_loaded(loaded, model.path)
    return TransformersEngine(loaded, model.reader, args.batch_size, args.seed)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what makes token ids of messages: the vocabulary, its merges and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return hash_content([vocabulary, tokenizer.chat_template])


def hash_content(content) -> str:
    """Short hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
