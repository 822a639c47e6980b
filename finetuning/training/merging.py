"""
Merging a LoRA adapter: which one, where the merged model goes, and how far two models are apart on the same tokens.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.config.arguments import MergeArguments
from finetuning.data.prompts import encode_prompts
from finetuning.data.samples import load_test_samples
from finetuning.errors import InputError, make_folder
from finetuning.models.config import base_of, find_base, load_model_config
from finetuning.models.files import is_adapter
from finetuning.models.loading import refuse_quantised
from finetuning.models.rounding import describe_plan, dtype_name, plan_rounding, round_weights
from finetuning.runs import ADAPTER_CONFIG, PRECISION_FILE, find_models, last_checkpoint, read_json, write_json

TOLERANCE_OF_SCALE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 0.0001}


@dataclass
class Difference:
    """How far two models are apart on the same tokens."""

    largest: float  # difference of a logit
    scale: float  # largest logit
    num_tokens: int
    num_same_choice: int  # tokens after which both would choose the same one

    def describe(self, tolerance: float, adapter_effect: float) -> str:
        return (
            f"largest logit difference {self.largest:.5f} over {self.num_tokens} tokens (tolerance {tolerance:.5f}; "
            f"the adapter itself moves logits by up to {adapter_effect:.3f}); "
            f"{self.num_same_choice / self.num_tokens:.1%} of the next tokens"
        )


@torch.inference_mode()
def answer(model: PeftModel | PreTrainedModel, prompt_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Prompt and answer, shape (1, tokens); of an encoder-decoder model what its decoder has read and written."""
    return model.generate(input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=config)


@torch.inference_mode()
def logits_of(
    model: PeftModel | PreTrainedModel, prompts: list[torch.Tensor], answers: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Logits at every token of what `answer` gives, one tensor of shape (tokens, vocabulary) a prompt."""
    if model.config.is_encoder_decoder:
        pairs = zip(prompts, answers, strict=True)
        return [model(input_ids=prompt, decoder_input_ids=ids).logits[0] for prompt, ids in pairs]
    return [model(sequence).logits[0] for sequence in answers]


def measure_difference(logits: list[torch.Tensor], other: list[torch.Tensor]) -> Difference:
    pairs = list(zip(logits, other, strict=True))
    return Difference(
        largest=max((a - b).abs().max().item() for a, b in pairs),
        scale=max(a.abs().max().item() for a in logits),
        num_tokens=sum(len(a) for a in logits),
        num_same_choice=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
    )


def find_adapter(run: Path, args: MergeArguments) -> tuple[str, str, Path]:
    """Name and path of the adapter, and where its merged model goes."""
    model_name = args.model_name
    if model_name is None:
        last = last_checkpoint(run)
        if last is None:
            raise InputError(
                f"{run} has no complete checkpoint; run 1_train_full_fine_tuning.py to its end, or set --model_name"
            )
        model_name = last.name
    models = find_models(run, model_name)
    if len(models) > 1:
        raise InputError(f"--model_name {model_name} means {', '.join(models)}; name one of them")
    ((name, path),) = models.items()
    path = os.path.normpath(path)
    if not is_adapter(path):
        raise InputError(f"{path} is no LoRA adapter (no {ADAPTER_CONFIG} in it), so there is nothing to merge")
    kind = read_json(Path(path) / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path} is an adapter of type {kind}, and only LoRA adapters can be merged")
    return name, path, Path(f"{path}-merged" if args.merged_dir is None else args.merged_dir)


@contextlib.contextmanager
def partial_folder(merged_dir: Path) -> Iterator[Path]:
    """A folder to write into, which is renamed to `merged_dir` at the end, or deleted where anything fails.

    Raises:
        InputError: One of the two folders exists already.
    """
    partial_dir = merged_dir.with_name(merged_dir.name + ".partial")
    for folder in (merged_dir, partial_dir):
        if os.path.lexists(folder):
            raise InputError(f"{folder} exists; delete it or choose another --merged_dir")
    make_folder(partial_dir)
    try:
        yield partial_dir
        os.replace(partial_dir, merged_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


def check_base(path: str, config: dict, **options) -> torch.dtype:
    """The dtype of the base model under an adapter, which is that of the merged one.

    Raises:
        InputError: The base model is quantised, or in a dtype that no tolerance is known for.
    """
    base_path = base_of(path)
    base_config = load_model_config(path, **options)
    refuse_quantised(base_config, base_path)
    dtype = base_config.dtype or torch.float32
    print(f"merging {path} into {base_path} ({str(dtype).removeprefix('torch.')})")
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        print("the adapter was trained on a quantised base; it is merged into, and compared on, the unquantised one")
    if dtype not in TOLERANCE_OF_SCALE:
        raise InputError(f"{base_path} is in {dtype}; merge into a base in bfloat16, float16 or float32")
    return dtype


def load_prompts(tokenizer: PreTrainedTokenizerBase, config: dict, num_prompts: int) -> list[torch.Tensor]:
    """Token ids of the first test samples that the chat template can phrase, of shape (1, tokens) each."""
    encoded = encode_prompts(tokenizer, load_test_samples(config)[:num_prompts])
    prompts = [torch.tensor([list(prompt.token_ids)]) for prompt in encoded if prompt.error is None]
    if not prompts:
        raise InputError(f"none of {len(encoded)} test samples can be asked ({encoded[0].error}); raise --num_prompts")
    return prompts


def choose_tolerance(asked: float | None, dtype: torch.dtype, scale: float, adapter_effect: float) -> float:
    """The largest difference of a logit that is accepted: the one that is asked for, else what rounding may make of the
    largest logit (`scale`), but at most a tenth of what the adapter changes."""
    return min(TOLERANCE_OF_SCALE[dtype] * scale, adapter_effect / 10) if asked is None else asked


def round_merged(model: PreTrainedModel, adapter: str, dtype: torch.dtype, asked: str, folder: Path) -> PreTrainedModel:
    """The merged model in the dtype of its base, rounded once from float32; what that keeps is printed, and recorded in
    the folder."""
    base, source = find_base(adapter)
    plan = plan_rounding(model.named_parameters(), (base, source["revision"]), dtype_name(dtype), asked)
    for name, parameter in model.named_parameters():
        parameter.data = round_weights(parameter.data, dtype, name, plan["rounding"])
    print(describe_plan(plan))
    write_json(folder / PRECISION_FILE, plan)
    return model.to(dtype)
