"""
Requests to the judge: as many at once as its endpoint takes, none beyond the budget, each reply read into a row.

    evaluation   id, prediction_hash, status ok|refusal|truncated|content_filter|invalid|error,
                 evaluation {criterion: {explanation, score}} or null, expected {criterion: float} or null,
                 usage {prompt_tokens, cached_tokens, completion_tokens} or null, cost (US dollars) or null, error

`usage` and `cost` are of every reply that was paid for to get the row. Imports without torch.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

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
        InputError: OPENAI_BASE_URL is no address.
    """
    # always given to the client, which takes an empty OPENAI_BASE_URL for an address
    url = args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    if not url.startswith(("http://", "https://")):
        raise InputError(f"OPENAI_BASE_URL: {show_url(url)} is no address; write it as http://localhost:8000/v1")
    return url


def has_key(args: JudgeArguments) -> bool:
    """Whether requests can be sent: OpenAI wants a key, a server of one's own may take any."""
    return bool(os.environ.get("OPENAI_API_KEY")) or endpoint_of(args) != OPENAI_URL


def client_settings(args: JudgeArguments) -> dict:
    """What an OpenAI client, of either kind, is made with."""
    return {
        "base_url": endpoint_of(args),
        "api_key": os.environ.get("OPENAI_API_KEY") or "none",
        "timeout": args.timeout,
        "max_retries": args.max_retries,
    }


def show_url(url: str) -> str:
    """An address without the password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//***@", url)


class RateControl:
    """When the next request may leave, and how many may be in flight.

    The client retries by itself; this sees each of its attempts (as hooks of its HTTP client), so that the budgets hold
    for retries too. A 429 or 503 halves the number in flight, once for all that left before it; each success raises
    it a little. A Retry-After holds back all requests, not only the one that it answered.

    Args:
        concurrency: The most requests in flight.
        requests_per_minute, tokens_per_minute: Budgets; requests leave evenly. None is no limit.
        stop: When it is set, what has not left yet is cancelled.
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
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.stop = stop
        self._tokens: ContextVar[float] = ContextVar("tokens", default=0.0)  # of the request of this task
        self._next = self._paused_until = self._last_cut = 0.0  # by time.monotonic

    def open_http_client(self) -> DefaultAsyncHttpxClient:
        return DefaultAsyncHttpxClient(event_hooks={"request": [self.before], "response": [self.after]})

    @contextlib.contextmanager
    def expecting(self, tokens: float) -> Iterator[None]:
        """Requests that leave within this are expected to use so many tokens."""
        token = self._tokens.set(tokens)
        try:
            yield
        finally:
            self._tokens.reset(token)

    async def before(self, request) -> None:
        """Wait until the request may leave."""
        leave = max(time.monotonic(), self._next)
        self._next = leave + max(self._seconds_per_request, self._seconds_per_token * self._tokens.get())
        while (wait := max(leave, self._paused_until) - time.monotonic()) > 0 and not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), wait)
        if self.stop.is_set():
            raise asyncio.CancelledError
        request.extensions["left"] = time.monotonic()

    async def after(self, response) -> None:
        """Learn from the status of a reply.

        Raises:
            InputError: The quota of the key is used up, or the endpoint wants a wait that is not worth it.
        """
        if response.status_code in (429, 503):
            now = time.monotonic()
            if response.request.extensions["left"] > self._last_cut:
                self.limit, self._last_cut = max(1.0, self.limit / 2), now
            if response.status_code == 429:
                await response.aread()
                if "insufficient_quota" in response.text:  # the client would try again, though waiting does not help
                    raise InputError("the judge's endpoint says that the quota of this key is used up")
            wait = _retry_after(response.headers)
            if wait > LONGEST_WAIT:
                raise InputError(
                    f"the judge's endpoint asks to wait {wait / 60:.0f} minutes; what was judged is kept, start again then"
                )
            self._paused_until = max(self._paused_until, now + wait)
        elif response.is_success:
            self.limit = min(self.most, self.limit + 1 / self.limit)

    def settle(self, expected: float, used: float) -> None:
        """Correct the budget of tokens by what a reply has used."""
        self._next += self._seconds_per_token * (used - expected)


