"""
What stands between a run and its success, looked for before the first step in the rows that the trainer really gets.

Each check has a name. A run that would never learn to stop, has nothing to learn from, or does not fit into memory is
refused; `allow: [<check>]` lets it through, which is recorded in preflight.json.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetuning.config.arguments import ScriptArguments
from finetuning.data.batches import build_collator, choose_preparation, sequences
from finetuning.data.chat import control_tokens, end_token_ids
from finetuning.data.checks import (
    Finding,
    check_control_tokens,
    check_rows,
    check_template,
    check_turns,
    is_visible,
    question_of,
)
from finetuning.data.leaks import check_leaks
from finetuning.data.samples import load_test_samples
from finetuning.data.training_rows import tokens_to_add
from finetuning.errors import InputError
from finetuning.models.config import load_generation_config, load_model_config
from finetuning.runs import EDA, is_planned
from finetuning.training.arguments import TrainingArguments
from finetuning.training.labels import check_labels, count_labels
from finetuning.training.lengths import (
    check_lengths,
    check_pair_lengths,
    check_positions,
    check_schedule,
    conversations_of,
    learned_texts,
    measure_lengths,
    percent,
    plan_training,
    token_ids,
)
from finetuning.training.memory import check_memory
from finetuning.training.model import ModelPlan
from finetuning.training.report import Report, plot_lengths, preview_row, render, use_colour

MIN_UNKNOWN, MAX_UNKNOWN = 0.001, 0.2  # shares of unknown tokens above which a run is warned of, and refused
SPEAKER_TAG = re.compile(r"#\w+#")


def check_conversations(tokenized: Dataset, control_texts: list[str], where: str = "") -> list[Finding]:
    """What the chat template makes of the turns of each row, and whether their text holds control tokens.

    Args:
        where: The beginning of each finding, which names the split where it is not the training set.
    """
    rows = conversations_of(tokenized)
    num_turns = [sum(message["role"] == "assistant" for message in messages) for messages, _ in rows]
    texts = ["\n".join(message["content"] for message in messages) for messages, _ in rows]
    return [
        *check_turns(num_turns, [len(learned) for _, learned in rows], tokenized["left_out"], where),
        *check_template(tokenized["hidden"], tokenized["begins_alike"], where),
        *check_control_tokens(texts, control_texts, where),
    ]


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run as its trainer gets them."""

    tokenized: Dataset  # the training rows as RowPreparation.tokenize returns them
    prepared: Dataset  # the same rows after they are cut, and packed where `packing` is on
    collator: Callable  # makes batches of `prepared`
    evaluation: Dataset | None  # the validation split, tokenised


def prepare_rows(
    tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, train_rows: Dataset, eval_rows: Dataset | None = None
) -> TrainingRows:
    """Tokenise, cut and pack rows as the trainer will."""
    preparation = choose_preparation(tokenizer, args)
    tokenized = preparation.tokenize(train_rows, "train")
    prepared = preparation.cut_and_pack(tokenized, "train")  # the trainer will find it in the cache
    evaluation = None if eval_rows is None else preparation.tokenize(eval_rows, "eval")
    return TrainingRows(tokenized, prepared, build_collator(tokenizer, args), evaluation)


