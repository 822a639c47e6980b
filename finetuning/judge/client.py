"""
One request to a judge, attempt by attempt, until it is a row. Imports without torch.

money.py has a picture of what becomes of an attempt, rate.py says when it leaves, rows.py reads what comes back.
"""

import asyncio
import itertools
import re
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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

from finetuning.endpoint import Endpoint, check_key, never_arrived, seconds_to_wait
from finetuning.errors import InputError
from finetuning.judge.form import Form, RequestSettings
from finetuning.judge.jobs import Item
from finetuning.judge.money import Budget
from finetuning.judge.plan import Plan
from finetuning.judge.rate import RateControl, Stopped
from finetuning.judge.rows import add_usage, failure, read_completion

RATE_LIMIT_ROUNDS = 3  # times --max_retries, before a rate limit is an error of the sample
RETRIES_UNREACHED = 2  # while nothing has ever answered at the address
FAILURES_IN_A_ROW = 10  # from the start on: then nothing is set up as it should be
GIVEN_UP = "given up before its reply came"


class Attempt(NamedTuple):
    """What came of sending a request once."""

    reply: dict  # what a row holds of it
    is_lost: bool = False  # it may have been billed, and nobody knows how much
    wait: float | None = None  # seconds until another attempt is worth while; None means that none is


