"""
Requests to the judge: as many at once as its endpoint takes, none beyond the budget, each reply read into a row.

    evaluation   id, prediction_hash, status ok|refusal|truncated|content_filter|invalid|error,
                 evaluation {criterion: {explanation, score}} or null, expected {criterion: float} or null,
                 usage {prompt_tokens, cached_tokens, completion_tokens} or null, cost (US dollars) or null,
                 possible_cost (US dollars), replied_as (the model, by its reply) or null, error

`usage` and `cost` are of every reply that was paid for to get the row; `possible_cost` is what attempts may have cost at
most whose replies never came, or did not say what they used. Imports without torch.
"""

import asyncio
import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from openai import (
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    NotFoundError,
    OpenAIError,
    RateLimitError,
    UnprocessableEntityError,
)
from openai.types.chat import ChatCompletion

from finetuning.config.arguments import JudgeArguments
from finetuning.credentials import hide, hide_all
from finetuning.endpoint import (
    MAX_TOKEN_COUNT,
    MAX_WAIT,
    Endpoint,
    check_key,
    never_arrived,
    read_retry_after,
    seconds_to_wait,
)
from finetuning.errors import InputError
from finetuning.judge.form import Form, Item, expected_scores, read_choice
from finetuning.judge.prices import Price

RATE_LIMIT_ROUNDS = 3  # times --max_retries, before a rate limit is an error of the sample
RETRIES_UNREACHED = 2  # while nothing has ever answered at the address
FAILURES_IN_A_ROW = 10  # from the start on: then nothing is set up as it should be
NUM_TOP_LOGPROBS = 20  # the most that the API gives


class Stopped(Exception):
    """An attempt is not made, as nothing more is to be sent."""


