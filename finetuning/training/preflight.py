"""
What stands between a run and its success, looked for before the first step in the rows that the trainer really gets.

Each check has a name. A run that would never learn to stop, has nothing to learn from, or does not fit into memory is
refused; `allow: [<check>]` lets it through, which is recorded in preflight.json.
"""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetuning.config.arguments import ScriptArguments
from finetuning.data.batches import IGNORED, build_collator, sequences
from finetuning.data.chat import control_tokens, end_of_turn_id, end_token_ids
from finetuning.data.checks import (
    Finding,
    check_control_tokens,
    check_leaks,
    check_rows,
    check_template,
    check_turns,
    is_visible,
    question_of,
)
from finetuning.data.rows import load_test_samples, tokens_to_add
from finetuning.errors import InputError, make_folder, to_line, to_plain
from finetuning.hardware import available_memory
from finetuning.models.config import load_generation_config, load_model_config
from finetuning.ranks import get_local_world_size, get_world_size
from finetuning.runs import EDA, PREFLIGHT_FILE, RUN_FILE, write_json
from finetuning.training.eda import plot_lengths
from finetuning.training.memory import (
    Batch,
    MemoryPlan,
    gib,
    measure_shapes,
    plan_memory,
    what_would_fit,
)
from finetuning.training.model import ModelPlan

LEVELS = ("refused", "allowed", "warning", "note", "ok")
NO_END = 0.5  # share of the rows that must end in an end token
NO_LABELS = 0.1  # share of the rows that may have nothing to learn from
TAIL = 4  # tokens at the end of a row among which its end token is looked for, before white space
PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class Report:
    """Everything that preflight found."""

    findings: list[Finding] = field(default_factory=list)
    lengths: dict = field(default_factory=dict)
    plan: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    preview: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def refused(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "refused"]

    def allow(self, names: list[str]) -> None:
        for finding in self.findings:
            if finding.level == "refused" and finding.check in names:
                finding.level = "allowed"

    def save(self, run: Path) -> None:
        make_folder(run)
        content = asdict(self)
        for finding in content["findings"]:
            finding["rows"] = finding["rows"][:100]
        write_json(run / PREFLIGHT_FILE, content)


# Labels


@dataclass
class Labels:
    """Counts over the sequences that the model will get. An answer is a run of tokens that are learned."""

    rows: int = 0
    answers: int = 0
    tokens: int = 0
    supervised: int = 0
    ended: int = 0
    unsupervised_rows: int = 0
    whole_rows: int = 0
    double_bos: int = 0
    pad_labels: int = 0
    last_tokens: Counter = field(default_factory=Counter)
    last_of_whole: Counter = field(default_factory=Counter)  # of answers that are surely not cut


def count_labels(
    prepared: Dataset,
    collator: Callable,
    batch_size: int,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: list[int],
    max_length: int | None,
) -> Labels:
    """Go through every batch of an epoch, as collated, and count what its labels teach."""
    labels_seen = Labels()
    ends, blank = set(end_ids), {}
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id

    def is_blank(token_id: int) -> bool:
        if token_id not in blank:
            blank[token_id] = not tokenizer.decode([token_id]).strip()
        return blank[token_id]

    for ids, labels in sequences(prepared, collator, batch_size):
        places = np.flatnonzero(labels != IGNORED)
        labels_seen.rows += 1
        labels_seen.tokens += len(ids)
        labels_seen.supervised += len(places)
        labels_seen.double_bos += bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos
        if len(places) == 0:
            labels_seen.unsupervised_rows += 1
            continue
        labels_seen.whole_rows += len(places) >= len(labels) - 1  # the first token of a row is never predicted
        labels_seen.pad_labels += pad not in ends and bool((labels == pad).any())
        answers = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        for answer in answers:
            last = None
            for token_id in labels[answer[-TAIL:]][::-1].tolist():
                if token_id in ends or not is_blank(token_id):
                    last = token_id
                    break
            labels_seen.answers += 1
            labels_seen.ended += last in ends
            labels_seen.last_tokens[last] += 1
            is_whole = max_length is None or len(ids) < max_length or answer is not answers[-1]
            labels_seen.last_of_whole[last] += is_whole
    return labels_seen


