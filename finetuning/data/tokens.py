"""
The tokens of a training row, and the labels of what is learned of them.
"""

import bisect
import json
import re

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from finetuning.data.chat import end_of_turn_id, fit_to_template, hidden_keys
from finetuning.errors import InputError

IGNORED = -100  # a label that counts in no loss


def _token_ends(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int] | None:
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


def _turn_end(tokenizer: PreTrainedTokenizerBase, text: str, until_turn: str) -> int | None:
    """Where in the text of a conversation a turn ends, in characters.

    Args:
        until_turn: What the chat template makes of the conversation up to this turn. It may close it with control
            tokens that do not stand behind an earlier turn, as Phi-3's does after the one that ends each turn.

    Returns:
        None if the template writes the turn in another way when more follows.
    """
    if text.startswith(until_turn):
        return len(until_turn)
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    piece = "|".join([*map(re.escape, names), r"\s+"])
    closing = re.compile(f"(?:{piece})*$").search(until_turn)
    pieces = re.findall(piece, closing[0]) if closing else []
    while pieces and not text.startswith(until_turn):
        until_turn = until_turn[: -len(pieces.pop())]
    return len(until_turn) if any(piece.strip() for piece in pieces) else None


def _earlier_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], ids: list[int], places: list[int], template: dict
) -> list[tuple[int, int]]:
    """Where the turns at these places, none of them the last one, stand among the tokens of a conversation.

    A turn whose text in the conversation is not how the template writes it as the last turn is left out.

    Args:
        ids: Tokens of the whole conversation.
        template: Arguments of apply_chat_template.
    """

    def write(end: int, ask: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=ask, **template)

    def count_tokens(end: int, ask: bool = False) -> int:
        """Tokens with which both the conversation and its first messages begin."""
        start_ids = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=ask, **template)["input_ids"]
        return common_prefix_length(start_ids, ids)

    spans = []
    text = write(len(messages))
    ends = _token_ends(tokenizer, text, ids)
    for place in places:
        before = write(place, ask=True)
        end = _turn_end(tokenizer, text, write(place + 1))
        if not text.startswith(before) or end is None:
            continue
        if ends is None:
            spans.append((count_tokens(place, ask=True), count_tokens(place + 1)))
        else:
            spans.append((bisect.bisect_right(ends, len(before)), bisect.bisect_right(ends, end)))
    return spans


def tokenize_row(
    row: dict,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    answers_only: bool,
    marked_only: bool,
) -> dict:
    """Tokens of a row, uncut, and the labels of what is learned of them.

    What is learned of a turn is what the template adds to the conversation before it, from the end of the prompt on
    which the model would write it. The last turn is learned to the end of the row, as in trl. An earlier one whose text
    in the row is not how the template writes it as the last turn, as where it strips the thinking from it, is not
    learned: the model would be taught to answer in a way in which nobody asks it to.

    Args:
        row: With prompt, completion and, as data.rows.to_training_row makes them, learned and conversation.
        answers_only: Whether to learn assistant's turns only, and not everything.
        marked_only: Whether to learn of them only what the template marks with {% generation %}.

    Returns:
        input_ids, labels; left_out, the number of turns that the template writes in another way; begins_alike, whether
        the row begins with the tokens of its prompt; hidden, what the template does not show, separated by spaces.
    """
    whole = json.loads(row["conversation"]) if row.get("conversation") else {}
    messages, tools = whole.get("messages") or [*row["prompt"], *row["completion"]], whole.get("tools")
    template = {"chat_template": chat_template, "tools": tools}
    messages = fit_to_template(tokenizer, messages, **template)
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=marked_only, **template)
    ids, last = encoded["input_ids"], len(messages) - 1
    prompt_ids = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, **template)["input_ids"]
    answer_start = common_prefix_length(prompt_ids, ids)
    learned = row.get("learned", [last])
    earlier = [place for place in learned if place != last]
    spans = _earlier_turns(tokenizer, messages, ids, earlier, template) if earlier else []
    left_out = len(earlier) - len(spans)
    if last in learned:
        spans.append((answer_start, len(ids)))
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


def tokenize_pair(row: dict, tokenizer: PreTrainedTokenizerBase, decoder_start: int) -> dict:
    """The row of an encoder-decoder model: a question as the encoder reads it, and behind it the answer, as the
    tokenizer writes a target, with labels on it. So preflight reads it like other rows, and PairCollator parts the two.

    Args:
        row: With prompt and completion, as data.rows.to_training_row makes them.
        decoder_start: The token that the decoder reads first; an answer does not repeat it.

    Returns:
        What tokenize_row returns.
    """
    question = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    answer = tokenizer(text_target=row["completion"][-1]["content"])["input_ids"]
    answer = answer[1:] if answer[:1] == [decoder_start] else answer
    turn_end = end_of_turn_id(tokenizer)
    if not {tokenizer.eos_token_id, turn_end}.intersection(answer):  # some tokenizers end no text
        answer = [*answer, tokenizer.eos_token_id if turn_end is None else turn_end]
    labels = [IGNORED] * len(question) + answer
    return {"input_ids": question + answer, "labels": labels, "left_out": 0, "begins_alike": True, "hidden": ""}


def cut_pair(
    row: dict, control_ids: set[int], max_length: int | None, max_target_length: int | None, truncation_mode: str
) -> dict:
    """A row of tokenize_pair with at most max_length tokens of its question and max_target_length of its answer.

    What the tokenizer puts around a question, such as its end token, stays.
    """
    size = row["labels"].count(IGNORED)
    question, answer = row["input_ids"][:size], row["input_ids"][size:][:max_target_length]
    if max_length is not None and size > max_length:
        text = [place for place, token_id in enumerate(question) if token_id not in control_ids] or [0]
        before, kept, after = question[: text[0]], question[text[0] : text[-1] + 1], question[text[-1] + 1 :]
        room = max_length - len(before) - len(after)
        cut = [*before, *(kept[-room:] if truncation_mode == "keep_end" else kept[:room]), *after]
        question = cut if room > 0 else question[:max_length]
    return {"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer}