def inspect(
    rows: TrainingRows,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    args: TrainingArguments,
    held_out: dict[str, list[str]],
    num_previews: int = 2,
) -> tuple[Report, dict[str, np.ndarray]]:
    """Run every check on the rows of a training run.

    Args:
        generation_config: The model's own.
        held_out: The questions of the test and the validation split, by the name of the split.

    Returns:
        The report, and the lengths of each row, for the plots.
    """
    start = time.perf_counter()
    report, tokenized, end_ids = Report(), rows.tokenized, end_token_ids(tokenizer, generation_config)
    whole_rows, collator, limit = rows.prepared, rows.collator, args.max_length
    if args.packing and args.packing_strategy != "bfd":  # its sequences may begin and end inside a row
        whole_rows, collator, limit = tokenized, DataCollatorForLanguageModeling(tokenizer.pad_token_id), None
    collated = sequences(whole_rows, collator, args.per_device_train_batch_size)
    pairs = args.decoder_start is not None
    behind_end = set(tokenizer.all_special_ids).difference(end_ids) if pairs else ()  # mBART's language, for one
    labels = count_labels(collated, tokenizer, end_ids, None if pairs else limit, behind_end)
    if not args.packing:  # the trainer leaves out rows with nothing to learn
        labels.unsupervised_rows += len(tokenized) - len(rows.prepared)
        labels.rows += len(tokenized) - len(rows.prepared)
    report.findings += check_labels(labels, tokenizer, generation_config, args.completion_only_loss is not False)
    report.lengths, per_row = measure_lengths(tokenized, tokenizer, args.max_length)
    report.findings += check_pair_lengths(per_row, args) if pairs else check_lengths(report.lengths, per_row, args)
    report.findings += check_vocabulary(tokenized, tokenizer)
    report.findings += check_conversations(tokenized, control_tokens(tokenizer, end_ids))
    questions = [question_of(prompt) for prompt in tokenized["prompt"]]
    learned = [learned_texts(*row) for row in conversations_of(tokenized)]
    answers = ["\n".join(texts) if all(map(is_visible, texts)) else "" for texts in learned]  # "" counts as empty
    report.findings += check_rows(questions, answers)
    report.findings += check_leaks(questions, {name: texts for name, texts in held_out.items() if texts})
    report.plan = plan_training(rows.prepared, len(tokenized), args)
    report.findings += check_schedule(report.plan, len(rows.prepared), args)
    report.plan["labelled_share"] = round(labels.supervised / max(1, labels.tokens), 4)
    kept = slice(-limit, None) if limit and args.truncation_mode == "keep_end" else slice(limit)
    for place in np.linspace(0, len(tokenized) - 1, num=min(num_previews, len(tokenized)), dtype=int).tolist():
        row = {name: [tokenized[place][name][kept]] for name in ("input_ids", "labels")}
        ((ids, row_labels),) = sequences(Dataset.from_dict(row), collator, 1)
        report.preview.append({"row": place, **preview_row(tokenizer, ids.tolist(), row_labels.tolist())})
    report.seconds = round(time.perf_counter() - start, 2)
    return report, per_row


def run_preflight(
    run: Path, script_args: ScriptArguments, args: TrainingArguments, model: ModelPlan, rows: TrainingRows
) -> dict:
    """Check everything, print one screen, and write preflight.json and the plots into the run's folder.

    Returns:
        The memory plan, which says whether activations are recomputed (`activation_checkpointing`).

    Raises:
        InputError: A check refuses the run and is not in `script_args.allow`. A run in the folder stays as it is.
    """
    start = time.perf_counter()
    if len(rows.prepared) == 0:
        raise InputError(
            f"supervision: with max_length: {args.max_length} no row has anything left to learn from; raise it"
        )
    tokenizer = model.tokenizer
    generation_config = load_generation_config(model.name_or_path, **model.source)
    control_texts = control_tokens(tokenizer, end_token_ids(tokenizer, generation_config))
    findings, test_questions = check_test_split(script_args, control_texts)
    held_out = {"test": test_questions}
    if rows.evaluation is not None:
        held_out = {"validation": [question_of(prompt) for prompt in rows.evaluation["prompt"]], **held_out}
        findings += check_conversations(rows.evaluation, control_texts, "in the validation split, ")
    report, per_row = inspect(rows, tokenizer, generation_config, args, held_out, script_args.preview_rows)
    config, pairs = load_model_config(model.name_or_path, **model.source), args.decoder_start is not None
    largest, vocabulary = int(token_ids(rows.prepared)[0].max()), config.get_text_config().vocab_size
    if largest >= max([vocabulary, *(new_id + 1 for new_id in model.new_ids)]):
        raise InputError(
            f"the tokenizer makes token {largest} of the rows, and the model has {vocabulary} tokens: they do not "
            "belong together; take both from where the model comes from"
        )
    longest = int(min(per_row["question tokens" if pairs else "row tokens"].max(), args.max_length or 2**62))
    answer = int(min(per_row["answer tokens"].max(), args.max_target_length or 2**62)) if pairs else 0
    findings += check_positions(config, max(longest, answer), args)
    length = args.max_length if args.packing else longest
    memory = check_memory(args, model, length, report.plan["labelled_share"], answer)
    if model.frozen:
        trained, total = memory.numbers["trained_parameters"], memory.numbers["model_parameters"]
        by = ", ".join(f"{pattern} {number:,}" for pattern, number in model.frozen.items())
        text = f"{total - trained:,} of {total:,} parameters are frozen ({by}); {trained:,} are trained"
        findings.append(Finding("frozen", "ok", text, numbers=model.frozen))
    report.findings += [*findings, memory, *count_special_tokens(rows.tokenized, tokenizer, script_args)]
    report.memory = memory.numbers
    report.allow(script_args.allow or [])
    report.seconds = round(time.perf_counter() - start, 2)
    colour = use_colour()
    print(render(report, colour), file=sys.__stdout__ if colour else sys.stdout, flush=True)

    # a finished or stopped run in the folder keeps its report until training replaces it
    if not (report.refused or script_args.preflight_only) or is_planned(run):
        report.save(run)
        plot_lengths(per_row, args.max_length, run / EDA)
    if report.refused:
        checks = " ".join(finding.check for finding in report.refused)
        reasons = "; ".join(f"{finding.check}: {finding.text}" for finding in report.refused)
        raise InputError(f"refused before the first step. {reasons}. To train all the same: --allow {checks}")
    return report.memory