@dataclass
class Judge:
    """One judge at an endpoint; rate and budget are those of all judges."""

    endpoint: Endpoint
    client: AsyncOpenAI
    plan: Plan  # its name there, its price, and the tokens that its requests are expected to use
    settings: RequestSettings
    rate: RateControl
    budget: Budget
    has_judged: bool = False  # something, on this start or an earlier one
    fault: InputError | None = None  # why nothing more can be judged
    first_in_flight: bool = False  # its first request, which goes alone
    num_in_flight: int = 0
    num_rows: int = 0  # that it has given; the first shows what the endpoint can do
    _has_answered: bool = False  # the endpoint, whatever it said
    _structured: bool = True  # until the endpoint refuses a schema
    _warnings: set[str] = field(default_factory=set)

    async def judge(self, item: Item, form: Form) -> dict | None:
        """The evaluation row of one item, for whose first attempt money has been set aside.

        A reply that was cut off or does not fit is asked for once more, with twice the limit. None means that nothing
        was sent that may have been billed: all was stopped before, or `fault`, which LiveJudging looks at, says why no
        request can succeed.
        """
        reply = await self._get_reply(item, form, self.settings.max_tokens)
        if reply is not None and reply["status"] in ("truncated", "invalid"):
            reply = await self._ask_again(item, form, reply)
        if reply is None:
            return None
        self._watch(reply)
        return {**item.row, **reply}

    async def _ask_again(self, item: Item, form: Form, first: dict) -> dict:
        """The second reply, or the first where there is none: it was paid for, whatever becomes of this."""
        max_tokens = 2 * self.settings.max_tokens
        if not self.budget.set_aside(self.worst_cost(item, form, max_tokens)):
            self.budget.exhausted = True
            return first
        again = await self._get_reply(item, form, max_tokens)
        if again is None:
            return first
        return add_usage(first, again) if again["status"] == "error" else add_usage(again, first)

    def worst_cost(self, item: Item, form: Form, max_tokens: int | None = None) -> float:
        """US dollars that one attempt can cost at most."""
        return self.plan.worst_cost(form.count_bytes(item.data), max_tokens or self.settings.max_tokens)

    async def _get_reply(self, item: Item, form: Form, max_tokens: int) -> dict | None:
        """One reply, over as many attempts as it takes; money has been set aside for the first one.

        None means that there is none, and that nothing was sent that may have been billed.
        """
        worst_cost = self.worst_cost(item, form, max_tokens)
        reply, wait, num_lost = dict[str, Any](), 0.0, 0
        for num_attempts in itertools.count(1):
            if num_attempts > 1 and not self.budget.set_aside(worst_cost):
                self.budget.exhausted = True
                reply["error"] += "; --max_cost allows no other request"
                break
            try:
                attempt = await self._attempt(item, form, max_tokens, num_attempts, wait)
            except Stopped:
                if num_lost == 0:
                    return None
                reply["error"] += "; stopped before it was asked again"
                break
            except InputError as error:
                self.fault = error
                if num_lost == 0:
                    return None
                reply = failure(str(error))
                break
            except asyncio.CancelledError:  # while it waited; nothing of this attempt has left
                if num_lost == 0:
                    raise
                reply = failure(GIVEN_UP)
                break
            reply = attempt.reply
            num_lost += attempt.is_lost
            if attempt.wait is None:
                break
            wait = attempt.wait
        return {**reply, "possible_cost": num_lost * worst_cost}

    async def _attempt(self, item: Item, form: Form, max_tokens: int, num_attempts: int, wait: float) -> Attempt:
        """Wait until a request may leave, send it, and settle the money that was set aside for it.

        Args:
            num_attempts: With this one.
            wait: Seconds, at least.

        Raises:
            Stopped: It may not leave any more.
            InputError: No request can succeed. Such a refusal is not billed.
        """
        tokens = form.count_bytes(item.data) * self.plan.tokens_per_byte + self.plan.completion_tokens
        worst_cost, cost = self.worst_cost(item, form, max_tokens), 0.0
        try:
            sent_at = await self.rate.leave(tokens, wait)
            attempt = await self._send(item, form, max_tokens, num_attempts, sent_at)
            cost = worst_cost if attempt.is_lost else attempt.reply["cost"] or 0.0
        finally:
            self.budget.settle(worst_cost, cost)
        if (usage := attempt.reply["usage"]) is not None:
            self.rate.correct_tokens(tokens, usage["prompt_tokens"] + usage["completion_tokens"])
        return attempt

    async def _send(self, item: Item, form: Form, max_tokens: int, num_attempts: int, sent_at: float) -> Attempt:
        structured = self._structured  # as sent: another request may find out meanwhile that no schema is taken
        body = self.settings.build_request(self.plan.model, form, item.data, max_tokens, structured)
        self.num_in_flight += 1
        try:
            # not `completions.create`, which walks through the body for types to convert, a quarter of a request's work
            request = self.client.post("/chat/completions", body=body, cast_to=ChatCompletion)
            completion = await self.endpoint.attempt(request)
        except APIStatusError as error:
            wait = self._wait_after_refusal(error, num_attempts, sent_at, structured)
            return Attempt(failure(self.endpoint.describe(error)), wait=wait)
        except (TimeoutError, OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON, or no text
            wait = self._wait_after_loss(error, num_attempts)
            return Attempt(failure(self.endpoint.describe(error)), not never_arrived(error), wait)
        except asyncio.CancelledError:
            return Attempt(failure(GIVEN_UP), is_lost=True)
        finally:
            self.num_in_flight -= 1
        self._has_answered = True
        self.rate.succeeded()
        reply = read_completion(completion, form, self.plan.price, self.settings.expected_scores)
        if reply["usage"] is None and reply["status"] != "error" and self.plan.price is not None:
            self._warn("does not say how many tokens a reply used; it counts at its most against --max_cost")
        return Attempt(reply, is_lost=reply["usage"] is None)

    def _wait_after_refusal(
        self, error: APIStatusError, num_attempts: int, sent_at: float, structured: bool
    ) -> float | None:
        """Seconds until another attempt is worth while; None means that none is.

        Raises:
            InputError: Every other request would be refused, too.
        """
        self._has_answered = True
        self.rate.refused(error, sent_at)
        is_about_body, message = isinstance(error, (BadRequestError, UnprocessableEntityError)), str(error.message)
        if structured and is_about_body and re.search("response_format|json_schema|structured", message):
            self._structured = False
            self._warn("takes no JSON schema, so replies are asked for in words only and checked here")
            return 0.0
        check_key(error)
        if isinstance(error, NotFoundError):
            raise InputError(f"the judge's endpoint has no model `{self.plan.model}`; set --judge_model") from error
        if is_about_body and "logprobs" in message and self.settings.expected_scores:
            raise InputError(
                f"the judge's endpoint gives no logprobs of `{self.plan.model}`; leave --expected_scores out"
            ) from error
        rounds = RATE_LIMIT_ROUNDS if isinstance(error, RateLimitError) else 1
        return seconds_to_wait(error, num_attempts) if num_attempts <= rounds * self.settings.max_retries else None

    def _wait_after_loss(self, error: Exception, num_attempts: int) -> float | None:
        """Seconds until another attempt is worth while; None means that none is.

        Raises:
            InputError: There is no server.
        """
        max_retries = self.settings.max_retries
        if never_arrived(error) and not self._has_answered:  # fails soon if there is no server at all
            max_retries = min(RETRIES_UNREACHED, max_retries)
            if num_attempts > max_retries:
                raise InputError(f"no server answers at {self.endpoint}: {self.endpoint.describe(error)}") from error
        return seconds_to_wait(error, num_attempts) if num_attempts <= max_retries else None

    def _warn(self, what: str) -> None:
        if what not in self._warnings:
            print(f"warning: {self.endpoint} {what}", file=sys.stderr)
            self._warnings.add(what)

    def _watch(self, reply: dict) -> None:
        """Find out that nothing works, if nothing has ever worked."""
        self.num_rows += 1
        if self.num_rows == 1 and reply["status"] == "invalid" and self._structured:
            self._warn("does not keep to the JSON schema; replies that do not fit it are `invalid`")
        self.has_judged = self.has_judged or reply["status"] != "error"
        if self.num_rows == FAILURES_IN_A_ROW and not self.has_judged and self.fault is None:
            self.fault = InputError(
                f"the first {self.num_rows} requests all failed, the last with {reply['error']}; nothing more is sent"
            )
