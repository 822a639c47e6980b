"""
Step 2, for LoRA runs only: merge an adapter into its base model, and prove that the result answers like the adapter.

    python 2_merge_lora.py --model_name checkpoint-148

Reads   <output_dir>/checkpoint-148            the adapter, and the base model that it names
        <output_dir>/run.json                  test samples, on which adapter and merged model are compared
Writes  <output_dir>/checkpoint-148-merged     a complete model in the dtype of the base model

The weights are added in float32 and rounded once to the base's dtype, which takes 4 bytes of memory per parameter.
Both models then see the same prompts with the adapter's answers. If a logit differs by more than the tolerance, nothing
is left behind and the exit status is 1.
"""

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from finetuning.config.arguments import MergeArguments
from finetuning.config.run_step import run_step
from finetuning.errors import InputError, make_folder
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import encode_prompts
from finetuning.data.rows import load_test_samples
from finetuning.models.config import base_of, load_generation_config, load_model_config, loading_options
from finetuning.models.loading import load_adapter, refuse_quantised
from finetuning.runs import find_models, find_run, last_checkpoint, read_json, read_run
from finetuning.schemas import TESTED_RUN_RECORD

MAX_NEW_TOKENS = 64
TOLERANCE_OF_SCALE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 0.0001}


@dataclass
class Difference:
    """How far two models are apart on the same tokens."""

    largest: float  # difference of a logit
    scale: float  # largest logit
    num_tokens: int
    num_same_choice: int  # tokens after which both would choose the same one


@torch.inference_mode()
def answer(model, prompt_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
    """Prompt and greedy answer, shape (1, tokens)."""
    return model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=generation_config)


