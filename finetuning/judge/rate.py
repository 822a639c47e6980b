"""
When the next attempt at a request may leave, and how many may be in flight. Imports without torch.
"""

import asyncio
import contextlib
import time
from typing import NamedTuple

from openai import APIStatusError

from finetuning.endpoint import MAX_WAIT, read_retry_after
from finetuning.errors import InputError


class RateLimits(NamedTuple):
    """Requests in flight at most, and what may leave in a minute; None means that there is no limit."""

    concurrency: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Stopped(Exception):
    """An attempt is not made, as nothing more is to be sent."""


class RateControl:
    """Lets attempts leave, evenly under the limits of a minute.

    A 429 or 503 halves the number in flight, once for all that left before it; each success raises it a little. A
    Retry-After holds back all requests, not only the one that it answered.

    Attributes:
        stop: When it is set, what has not left yet never does.
        limit: How many may be in flight now.
    """

    def __init__(self, limits: RateLimits):
        self.stop = asyncio.Event()
        self.limit = float(limits.concurrency)
        self._concurrency = limits.concurrency
        self._seconds_per_request = 60 / limits.requests_per_minute if limits.requests_per_minute else 0.0
        self._seconds_per_token = 60 / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
        self._next_request = self._next_tokens = self._paused_until = self._last_cut = 0.0  # by time.monotonic

    async def leave(self, tokens: float, wait: float = 0.0) -> float:
        """Wait until an attempt may leave, and return when it does.

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
        self.limit = min(self._concurrency, self.limit + 1 / self.limit)

    def refused(self, error: APIStatusError, sent_at: float) -> None:
        """Learn from a refusal of an attempt.

        Args:
            sent_at: What `leave` returned for it.

        Raises:
            InputError: The quota of the key is used up, or the endpoint wants a wait that is not worth it.
        """
        if error.status_code not in (429, 503):
            return
        now = time.monotonic()
        if sent_at > self._last_cut:
            self.limit, self._last_cut = max(1.0, self.limit / 2), now
        if error.status_code == 429 and "insufficient_quota" in error.response.text:
            raise InputError("the judge's endpoint says that the quota of this key is used up")
        wait = read_retry_after(error.response.headers)
        if wait > MAX_WAIT:
            raise InputError(
                f"the judge's endpoint asks to wait {wait / 60:.0f} minutes; what was judged is kept, start again then"
            )
        self._paused_until = max(self._paused_until, now + wait)

    def correct_tokens(self, expected: float, used: float) -> None:
        """Correct the tokens of this minute by what a reply has used, in place of what was expected."""
        self._next_tokens += self._seconds_per_token * (used - expected)
