"""
What the labels of a run teach: an answer and its end, and whether generation stops at that end.
"""

import functools
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetuning.data.chat import end_token_ids
from finetuning.data.checks import Finding
from finetuning.data.tokens import IGNORED
from finetuning.training.lengths import percent

MIN_ENDED_SHARE = 0.5  # of the answers; with fewer that end in an end token, a run is refused
MAX_UNSUPERVISED_SHARE = 0.1  # of the rows; with more that have nothing to learn from, a run is refused
TAIL = 4  # an end token is looked for among so many last tokens of an answer, as white space may follow it


@dataclass
class Labels:
    """Counts over the sequences that the model will get. An answer is an unbroken run of learned tokens."""

    rows: int = 0
    answers: int = 0
    tokens: int = 0
    supervised: int = 0  # tokens that are learned
    ended: int = 0  # answers that end in an end token
    unsupervised_rows: int = 0
    whole_rows: int = 0  # rows of which every token is learned
    double_bos: int = 0
    double_ends: int = 0  # answers that end in the same end token twice
    pad_labels: int = 0
    last_tokens: Counter[int | None] = field(default_factory=Counter)  # answers by their last token
    last_of_uncut: Counter[int | None] = field(default_factory=Counter)  # the same for answers that are surely not cut

    @property
    def ended_share(self) -> float:
        return self.ended / max(1, self.answers)


def count_labels(
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: list[int],
    max_length: int | None,
    behind_end: Collection[int] = (),
) -> Labels:
    """Count what the labels of an epoch teach.

    Args:
        rows: Token ids and labels of each sequence, as collated.
        max_length: Sequences of this length may have been cut; None means that none was.
        behind_end: Tokens that may stand behind the end token, where nothing is generated any more.
    """
    seen = Labels()
    ends, bos, pad = set(end_ids), tokenizer.bos_token_id, tokenizer.pad_token_id

    @functools.cache
    def is_blank(token_id: int) -> bool:
        return token_id in behind_end or not tokenizer.decode([token_id]).strip()

    for ids, labels in rows:
        places = np.flatnonzero(labels != IGNORED)
        seen.rows += 1
        seen.tokens += len(ids)
        seen.supervised += len(places)
        seen.double_bos += bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos
        if len(places) == 0:
            seen.unsupervised_rows += 1
            continue
        seen.whole_rows += len(places) >= len(labels) - 1  # the first token of a row is never predicted
        seen.pad_labels += pad not in ends and bool((labels == pad).any())
        answers = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        for answer in answers:
            tail = labels[answer[-TAIL:]][::-1].tolist()
            last = next((token_id for token_id in tail if token_id in ends or not is_blank(token_id)), None)
            seen.answers += 1
            seen.ended += last in ends
            seen.double_ends += len(tail) > 1 and tail[0] == tail[1] in ends
            seen.last_tokens[last] += 1
            seen.last_of_uncut[last] += max_length is None or len(ids) < max_length or answer is not answers[-1]
    return seen


def check_labels(
    labels: Labels, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, answers_only: bool
) -> list[Finding]:
    """Whether the labels teach an answer and its end, and whether generation stops at that end."""
    ends = end_token_ids(tokenizer, generation_config)
    return [
        *check_ends(labels, tokenizer, ends),
        *check_declared_ends(tokenizer, generation_config, ends),
        *check_supervision(labels, answers_only),
        *check_beginning_and_padding(labels, tokenizer, ends),
    ]