def check_labels(
    labels: Labels, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, answers_only: bool
) -> list[Finding]:
    """Whether the labels teach an answer and its end, and the end is one at which generation stops."""
    ends = end_token_ids(tokenizer, generation_config)

    def name(token_id: int | None) -> str:
        return "nothing" if token_id is None else show_token(tokenizer, token_id)

    findings = []
    share = labels.ended / max(1, labels.answers)
    unit = "rows" if labels.answers == labels.rows - labels.unsupervised_rows else "answers"
    stops = ", ".join(name(i) for i in ends)
    numbers = {
        "rows": labels.rows,
        "answers": labels.answers,
        "ended": labels.ended,
        "share": share,
        "generation_stops_at": {name(i): i for i in ends},
        "rows_end_in": {name(i): n for i, n in labels.last_tokens.most_common(10)},
    }
    special = set(tokenizer.added_tokens_decoder) - set(ends)
    others = {i: n for i, n in labels.last_of_whole.items() if i in special and n > 0.01 * labels.answers}
    if others:
        which = ", ".join(f"{name(i)} ({n} {unit})" for i, n in others.items())
        text = (
            f"{unit} end in {which}, but generation stops at {stops}: answers would go on; end every answer of the chat "
            "template in the same token"
        )
        findings.append(Finding("terminators_agree", "refused", text, numbers=numbers))
    if labels.answers and share < NO_END:
        common = ", ".join(f"{name(i)} ({n})" for i, n in labels.last_tokens.most_common(3))
        text = (
            f"only {percent(share)} of the {'rows with labels' if unit == 'rows' else unit} end in a token at which generation stops ({stops}), so the "
            f"model would not learn to stop; they end in {common}. Look at the preview: the chat template must write "
            "the end token as one token, labels must keep it, and max_length must not cut it off"
        )
        findings.append(Finding("terminator", "refused", text, numbers=numbers))
    elif labels.answers and not others:
        level = "ok" if share == 1 else "warning"
        text = f"{percent(share)} of the answers end in {', '.join(name(i) for i in labels.last_tokens if i in ends)}, "
        text += f"generation stops at {stops}"
        findings.append(Finding("terminator", level, text, numbers=numbers))

    declared = generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    added = [i for i in (end_of_turn_id(tokenizer), tokenizer.eos_token_id) if i is not None and i not in declared]
    if added and declared:
        text = f"the model's generation config stops at {', '.join(name(i) for i in declared)} only; checkpoints will "
        text += f"stop at {', '.join(name(i) for i in dict.fromkeys(added))} as well"
        findings.append(Finding("generation_config", "note", text))

    unsupervised = labels.unsupervised_rows / max(1, labels.rows)
    if labels.unsupervised_rows:
        text = f"{labels.unsupervised_rows} of {labels.rows} rows have no token to learn from"
        text += (
            "; the question alone fills max_length, or the mask is wrong" if unsupervised < 1 else "; no loss at all"
        )
        level = "refused" if unsupervised > NO_LABELS else "warning"
        findings.append(Finding("supervision", level, text, numbers={"rows": labels.unsupervised_rows}))
    if labels.whole_rows and answers_only:
        text = f"in {labels.whole_rows} of {labels.rows} rows everything is learned, the question too"
        findings.append(Finding("everything_supervised", "warning", text, numbers={"rows": labels.whole_rows}))
    elif labels.whole_rows == labels.rows:
        text = "everything is learned, the question too, as completion_only_loss: false asks; the loss is mostly theirs"
        findings.append(Finding("everything_supervised", "warning", text, numbers={"rows": labels.whole_rows}))
    if labels.double_bos:
        text = f"{labels.double_bos} rows begin with {name(tokenizer.bos_token_id)} twice; take it out of the chat template"
        findings.append(Finding("double_bos", "warning", text, numbers={"rows": labels.double_bos}))
    if labels.pad_labels:
        text = f"{labels.pad_labels} rows learn to write the padding token {name(tokenizer.pad_token_id)}"
        findings.append(Finding("pad_in_labels", "warning", text, numbers={"rows": labels.pad_labels}))
    if tokenizer.pad_token_id in ends:
        text = f"padding and the end of an answer are the same token, {name(tokenizer.pad_token_id)}; "
        if share < NO_END:
            text += "something masks it by its id, and with it the end: give padding a token of its own"
        else:
            text += "harmless here, as padding is masked by its place"
        findings.append(Finding("pad_is_end", "note", text))
    return findings


