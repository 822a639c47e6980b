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

import shlex
import sys
from pathlib import Path

from finetuning.config.arguments import MergeArguments
from finetuning.config.run_step import run_step
from finetuning.errors import InputError
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

import torch
from transformers import GenerationConfig

from finetuning.data.chat import load_tokenizer
from finetuning.models.config import OF_DECODERS, auto_class, base_of, load_generation_config, loading_options
from finetuning.models.loading import load_adapter
from finetuning.runs import find_run, read_run
from finetuning.training.merging import (
    answer,
    check_base,
    choose_tolerance,
    find_adapter,
    load_prompts,
    logits_of,
    measure_difference,
    partial_folder,
    round_merged,
)

MAX_NEW_TOKENS = 64


def main(args: MergeArguments) -> None:
    quiet_weight_bars()
    run = find_run(args.output_dir)
    record = read_run(run)
    name, path, merged_dir = find_adapter(run, args)
    with partial_folder(merged_dir) as partial_dir:
        in_run = Path(path).resolve().parent == run.resolve()
        options = loading_options(record["config"], name, in_run, args.trust_remote_code)
        base_dtype = check_base(path, record["config"], **options)
        # the checkpoint may have lost its chat template
        tokenizer = load_tokenizer(path, (record.get("chat_template") or None) if in_run else None, **options)
        prompts = load_prompts(tokenizer, record["config"], args.num_prompts)
        model = load_adapter(path, dtype=torch.float32, **options).eval()
        if model.get_input_embeddings().num_embeddings < len(tokenizer):
            base = base_of(path)
            raise InputError(f"{base} has fewer embeddings than {path} has tokens, so it is not the base of {path}")

        # What the adapter answers, and its logits at every token of these answers.
        own_config = load_generation_config(path)
        ends = {"eos_token_id": own_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ends |= {key: getattr(own_config, key) for key in OF_DECODERS}
        greedy = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **ends)
        answers = [answer(model, prompt, greedy) for prompt in prompts]
        adapter_logits = logits_of(model, prompts, answers)
        with model.disable_adapter():
            adapter_effect = measure_difference(adapter_logits, logits_of(model, prompts, answers)).largest
        if adapter_effect == 0:
            raise InputError(f"{path} answers like {base_of(path)} itself: it has learned nothing that could be merged")

        # The merged model is written, and compared as later steps will load it.
        model = round_merged(model.merge_and_unload(safe_merge=True), path, base_dtype, args.rounding, partial_dir)
        model.generation_config = own_config
        model.config.use_cache = True
        model.save_pretrained(partial_dir)
        tokenizer.save_pretrained(partial_dir)
        config = model.config
        del model
        merged = auto_class(config).from_pretrained(partial_dir, dtype=torch.float32, **options).eval()
        difference = measure_difference(adapter_logits, logits_of(merged, prompts, answers))
        merged_answers = [answer(merged, prompt, greedy) for prompt in prompts]
        num_same = sum(map(torch.equal, merged_answers, answers))
        tolerance = choose_tolerance(args.tolerance, base_dtype, difference.scale, adapter_effect)
        proof = difference.describe(tolerance, adapter_effect)
        print(f"{proof} and {num_same} of {len(prompts)} answers are the same")
        if not difference.largest <= tolerance:  # also where the difference is NaN
            print(f"error: {name} does not survive being merged; nothing was written", file=sys.stderr)
            sys.exit(1)
    where = f"--output_dir {shlex.quote(str(run))} --model_name {shlex.quote(merged_dir.name)}"
    print(f"written to {merged_dir}. Next: python 3_test.py {where}")


if __name__ == "__main__":
    run_step(main, MergeArguments)