def check_ends(labels: Labels, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> list[Finding]:
    """Whether answers end in one token at which generation stops."""
    name = functools.partial(show_token, tokenizer)
    one_each = labels.answers == labels.rows - labels.unsupervised_rows
    unit, share, stops = "rows" if one_each else "answers", labels.ended_share, ", ".join(map(name, ends))
    numbers = {
        "rows": labels.rows,
        "answers": labels.answers,
        "ended": labels.ended,
        "share": share,
        "generation_stops_at": {name(i): i for i in ends},
        "rows_end_in": {name(i): n for i, n in labels.last_tokens.most_common(10)},
    }
    special = set(tokenizer.added_tokens_decoder) - set(ends)
    others = {i: n for i, n in labels.last_of_uncut.items() if i in special and n > 0.01 * labels.answers}
    findings = []
    if others:
        which = ", ".join(f"{name(i)} ({n} {unit})" for i, n in others.items())
        text = (
            f"{unit} end in {which}, but generation stops at {stops}: answers would go on; end every answer of the "
            "chat template in the same token"
        )
        findings.append(Finding("terminators_agree", "refused", text, numbers=numbers))
    if labels.answers and share < MIN_ENDED_SHARE:
        common = ", ".join(f"{name(i)} ({n})" for i, n in labels.last_tokens.most_common(3))
        text = (
            f"only {percent(share)} of the {'rows with labels' if one_each else unit} end in a token at which "
            f"generation stops ({stops}), so the model would not learn to stop; they end in {common}. Look at the "
            "preview: the chat template must write the end token as one token, labels must keep it, and max_length "
            "must not cut it off"
        )
        findings.append(Finding("terminator", "refused", text, numbers=numbers))
    elif labels.answers and not others:
        used = ", ".join(name(i) for i in labels.last_tokens if i in ends)
        text = f"{percent(share)} of the answers end in {used}, generation stops at {stops}"
        findings.append(Finding("terminator", "ok" if share == 1 else "warning", text, numbers=numbers))
    return findings


def check_declared_ends(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, ends: list[int]
) -> list[Finding]:
    """Which end tokens the checkpoints will have that the model's own generation config lacks."""
    declared = generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    added = ", ".join(show_token(tokenizer, i) for i in ends if i not in declared)
    if not declared or not added:
        return []
    only = ", ".join(show_token(tokenizer, i) for i in declared)
    text = f"the model's generation config stops at {only} only; checkpoints will stop at {added} as well"
    return [Finding("generation_config", "note", text)]


def check_supervision(labels: Labels, answers_only: bool) -> list[Finding]:
    """Whether each row has tokens that are learned, and others that are only read."""
    findings = []
    share = labels.unsupervised_rows / max(1, labels.rows)
    if labels.unsupervised_rows:
        why = "the question alone fills max_length, or the mask is wrong" if share < 1 else "no loss at all"
        text = f"{labels.unsupervised_rows} of {labels.rows} rows have no token to learn from; {why}"
        level = "refused" if share > MAX_UNSUPERVISED_SHARE else "warning"
        findings.append(Finding("supervision", level, text, numbers={"rows": labels.unsupervised_rows}))
    text = ""
    if labels.whole_rows and answers_only:
        text = f"in {labels.whole_rows} of {labels.rows} rows everything is learned, the question too"
    elif labels.whole_rows == labels.rows:
        text = "everything is learned, the question too, as completion_only_loss: false asks; the loss is mostly theirs"
    if text:
        findings.append(Finding("everything_supervised", "warning", text, numbers={"rows": labels.whole_rows}))
    return findings


def check_beginning_and_padding(labels: Labels, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> list[Finding]:
    """Whether rows begin with one BOS token, and whether padding is learned or hides the ends of answers."""
    bos, pad = (show_token(tokenizer, token_id) for token_id in (tokenizer.bos_token_id, tokenizer.pad_token_id))
    faults = (
        ("double_bos", labels.double_bos, f"rows begin with {bos} twice; take it out of the chat template"),
        (
            "double_end",
            labels.double_ends,
            "answers end in their end token twice; take out the one that stands in the data",
        ),
        ("pad_in_labels", labels.pad_labels, f"rows learn to write the padding token {pad}"),
    )
    findings = [Finding(check, "warning", f"{n} {text}", numbers={"rows": n}) for check, n, text in faults if n]
    if tokenizer.pad_token_id in ends:
        effect = "harmless here, as padding is masked by its place"
        if labels.ended_share < MIN_ENDED_SHARE:
            effect = "something masks it by its id, and with it the end: give padding a token of its own"
        text = f"padding and the end of an answer are the same token, {pad}; {effect}"
        findings.append(Finding("pad_is_end", "note", text))
    return findings


def show_token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    if token_id is None:
        return "nothing"
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return text if text.strip() else repr(text)