def percent(share: float) -> str:
    return "100 %" if share == 1 else f"{share:.1%}".replace("%", " %")


# Conversations


def conversations_of(tokenized: Dataset) -> Iterator[tuple[list[dict], list[dict], list[int]]]:
    """Prompt and completion of each row, and the places in both together of the messages that are learned."""
    if "learned" in tokenized.column_names:
        return zip(tokenized["prompt"], tokenized["completion"], tokenized["learned"], strict=True)
    return ((p, c, [len(p)]) for p, c in zip(tokenized["prompt"], tokenized["completion"], strict=True))


def learned_texts(prompt: list[dict], completion: list[dict], learned: list[int]) -> list[str]:
    """The answers of a row that are learned; where there are none, the last one."""
    messages = [*prompt, *completion]
    return [messages[place]["content"] for place in learned or [len(messages) - 1]]


def check_conversations(tokenized: Dataset, tokens: list[str], where: str = "") -> list[Finding]:
    """What becomes of the turns of each row, and of what stands in them beside text.

    Args:
        tokens: Control tokens, by name.
        where: What stands before the texts, for another split than the training set.
    """
    rows = list(conversations_of(tokenized))
    num_turns = [sum(m["role"] == "assistant" for m in [*prompt, *completion]) for prompt, completion, _ in rows]
    texts = ["\n".join(m["content"] for m in [*prompt, *completion]) for prompt, completion, _ in rows]
    return [
        *check_turns(num_turns, [len(learned) for _, _, learned in rows], tokenized["left_out"], where),
        *check_template(tokenized["hidden"], tokenized["begins_alike"], where),
        *check_control_tokens(texts, tokens, where),
    ]


# Lengths


