"""
Requests to the judge: as many at once as its endpoint takes, none beyond the budget, each reply read into a row.

    evaluation   id, prediction_hash, status ok|refusal|truncated|content_filter|invalid|error,
                 evaluation {criterion: {explanation, score}} or null, expected {criterion: float} or null,
                 usage {prompt_tokens, cached_tokens, completion_tokens} or null, cost (US dollars) or null,
                 possible_cost (US dollars), error

`usage` and `cost` are of every reply that was paid for to get the row; `possible_cost` is what requests may have cost at
most whose replies never came, or did not say what they used. Imports without torch.
"""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    DefaultAsyncHttpxClient,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
    UnprocessableEntityError,
)
from openai.types.chat import ChatCompletion

from finetuning.configs import JudgeArguments
from finetuning.errors import InputError
from finetuning.judge import Form, Item, expected_scores, read_choice
from finetuning.prices import Price

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_WAIT = 600.0  # seconds of a Retry-After that are worth waiting for
RATE_LIMIT_ROUNDS = 3  # of the client's own retries, before a rate limit is an error of the sample
FAILURES_IN_A_ROW = 10  # from the start on: then nothing is set up as it should be
NUM_TOP_LOGPROBS = 20  # the most that the API gives


def endpoint_of(args: JudgeArguments) -> str:
    """The address of the judge.

    Raises:
        InputError: It is none.
    """
    # always given to the client, which takes an empty OPENAI_BASE_URL for an address
    url = args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    key = "base_url" if args.base_url else "OPENAI_BASE_URL"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"{key}: {show_url(url)} is no address; write it as http://localhost:8000/v1")
    return url


def read_key() -> str:
    """The key of the environment, without the line break that a file may have left; empty if there is none.

    Raises:
        InputError: No key looks like this.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("OPENAI_API_KEY holds spaces or characters that no key has; set it again")
    return key


def has_key(args: JudgeArguments) -> bool:
    """Whether requests can be sent: OpenAI wants a key, a server of one's own may take any."""
    return bool(read_key()) or endpoint_of(args) != OPENAI_URL


def client_settings(args: JudgeArguments) -> dict:
    """What an OpenAI client, of either kind, is made with."""
    return {
        "base_url": endpoint_of(args),
        "api_key": read_key() or "none",
        "timeout": args.timeout,
        "max_retries": args.max_retries,
    }


def show_url(url: str) -> str:
    """An address without the password that may stand in it."""
    head, separator, rest = url.partition("//")
    return f"{head}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else url


def hide_key(text: str) -> str:
    """A text in which the key cannot be read."""
    return text.replace(read_key() or "\0", "***")


class OutOfMoney(Exception):
    """A request is not sent again, as that could pass --max_cost."""


@dataclass
class Sending:
    """One request on its way, over all attempts of the client.

    Args:
        tokens: Expected to be used.
        most: US dollars that an attempt can cost.
        is_open: An attempt has left, and neither its reply nor a refusal has come.
        num_lost: Attempts whose replies never came, and that may have been billed.
        num_set_aside: Attempts that money has been set aside for; the first one's is before it is made.
    """

    tokens: float
    most: float
    is_open: bool = False
    num_lost: int = 0
    num_set_aside: int = 1


