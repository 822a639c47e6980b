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
from finetuning.data import describe_test_split, load_training_rows  # noqa: E402
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
    quantization_config = get_quantization_config(dataclasses.replace(model_args, dtype=None))
    if quantization_config is not None:
        quantization_config.bnb_4bit_compute_dtype = compute_dtype
        settings |= {"quantization_config": quantization_config, "device_map": {"": training_args.device}}
    return settings


def main(script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    quiet_weight_bars()
    if (script_args.dataset_eval_split is None) != (training_args.eval_strategy == "no"):
        raise InputError("dataset_eval_split and eval_strategy (steps or epoch) go together: set both, or neither")
    run = Path(training_args.output_dir)
    settings = choose_model_settings(model_args, training_args)
    train_rows, eval_rows, row_format = load_training_rows(script_args)
    chat_template = None
    if training_args.chat_template_path is not None:
        if not Path(training_args.chat_template_path).is_file():
            raise InputError(f"chat_template_path: {training_args.chat_template_path} is no file")
        chat_template = Path(training_args.chat_template_path).read_text(encoding="utf-8")
        training_args.chat_template_path = None  # it is in the tokenizer from here on
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        chat_template,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )

    # Where to start: at the beginning, or where a run that was stopped has left off.
    config = {**training_args.to_dict(), **dataclasses.asdict(model_args), **dataclasses.asdict(script_args)}
    record = build_record(config, tokenizer.chat_template, train_rows, eval_rows)
    start = [None, False, None]
    if is_main_process():
        try:
            start[:2] = open_run(run, record, script_args.overwrite, training_args.resume_from_checkpoint)
        except InputError as error:
            start[2] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(start, src=0)
    checkpoint, finished, problem = start
    if problem is not None:
        raise InputError(problem)
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
    if is_main_process():
        say(describe_test_split(script_args, train_rows))
    prepare_wandb(training_args, say)

    # The weights come from the model, or from the checkpoint to go on from; both load in the same way.
    peft_config = get_peft_config(model_args)  # None unless the recipe sets use_peft
    model = model_args.model_name_or_path if checkpoint is None else str(checkpoint)
    if checkpoint is not None and peft_config is not None:
        del settings["revision"]  # the adapter names that of its base
        model, peft_config = AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **settings), None
    else:
        if peft_config is not None:
            peft_config.revision = model_args.model_revision
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
