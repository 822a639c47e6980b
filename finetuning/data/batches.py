"""
What the trainer really gets: rows after template, tokenisation, truncation, packing and collation, without a model.

The steps are those of trl's SFTTrainer itself; training takes the tokenised rows from here, so that what was checked is
what is trained on.
"""

import bisect
import json
import re
from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import global_then_local_main_first

from finetuning.data.chat import TEMPLATE_ERRORS, fit_to_template, hidden_keys
from finetuning.data.fingerprints import fingerprint_of_result
from finetuning.errors import InputError

IGNORED = -100  # a label that counts in no loss


class RowPreparation(SFTTrainer):
    """The part of SFTTrainer that prepares rows. It has no model, and cannot train."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: SFTConfig):
        self._tokenizer = tokenizer
        self.args = args
        self.completion_only_loss = True if args.completion_only_loss is None else args.completion_only_loss
        needs_markers = args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template)
        try:
            self.chat_template = get_training_chat_template(tokenizer) if needs_markers else None
        except ValueError as error:
            raise InputError(f"assistant_only_loss: the chat template does not mark answers: {error}") from error

    def tokenize(self, rows: Dataset, name: str) -> Dataset:
        """Add what tokenize_row gives to rows of data.load_training_rows."""
        settings = {
            "tokenizer": self._tokenizer,
            "chat_template": self.chat_template,
            "answers_only": self.completion_only_loss,
            "marked_only": self.args.assistant_only_loss,
        }
        try:
            with global_then_local_main_first():
                return rows.map(
                    tokenize_row,
                    fn_kwargs=settings,
                    new_fingerprint=fingerprint_of_result(rows._fingerprint, settings),
                    num_proc=self.args.dataset_num_proc,
                    desc=f"Tokenizing {name} dataset",
                )
        except InputError:
            raise
        except TEMPLATE_ERRORS as error:  # roles that the template refuses, or a message in an unknown form
            raise InputError(f"the rows cannot be phrased with the chat template: {error}") from error

    def cut_and_pack(self, tokenized: Dataset, name: str) -> Dataset:
        """What the trainer makes of tokenised rows before it collates them."""
        return self._prepare_dataset(tokenized, self._tokenizer, self.args, self.args.packing, None, name)


def token_ends(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int] | None:
    """Where each token of a text ends, in characters; None if the tokenizer cannot say.

    A control token may take up the white space behind it, and yet it ends before that.
    """
    if not tokenizer.is_fast:
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    if encoded["input_ids"] != ids or ends != sorted(ends):
        return None
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        if text[end - 1 : end].isspace():
            name = tokenizer.convert_ids_to_tokens(ids[place])
            if text.startswith(name, start):
                ends[place] = start + len(name)
    return ends


def turn_end(tokenizer: PreTrainedTokenizerBase, text: str, until_turn: str) -> int | None:
    """Where in the text of a conversation a turn ends, in characters.

    Args:
        until_turn: What the chat template makes of the conversation up to this turn. It may close it with control tokens
            that do not stand behind an earlier turn, as Phi-3's does after the one that ends each turn.

    Returns:
        None if the template writes the turn in another way when more follows.
    """
    if text.startswith(until_turn):
        return len(until_turn)
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    piece = "|".join([*map(re.escape, names), r"\s+"])
    pieces = re.findall(piece, re.search(f"(?:{piece})*$", until_turn)[0])
    while pieces and not text.startswith(until_turn):
        until_turn = until_turn[: -len(pieces.pop())]
    return len(until_turn) if any(piece.strip() for piece in pieces) else None


def tokenize_row(
    row: dict,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    answers_only: bool,
    marked_only: bool,
) -> dict:
    """Tokens of a row, uncut, and the labels of what is learned of them.

    What is learned of a turn is what the template adds to the conversation before it, from the end of the prompt on which
    the model would write it. The last turn is learned to the end of the row, as in trl. An earlier one whose text in the
    row is not how the template writes it as the last turn, as where it strips the thinking from it, is not learned: the
    model would be taught to answer in a way in which nobody asks it to.

    Args:
        row: With prompt, completion and, as data.to_training_row makes them, learned and conversation.
        answers_only: Whether to learn assistant's turns only, and not everything.
        marked_only: Whether to learn of them only what the template marks with {% generation %}.

    Returns:
        input_ids, labels; left_out, the number of turns that the template writes in another way; begins_alike, whether the
        row begins with the tokens of its prompt; hidden, what the template does not show, separated by spaces.
    """
    whole = json.loads(row["conversation"]) if row.get("conversation") else {}
    messages, tools = whole.get("messages") or [*row["prompt"], *row["completion"]], whole.get("tools")
    template = {"chat_template": chat_template, "tools": tools}
    messages = fit_to_template(tokenizer, messages, **template)

    def write(end: int, ask: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=ask, **template)

    def count_tokens(end: int, ask: bool = False) -> int:
        """Tokens with which both the row and its first messages begin."""
        start_ids = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=ask, **template)["input_ids"]
        return common_prefix_length(start_ids, ids)

    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=marked_only, **template)
    ids, last = encoded["input_ids"], len(messages) - 1
    prompt_ids = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, **template)["input_ids"]
    answer_start = common_prefix_length(prompt_ids, ids)
    learned = row.get("learned", [last])
    earlier = [place for place in learned if place != last]
    spans = [(answer_start, len(ids))] if last in learned else []
    left_out = 0
    if earlier:
        text = write(len(messages))
        ends = token_ends(tokenizer, text, ids)
    for place in earlier:
        before = write(place, ask=True)
        end = turn_end(tokenizer, text, write(place + 1))
        if not text.startswith(before) or end is None:
            left_out += 1
        elif ends is None:
            spans.append((count_tokens(place, ask=True), count_tokens(place + 1)))
        else:
            spans.append((bisect.bisect_right(ends, len(before)), bisect.bisect_right(ends, end)))
    labels = [IGNORED] * len(ids) if answers_only else list(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    if marked_only:
        marks = encoded["assistant_masks"]
        if 1 not in marks:
            raise InputError("assistant_only_loss: the chat template marks no answer in some of the rows")
        labels = [label if mark else IGNORED for label, mark in zip(labels, marks, strict=True)]
    return {
        "input_ids": ids,
        "labels": labels,
        "left_out": left_out,
        "begins_alike": answer_start == len(prompt_ids),
        "hidden": " ".join(hidden_keys(tokenizer, messages, tools, chat_template=chat_template)) if whole else "",
    }


def build_collator(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> DataCollatorForLanguageModeling:
    """The collator that SFTTrainer builds for these arguments."""
    packed = args.packing and args.packing_strategy in ("bfd", "bfd_split")
    return DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.pad_token_id,
        padding_free=args.padding_free or packed,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


def sequences(prepared: Dataset, collator: Callable, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of every sequence of every batch, as the model will get them, padding left out."""
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in prepared.column_names]
    for start in range(0, len(prepared), batch_size):
        piece = prepared[start : start + batch_size]
        size = len(piece["input_ids"])
        batch = collator([{name: piece[name][i] for name in columns} for i in range(size)])
        ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        if "attention_mask" in batch:
            for row, mask in enumerate(batch["attention_mask"].numpy().astype(bool)):
                yield ids[row][mask], labels[row][mask]
        else:  # packed: each sequence starts where positions do
            starts = np.flatnonzero(batch["position_ids"].numpy()[0] == 0)
            for first, last in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
                yield ids[0, first:last], labels[0, first:last]
