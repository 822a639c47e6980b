"""
Step 1 with the old answer-only collator in place of trl's, for two arms of the stopping experiment.

    python -m experiments.stopping.train --config experiments/stopping/own_pad.yaml --seed 1

Reads and writes what step 1 does, so that step 3 tests its checkpoints in the same way; preflight looks at the batches of
the old collator. On one process, without adapters; killed, the same command goes on from the last checkpoint.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from finetuning.config.arguments import ScriptArguments
from finetuning.config.checks import argument
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.run_step import run_step
from finetuning.errors import InputError
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

import torch

from experiments.stopping.old_collator import OldAnswerOnlyCollator
from finetuning.data.checks import question_of
from finetuning.data.samples import load_test_samples
from finetuning.data.training_rows import load_training_rows
from finetuning.hardware import choose_attention
from finetuning.models.config import load_generation_config
from finetuning.training.arguments import TrainingArguments
from finetuning.training.callbacks import RecordShares
from finetuning.training.model import prepare_tokenizer
from finetuning.training.preflight import inspect, prepare_rows
from finetuning.training.records import build_record, delete_run, now, open_run, save_record
from finetuning.training.report import render, use_colour
from finetuning.training.trainer import ResumableSFTTrainer

RESPONSE_TEMPLATE = "<|im_start|>assistant\n"  # as users wrote it for templates of the ChatML kind


@dataclass
class OldScriptArguments(ScriptArguments):
    """What is trained on, and how the old collator pads."""

    pad_is_eos: bool = argument(False, "Pad with the end token, as tutorials advised.")


def main(script_args: OldScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    quiet_weight_bars()
    run = Path(training_args.output_dir)
    train_rows, _, _ = load_training_rows(script_args)
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer, _ = prepare_tokenizer(model_args.model_name_or_path, training_args, [], **source)
    if script_args.pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    record = build_record((training_args, model_args, script_args), tokenizer.chat_template, train_rows, None)
    checkpoint, finished = open_run(run, record, script_args.overwrite, training_args.resume_from_checkpoint)
    if finished:
        print(f"{run} is finished; its last checkpoint is {checkpoint}")
        return

    # What the trainer will get: the rows as step 1 tokenises them, as the old collator labels them.
    collator = OldAnswerOnlyCollator(tokenizer, RESPONSE_TEMPLATE)
    rows = dataclasses.replace(prepare_rows(tokenizer, training_args, train_rows), collator=collator)
    held_out = {"test": [question_of(sample["prompt"]) for sample in load_test_samples(vars(script_args))]}
    generation_config = load_generation_config(model_args.model_name_or_path)
    # a preview would show the labels before collation
    report, _ = inspect(rows, tokenizer, generation_config, training_args, held_out, num_previews=0)
    report.allow(script_args.allow or [])
    report.save(run)
    print(render(report, use_colour()), flush=True)
    if report.refused:
        checks = ", ".join(finding.check for finding in report.refused)
        raise InputError(f"refused before the first step: {checks}")
    if script_args.preflight_only:
        return

    training_args.model_init_kwargs = {
        "dtype": torch.float32,
        "attn_implementation": choose_attention(None, training_args.compute_dtype)[0],
    }
    trainer = ResumableSFTTrainer(
        model=model_args.model_name_or_path if checkpoint is None else str(checkpoint),
        args=training_args,
        train_dataset=rows.tokenized,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[RecordShares(run, record)],
    )
    if script_args.overwrite:
        delete_run(run)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    save_record(run, record, finished=now())
    print(f"finished: {run / f'checkpoint-{trainer.state.global_step}'}")


if __name__ == "__main__":
    run_step(main, OldScriptArguments, TrainingArguments, ModelArguments)
