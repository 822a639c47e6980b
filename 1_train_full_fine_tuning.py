"""
Step 1: fine-tune a language model, every weight of it or an adapter, with FSDP.

    ACCELERATE_USE_FSDP=1 FSDP_CPU_RAM_EFFICIENT_LOADING=1 torchrun --nproc_per_node=2 \
        ./1_train_full_fine_tuning.py --config ./0_full_fine_tuning_config.yaml

Without torchrun it is one process: `python 1_train_full_fine_tuning.py --config ...`. Any key of the YAML can be
overridden on the command line: `--learning_rate 1e-5`.

Reads   the dataset and the model that the YAML names
Writes  <output_dir>/preflight.json     what was found in the rows as the trainer gets them; eda/*.png, the plots
        <output_dir>/run.json           what was run: configuration, data, libraries, hardware
        <output_dir>/checkpoint-<step>  complete: loads with from_pretrained on any number of devices

A run that cannot learn, never stops or does not fit is refused before its first step; `--preflight_only true` only
looks, and leaves a folder in which step 3 can test the model as it is before any training.
Stop it (SIGTERM saves a checkpoint first) or kill it at any time: the same command goes on from the last checkpoint.
"""

import shlex
import sys
from pathlib import Path

from finetuning.config.arguments import ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.run_step import run_step, same_command
from finetuning.quiet import quiet_libraries, quiet_weight_bars
from finetuning.ranks import is_main_process, print_main

quiet_libraries()

from finetuning.data.training_rows import load_training_rows, tokens_to_add
from finetuning.training.arguments import TrainingArguments, fit_to_hardware
from finetuning.training.callbacks import GiveBackMemory, RecordShares, SaveOnTermination, prepare_wandb, show_lines
from finetuning.training.checkpoints import check_resumable
from finetuning.training.memory import MemoryPeak
from finetuning.training.model import load_model, plan_model, print_hardware
from finetuning.training.preflight import prepare_rows, run_preflight
from finetuning.training.records import build_record, delete_run, now, open_run, save_plan, save_record
from finetuning.training.trainer import choose_trainer, on_main_process


def main(script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    quiet_weight_bars()
    # What the YAML names: the model, of which only the weights are not read yet, and the rows.
    run = Path(training_args.output_dir)
    model_plan = plan_model(model_args, training_args, tokens_to_add(script_args))
    tokenizer = model_plan.tokenizer
    train_rows, eval_rows, row_format = load_training_rows(script_args)

    # Where to start: at the beginning, or at the last checkpoint of a run that was stopped.
    record = build_record((training_args, model_args, script_args), tokenizer.chat_template, train_rows, eval_rows)
    requested, look_only = training_args.resume_from_checkpoint, script_args.preflight_only
    checkpoint, finished = on_main_process(lambda: open_run(run, record, script_args.overwrite, requested, look_only))
    if finished and not look_only:
        print_main(f"{run} is finished; its last checkpoint is {checkpoint}. To train again: --overwrite true")
        return
    print_hardware(record["hardware"], model_plan, training_args)
    print_main(f"data: {len(train_rows)} rows of {script_args.dataset_name}, read as {row_format.describe()}")

    # The rows that the trainer will get, checked before a model is loaded.
    rows = prepare_rows(tokenizer, training_args, train_rows, eval_rows)
    memory_plan = on_main_process(lambda: run_preflight(run, script_args, training_args, model_plan, rows))
    recompute = memory_plan["activation_checkpointing"]
    training_args.gradient_checkpointing = record["config"]["gradient_checkpointing"] = recompute
    if look_only:
        print_main(f"preflight only: nothing is trained; {on_main_process(lambda: save_plan(run, record))}")
        return

    # The weights come from the model itself, or from the checkpoint; both are loaded in the same way.
    if checkpoint is not None:
        on_main_process(lambda: check_resumable(checkpoint))
        print_main(f"going on from {checkpoint}")
    prepare_wandb(training_args)
    memory_peak, termination = MemoryPeak(training_args.device), SaveOnTermination()
    model, peft_config = load_model(model_plan, checkpoint, training_args)
    trainer = choose_trainer(training_args)(
        model=model,
        args=training_args,
        train_dataset=rows.tokenized,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[RecordShares(run, record), GiveBackMemory(memory_plan["total"]), termination],
    )
    if script_args.overwrite:  # the older run goes only now, as nothing is left that could refuse to train
        on_main_process(lambda: delete_run(run))
    show_lines(trainer)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    step = trainer.state.global_step
    saved = run / f"checkpoint-{step}"
    if termination.stopped:
        again = same_command(script_args.overwrite)
        print_main(f"stopped by SIGTERM at step {step}; {saved} is saved, and {again} goes on from it")
        sys.exit(128 + 15)
    if is_main_process():
        memory = {"estimate": memory_plan, "measured_peak": memory_peak.bytes()}
        save_record(run, record, finished=now(), memory=memory)
    print_main(f"finished: {saved}. Next: python 3_test.py --output_dir {shlex.quote(str(run))}")


if __name__ == "__main__":
    run_step(main, ScriptArguments, TrainingArguments, ModelArguments, fit_to_hardware=fit_to_hardware)
