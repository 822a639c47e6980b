"""
The plan of a run: its steps, tokens and checkpoints, and what of the arguments does not fit into it.
"""

import math

import numpy as np
from datasets import Dataset

from finetuning.data.checks import Finding
from finetuning.errors import InputError
from finetuning.ranks import get_world_size
from finetuning.training.arguments import TrainingArguments


def plan_training(prepared: Dataset, num_rows: int, args: TrainingArguments) -> dict:
    """Steps, tokens and checkpoints of the run that these arguments describe."""
    per_batch = args.per_device_train_batch_size * get_world_size()
    per_step = per_batch * args.gradient_accumulation_steps
    batches = len(prepared) / per_batch
    if args.dataloader_drop_last and batches < 1:
        raise InputError(
            f"dataloader_drop_last: the {len(prepared)} sequences do not fill one batch of {per_batch}, so nothing "
            "would be trained; leave it out"
        )
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps_per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    ids = prepared.with_format("arrow")[:]["input_ids"].combine_chunks()
    tokens = int(np.diff(ids.offsets.to_numpy()).sum())
    if str(args.save_strategy.value) == "epoch":
        checkpoints = math.ceil(steps / steps_per_epoch)
    else:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(steps * args.save_steps))
        checkpoints = math.ceil(steps / every)
    if args.save_total_limit:
        checkpoints = min(checkpoints, args.save_total_limit)
    return {
        "steps": steps,
        "epochs": round(steps / steps_per_epoch, 2),
        "sequences_per_step": per_step,
        "rows_per_step": round(min(1, per_step / max(1, len(prepared))) * num_rows, 1),
        "tokens_per_epoch": tokens,
        "tokens": round(tokens * steps / steps_per_epoch),
        "packing_efficiency": round(tokens / (len(prepared) * args.max_length), 3) if args.packing else None,
        "checkpoints": checkpoints,
    }


def describe_plan(plan: dict) -> str:
    packing = f", sequences {plan['packing_efficiency']:.0%} full" if plan["packing_efficiency"] else ""
    return (
        f"{plan['steps']} steps ({plan['epochs']} epochs) of {plan['rows_per_step']:g} rows in "
        f"{plan['sequences_per_step']} sequences{packing}; {plan['tokens']:,} tokens; {plan['checkpoints']} checkpoints"
    )


def check_schedule(plan: dict, num_sequences: int, args: TrainingArguments) -> list[Finding]:
    """What of the batch, of the learning rate's schedule and of the evaluation does not fit into the plan."""
    texts = []
    if plan["sequences_per_step"] > num_sequences:
        texts.append(
            f"a step is to take {plan['sequences_per_step']} sequences and there are {num_sequences}, so it takes "
            "fewer; lower gradient_accumulation_steps or per_device_train_batch_size"
        )
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        texts.append(
            f"warmup_steps: {args.warmup_steps} has no effect with lr_scheduler_type: constant; use "
            "constant_with_warmup"
        )
    elif args.get_warmup_steps(plan["steps"]) >= plan["steps"]:
        texts.append(
            f"warmup_steps: {args.warmup_steps} is all of the {plan['steps']} steps, so learning_rate is never reached"
        )
    if args.eval_strategy != "no" and args.eval_delay > plan["epochs" if args.eval_strategy == "epoch" else "steps"]:
        texts.append(f"eval_delay: {args.eval_delay} is longer than the run, so nothing is evaluated")
    return [Finding("schedule", "warning", "; ".join(texts))] if texts else []
