"""
How long questions, answers and rows are, what becomes of those that are too long for max_length or for the model, and
how many steps, tokens and checkpoints they make.
"""

import math

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from finetuning.data.checks import Finding
from finetuning.data.tokens import IGNORED
from finetuning.errors import InputError
from finetuning.ranks import get_world_size
from finetuning.training.arguments import TrainingArguments

PERCENTILES = (50, 90, 95, 99, 100)


def percent(share: float) -> str:
    return "100 %" if share == 1 else f"{share:.1%}".replace("%", " %")


def conversations_of(tokenized: Dataset) -> list[tuple[list[dict], list[int]]]:
    """The messages of each row, and the places among them of those that are learned."""
    prompts, completions = tokenized["prompt"], tokenized["completion"]
    learned = tokenized["learned"] if "learned" in tokenized.column_names else [[len(prompt)] for prompt in prompts]
    return [([*p, *c], places) for p, c, places in zip(prompts, completions, learned, strict=True)]


def learned_texts(messages: list[dict], learned: list[int]) -> list[str]:
    """The answers of a row that are learned, or the last message where no answer is."""
    return [messages[place]["content"] for place in learned or [-1]]


def token_ids(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of all rows end to end, and the number of each row's."""
    column = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
    return column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())


def measure_lengths(
    tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Lengths of questions and answers before anything is cut.

    Returns:
        Percentiles for the report; and arrays of one number a row: characters and tokens of its question (all that is
        not learned) and of its answers, tokens of the row, and the place of the first token that is learned.
    """
    columns = tokenized.with_format("arrow")[:]
    totals = token_ids(tokenized)[1]
    labels = columns["labels"].combine_chunks()
    starts, is_learned = labels.offsets.to_numpy()[:-1], labels.flatten().to_numpy() != IGNORED
    learned = np.add.reduceat(is_learned, starts).astype(int)
    places = np.arange(len(is_learned)) - np.repeat(starts, totals)
    first_learned = np.minimum.reduceat(np.where(is_learned, places, len(places)), starts)
    if (learned == totals).any():  # the question is learned too, so labels do not tell where it ends
        prompts = tokenized["prompt"]
        questions = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
        first_learned = np.minimum(questions, totals)
        learned = totals - first_learned
    rows = conversations_of(tokenized)
    all_characters = np.array([sum(len(message["content"]) for message in messages) for messages, _ in rows])
    answer_characters = np.array([sum(map(len, learned_texts(*row))) for row in rows])
    per_row = {
        "question characters": all_characters - answer_characters,
        "answer characters": answer_characters,
        "question tokens": totals - learned,
        "answer tokens": learned,
        "row tokens": totals,
    }
    report: dict = {}
    for name, values in per_row.items():
        report[name] = {f"p{p}": int(np.percentile(values, p, method="higher")) for p in PERCENTILES}
        report[name]["mean"] = round(float(values.mean()), 1)
    # the smallest limit that cuts less than 1 % of the rows
    report["max_length_for_99_percent"] = int(np.sort(totals)[math.floor(0.99 * len(totals))])
    report["max_length"] = max_length
    return report, {**per_row, "first learned token": first_learned}


def check_lengths(lengths: dict, per_row: dict[str, np.ndarray], args: TrainingArguments) -> list[Finding]:
    """Rows longer than max_length, and what becomes of them."""
    totals, max_length = per_row["row tokens"], args.max_length
    if max_length is None or totals.max() <= max_length:
        return [Finding("truncation", "ok", f"no row is cut; the longest has {totals.max()} tokens")]
    cut = np.flatnonzero(totals > max_length)
    which = f"{len(cut)} of {len(totals)} rows ({percent(len(cut) / len(totals))})"
    if args.packing and args.packing_strategy != "bfd":
        text = f"max_length: {max_length} splits {which} into several sequences"
        return [Finding("truncation", "note", text, cut.tolist())]
    if args.truncation_mode == "keep_end":
        text = f"max_length: {max_length} cuts the beginning of {which}, system message and question first"
        return [Finding("truncation", "warning", text, cut.tolist(), {"cut": len(cut)})]
    enough = lengths["max_length_for_99_percent"]
    lost = np.flatnonzero(per_row["first learned token"] >= max_length)
    text = f"max_length: {max_length} cuts {which}: their answers lose the end"
    text += f", {len(lost)} of them all" if len(lost) else ""
    text += f"; {enough} would cut less than 1 %" if enough > max_length else ""
    return [Finding("truncation", "warning", text, cut.tolist(), {"cut": len(cut), "answers_lost": len(lost)})]


def check_pair_lengths(per_row: dict[str, np.ndarray], args: TrainingArguments) -> list[Finding]:
    """Questions longer than max_length and answers longer than max_target_length, and what becomes of them."""
    findings, start = [], args.truncation_mode == "keep_end"
    for key, what, lost in (
        ("max_length", "question", "beginning" if start else "end"),
        ("max_target_length", "answer", "end, and with it what ends them"),
    ):
        tokens, limit = per_row[f"{what} tokens"], getattr(args, key)
        cut = np.flatnonzero(tokens > (limit or math.inf))
        if len(cut):
            enough = int(np.sort(tokens)[math.floor(0.99 * len(tokens))])
            text = f"{key}: {limit} cuts {len(cut)} of {len(tokens)} {what}s ({percent(len(cut) / len(tokens))}), "
            text += f"which lose their {lost}" + (f"; {enough} would cut less than 1 %" if enough > limit else "")
            findings.append(Finding("truncation", "warning", text, cut.tolist(), {"cut": len(cut)}))
    longest = " and ".join(f"{per_row[f'{what} tokens'].max()} for {what}s" for what in ("question", "answer"))
    return findings or [Finding("truncation", "ok", f"nothing is cut; the longest have {longest}, in tokens")]


def check_positions(config: PreTrainedConfig, longest_row: int, args: TrainingArguments) -> list[Finding]:
    """Whether the model has a position for every token of a row; rows that are packed each begin at the first one."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if rope and rope.get("factor") and rope.get("original_max_position_embeddings"):
        positions = max(positions, rope["factor"] * rope["original_max_position_embeddings"])
    length = args.max_length if args.packing and args.packing_strategy == "wrapped" else longest_row
    if length <= positions:
        return []
    effect = "it has never seen what lies behind" if rope else "what lies behind has no embedding"
    text = (
        f"sequences have up to {length} tokens, and the model positions for {positions:g} (max_position_embeddings); "
        f"{effect}: set max_length: {positions:g}"
    )
    return [Finding("positions", "warning" if rope else "refused", text)]


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
    tokens = len(token_ids(prepared)[0])
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


def check_schedule(plan: dict, num_sequences: int, args: TrainingArguments) -> list[Finding]:
    """Whether the batch, the warm-up of the learning rate and the evaluation fit into the steps of the run."""
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