def measure_lengths(
    tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Lengths of questions and answers before anything is cut.

    Returns:
        Percentiles for the report, and per row: characters and tokens of both (of a question, all that is not learned),
        tokens of the whole, and the place of the first one that is learned.
    """
    rows = tokenized.with_format("arrow")[:]
    totals = np.diff(rows["input_ids"].combine_chunks().offsets.to_numpy())
    labels = rows["labels"].combine_chunks()
    starts, is_learned = labels.offsets.to_numpy()[:-1], labels.flatten().to_numpy() != IGNORED
    learned = np.add.reduceat(is_learned, starts).astype(int)
    places = np.arange(len(is_learned)) - np.repeat(starts, totals)
    first_learned = np.minimum.reduceat(np.where(is_learned, places, len(places)), starts)
    if (learned == totals).any():  # the loss is on the question too, so labels do not tell where it ends
        prompts = tokenized["prompt"]
        questions = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
        first_learned = np.minimum(questions, totals)
        learned = totals - first_learned
    said = [learned_texts(*row) for row in conversations_of(tokenized)]
    whole = [sum(len(m["content"]) for m in [*prompt, *answer]) for prompt, answer, _ in conversations_of(tokenized)]
    answer_characters = np.array([sum(map(len, texts)) for texts in said])
    per_row = {
        "question characters": np.array(whole) - answer_characters,
        "answer characters": answer_characters,
        "question tokens": totals - learned,
        "answer tokens": learned,
        "row tokens": totals,
    }
    report = {
        name: {
            **{f"p{p}": int(np.percentile(values, p, method="higher")) for p in PERCENTILES},
            "mean": round(float(values.mean()), 1),
        }
        for name, values in per_row.items()
    }
    # the smallest limit that cuts less than 1 % of the rows
    report["max_length_for_99_percent"] = int(np.sort(totals)[math.floor(0.99 * len(totals))])
    report["max_length"] = max_length
    return report, {**per_row, "first learned token": first_learned}


def check_lengths(lengths: dict, per_row: dict[str, np.ndarray], args: SFTConfig) -> list[Finding]:
    """Rows longer than max_length, and what becomes of them."""
    totals, max_length = per_row["row tokens"], args.max_length
    if max_length is None or totals.max() <= max_length:
        return [Finding("truncation", "ok", f"no row is cut; the longest has {totals.max()} tokens")]
    cut = np.flatnonzero(totals > max_length)
    which = f"{len(cut)} of {len(totals)} rows ({percent(len(cut) / len(totals))})"
    if args.packing and args.packing_strategy != "bfd":
        return [
            Finding(
                "truncation", "note", f"max_length: {max_length} splits {which} into several sequences", cut.tolist()
            )
        ]
    if args.truncation_mode == "keep_end":
        text = f"max_length: {max_length} cuts the beginning of {which}, system message and question first"
        return [Finding("truncation", "warning", text, cut.tolist(), {"cut": len(cut)})]
    enough = lengths["max_length_for_99_percent"]
    lost = np.flatnonzero(per_row["first learned token"] >= max_length)
    text = f"max_length: {max_length} cuts {which}: their answers lose the end" + (
        f", {len(lost)} of them all" if len(lost) else ""
    )
    text += f"; {enough} would cut less than 1 %" if enough > max_length else ""
    return [Finding("truncation", "warning", text, cut.tolist(), {"cut": len(cut), "answers_lost": len(lost)})]


def check_positions(config: PreTrainedConfig, longest_row: int, args: SFTConfig) -> list[Finding]:
    """Whether the model has a position for every token of a row; rows that are packed each begin at the first one."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if rope and rope.get("factor") and rope.get("original_max_position_embeddings"):
        positions = max(positions, rope["factor"] * rope["original_max_position_embeddings"])
    length = args.max_length if args.packing and args.packing_strategy == "wrapped" else longest_row
    if length <= positions:
        return []
    text = (
        f"sequences have up to {length} tokens, and the model positions for {positions:g} (max_position_embeddings); "
    )
    if rope:
        return [
            Finding("positions", "warning", text + f"it has never seen what lies behind: set max_length: {positions:g}")
        ]
    return [Finding("positions", "refused", text + f"what lies behind has no embedding: set max_length: {positions:g}")]


# The plan


def plan_training(prepared: Dataset, num_rows: int, args: SFTConfig) -> dict:
    """Steps, tokens and checkpoints of the run that these arguments describe."""
    world_size = get_world_size()
    per_step = args.per_device_train_batch_size * world_size * args.gradient_accumulation_steps
    batches = len(prepared) / (args.per_device_train_batch_size * world_size)
    if args.dataloader_drop_last and batches < 1:
        raise InputError(
            f"dataloader_drop_last: the {len(prepared)} sequences do not fill one batch of "
            f"{args.per_device_train_batch_size * world_size}, so nothing would be trained; leave it out"
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


def check_schedule(plan: dict, num_sequences: int, args: SFTConfig) -> list[Finding]:
    """What of the batch, of the learning rate's schedule and of the evaluation does not fit into the plan."""
    texts = []
    if plan["sequences_per_step"] > num_sequences:
        texts.append(
            f"a step is to take {plan['sequences_per_step']} sequences and there are {num_sequences}, so it takes fewer; "
            "lower gradient_accumulation_steps or per_device_train_batch_size"
        )
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        texts.append(
            f"warmup_steps: {args.warmup_steps} has no effect with lr_scheduler_type: constant; use constant_with_warmup"
        )
    elif args.get_warmup_steps(plan["steps"]) >= plan["steps"]:
        texts.append(
            f"warmup_steps: {args.warmup_steps} is all of the {plan['steps']} steps, so learning_rate is never reached"
        )
    if args.eval_strategy != "no" and args.eval_delay > plan["epochs" if args.eval_strategy == "epoch" else "steps"]:
        texts.append(f"eval_delay: {args.eval_delay} is longer than the run, so nothing is evaluated")
    return [Finding("schedule", "warning", "; ".join(texts))] if texts else []


# The preview


def show_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return text if text.strip() else repr(text)


def preview_row(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], num_tokens: int = 160) -> dict:
    """The tokens of a row with what is learned of them; a long one without its middle.

    Returns:
        {"tokens": [[text, learned, special], ...], "left_out": number of tokens}. Bytes of one character are one token.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens: list[list] = []
    pending: list[int] = []
    for place, (token_id, label) in enumerate(zip(ids, labels, strict=True)):
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(pending) < 4 and place + 1 < len(ids):
            continue
        tokens.append([text, label != IGNORED, token_id in special])
        pending = []
    left_out = max(0, len(tokens) - num_tokens)
    if left_out:
        head = num_tokens // 4
        tokens = [*tokens[:head], *tokens[head + left_out :]]
    return {"tokens": tokens, "left_out": left_out, "gap": num_tokens // 4 if left_out else None}


def render_preview(preview: dict, colour: bool) -> str:
    """The row for a terminal: learned tokens green, or between ⟦ and ⟧ where there is no colour; | between tokens."""
    pieces = []
    inside = False
    for place, (text, learned, special) in enumerate(preview["tokens"]):
        if place == preview["gap"]:
            pieces.append(f" … {preview['left_out']} tokens … ")
        shown = to_plain(text).replace("\n", "⏎\n")  # in colour no PlainOutput does this
        if colour:
            style = ("1;" if special else "") + ("30;42" if learned else "2")
            pieces.append(f"\033[{style}m{shown}\033[0m")
        else:
            pieces.append(
                ("⟦" if learned and not inside else "⟧" if inside and not learned else "|" if place else "") + shown
            )
        inside = learned
    return ("\033[2m|\033[0m" if colour else "").join(pieces) + ("⟧" if inside and not colour else "")


def use_colour() -> bool:
    """Colours for a terminal, unless NO_COLOR is set (no-color.org)."""
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


# All of it


def inspect(
    tokenized: Dataset,
    prepared: Dataset,
    collator: Callable,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    args: SFTConfig,
    held_out: dict[str, list[str]],
    preview_rows: int = 2,
) -> tuple[Report, dict[str, np.ndarray]]:
    """Run every check on the rows of a training run.

    Args:
        tokenized: Rows as RowPreparation.tokenize gives them.
        prepared: The same as the trainer will have them: cut, and packed if they are.
        collator: What makes batches of them.
        generation_config: The model's own.
        held_out: Questions of the test and the validation split by name.

    Returns:
        The report, and the lengths of each row for the plots.
    """
    start = time.perf_counter()
    report = Report()
    end_ids = end_token_ids(tokenizer, generation_config)
    if args.packing and args.packing_strategy != "bfd":  # sequences that begin and end anywhere in a row
        whole_rows, collate = tokenized, DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    else:
        whole_rows, collate = prepared, collator
    batch_size = args.per_device_train_batch_size
    limit = None if whole_rows is tokenized else args.max_length
    labels = count_labels(whole_rows, collate, batch_size, tokenizer, end_ids, limit)
    if not args.packing:  # the trainer leaves out rows with nothing to learn
        labels.unsupervised_rows += len(tokenized) - len(prepared)
        labels.rows += len(tokenized) - len(prepared)
    answers_only = args.completion_only_loss is not False
    report.findings += check_labels(labels, tokenizer, generation_config, answers_only)
    report.lengths, per_row = measure_lengths(tokenized, tokenizer, args.max_length)
    report.findings += check_lengths(report.lengths, per_row, args)
    report.findings += check_conversations(tokenized, control_tokens(tokenizer, end_ids))
    questions = [question_of(prompt) for prompt in tokenized["prompt"]]
    said = [learned_texts(*row) for row in conversations_of(tokenized)]
    answers = ["\n".join(texts) if all(map(is_visible, texts)) else "" for texts in said]  # "" counts as empty
    report.findings += check_rows(questions, answers)
    report.findings += check_leaks(questions, {name: texts for name, texts in held_out.items() if texts})
    report.plan = plan_training(prepared, len(tokenized), args)
    report.findings += check_schedule(report.plan, len(prepared), args)
    report.plan["labelled_share"] = round(labels.supervised / max(1, labels.tokens), 4)
    places = np.linspace(0, len(tokenized) - 1, num=min(preview_rows, len(tokenized)), dtype=int).tolist()
    for place in places:
        kept = slice(-limit, None) if limit and args.truncation_mode == "keep_end" else slice(limit)
        row = {name: [tokenized[place][name][kept]] for name in ("input_ids", "labels")}
        ((ids, labels),) = sequences(Dataset.from_dict(row), collate, 1)
        report.preview.append({"row": place, **preview_row(tokenizer, ids.tolist(), labels.tolist())})
    report.seconds = round(time.perf_counter() - start, 2)
    return report, per_row


def render(report: Report, colour: bool) -> str:
    """The report as one screen."""
    marks = {"refused": "1;31", "allowed": "33", "warning": "33", "note": "36", "ok": "32"}
    lines = []
    for preview in report.preview:
        lines += [
            f"row {preview['row']}, what is learned {'in green' if colour else 'between ⟦ and ⟧'}:",
            render_preview(preview, colour),
            "",
        ]
    tokens = [report.lengths[name] for name in ("question tokens", "answer tokens", "row tokens")]
    lines.append("lengths in tokens     " + "".join(f"{f'p{p}':>7}" for p in PERCENTILES))
    for name, values in zip(("question", "answer", "row"), tokens, strict=True):
        lines.append(f"  {name:<20}" + "".join(f"{values[f'p{p}']:>7}" for p in PERCENTILES))
    lines.append("checks")
    for finding in sorted(report.findings, key=lambda finding: LEVELS.index(finding.level)):
        rows = ", ".join(str(row) for row in finding.rows[:8]) + (", ..." if len(finding.rows) > 8 else "")
        level = f"\033[{marks[finding.level]}m{finding.level:<8}\033[0m" if colour else f"{finding.level:<8}"
        lines.append(f"  {level} {finding.check}: {to_line(finding.text)}" + (f" (rows {rows})" if rows else ""))
    lines.append(f"plan: {to_line(describe_plan(report.plan))}")
    return "\n".join(lines)


# The memory


def check_memory(
    args: SFTConfig, model: ModelPlan, longest_row: int, labelled: float
) -> tuple[list[Finding], dict, bool]:
    """Whether training fits into memory, with activation checkpointing where it does not fit without.

    Args:
        longest_row: Tokens of the longest sequence that the trainer has.
        labelled: Share of the tokens that the loss is on.

    Returns:
        Findings, the plan for preflight.json, and whether to checkpoint activations.
    """
    flattened = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
    # a batch may have a larger share of answers than the average
    batch = Batch(args.per_device_train_batch_size, longest_row, flattened, min(1.0, 1.5 * labelled))
    requested = args.activation_checkpointing
    config = AutoConfig.from_pretrained(model.name_or_path, **model.source)
    settings = model.settings
    if settings["dtype"] == "auto":
        settings = {**settings, "dtype": config.dtype or torch.float32}
    shapes = measure_shapes(config, batch, args, settings, model.peft_config, len(model.new_ids))
    available = available_memory(args.device, get_local_world_size())

    def plan(checkpointing: bool) -> MemoryPlan:
        return plan_memory(shapes, batch, args, settings, checkpointing, available)

    chosen = plan(requested == "true")
    if requested == "auto" and (shapes.unmeasured or not chosen.fits):
        chosen = plan(True)
    numbers = {**chosen.to_dict(), "model_parameters": shapes.parameters, "trained_parameters": shapes.trained}
    state = "on" if chosen.activation_checkpointing else "off"
    if not chosen.fits:
        would = what_would_fit(shapes, batch, args, settings, chosen)
        if not chosen.activation_checkpointing and plan(True).fits:
            would = [f"activation_checkpointing: true ({gib(plan(True).total)})"]
        text = f"training needs {chosen.describe()}. What would fit: {'; or '.join(would)}"
        return [Finding("memory", "refused", text, numbers=numbers)], numbers, chosen.activation_checkpointing
    if shapes.unmeasured:
        text = (
            f"at least {chosen.describe()}, and the activations, which could not be measured ({shapes.unmeasured}); "
            f"activation checkpointing {state}"
        )
        return [Finding("memory", "warning", text, numbers=numbers)], numbers, chosen.activation_checkpointing
    why = {"auto": "it fits without" if state == "off" else "it does not fit without"}.get(requested, "as asked")
    text = f"{chosen.describe()}; activation checkpointing {state}, {why}"
    return [Finding("memory", "ok", text, numbers=numbers)], numbers, chosen.activation_checkpointing


def run_preflight(
    run: Path,
    script_args: ScriptArguments,
    args: SFTConfig,
    model: ModelPlan,
    train_rows: Dataset,
    prepared: Dataset,
    eval_rows: Dataset | None,
) -> tuple[bool, dict]:
    """Check everything, print one screen, and write preflight.json and the plots into the run's folder.

    Args:
        train_rows, eval_rows: Rows as RowPreparation.tokenize gives them.
        prepared: The training rows as RowPreparation.cut_and_pack makes them.

    Returns:
        Whether to checkpoint activations, and the memory plan.

    Raises:
        InputError: A check refuses the run and is not in `script_args.allow`. A run that is in the folder stays as it is.
    """
    start = time.perf_counter()
    if len(prepared) == 0:
        raise InputError(
            f"supervision: with max_length: {args.max_length} no row has anything left to learn from; raise it"
        )
    tokenizer = model.tokenizer
    generation_config = load_generation_config(model.name_or_path, **model.source)
    held_out = {} if eval_rows is None else {"validation": [question_of(prompt) for prompt in eval_rows["prompt"]]}
    notes, tokens = [], control_tokens(tokenizer, end_token_ids(tokenizer, generation_config))
    try:
        samples = load_test_samples(vars(script_args))
        if not samples.have_references:
            text = "the test split has no answers: step 3 answers it, and measures nothing that needs references"
            notes.append(Finding("test_split", "note", text))
        if script_args.dataset_eval_split != script_args.dataset_test_split:
            held_out["test"] = [question_of(sample["prompt"]) for sample in samples]
            for finding in check_control_tokens(held_out["test"], tokens, "in the questions of the test split, "):
                finding.rows = sorted(row for place in finding.rows for row in samples.rows_of(place))
                notes.append(finding)
    except InputError as error:
        notes.append(Finding("test_split", "warning", f"step 3 will have nothing to answer: {error}"))
    collator = build_collator(tokenizer, args)
    report, per_row = inspect(
        train_rows, prepared, collator, tokenizer, generation_config, args, held_out, script_args.preview_rows
    )
    longest_row = int(min(per_row["row tokens"].max(), args.max_length or 2**62))
    notes += check_positions(load_model_config(model.name_or_path, **model.source), longest_row, args)
    longest = args.max_length if args.packing else longest_row
    findings, report.memory, checkpointing = check_memory(args, model, longest, report.plan["labelled_share"])
    if eval_rows is not None:
        notes += check_conversations(eval_rows, tokens, "in the validation split, ")
    report.findings += notes + findings
    report.findings += count_special_tokens(train_rows, tokenizer, script_args)
    report.allow(script_args.allow or [])
    report.seconds = round(time.perf_counter() - start, 2)
    colour = use_colour()
    print(render(report, colour), file=sys.__stdout__ if colour else sys.stdout, flush=True)

    if report.refused:
        if not (run / RUN_FILE).is_file():  # the report of an older run stays with it
            save_report(report, per_row, args.max_length, run)
        checks = [finding.check for finding in report.refused]
        reasons = "; ".join(f"{finding.check}: {finding.text}" for finding in report.refused)
        raise InputError(f"refused before the first step. {reasons}. To train all the same: --allow {' '.join(checks)}")
    if not (script_args.preflight_only and (run / RUN_FILE).is_file()):
        save_report(report, per_row, args.max_length, run)
    return checkpointing, report.memory


def save_report(report: Report, per_row: dict[str, np.ndarray], max_length: int | None, run: Path) -> None:
    report.save(run)
    plot_lengths(per_row, max_length, run / EDA)


def count_special_tokens(
    train_rows: Dataset, tokenizer: PreTrainedTokenizerBase, script_args: ScriptArguments
) -> list[Finding]:
    """How often each added token stands in the rows: one of `special_tokens` that never does cannot be learned."""
    tokens = tokens_to_add(script_args)
    if not tokens:
        return []
    ids = train_rows.with_format("arrow")[:]["input_ids"].combine_chunks().flatten().to_numpy()
    counts = {token: int((ids == tokenizer.convert_tokens_to_ids(token)).sum()) for token in tokens}
    shown = ", ".join(f"{token} {n}" for token, n in counts.items())
    missing = [token for token in script_args.special_tokens or [] if counts[token] == 0]
    text = f"in the rows: {shown}" + (f"; {', '.join(missing)} cannot be learned" if missing else "")
    return [Finding("special_tokens", "warning" if missing else "ok", text, numbers=counts)]