@torch.inference_mode()
def logits_of(model, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits at every token, one tensor of shape (tokens, vocabulary) a sequence."""
    return [model(sequence).logits[0] for sequence in sequences]


def measure_difference(logits: list[torch.Tensor], other: list[torch.Tensor]) -> Difference:
    return Difference(
        largest=max((a - b).abs().max().item() for a, b in zip(logits, other, strict=True)),
        scale=max(a.abs().max().item() for a in logits),
        num_tokens=sum(len(a) for a in logits),
        num_same_choice=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(logits, other, strict=True)),
    )


def find_adapter(run: Path, args: MergeArguments) -> tuple[str, str, Path]:
    """Name and path of the adapter, and where its merged model goes."""
    last = last_checkpoint(run)
    if args.model_name is None and last is None:
        raise InputError(
            f"{run} has no complete checkpoint; run 1_train_full_fine_tuning.py to its end, or set --model_name"
        )
    models = find_models(run, last.name if args.model_name is None else args.model_name)
    if len(models) > 1:
        raise InputError(f"--model_name {args.model_name} means {', '.join(models)}; name one of them")
    ((name, path),) = models.items()
    path = os.path.normpath(path)
    if not (Path(path) / "adapter_config.json").is_file():
        raise InputError(f"{path} is no LoRA adapter (no adapter_config.json in it), so there is nothing to merge")
    kind = read_json(Path(path) / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path} is an adapter of type {kind}, and only LoRA adapters can be merged")
    return name, path, Path(f"{path}-merged" if args.merged_dir is None else args.merged_dir)


def make_partial_folder(merged_dir: Path) -> Path:
    """A folder beside `merged_dir` to write into, made before anything is loaded."""
    partial_dir = merged_dir.with_name(merged_dir.name + ".partial")
    for folder in (merged_dir, partial_dir):
        if os.path.lexists(folder):
            raise InputError(f"{folder} exists; delete it or choose another --merged_dir")
    make_folder(partial_dir)
    return partial_dir


def main(args: MergeArguments) -> None:
    quiet_weight_bars()
    run = find_run(args.output_dir)
    record = read_run(run, TESTED_RUN_RECORD)
    name, path, merged_dir = find_adapter(run, args)
    partial_dir = make_partial_folder(merged_dir)
    try:
        merge(run, record, name, path, partial_dir, args)
        os.replace(partial_dir, merged_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    print(
        f"written to {merged_dir}. Next: python 3_test.py --output_dir {shlex.quote(str(run))} --model_name "
        f"{shlex.quote(merged_dir.name)}"
    )


def merge(run: Path, record: dict, name: str, path: str, partial_dir: Path, args: MergeArguments) -> None:
    """Write the merged model into a folder, and compare it with the adapter; exits where they differ."""
    in_run = Path(path).resolve().parent == run.resolve()
    options = loading_options(record["config"], name, in_run, args.trust_remote_code)
    base_path = base_of(path)
    base_config = load_model_config(path, **options)
    refuse_quantised(base_config, base_path)
    base_dtype = base_config.dtype or torch.float32
    print(f"merging {path} into {base_path} ({str(base_dtype).removeprefix('torch.')})")
    if record["config"].get("load_in_4bit") or record["config"].get("load_in_8bit"):
        print("the adapter was trained on a quantised base; it is merged into, and compared on, the unquantised one")
    if base_dtype not in TOLERANCE_OF_SCALE:
        raise InputError(f"{base_path} is in {base_dtype}; merge into a base in bfloat16, float16 or float32")
    chat_template = record.get("chat_template") or None  # which the checkpoint may have lost
    tokenizer = load_tokenizer(path, chat_template if in_run else None, **options)
    samples = load_test_samples(record["config"])[: args.num_prompts]
    encoded = encode_prompts(tokenizer, samples)
    prompts = [torch.tensor([list(prompt.token_ids)]) for prompt in encoded if prompt.error is None]
    if not prompts:
        raise InputError(f"none of {len(encoded)} test samples can be asked ({encoded[0].error}); raise --num_prompts")
    model = load_adapter(path, dtype=torch.float32, **options).eval()
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        raise InputError(f"{base_path} has fewer embeddings than {path} has tokens, so it is not the base of {path}")

    # What the adapter answers, and its logits there.
    own_config = load_generation_config(path)
    greedy = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, eos_token_id=own_config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    sequences = [answer(model, prompt, greedy) for prompt in prompts]
    adapter_logits = logits_of(model, sequences)
    with model.disable_adapter():
        adapter_effect = measure_difference(adapter_logits, logits_of(model, sequences)).largest
    if adapter_effect == 0:
        raise InputError(f"{path} answers like {base_path} itself: it has learned nothing that could be merged")

    # The merged model is written, and compared as it will be read by others.
    model = model.merge_and_unload(safe_merge=True).to(base_dtype)
    model.generation_config = own_config
    model.config.use_cache = True
    model.save_pretrained(partial_dir)
    tokenizer.save_pretrained(partial_dir)
    del model
    merged = AutoModelForCausalLM.from_pretrained(partial_dir, dtype=torch.float32, **options).eval()
    difference = measure_difference(adapter_logits, logits_of(merged, sequences))
    num_same = sum(
        torch.equal(answer(merged, prompt, greedy), sequence)
        for prompt, sequence in zip(prompts, sequences, strict=True)
    )
    tolerance = args.tolerance
    if tolerance is None:
        # rounding may move logits by so much, but never by a tenth of what the adapter does
        tolerance = min(TOLERANCE_OF_SCALE[base_dtype] * difference.scale, adapter_effect / 10)
    print(
        f"largest logit difference {difference.largest:.5f} over {difference.num_tokens} tokens (tolerance "
        f"{tolerance:.5f}; the adapter itself moves logits by up to {adapter_effect:.3f}); "
        f"{difference.num_same_choice / difference.num_tokens:.1%} of the next tokens and {num_same} of "
        f"{len(prompts)} answers are the same"
    )
    if not difference.largest <= tolerance:  # also where it is nan
        print(f"error: {name} does not survive being merged; nothing was written", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_step(main, MergeArguments)