def _retry_after(headers) -> float:
    """Seconds, 0 where there are none; a date is left to the client, which reads it."""
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:
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
        max_tokens: Longest reply; a reply that was cut off or does not fit the form is asked for once more with twice it.
        tokens_per_byte: Of prompts, for the budget of tokens.
    """

    client: AsyncOpenAI
    model: str
    args: JudgeArguments
    rate: RateControl
    budget: Budget
    price: Price | None
    tokens_per_byte: float
    completion_tokens: float
    structured: bool = True  # until the endpoint refuses a schema
    _reached: bool = False  # something has answered
    _warned: bool = False

    async def judge(self, item: Item, form: Form) -> dict:
        """The evaluation row of one item.

        Raises:
            InputError: No request can succeed: the key is refused, or there is no such model.
        """
        most = self._most(item, form, self.args.max_tokens)
        reply = await self._ask(item, form, self.args.max_tokens, most)
        if reply["status"] in ("truncated", "invalid"):
            reply = await self._ask_again(item, form, reply)
        return {**item.row, **reply}

    async def _ask_again(self, item: Item, form: Form, first: dict) -> dict:
        max_tokens = 2 * self.args.max_tokens
        most = self._most(item, form, max_tokens)
        if not self.budget.set_aside(most):
            return first
        try:
            again = await self._ask(item, form, max_tokens, most)
        except asyncio.CancelledError:
            if self.rate.stop.is_set():  # it has not left; the first reply was paid for
                return first
            raise
        return first if again["status"] == "error" else add_usage(again, first)  # the first reply says more

    def _most(self, item: Item, form: Form, max_tokens: int) -> float:
        """US dollars that a request can cost; no token is shorter than a byte."""
        return 0.0 if self.price is None else most_cost(self.price, prompt_bytes(item, form), max_tokens)

    async def _ask(self, item: Item, form: Form, max_tokens: int, most: float) -> dict:
        """One reply, for which `most` has been set aside."""
        cost = 0.0
        try:
            expected = prompt_bytes(item, form) * self.tokens_per_byte + self.completion_tokens
            with self.rate.expecting(expected):
                reply, timed_out = await self._send(item, form, max_tokens)
            if reply["usage"] is not None:
                used = reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
                self.rate.settle(expected, used)
            # a reply that came too late may be billed, each time; it counts against the budget only
            cost = most * (1 + self.args.max_retries) if timed_out else reply["cost"] or 0.0
            return reply
        finally:
            self.budget.settle(most, cost)

    async def _send(self, item: Item, form: Form, max_tokens: int) -> tuple[dict, bool]:
        """A reply, and whether the endpoint was too slow to give one."""
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
                return failure(describe_error(error)), False
            except (BadRequestError, UnprocessableEntityError) as error:
                if self.structured and re.search("response_format|json_schema|structured", str(error.message)):
                    self.structured = False
                    self._warn("takes no JSON schema, so replies are asked for in words only and checked here")
                    continue
                if "logprobs" in str(error.message) and self.args.expected_scores:
                    raise InputError(
                        f"the judge's endpoint gives no logprobs of `{self.model}`; leave --expected_scores out"
                    ) from error
                return failure(describe_error(error)), False
            except APITimeoutError as error:
                return failure(describe_error(error)), True
            except (OpenAIError, json.JSONDecodeError) as error:
                if not self._reached:
                    if isinstance(error.__cause__, httpx2.ConnectError):
                        url = show_url(str(self.client.base_url))
                        raise InputError(f"no server answers at {url}: {describe_error(error)}") from error
                    self._reached = True  # with all retries, as others may succeed
                    continue
                return failure(describe_error(error)), False
            self._reached = True
            return read_completion(completion, form, self.price, self.args.expected_scores), False

    def _warn(self, what: str) -> None:
        if not self._warned:
            print(f"warning: {show_url(str(self.client.base_url))} {what}", file=sys.stderr)
            self._warned = True

    async def judge_all(self, items: Iterable[Item], form: Form, stop: asyncio.Event) -> AsyncIterator[dict]:
        """Judge items, as many at once as the endpoint takes, and yield each row as it arrives.

        The first is judged alone, as it shows what the endpoint can do. Once `stop` is set or the money is used up,
        nothing more is sent, and what is in flight is waited for.

        Raises:
            InputError: No request can succeed; what was in flight has been given before.
        """
        waiting: Iterator[Item] = iter(items)
        finished: asyncio.Queue[asyncio.Task] = asyncio.Queue()
        running: set[asyncio.Task] = set()
        held: Item | None = None  # for want of money, until others have cost less than they could
        num_replies = num_failed = 0
        fault: BaseException | None = None
        try:
            while True:
                most_running = int(self.rate.limit) if num_replies else 1
                while not stop.is_set() and fault is None and len(running) < most_running:
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
                running.discard(task)
                if task.cancelled():  # it had not left when all was stopped
                    continue
                if task.exception() is not None:
                    fault = fault or task.exception()
                    continue
                row = task.result()
                num_replies += 1
                num_failed += row["status"] == "error"
                if num_replies == 1 and row["status"] == "invalid" and self.structured:
                    self._warn("does not keep to the JSON schema; replies that do not fit it are `invalid`")
                yield row
                if num_failed == num_replies == FAILURES_IN_A_ROW:
                    fault = InputError(
                        f"the first {num_failed} requests all failed, the last with {row['error']}; nothing more is sent"
                    )
            self.budget.exhausted |= held is not None
            if fault is not None:
                raise fault
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


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
    return {"status": "error", "evaluation": None, "expected": None, "usage": None, "cost": None, "error": error}


def read_completion(
    completion: ChatCompletion, form: Form, price: Price | None, expected: bool, batch: bool = False
) -> dict:
    """What a row holds of a reply."""
    if not isinstance(completion, ChatCompletion) or not completion.choices:  # a proxy's page, say
        return failure("the reply is no chat completion")
    choice, usage = completion.choices[0], None
    if completion.usage is not None:
        details = completion.usage.prompt_tokens_details
        usage = {
            "prompt_tokens": completion.usage.prompt_tokens,
            "cached_tokens": (details.cached_tokens if details is not None else None) or 0,
            "completion_tokens": completion.usage.completion_tokens,
        }
    status, evaluation, error = read_choice(choice, form)
    return {
        "status": status,
        "evaluation": evaluation,
        "expected": expected_scores(choice) if expected and status == "ok" else None,
        "usage": usage,
        "cost": price.cost(usage, batch) if price is not None and usage is not None else None,
        "error": error,
    }


def add_usage(row: dict, earlier: dict) -> dict:
    """The row with what an earlier reply to the same request was paid for as well."""
    usages = [r["usage"] for r in (earlier, row) if r["usage"] is not None]
    costs = [r["cost"] for r in (earlier, row) if r["cost"] is not None]
    usage = {key: sum(u[key] for u in usages) for key in usages[0]} if usages else None
    return {**row, "usage": usage, "cost": sum(costs) if costs else None}


def describe_error(error: Exception) -> str:
    """One line that names the fault and cannot hold the key."""
    if isinstance(error, APIStatusError):
        message = f"{type(error).__name__}: {' '.join(str(error.message).split())[:300]}"
    elif isinstance(error, APIConnectionError):
        message = f"{type(error).__name__}: {error.__cause__ or error}".splitlines()[0]
    else:
        message = f"{type(error).__name__}: the reply is not JSON"
    return message.replace(os.environ.get("OPENAI_API_KEY") or "\0", "***")