class RateControl:
    """When the next request may leave, and how many may be in flight.

    The client retries by itself; this sees each of its attempts (as hooks of its HTTP client), so that the budgets hold
    for retries too. A 429 or 503 halves the number in flight, once for all that left before it; each success raises
    it a little. A Retry-After holds back all requests, not only the one that it answered.

    Args:
        concurrency: The most requests in flight.
        requests_per_minute, tokens_per_minute: Budgets; requests leave evenly. None is no limit.
        stop: When it is set, what has not left yet is cancelled.
        budget: Of money.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        stop: asyncio.Event,
        budget: "Budget",
    ):
        self.most = concurrency
        self.limit = float(concurrency)
        self.stop, self.budget = stop, budget
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_tokens = self._paused_until = self._last_cut = 0.0  # by time.monotonic
        self._sending: ContextVar[Sending] = ContextVar("sending")  # of this task
        self._by_task: dict[asyncio.Task, Sending] = {}

    def open_http_client(self) -> DefaultAsyncHttpxClient:
        return DefaultAsyncHttpxClient(event_hooks={"request": [self.before], "response": [self.after]})

    @contextlib.contextmanager
    def sending(self, tokens: float, most: float) -> Iterator[Sending]:
        """Requests of this task within this are one, whose attempts are counted."""
        sending = Sending(tokens, most)
        token, task = self._sending.set(sending), asyncio.current_task()
        self._by_task[task] = sending
        try:
            yield sending
        finally:
            self._sending.reset(token)
            del self._by_task[task]

    def is_waiting(self, task: asyncio.Task) -> bool:
        """Whether nothing of a task is in flight."""
        sending = self._by_task.get(task)
        return sending is not None and not sending.is_open

    async def before(self, request) -> None:
        """Wait until the attempt may leave.

        Raises:
            OutOfMoney: An earlier attempt may have been billed, and another one could pass the limit.
        """
        sending = self._sending.get()
        if sending.is_open:  # the client has given up on its reply
            sending.is_open = False
            sending.num_lost += 1
            if not self.budget.set_aside(sending.most):
                self.budget.exhausted = True
                raise OutOfMoney
            sending.num_set_aside += 1
        while not self.stop.is_set():
            now = time.monotonic()
            leave = max(self._next_request, self._next_tokens, self._paused_until)
            if leave <= now:
                self._next_request = now + self._seconds_per_request
                self._next_tokens = max(now, self._next_tokens) + self._seconds_per_token * sending.tokens
                request.extensions["left"] = now
                sending.is_open = True
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), leave - now)
        raise asyncio.CancelledError

    async def after(self, response) -> None:
        """Learn from the status of a reply.

        Raises:
            InputError: The quota of the key is used up, or the endpoint wants a wait that is not worth it.
        """
        if response.is_success:
            self.limit = min(self.most, self.limit + 1 / self.limit)
            return
        self._sending.get().is_open = False  # a refusal is not billed
        if response.status_code in (429, 503):
            now = time.monotonic()
            if response.request.extensions["left"] > self._last_cut:
                self.limit, self._last_cut = max(1.0, self.limit / 2), now
            if response.status_code == 429:
                await response.aread()
                if (
                    b"insufficient_quota" in response.content
                ):  # the client would try again, though waiting does not help
                    raise InputError("the judge's endpoint says that the quota of this key is used up")
            wait = read_retry_after(response.headers)
            if wait > LONGEST_WAIT:
                raise InputError(
                    f"the judge's endpoint asks to wait {wait / 60:.0f} minutes; what was judged is kept, start again then"
                )
            self._paused_until = max(self._paused_until, now + wait)

    def settle(self, expected: float, used: float) -> None:
        """Correct the budget of tokens by what a reply has used."""
        self._next_tokens += self._seconds_per_token * (used - expected)


def read_retry_after(headers) -> float:
    """Seconds to wait, as milliseconds, seconds or a date say it; 0 where nothing does."""
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(headers.get("retry-after-ms")) / 1000)
    text = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


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
    """

    client: AsyncOpenAI
    model: str
    args: JudgeArguments
    rate: RateControl
    budget: Budget
    price: Price | None
    tokens_per_byte: float
    completion_tokens: float
    has_replied: bool = False
    structured: bool = True  # until the endpoint refuses a schema
    _reached: bool = False  # something has answered
    _num_failed: int = 0  # before anything was judged
    _fault: InputError | None = None  # nothing more can be judged
    _warnings: set[str] = field(default_factory=set)

    async def judge(self, item: Item, form: Form) -> dict:
        """The evaluation row of one item; a reply that was cut off or does not fit is asked for once more, with twice the limit.

        Raises:
            InputError: No request can succeed: the key is refused, or there is no such model.
        """
        reply = await self._ask(item, form, self.args.max_tokens)
        if reply["status"] in ("truncated", "invalid"):
            reply = await self._ask_again(item, form, reply)
        return {**item.row, **reply}

    async def _ask_again(self, item: Item, form: Form, first: dict) -> dict:
        """The second reply, or the first where there is none: it was paid for, whatever becomes of this."""
        if not self.budget.set_aside(self._most(item, form, 2 * self.args.max_tokens)):
            self.budget.exhausted = True
            return first
        try:
            again = await self._ask(item, form, 2 * self.args.max_tokens)
        except asyncio.CancelledError:
            if self.rate.stop.is_set():  # it has not left
                return first
            raise
        except InputError as error:
            self._fault = error
            return first
        return add_usage(first, again) if again["status"] == "error" else add_usage(again, first)

    def _most(self, item: Item, form: Form, max_tokens: int) -> float:
        return 0.0 if self.price is None else most_cost(self.price, prompt_bytes(item, form), max_tokens)

    async def _ask(self, item: Item, form: Form, max_tokens: int) -> dict:
        """One reply, for which what an attempt can cost at most has been set aside."""
        expected = prompt_bytes(item, form) * self.tokens_per_byte + self.completion_tokens
        most = self._most(item, form, max_tokens)
        cost = 0.0
        with self.rate.sending(expected, most) as sending:
            try:
                reply = await self._send(item, form, max_tokens)
                if reply["usage"] is not None:
                    sending.is_open = False  # its cost is known
                    cost = reply["cost"] or 0.0
                    self.rate.settle(expected, reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"])
                num_lost = sending.num_lost + sending.is_open
                reply["possible_cost"] = num_lost * most
                if sending.is_open and reply["status"] != "error" and self.price is not None:
                    self._warn("does not say how many tokens a reply used; it counts at its most against --max_cost")
                return {**reply, "error": reply["error"] and hide_key(reply["error"])}
            finally:
                num_lost = sending.num_lost + sending.is_open
                self.budget.settle(sending.num_set_aside * most, cost + num_lost * most)

    async def _send(self, item: Item, form: Form, max_tokens: int) -> dict:
        rounds = RATE_LIMIT_ROUNDS
        while True:
            rounds -= 1
            body = build_request(self.model, item, form, self.args, max_tokens, self.structured)
            # the first one fails soon if there is no server at all
            client = (
                self.client if self._reached else self.client.with_options(max_retries=min(2, self.args.max_retries))
            )
            try:
                completion = await client.chat.completions.create(**body)
            except (AuthenticationError, PermissionDeniedError) as error:
                raise InputError(
                    f"the judge's endpoint refuses the key (status {error.status_code}); check OPENAI_API_KEY"
                ) from error
            except NotFoundError as error:
                raise InputError(f"the judge's endpoint has no model `{self.model}`; set --judge_model") from error
            except RateLimitError as error:
                if rounds > 0:
                    continue
                return failure(describe_error(error))
            except (BadRequestError, UnprocessableEntityError) as error:
                if self.structured and re.search("response_format|json_schema|structured", str(error.message)):
                    self.structured = False
                    self._warn("takes no JSON schema, so replies are asked for in words only and checked here")
                    continue
                if "logprobs" in str(error.message) and self.args.expected_scores:
                    raise InputError(
                        f"the judge's endpoint gives no logprobs of `{self.model}`; leave --expected_scores out"
                    ) from error
                return failure(describe_error(error))
            except APITimeoutError as error:
                return failure(describe_error(error))
            except OutOfMoney:
                return failure("no reply came, and --max_cost allows no other request")
            except InputError:
                raise
            except (OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON, or no text
                if not self._reached:
                    if isinstance(error.__cause__, httpx2.ConnectError):
                        url = show_url(str(self.client.base_url))
                        raise InputError(f"no server answers at {url}: {describe_error(error)}") from error
                    self._reached = True  # with all retries, as others may succeed
                    continue
                return failure(describe_error(error))
            self._reached = True
            return read_completion(completion, form, self.price, self.args.expected_scores)

    def _warn(self, what: str) -> None:
        if what not in self._warnings:
            print(f"warning: {show_url(str(self.client.base_url))} {what}", file=sys.stderr)
            self._warnings.add(what)

    async def judge_all(self, items: Iterable[Item], form: Form) -> AsyncIterator[dict]:
        """Judge items, as many at once as the endpoint takes, and yield each row as it arrives.

        The first is judged alone, as it shows what the endpoint can do. Once the rate control's `stop` is set or the
        money is used up, nothing more is sent, and what is in flight is waited for.

        Raises:
            InputError: No request can succeed; what was in flight has been given before.
        """
        stop, waiting = self.rate.stop, iter(items)
        finished: asyncio.Queue[asyncio.Task | None] = asyncio.Queue()
        running: set[asyncio.Task] = set()
        held: Item | None = None  # for want of money, until others have cost less than they could
        num_rows = 0
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: finished.put_nowait(None))
        try:
            while True:
                most_running = int(self.rate.limit) if num_rows else 1
                while not stop.is_set() and self._fault is None and len(running) < most_running:
                    item = held or next(waiting, None)
                    held = None
                    if item is None:
                        break
                    if not self.budget.set_aside(self._most(item, form, self.args.max_tokens)):
                        held = item
                        break
                    task = asyncio.create_task(self.judge(item, form))
                    task.add_done_callback(finished.put_nowait)
                    running.add(task)
                if not running:
                    break
                task = await finished.get()
                if task is None:  # what waits to be sent again is not waited for
                    for waiting_task in filter(self.rate.is_waiting, running):
                        waiting_task.cancel()
                    continue
                running.discard(task)
                if task.cancelled():  # it had not left when all was stopped
                    continue
                if task.exception() is not None:
                    self._fault = self._fault or task.exception()
                    continue
                row = task.result()
                num_rows += 1
                if num_rows == 1 and row["status"] == "invalid" and self.structured:
                    self._warn("does not keep to the JSON schema; replies that do not fit it are `invalid`")
                yield row
                self._watch(row)
            self.budget.exhausted |= held is not None
            if self._fault is not None:
                raise self._fault
        finally:
            stopping.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, stopping, return_exceptions=True)

    def _watch(self, row: dict) -> None:
        """Find out that nothing works, if nothing has ever worked."""
        self.has_replied = self.has_replied or row["status"] != "error"
        self._num_failed += not self.has_replied
        if self._num_failed == FAILURES_IN_A_ROW and self._fault is None:
            self._fault = InputError(
                f"the first {self._num_failed} requests all failed, the last with {row['error']}; nothing more is sent"
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
        "error": hide_key(error),
    }  # fmt: skip