def check_test_split(script_args: ScriptArguments, control_texts: list[str]) -> tuple[list[Finding], list[str]]:
    """What is wrong with the samples that step 3 will answer, and their questions, which must not be trained on."""
    try:
        samples = load_test_samples(vars(script_args))
    except InputError as error:
        return [Finding("test_split", "warning", f"step 3 will have nothing to answer: {error}")], []
    findings, questions = [], []
    if not samples.have_references:
        text = "the test split has no answers: step 3 answers it, and measures nothing that needs references"
        findings.append(Finding("test_split", "note", text))
    if script_args.dataset_eval_split != script_args.dataset_test_split:
        questions = [question_of(sample["prompt"]) for sample in samples]
        for finding in check_control_tokens(questions, control_texts, "in the questions of the test split, "):
            finding.rows = sorted(row for place in finding.rows for row in samples.rows_of(place))
            findings.append(finding)
    return findings, questions


def check_vocabulary(tokenized: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Text that the tokenizer has no tokens for, and speaker tags such as #Person1# that it takes apart."""
    findings, unknown = [], tokenizer.unk_token_id
    if unknown not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        ids, _ = token_ids(tokenized)
        share = float((ids == unknown).mean())
        text = (
            f"{percent(share)} of the tokens are {tokenizer.unk_token}, as the vocabulary lacks what is written; the "
            "model can neither read nor write it: take one of the language of the data"
        )
        if share > MIN_UNKNOWN:
            level = "refused" if share > MAX_UNKNOWN else "warning"
            findings.append(Finding("unknown_tokens", level, text, numbers={"share": share}))
    tags = Counter(SPEAKER_TAG.findall("\n".join(question_of(prompt) for prompt in tokenized["prompt"])))
    common = [tag for tag, n in tags.most_common(10) if n >= len(tokenized) / 10]
    sizes = {tag: len(tokenizer(tag, add_special_tokens=False)["input_ids"]) for tag in common}
    if split := [tag for tag, size in sizes.items() if size > 1]:
        text = f"{split[0]} is split into {sizes[split[0]]} tokens; special_tokens: {split} would keep such tags whole"
        findings.append(Finding("tags", "note", text))
    return findings


def count_special_tokens(
    train_rows: Dataset, tokenizer: PreTrainedTokenizerBase, script_args: ScriptArguments
) -> list[Finding]:
    """How often each added token stands in the rows: one of `special_tokens` that never does cannot be learned."""
    tokens = tokens_to_add(script_args)
    if not tokens:
        return []
    ids, _ = token_ids(train_rows)
    counts = {token: int((ids == tokenizer.convert_tokens_to_ids(token)).sum()) for token in tokens}
    shown = ", ".join(f"{token} {n}" for token, n in counts.items())
    missing = [token for token in script_args.special_tokens or [] if counts[token] == 0]
    text = f"in the rows: {shown}" + (f"; {', '.join(missing)} cannot be learned" if missing else "")
    return [Finding("special_tokens", "warning" if missing else "ok", text, numbers=counts)]
