"""
Step 1: fine-tune a causal language model, every weight of it, with FSDP.

    ACCELERATE_USE_FSDP=1 FSDP_CPU_RAM_EFFICIENT_LOADING=1 torchrun --nproc_per_node=2 \
        ./1_train_full_fine_tuning.py --config ./0_full_fine_tuning_config.yaml

Without torchrun it is one process: `python 1_train_full_fine_tuning.py --config ...`. Any key of the YAML can be
overridden on the command line: `--learning_rate 1e-5`.

Reads   the dataset and the model that the YAML names
Writes  <output_dir>/preflight.json     what was found in the rows as the trainer gets them; eda/*.png, the plots
        <output_dir>/run.json           what was run: configuration, data, libraries, hardware
        <output_dir>/checkpoint-<step>  complete: loads with from_pretrained on any number of devices

A run that cannot learn, never stops or does not fit is refused before its first step; `--preflight_only true` only looks.
Stop it (SIGTERM saves a checkpoint first) or kill it at any time: the same command goes on from the last checkpoint.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

from finetuning.config.arguments import ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.run_step import run_step
from finetuning.errors import InputError
from finetuning.quiet import quiet_libraries, quiet_weight_bars
from finetuning.ranks import is_main_process, print_main

quiet_libraries()

import torch
from transformers import PreTrainedTokenizerBase, ProgressCallback
from trl import get_quantization_config

from finetuning.data.batches import RowPreparation
from finetuning.data.chat import add_tokens, load_tokenizer
from finetuning.data.rows import load_training_rows, tokens_to_add
from finetuning.hardware import bf16_available, choose_attention
from finetuning.models.loading import load_adapter
from finetuning.runs import EDA, RUN_FILE
from finetuning.training.checkpoints import check_resumable
from finetuning.training.memory import MemoryPeak
from finetuning.training.preflight import run_preflight
from finetuning.training.records import build_record, now, open_run, save_record
from finetuning.training.trainer import (
    LineProgress,
    RecordShares,
    ResumableSFTTrainer,
    SaveOnTermination,
    TrainingArguments,
    build_adapter_config,
    check_model,
    check_optimizer,
    load_with_new_tokens,
    on_main_process,
    prepare_wandb,
)


def fit_to_hardware(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> dict[str, str]:
    """Replace what this machine cannot do, and choose what the YAML leaves open; gives the reasons by key."""
    check_optimizer(training_args)
    reasons = training_args.hardware_choices
    compute_dtype = training_args.compute_dtype
    low_precision = model_args.dtype in ("bfloat16", "float16")
    if low_precision and (compute_dtype == torch.float32 or (model_args.dtype == "bfloat16" and not bf16_available())):
        reasons["dtype"] = f"float32, this machine does not compute in {model_args.dtype}"
        model_args.dtype = "float32"
    elif model_args.dtype == "float16" and not model_args.use_peft:
        reasons["dtype"] = "float32, weights in float16 cannot be trained; fp16: true computes in it"
        model_args.dtype = "float32"
    attention, problem = choose_attention(model_args.attn_implementation, compute_dtype)
    if model_args.attn_implementation is not None and problem:
        reasons["attn_implementation"] = f"sdpa, {problem}"
    model_args.attn_implementation = attention
    if training_args.eval_strategy != "no" and script_args.dataset_eval_split is None:
        script_args.dataset_eval_split = script_args.dataset_test_split
        reasons["dataset_eval_split"] = f"{script_args.dataset_test_split}, as eval_strategy needs a split to measure"
    return reasons


def choose_model_settings(model_args: ModelArguments, training_args: TrainingArguments) -> dict:
    """Keyword arguments of from_pretrained."""
    if model_args.dtype is None:
        dtype = training_args.compute_dtype if model_args.use_peft else torch.float32
    else:
        dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    settings = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "dtype": dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    quantization_config = get_quantization_config(dataclasses.replace(model_args, dtype=None))
    if quantization_config is not None:
        quantization_config.bnb_4bit_compute_dtype = training_args.compute_dtype
        settings |= {"quantization_config": quantization_config, "device_map": {"": training_args.device}}
    return settings


def read_chat_template(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"chat_template_path: {path} is no file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"chat_template_path: {path} is no text in UTF-8") from None


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> None:
    """Give the tokenizer the eos_token and pad_token of the YAML, before anything is phrased with it."""
    for key in ("eos_token", "pad_token"):
        token = getattr(args, key)
        if token is not None and token not in tokenizer.get_vocab():
            raise InputError(
                f"{key}: {token} is not in the vocabulary of the tokenizer; leave it out, or see special_tokens"
            )
        if token is not None:
            setattr(tokenizer, key, token)
            setattr(args, key, None)


def main(script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    quiet_weight_bars()
    run = Path(training_args.output_dir)
    settings = choose_model_settings(model_args, training_args)
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    check_model(model_args.model_name_or_path, **source)  # before it costs time
    train_rows, eval_rows, row_format = load_training_rows(script_args)
    chat_template = read_chat_template(training_args.chat_template_path)
    training_args.chat_template_path = None  # it is in the tokenizer from here on
    tokenizer = load_tokenizer(model_args.model_name_or_path, chat_template, **source)
    set_special_tokens(tokenizer, training_args)
    new_ids = add_tokens(tokenizer, tokens_to_add(script_args))

    # Where to start: at the beginning, or where a run that was stopped has left off.
    config = {**training_args.to_dict(), **dataclasses.asdict(model_args), **dataclasses.asdict(script_args)}
    record = build_record(config, tokenizer.chat_template, train_rows, eval_rows)
    checkpoint, finished = on_main_process(
        lambda: open_run(
            run, record, script_args.overwrite, training_args.resume_from_checkpoint, script_args.preflight_only
        )
    )
    if finished and not script_args.preflight_only:
        print_main(f"{run} is finished; its last checkpoint is {checkpoint}. To train again: --overwrite true")
        return

    for key, choice in training_args.hardware_choices.items():
        print_main(f"{key}: {choice}")
    devices = ", ".join(dict.fromkeys(record["hardware"]["devices"]))
    dtype, compute_dtype = (str(d).removeprefix("torch.") for d in (settings["dtype"], training_args.compute_dtype))
    print_main(
        f"hardware: {devices}; weights {dtype}, compute {compute_dtype}, attention {settings['attn_implementation']}"
    )
    print_main(f"data: {len(train_rows)} rows of {script_args.dataset_name}, read as {row_format.describe()}")

    # What the trainer will get, and what is wrong with it, before a model is loaded.
    peft_config = build_adapter_config(model_args, new_ids, **source)  # None unless the recipe sets use_peft
    preparation = RowPreparation(tokenizer, training_args)
    train_rows = preparation.tokenize(train_rows, "train")
    prepared_rows = preparation.cut_and_pack(train_rows, "train")  # the trainer will find it in the cache
    if eval_rows is not None:
        eval_rows = preparation.tokenize(eval_rows, "eval")
    model_parts = (model_args, settings, peft_config, tokenizer, len(new_ids))
    checkpointing, estimate = on_main_process(
        lambda: run_preflight(run, script_args, training_args, *model_parts, train_rows, prepared_rows, eval_rows)
    )
    training_args.gradient_checkpointing = record["config"]["gradient_checkpointing"] = checkpointing
    if script_args.preflight_only:
        written = "nothing is written, the folder holds a run" if (run / RUN_FILE).is_file() else f"see {run / EDA}"
        print_main(f"preflight only: nothing is trained; {written}")
        return

    # The weights come from the model, or from the checkpoint to go on from; both load in the same way.
    if checkpoint is not None:
        on_main_process(lambda: check_resumable(checkpoint))
        print_main(f"going on from {checkpoint}")
    prepare_wandb(training_args)
    memory = MemoryPeak(training_args.device)
    model = model_args.model_name_or_path if checkpoint is None else str(checkpoint)
    if checkpoint is not None and peft_config is not None:
        del settings["revision"]  # the adapter names that of its base
        model, peft_config = load_adapter(model, is_trainable=True, **settings), None
    elif checkpoint is None and new_ids:
        model = load_with_new_tokens(model, new_ids, settings)
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
        callbacks=[RecordShares(run, record, script_args.overwrite), termination],
    )
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LineProgress())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    last = run / f"checkpoint-{trainer.state.global_step}"
    if termination.stopped:
        print_main(
            f"stopped by SIGTERM at step {trainer.state.global_step}; {last} is saved, and the same command goes on from it"
        )
        sys.exit(128 + 15)
    if is_main_process():
        save_record(run, record, finished=now(), memory={"estimate": estimate, "measured_peak": memory.bytes()})
    print_main(f"finished: {last}. Next: python 3_test.py --output_dir {shlex.quote(str(run))}")


if __name__ == "__main__":
    run_step(main, ScriptArguments, TrainingArguments, ModelArguments, fit_to_hardware=fit_to_hardware)
