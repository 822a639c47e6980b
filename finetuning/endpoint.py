"""
An endpoint that speaks the OpenAI API: its address and key, one attempt at a request, and what to say of a failed one.

The client's own retries are off: an attempt that is hidden in them can be neither counted nor timed nor stopped.
Whoever sends requests tries again by a loop of its own, as often and as late as `seconds_to_wait` says. Imports without
torch.
"""

import asyncio
import base64
import contextlib
import os
import random
import re
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import httpx2
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    PermissionDeniedError,
)

from finetuning.credentials import hide, remember
from finetuning.errors import InputError

OPENAI_URL = "https://api.openai.com/v1"
MAX_WAIT = 600.0  # seconds of a Retry-After that are worth waiting for
MAX_BACKOFF = 8.0  # seconds between two attempts where the endpoint names none
MAX_TOKEN_COUNT = 2**53  # that a reply can say it used; no larger number is believed
MIN_BYTES_PER_SECOND = 50_000  # at which a file is sent or fetched
KEY_REFUSED = (AuthenticationError, PermissionDeniedError)  # whatever is asked for

Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Args:
        url: As in http://localhost:8000/v1.
        timeout: Seconds that an attempt may take, from the connection to the last byte of its reply.
        named_by: The setting that the address comes from.

    Raises:
        InputError: The address is not one, or no key looks like the one that is set.
    """

    url: str
    timeout: float
    named_by: str = "base_url"

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            httpx2.URL(self.url)  # which the client reads it by
        except (ValueError, httpx2.InvalidURL):
            valid = False
        if not valid or not self.url.isprintable():
            raise InputError(f"{self.named_by}: {self} is no address; write it as http://localhost:8000/v1")
        if parts.password:
            user, password = unquote(parts.username or ""), unquote(parts.password)
            header = base64.b64encode(f"{user}:{password}".encode()).decode()  # as it is sent
            for secret in (parts.password, password, header):
                remember(secret)
        read_key()

    def __str__(self) -> str:
        return show_url(self.url)

    @property
    def has_key(self) -> bool:
        """Whether requests can be sent: OpenAI wants a key, a server of one's own may take any."""
        return bool(read_key()) or self.url != OPENAI_URL

    def open_client(self) -> AsyncOpenAI:
        """A client that makes each attempt once, and leaves its time to `attempt`.

        Raises:
            InputError: The environment names a proxy or certificates that it cannot use.
        """
        try:
            return AsyncOpenAI(base_url=self.url, api_key=read_key() or "none", max_retries=0, timeout=None)
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no connection to {self} can be made with the proxy and certificates of the environment (HTTPS_PROXY, "
                f"HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE, SSL_CERT_DIR): {hide(' '.join(str(error).split()))}"
            ) from error

    async def attempt(self, request: Awaitable[Reply], num_bytes: int = 0) -> Reply:
        """Make one attempt at a request, and return its reply.

        Args:
            num_bytes: Size of a file that is sent with it, which has time of its own.

        Raises:
            TimeoutError: The last byte has not come in time; the client's own limit is between two bytes.
            ValueError: The reply is no JSON that can be read.
        """
        async with asyncio.timeout(self.timeout + num_bytes / MIN_BYTES_PER_SECOND):
            try:
                return await request
            except RecursionError as error:
                raise ValueError("the reply is nested too deeply") from error

    def describe(self, error: Exception) -> str:
        """One line that says what became of an attempt, without what must not be read."""
        if isinstance(error, (TimeoutError, APITimeoutError)):
            return f"no reply within {self.timeout:g} s (--timeout)"
        if isinstance(error, APIStatusError):
            text = hide(" ".join(str(error.message).split()))[:300]
        elif isinstance(error, APIConnectionError):
            cause = error.__cause__ or error
            text = str(cause) or type(cause).__name__
        else:
            text = "the reply is not JSON"
        return hide(f"{type(error).__name__}: {text}".splitlines()[0])


def find_endpoint(base_url: str | None, timeout: float) -> Endpoint:
    """The endpoint of a setting, or else of OPENAI_BASE_URL, or else OpenAI's.

    Raises:
        InputError: Its address is not one, or the key is not.
    """
    # always given to the client, which takes an empty OPENAI_BASE_URL for an address
    url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    return Endpoint(url, timeout, "base_url" if base_url else "OPENAI_BASE_URL")


def read_key() -> str:
    """The key of the environment, without the line break that a file may have left at its end; empty if there is none.

    Raises:
        InputError: No key looks like this.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if re.search(r"[^!-~]|[\"'`\\]", key):
        raise InputError("OPENAI_API_KEY holds spaces, line breaks, quotes or characters that no key has; set it again")
    return key


def show_url(url: str) -> str:
    """An address without the password that may stand in it."""
    head, separator, rest = url.partition("//")
    return f"{head}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else url


def check_key(error: Exception) -> None:
    """Raise where an attempt at judging failed because the key is refused, as every other one would.

    Raises:
        InputError: It did.
    """
    if isinstance(error, KEY_REFUSED):
        raise InputError(
            f"the judge's endpoint refuses the key (status {error.status_code}); check OPENAI_API_KEY"
        ) from error


def never_arrived(error: Exception) -> bool:
    """Whether an attempt failed before there was a connection to send it over."""
    return isinstance(error.__cause__, httpx2.ConnectError)


def seconds_to_wait(error: Exception, num_attempts: int) -> float | None:
    """Seconds before a request is worth another attempt; None means that it would fail in the same way.

    Args:
        num_attempts: How many attempts have failed.
    """
    if isinstance(error, APIStatusError):
        word = error.response.headers.get("x-should-retry")
        again = error.status_code in (408, 409, 429) or error.status_code >= 500
        if word == "false" or (not again and word != "true"):
            return None
        wait = read_retry_after(error.response.headers)
        if wait > 0:
            return wait if wait <= MAX_WAIT else None
    elif not isinstance(error, (TimeoutError, APIConnectionError)):
        return None
    # shorter by up to a quarter, so that those that failed together do not come together again
    return min(0.5 * 2 ** (num_attempts - 1), MAX_BACKOFF) * (1 - random.random() / 4)


def read_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait, as milliseconds, seconds or a date say it; 0 where nothing does."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    text = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