class RateControl:
    """When the next attempt may leave, and how many requests may be in flight.

    A 429 or 503 halves the number in flight, once for all that left before it; each success raises it a little. A
    Retry-After holds back all requests, not only the one that it answered.

    Args:
        concurrency: The most requests in flight.
        requests_per_minute, tokens_per_minute: Budgets; attempts leave evenly. None is no limit.
        stop: When it is set, what has not left yet never does.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        stop: asyncio.Event,
    ):
        self.most = concurrency
        self.limit = float(concurrency)
        self.stop = stop
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_tokens = self._paused_until = self._last_cut = 0.0  # by time.monotonic

    async def leave(self, tokens: float, wait: float = 0.0) -> float:
        """Wait until an attempt may leave; gives when it does.

        Args:
            tokens: Expected to be used.
            wait: Seconds, at least.

        Raises:
            Stopped: It may not any more.
        """
        earliest = time.monotonic() + wait
        while not self.stop.is_set():
            now = time.monotonic()
            leave = max(earliest, self._next_request, self._next_tokens, self._paused_until)
            if leave <= now:
                self._next_request = now + self._seconds_per_request
                self._next_tokens = max(now, self._next_tokens) + self._seconds_per_token * tokens
                return now
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), leave - now)
        raise Stopped

    def succeeded(self) -> None:
        """More may be in flight."""
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def refused(self, error: APIStatusError, left: float) -> None:
        """Learn from a refusal of an attempt that left at some time.

        Raises:
            InputError: The quota of the key is used up, or the endpoint wants a wait that is not worth it.
        """
        if error.status_code not in (429, 503):
            return
        now = time.monotonic()
        if left > self._last_cut:
            self.limit, self._last_cut = max(1.0, self.limit / 2), now
        if error.status_code == 429 and "insufficient_quota" in error.response.text:
            raise InputError("the judge's endpoint says that the quota of this key is used up")
        wait = read_retry_after(error.response.headers)
        if wait > MAX_WAIT:
            raise InputError(
                f"the judge's endpoint asks to wait {wait / 60:.0f} minutes; what was judged is kept, start again then"
            )
        self._paused_until = max(self._paused_until, now + wait)

    def settle(self, expected: float, used: float) -> None:
        """Correct the budget of tokens by what a reply has used."""
        self._next_tokens += self._seconds_per_token * (used - expected)


class Budget:
    """Money. What a request could cost at most is set aside before it leaves, so that the limit cannot be passed.

    Args:
        limit: US dollars, of earlier starts too. None is no limit.
        spent: What the rows there are have cost.
    """

    def __init__(self, limit: float | None, spent: float):
        self.limit, self.spent, self._set_aside = limit, spent, 0.0
        self.exhausted = False  # something was not sent for want of money

    def set_aside(self, most: float) -> bool:
        """Whether a request that costs at most this much may be sent."""
        if self.limit is not None and self.spent + self._set_aside + most > self.limit:
            return False
        self._set_aside += most
        return True

    def settle(self, most: float, cost: float) -> None:
        """The request that was set aside for has cost this much."""
        self._set_aside -= most
        self.spent += cost


@dataclass
class Judge:
    """One judge at an endpoint.

    Args:
        model: Its name there.
        tokens_per_byte: Of prompts, for the budget of tokens.
        completion_tokens: Expected of a reply.
        has_replied: It has judged something, on an earlier start.
        fault: Why nothing more can be judged.
    """

    endpoint: Endpoint
    client: AsyncOpenAI
    model: str
    args: JudgeArguments
    rate: RateControl
    budget: Budget
    price: Price | None
    tokens_per_byte: float
    completion_tokens: float
    has_replied: bool = False
    fault: InputError | None = None
    is_trying: bool = False  # its first request is under way, and no other is to be sent
    num_in_flight: int = 0
    _structured: bool = True  # until the endpoint refuses a schema
    _reached: bool = False  # something has answered
    _num_rows: int = 0
    _num_failed: int = 0  # before anything was judged
    _warnings: set[str] = field(default_factory=set)

    async def judge(self, item: Item, form: Form) -> dict | None:
        """The evaluation row of one item, for whose first attempt money has been set aside.

        A reply that was cut off or does not fit is asked for once more, with twice the limit. None if all was stopped
        before anything was sent that may have been billed.

        Raises:
            InputError: No request can succeed: the key is refused, or there is no such model.
        """
        reply = await self._ask(item, form, self.args.max_tokens)
        if reply is not None and reply["status"] in ("truncated", "invalid"):
            reply = await self._ask_again(item, form, reply)
        if reply is None:
            return None
        self._watch(reply)
        return {**item.row, **reply}

    async def _ask_again(self, item: Item, form: Form, first: dict) -> dict:
        """The second reply, or the first where there is none: it was paid for, whatever becomes of this."""
        if not self.budget.set_aside(self.most_cost(item, form, 2 * self.args.max_tokens)):
            self.budget.exhausted = True
            return first
        try:
            again = await self._ask(item, form, 2 * self.args.max_tokens)
        except InputError as error:
            self.fault = error
            return first
        if again is None:
            return first
        return add_usage(first, again) if again["status"] == "error" else add_usage(again, first)

    def most_cost(self, item: Item, form: Form, max_tokens: int | None = None) -> float:
        """US dollars that one attempt can cost."""
        if self.price is None:
            return 0.0
        return most_cost(self.price, prompt_bytes(item, form), max_tokens or self.args.max_tokens)

    async def _ask(self, item: Item, form: Form, max_tokens: int) -> dict | None:
        """One reply, over as many attempts as it takes: each sets money aside, is sent, and is settled."""
        most = self.most_cost(item, form, max_tokens)
        expected = prompt_bytes(item, form) * self.tokens_per_byte + self.completion_tokens
        reply, wait, num_lost, possible_cost = None, 0.0, 0, 0.0
        for num_attempts in itertools.count(1):
            if num_attempts > 1 and not self.budget.set_aside(most):
                self.budget.exhausted = True
                reply["error"] += "; --max_cost allows no other request"
                break
            cost, unsure = 0.0, False  # whether it was billed
            try:
                left = await self.rate.leave(expected, wait)
                self.num_in_flight += 1
                unsure = True  # until a reply says what it used, or a refusal comes
                try:
                    reply, wait, unsure = await self._attempt(item, form, max_tokens, num_attempts, left)
                finally:
                    self.num_in_flight -= 1
                if reply["usage"] is not None:
                    cost = reply["cost"] or 0.0
                    self.rate.settle(expected, reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"])
            except Stopped:
                if num_lost == 0:
                    return None
                reply["error"] += "; stopped before it was asked again"
                wait = None
            except InputError as error:  # a refusal, which is not billed
                unsure = False
                if num_lost == 0:
                    raise
                self.fault, reply, wait = error, failure(str(error)), None
            except asyncio.CancelledError:
                if not unsure and num_lost == 0:
                    raise
                reply, wait = failure("given up before its reply came"), None
            finally:
                self.budget.settle(most, cost + unsure * most)
                num_lost += unsure
                possible_cost += unsure * most
            if wait is None:
                break
        return {**reply, "possible_cost": possible_cost}

    async def _attempt(
        self, item: Item, form: Form, max_tokens: int, num_attempts: int, left: float
    ) -> tuple[dict, float | None, bool]:
        """What a row holds of one attempt, seconds until another one is worth while, and whether it may have been billed.

        Raises:
            InputError: No request can succeed.
        """
        structured = self._structured  # as sent: another request may find out meanwhile that no schema is taken
        body = build_request(self.model, item, form, self.args, max_tokens, structured)
        try:
            # not `completions.create`, which walks through the body for types to convert, a quarter of a request's work
            completion = await self.endpoint.attempt(
                self.client.post("/chat/completions", body=body, cast_to=ChatCompletion)
            )
        except APIStatusError as error:
            self._reached = True
            self.rate.refused(error, left)
            if structured and self._is_about_schema(error):
                self._structured = False
                self._warn("takes no JSON schema, so replies are asked for in words only and checked here")
                return failure(self.endpoint.describe(error)), 0.0, False
            self._check_hope(error)
            most_retries = self.args.max_retries * (RATE_LIMIT_ROUNDS if isinstance(error, RateLimitError) else 1)
            wait = seconds_to_wait(error, num_attempts) if num_attempts <= most_retries else None
            return failure(self.endpoint.describe(error)), wait, False  # a refusal is not billed
        except (TimeoutError, OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON, or no text
            most_retries = self.args.max_retries
            if never_arrived(error) and not self._reached:  # fails soon if there is no server at all
                most_retries = min(RETRIES_UNREACHED, most_retries)
                if num_attempts > most_retries:
                    raise InputError(
                        f"no server answers at {self.endpoint}: {self.endpoint.describe(error)}"
                    ) from error
            wait = seconds_to_wait(error, num_attempts) if num_attempts <= most_retries else None
            return failure(self.endpoint.describe(error)), wait, not never_arrived(error)
        self._reached = True
        self.rate.succeeded()
        reply = read_completion(completion, form, self.price, self.args.expected_scores)
        if reply["usage"] is None and reply["status"] != "error" and self.price is not None:
            self._warn("does not say how many tokens a reply used; it counts at its most against --max_cost")
        return reply, None, reply["usage"] is None

    def _is_about_schema(self, error: APIStatusError) -> bool:
        return isinstance(error, (BadRequestError, UnprocessableEntityError)) and bool(
            re.search("response_format|json_schema|structured", str(error.message))
        )

    def _check_hope(self, error: APIStatusError) -> None:
        """Raise where a refusal would meet every request."""
        check_key(error)
        if isinstance(error, NotFoundError):
            raise InputError(f"the judge's endpoint has no model `{self.model}`; set --judge_model") from error
        if error.status_code in (400, 422) and "logprobs" in str(error.message) and self.args.expected_scores:
            raise InputError(
                f"the judge's endpoint gives no logprobs of `{self.model}`; leave --expected_scores out"
            ) from error

    @property
    def is_tried(self) -> bool:
        """Whether its first request, which shows what the endpoint can do, has come back."""
        return self._num_rows > 0

    def _warn(self, what: str) -> None:
        if what not in self._warnings:
            print(f"warning: {self.endpoint} {what}", file=sys.stderr)
            self._warnings.add(what)

    def _watch(self, reply: dict) -> None:
        """Find out that nothing works, if nothing has ever worked."""
        self._num_rows += 1
        if self._num_rows == 1 and reply["status"] == "invalid" and self._structured:
            self._warn("does not keep to the JSON schema; replies that do not fit it are `invalid`")
        self.has_replied = self.has_replied or reply["status"] != "error"
        self._num_failed += not self.has_replied
        if self._num_failed == FAILURES_IN_A_ROW and self.fault is None:
            self.fault = InputError(
                f"the first {self._num_failed} requests all failed, the last with {reply['error']}; nothing more is sent"
            )


def prompt_bytes(item: Item, form: Form) -> int:
    """UTF-8 bytes of a request that are paid for as a prompt: its messages and its schema."""
    return form.num_bytes + len(item.data.encode())


def most_cost(price: Price, num_bytes: int, max_tokens: int, batch: bool = False) -> float:
    """US dollars that a request can cost; no token is shorter than a byte."""
    return price.cost({"prompt_tokens": num_bytes, "completion_tokens": max_tokens}, batch)


def build_request(
    model: str, item: Item, form: Form, args: JudgeArguments, max_tokens: int, structured: bool = True
) -> dict:
    """The body of one request, live or in a batch."""
    body = {
        "model": model,
        "messages": form.build_messages(item),
        "max_completion_tokens": max_tokens,
    }
    if structured:
        json_schema = {"name": "evaluation", "strict": True, "schema": form.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if args.temperature is not None:
        body["temperature"] = args.temperature
    if args.expected_scores:
        body |= {"logprobs": True, "top_logprobs": NUM_TOP_LOGPROBS}
    return body


def failure(error: str) -> dict:
    """What a row holds if there is no reply."""
    return {
        "status": "error", "evaluation": None, "expected": None, "usage": None, "cost": None, "possible_cost": 0.0,
        "replied_as": None, "error": hide(error),
    }  # fmt: skip


def read_completion(
    completion: ChatCompletion, form: Form, price: Price | None, expected: bool, batch: bool = False
) -> dict:
    """What a row holds of a reply, whatever came."""
    usage, model = _read_usage(completion), getattr(completion, "model", None)
    cost = price.cost(usage, batch) if price is not None and usage is not None else None
    try:  # the client checks no types, so anything may be missing in it
        choice = completion.choices[0]
        status, evaluation, error = read_choice(choice, form)
        means = expected_scores(choice) if expected and status == "ok" else None
    except (AttributeError, TypeError, IndexError, KeyError, ValueError):
        return {**failure("the reply is no chat completion"), "usage": usage, "cost": cost}
    said = {
        "status": status,
        "evaluation": evaluation,
        "expected": means,
        "replied_as": model if isinstance(model, str) else None,
        "error": error,
    }
    return {
        **hide_all(said),
        "usage": usage,
        "cost": cost,
        "possible_cost": 0.0,
    }  # hidden all at once, as it takes time


def _read_usage(completion: ChatCompletion) -> dict | None:
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(value, int) and 0 <= value <= MAX_TOKEN_COUNT for value in counts):
        return None
    cached = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None)
    cached = min(cached, counts[0]) if isinstance(cached, int) and cached > 0 else 0
    return {"prompt_tokens": counts[0], "cached_tokens": cached, "completion_tokens": counts[1]}


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


def cost_of(rows: Iterable[dict]) -> float:
    """US dollars that rows have cost, or may have."""
    return sum((row["cost"] or 0.0) + row["possible_cost"] for row in rows)