def read_completion(
    completion: ChatCompletion, form: Form, price: Price | None, expected: bool, batch: bool = False
) -> dict:
    """What a row holds of a reply, whatever came."""
    usage = _read_usage(completion)
    cost = price.cost(usage, batch) if price is not None and usage is not None else None
    try:  # the client checks no types, so anything may be missing in it
        choice = completion.choices[0]
        status, evaluation, error = read_choice(choice, form)
        means = expected_scores(choice) if expected and status == "ok" else None
    except (AttributeError, TypeError, IndexError, KeyError, ValueError):
        return {**failure("the reply is no chat completion"), "usage": usage, "cost": cost}
    return {
        "status": status,
        "evaluation": evaluation,
        "expected": means,
        "usage": usage,
        "cost": cost,
        "possible_cost": 0.0,
        "error": error,
    }


def _read_usage(completion: ChatCompletion) -> dict | None:
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(value, int) and value >= 0 for value in counts):
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


def describe_error(error: Exception) -> str:
    """One line that names the fault and cannot hold the key."""
    if isinstance(error, APIStatusError):
        message = f"{type(error).__name__}: {hide_key(' '.join(str(error.message).split()))[:300]}"
    elif isinstance(error, APIConnectionError):
        message = f"{type(error).__name__}: {error.__cause__ or error}".splitlines()[0]
    else:
        message = f"{type(error).__name__}: the reply is not JSON"
    return hide_key(message)
