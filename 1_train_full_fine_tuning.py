"""
Step 1: fine-tune a causal language model, every weight of it, with FSDP.

    ACCELERATE_USE_FSDP=1 FSDP_CPU_RAM_EFFICIENT_LOADING=1 torchrun --nproc_per_node=2 \
        ./1_train_full_fine_tuning.py --config ./0_full_fine_tuning_config.yaml

Without torchrun it is one process: `python 1_train_full_fine_tuning.py --config ...`. Any key of the YAML can be
overridden on the command line: `--learning_rate 1e-5`.

Reads   the dataset and the model that the YAML names
Writes  <output_dir>/run.json           what was run: configuration, data, libraries, hardware
        <output_dir>/checkpoint-<step>  complete: loads with from_pretrained on any number of devices

Stop it (SIGTERM saves a checkpoint first) or kill it at any time: the same command goes on from the last checkpoint.
"""

import dataclasses
import sys
from pathlib import Path

from finetuning.configs import ModelArguments, ScriptArguments, is_main_process, run_step
from finetuning.errors import InputError
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from peft import AutoPeftModelForCausalLM  # noqa: E402
from transformers import ProgressCallback  # noqa: E402
from trl import get_peft_config, get_quantization_config  # noqa: E402

from finetuning.chat import load_tokenizer  # noqa: E402
from finetuning.data import load_training_rows  # noqa: E402
from finetuning.hardware import choose_attention  # noqa: E402
from finetuning.records import build_record, now, open_run, save_record  # noqa: E402
from finetuning.training import (  # noqa: E402
    LineProgress,
    RecordShares,
    ResumableSFTTrainer,
    SaveOnTermination,
    TrainingArguments,
    prepare_wandb,
)


def say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def choose_model_settings(model_args: ModelArguments, training_args: TrainingArguments) -> dict:
    """Keyword arguments of from_pretrained; what the YAML leaves open is chosen for the hardware."""
    compute_dtype = training_args.compute_dtype
    if model_args.dtype is None:
        dtype = compute_dtype if model_args.use_peft else torch.float32
    else:
        dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    attention, problem = choose_attention(model_args.attn_implementation, compute_dtype)
    if model_args.attn_implementation == "flash_attention_2" and problem:
        training_args.hardware_choices.append(f"attn_implementation: sdpa instead of flash_attention_2, {problem}")
    settings = {"revision": model_args.model_revision, "dtype": dtype, "attn_implementation": attention}
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        settings |= {"quantization_config": quantization_config, "device_map": {"": training_args.device}}
    return settings


def main(script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    quiet_weight_bars()
    if (script_args.dataset_eval_split is None) != (training_args.eval_strategy == "no"):
        raise InputError("dataset_eval_split and eval_strategy (steps or epoch) go together: set both, or neither")
    run = Path(training_args.output_dir)
    settings = choose_model_settings(model_args, training_args)
    train_rows, eval_rows, row_format = load_training_rows(script_args)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        chat_template=training_args.chat_template_path
        and Path(training_args.chat_template_path).read_text(encoding="utf-8"),
        revision=model_args.model_revision,
    )
    training_args.chat_template_path = None  # it is in the tokenizer now

    # Where to start: at the beginning, or where a run that was stopped has left off.
    config = {**training_args.to_dict(), **dataclasses.asdict(model_args), **dataclasses.asdict(script_args)}
    record = build_record(config, tokenizer.chat_template, train_rows, eval_rows)
    start = [None, False]
    if is_main_process():
        start = list(open_run(run, record, script_args.overwrite, training_args.resume_from_checkpoint))
    if dist.is_initialized():
        dist.broadcast_object_list(start, src=0)
    checkpoint, finished = start
    if finished:
        say(f"{run} is finished; its last checkpoint is {checkpoint}. To train again: --overwrite true")
        return

    for choice in training_args.hardware_choices:
        say(choice)
    devices = ", ".join(dict.fromkeys(record["hardware"]["devices"]))
    dtype, compute_dtype = (str(d).removeprefix("torch.") for d in (settings["dtype"], training_args.compute_dtype))
    say(f"hardware: {devices}; weights {dtype}, compute {compute_dtype}, attention {settings['attn_implementation']}")
    say(f"data: {len(train_rows)} rows of {script_args.dataset_name}, read as {row_format.describe()}")
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    prepare_wandb(training_args, say)

    # The weights come from the model, or from the checkpoint to go on from; both load in the same way.
    peft_config = get_peft_config(model_args)  # None unless the recipe sets use_peft
    model = model_args.model_name_or_path if checkpoint is None else str(checkpoint)
    if checkpoint is not None and peft_config is not None:
        model, peft_config = AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **settings), None
    else:
        training_args.model_init_kwargs = settings
    termination = SaveOnTermination()
    trainer = ResumableSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[RecordShares(run, record), termination],
    )
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LineProgress())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.accelerator.end_training()

    last = run / f"checkpoint-{trainer.state.global_step}"
    if termination.stopped:
        say(
            f"stopped by SIGTERM at step {trainer.state.global_step}; {last} is saved, and the same command goes on from it"
        )
        sys.exit(128 + 15)
    if is_main_process():
        save_record(run, record, finished=now())
    say(f"finished: {last}. Next: python 3_test.py --output_dir {run}")


if __name__ == "__main__":
    run_step(main, ScriptArguments, TrainingArguments, ModelArguments)
