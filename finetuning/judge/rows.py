"""
How a reply becomes a row (`EvaluationRow` in schemas.py), and what rows have cost. Imports without torch.

`usage` and `cost` are of every reply that was paid for to get the row; `possible_cost` is what attempts may have cost
at most whose replies never came, or did not say what they used.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice
from pydantic import ValidationError

from finetuning.credentials import hide
from finetuning.endpoint import MAX_TOKEN_COUNT
from finetuning.judge.form import Form
from finetuning.judge.money import Price
from finetuning.results import item_key, iterate_rows

SCORE = re.compile(rb'(?<!\\)"score"\s*:\s*(\d+)')


def make_reply(status: str, evaluation: dict | None, error: str | None = None) -> dict:
    """What a row holds besides what names its item, before anything is known of its cost."""
    return {
        "status": status, "evaluation": evaluation, "expected": None, "replied_as": None, "error": error,
        "usage": None, "cost": None, "possible_cost": 0.0,
    }  # fmt: skip


def failure(error: str) -> dict:
    """What a row holds if there is no reply."""
    return make_reply("error", None, hide(error))


def share(row: dict, name: str) -> dict:
    """The row of another model that gave the same answer, for which nothing was paid.

    Args:
        name: The model that `row` is of.
    """
    free = {"usage": None, "cost": None if row["cost"] is None else 0.0, "possible_cost": 0.0}
    return {**row, **free, "shared_with": row.get("shared_with", name)}


def add_usage(row: dict, other: dict) -> dict:
    """The row with what another reply about the same sample was paid for as well."""
    usages = [r["usage"] for r in (other, row) if r["usage"] is not None]
    costs = [r["cost"] for r in (other, row) if r["cost"] is not None]
    return {
        **row,
        "usage": {key: sum(usage[key] for usage in usages) for key in usages[0]} if usages else None,
        "cost": sum(costs) if costs else None,
        "possible_cost": other["possible_cost"] + row["possible_cost"],
    }


def read_earlier(rows: Path, keys: set[str]) -> dict[str, dict]:
    """What was paid for some items before, in rows of failures or of answers that have changed since."""
    paid = ("usage", "cost", "possible_cost")
    return {item_key(row): {name: row[name] for name in paid} for row in iterate_rows(rows) if item_key(row) in keys}


def cost_of(rows: Iterable[dict]) -> float:
    """US dollars that rows have cost, or may have."""
    return sum((row["cost"] or 0.0) + row["possible_cost"] for row in rows)


def read_completion(
    completion: ChatCompletion, form: Form, price: Price | None, expected: bool, batch: bool = False
) -> dict:
    """What a row holds of a reply.

    Args:
        expected: The mean scores under the judge's probabilities are wanted.
        batch: The reply came in a batch, at its price.
    """
    usage = _read_usage(completion)
    paid = {"usage": usage, "cost": None if price is None or usage is None else price.cost(usage, batch)}
    try:  # the client checks no types, so anything may be missing in it
        choice = completion.choices[0]
        reply = _read_choice(choice, form)
        reply["expected"] = expected_scores(choice) if expected and reply["status"] == "ok" else None
    except (AttributeError, TypeError, IndexError, KeyError, ValueError):
        return {**failure("the reply is no chat completion"), **paid}
    model = getattr(completion, "model", None)
    reply["replied_as"] = model if isinstance(model, str) else None
    return {**hide(reply), **paid}  # hidden all at once, as it takes time


def _read_choice(choice: Choice, form: Form) -> dict:
    if choice.message.refusal:
        return make_reply("refusal", None, choice.message.refusal)
    if choice.finish_reason == "content_filter":
        return make_reply("content_filter", None, "the endpoint's filter withheld the reply")
    text = choice.message.content or ""
    if choice.finish_reason == "length":
        return make_reply("truncated", None, text)
    try:
        return make_reply("ok", form.reply.model_validate_json(text, strict=True).model_dump())
    except ValidationError:
        return make_reply("invalid", None, text)


def _read_usage(completion: ChatCompletion) -> dict | None:
    usage = getattr(completion, "usage", None)
    prompt, completed = _read_count(usage, "prompt_tokens"), _read_count(usage, "completion_tokens")
    if prompt is None or completed is None or max(prompt, completed) > MAX_TOKEN_COUNT:
        return None
    cached = _read_count(getattr(usage, "prompt_tokens_details", None), "cached_tokens") or 0
    return {"prompt_tokens": prompt, "cached_tokens": min(cached, prompt), "completion_tokens": completed}


def _read_count(counts: object, name: str) -> int | None:
    value = getattr(counts, name, None)
    return value if isinstance(value, int) and value >= 0 else None


def expected_scores(choice: Choice) -> dict[str, float] | None:
    """Mean of each score under the judge's own probabilities, over the exact tokens 1 to 10, renormalised.

    Finer than the score, as a judge that is torn between 7 and 8 says so (Liu et al. 2023, G-Eval).

    Returns:
        By criterion; None where the server gave no log-probabilities, or a score is no token of its own. A judge whose
        tokenizer writes 10 as 1 and 0 has its `1` split by what it would have written next, where that is known.
    """
    if choice.logprobs is None or not choice.logprobs.content:
        return None
    tokens = choice.logprobs.content
    spelled = [bytes(token.bytes) if token.bytes is not None else token.token.encode() for token in tokens]
    text = b"".join(spelled)
    # the token that begins at each byte
    starts = {start: index for index, start in enumerate(itertools.accumulate(map(len, spelled), initial=0))}
    try:
        criteria = list(json.loads(text))
    except ValueError:
        return None
    found = [match.start(1) for match in SCORE.finditer(text)]
    if len(found) != len(criteria) or not all(start in starts for start in found):
        return None
    means = {}
    for criterion, start in zip(criteria, found, strict=True):
        masses = _score_masses(tokens[starts[start]], tokens[starts[start] + 1 : starts[start] + 2])
        if masses is None:
            return None
        means[criterion] = sum(score * mass for score, mass in masses.items()) / sum(masses.values())
    return means


def _score_masses(
    token: ChatCompletionTokenLogprob, following: list[ChatCompletionTokenLogprob]
) -> dict[int, float] | None:
    """Probability of each score at the token that begins it; None if none of the likely tokens is a score."""
    masses: dict[int, float] = {}
    for candidate in token.top_logprobs or []:
        text = candidate.token
        if text.isdecimal() and 1 <= int(text) <= 10 and text == str(int(text)):
            masses[int(text)] = masses.get(int(text), 0.0) + math.exp(candidate.logprob)
    if not masses or sum(masses.values()) == 0:
        return None
    if 10 not in masses and token.token == "1" and following:  # then 10 begins as 1 does
        zero = sum(math.exp(c.logprob) for c in following[0].top_logprobs or [] if c.token == "0")
        one = masses.get(1, 0.0)
        masses[10] = one * min(zero, 1.0)
        masses[1] = one - masses[10]
    return masses
