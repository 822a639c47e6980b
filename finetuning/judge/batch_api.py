"""
The Batch API of a judge's endpoint: submit, look, wait, download, cancel. Imports without torch.

A kill at any moment submits nothing twice: a batch carries its key as metadata, by which a start that does not know
whether it was submitted finds it at the endpoint.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, TypeVar

import httpx2
from openai import APIConnectionError, APIStatusError, InternalServerError, OpenAIError
from openai.types import Batch
from tqdm import tqdm

from finetuning.config.run_step import same_command
from finetuning.credentials import hide
from finetuning.endpoint import MIN_BYTES_PER_SECOND, Endpoint, check_key, seconds_to_wait, show_url
from finetuning.errors import InputError
from finetuning.judge.batch_files import CHAT_COMPLETIONS, UNSENT, PendingBatch

POLL_SECONDS = 30.0
WAITS = (0, 2, 10)  # seconds before a submission is looked for and tried again
CLOCKS_APART = 3600.0  # seconds, at most, of this machine and the endpoint
ABSENT = (404, 405, 501)  # statuses of what an endpoint does not have
ENDED = ("completed", "expired", "cancelled", "failed")  # all but the last with replies to what was done until then

Reply = TypeVar("Reply")


@dataclass
class BatchApi:
    """The Batch API of an endpoint, to be asked within `with`. None of its requests costs money by itself."""

    endpoint: Endpoint
    max_retries: int  # further attempts at each request
    poll_seconds: float = POLL_SECONDS  # between two looks at a batch
    again: str = same_command(overwrite=False)  # the command that goes on with the batches

    def __enter__(self) -> "BatchApi":
        self.client = self.endpoint.open_client()
        self.address = show_url(str(self.client.base_url))
        self._runner = asyncio.Runner()
        return self

    def __exit__(self, *exception) -> None:
        self._runner.run(self.client.close())
        self._runner.close()

    def _call(
        self, request: Callable[[], Awaitable[Reply]], max_retries: int | None = None, num_bytes: int = 0
    ) -> Reply:
        """The reply to a request, over as many attempts as it takes, each of which has a deadline.

        Args:
            request: Starts an attempt.
            num_bytes: Size of a file that is sent.
        """
        max_retries = self.max_retries if max_retries is None else max_retries
        num_attempts = 0
        while True:
            num_attempts += 1
            try:
                return self._runner.run(self.endpoint.attempt(request(), num_bytes))
            except (OpenAIError, TimeoutError) as error:
                wait = seconds_to_wait(error, num_attempts) if num_attempts <= max_retries else None
                if wait is None:
                    raise
            time.sleep(wait)

    def submit(self, batch: PendingBatch) -> None:
        """Bring a batch to the endpoint, or find it there if a kill has left that open.

        Raises:
            InputError: The endpoint refuses it.
        """
        with self._explained(batch):
            found = None
            if batch.state["status"] == "uploaded":
                found = self._find(batch)
            else:
                with batch.requests.open("rb") as file:  # from whose beginning each attempt sends it
                    upload = partial(self.client.files.create, file=(f"{batch.key}.jsonl", file), purpose="batch")
                    uploaded = self._call(upload, num_bytes=batch.requests.stat().st_size)
                batch.record(status="uploaded", input_file_id=uploaded.id, endpoint=self.address)
            found = found or self._create(batch)
            batch.record(status="submitted", batch_id=found)
            print(f"batch {found}: submitted with {batch.state['num_requests']:,} requests", flush=True)

    def _create(self, batch: PendingBatch) -> str:
        """Submit once, and return the id: where the answer is lost, the batch is looked for before another try."""
        create = partial(
            self.client.batches.create, input_file_id=batch.state["input_file_id"], endpoint=CHAT_COMPLETIONS,
            completion_window="24h", metadata={"key": batch.key},
        )  # fmt: skip
        num_tries = 0
        while True:
            time.sleep(WAITS[num_tries])
            if num_tries and (found := self._find(batch)) is not None:
                return found
            num_tries += 1
            try:
                return self._call(create, max_retries=0).id  # with retries there could be two of them
            except (OpenAIError, TimeoutError, AttributeError) as error:  # a proxy's page has no id
                if not _may_have_arrived(error):
                    self.delete_files(batch)
                    batch.record(status="written")
                    raise
                if num_tries == len(WAITS):
                    raise

    def _find(self, batch: PendingBatch) -> str | None:
        """The id of the batch at the endpoint, if it was submitted."""
        self._check_endpoint(batch)

        async def look_through() -> str | None:
            async for found in self.client.batches.list(limit=100):  # the newest first
                if found.metadata is not None and found.metadata.get("key") == batch.key:
                    return found.id
                if 0 < (found.created_at or 0) < batch.state["created"] - CLOCKS_APART:
                    return None
            return None

        return self._call(look_through)

    def _check_endpoint(self, batch: PendingBatch) -> None:
        if batch.state["endpoint"] != self.address:
            raise InputError(
                f"a batch is under way at {batch.state['endpoint']}, and this start asks {self.address}; set "
                f"--base_url to go on with it, or give it up by deleting {batch.path}"
            )

    def look(self, batch: PendingBatch) -> Batch:
        self._check_endpoint(batch)
        with self._explained(batch):
            found = self._call(partial(self.client.batches.retrieve, batch.state["batch_id"]))
            if not isinstance(found.status, str):  # the client checks no types
                raise ValueError("the reply is no batch")
            return found

    def wait(self, batch: PendingBatch) -> Batch:
        """Look again and again until the batch has ended; it goes on at the endpoint if this does not."""
        description = f"batch {batch.state['batch_id']}"
        with tqdm(total=batch.state["num_requests"], desc=description, unit="answer") as progress:
            while True:
                found = self.look(batch)
                if found.request_counts is not None:
                    with self._explained(batch):
                        progress.n = found.request_counts.completed + found.request_counts.failed
                    progress.set_postfix(status=found.status, failed=found.request_counts.failed)
                if found.status in ENDED:
                    return found
                time.sleep(self.poll_seconds)

    def download(self, batch: PendingBatch, found: Batch) -> None:
        """Fetch the replies of a batch that has ended.

        Raises:
            InputError: The endpoint could not read the batch at all.
        """
        if found.status == "failed":
            self.delete_files(batch)
            batch.finish("failed")
            with self._explained(batch):
                reasons = [error.message for error in (found.errors.data if found.errors is not None else None) or []]
            reason = hide("; ".join(map(str, reasons[:3]))) or "no reason"
            raise InputError(f"batch {batch.state['batch_id']} was refused, and nothing was judged: {reason}")
        partial_output = batch.output.with_suffix(".partial")
        with self._explained(batch), partial_output.open("wb") as file:
            for file_id in (found.output_file_id, found.error_file_id):
                if file_id is not None:
                    self._runner.run(self._fetch(file_id, file))
                    file.write(b"\n")  # whether or not the file ended in one
        partial_output.replace(batch.output)
        batch.record(status="downloaded", ended=found.status, files=[found.output_file_id, found.error_file_id])

    async def _fetch(self, file_id: str, file: BinaryIO) -> None:
        end = asyncio.get_running_loop().time() + self.endpoint.timeout
        async with (
            asyncio.timeout_at(end) as limit,
            self.client.files.with_streaming_response.content(file_id) as response,
        ):
            async for chunk in response.iter_bytes():
                file.write(chunk)
                end += len(chunk) / MIN_BYTES_PER_SECOND
                limit.reschedule(end)

    def delete_files(self, batch: PendingBatch) -> None:
        """Leave no questions and answers at the endpoint, as far as it can be asked now."""
        if batch.state.get("endpoint") != self.address:
            return
        for file_id in (batch.state.get("input_file_id"), *batch.state.get("files", [])):
            if file_id is not None:
                with contextlib.suppress(OpenAIError, TimeoutError, ValueError):  # they expire by themselves, too
                    self._call(partial(self.client.files.delete, file_id), max_retries=0)

    def give_up(self, batch: PendingBatch) -> None:
        """Cancel a batch whose rows nobody wants any more, or drop one that was never submitted."""
        if batch.state["status"] in UNSENT:
            self.delete_files(batch)
            print(f"batch {batch.key}: was never submitted, so it costs nothing and is dropped")
        else:
            why = self._cancel(batch)
            name, rest = batch.state.get("batch_id", batch.key), "what it has done until now is paid for"
            if why is not None:
                rest = f"but it could not be cancelled ({why}), so it may go on and cost more"
            print(f"batch {name}: given up; {rest}")
        batch.finish("given up")

    def _cancel(self, batch: PendingBatch) -> str | None:
        """Cancel a batch at its endpoint; returns why it may go on there, or None if it does not."""
        if batch.state["status"] == "downloaded":
            return None
        if batch.state["endpoint"] != self.address:
            return f"it is at {batch.state['endpoint']}, and this start asks {self.address}"
        try:
            batch_id = batch.state.get("batch_id") or self._find(batch)
            if batch_id is not None:
                self._call(partial(self.client.batches.cancel, batch_id))
        except (OpenAIError, TimeoutError, AttributeError, TypeError, ValueError) as error:  # of a page, too
            has_ended = isinstance(error, APIStatusError) and error.status_code in (*ABSENT, 400, 409)
            return None if has_ended else self.endpoint.describe(error)
        return None

    @contextlib.contextmanager
    def _explained(self, batch: PendingBatch) -> Iterator[None]:
        """Make errors of the client one line that says what to do."""
        try:
            yield
        except httpx2.HTTPError as error:  # in the middle of a download
            raise InputError(
                f"the connection to {self.address} broke: {error}. Nothing is lost; {self.again} goes on"
            ) from error
        except InputError:
            raise
        except (OpenAIError, TimeoutError, AttributeError, TypeError, ValueError) as error:
            check_key(error)
            is_unsent, why = batch.state["status"] in UNSENT, self.endpoint.describe(error)
            if not isinstance(error, APIStatusError) or error.status_code not in ABSENT:
                text = (
                    f"the Batch API at {self.address} cannot be used now: {why}. Nothing is lost; {self.again} "
                    f"goes on{', and --mode live needs no Batch API' if is_unsent else ''}"
                )
            elif is_unsent:
                text = f"{self.address} has no Batch API ({why}); use --mode live"
            else:
                text = (
                    f"{self.address} does not know the batch {batch.state.get('batch_id', batch.key)} ({why}): it has "
                    f"expired, or belongs to another key. Where it is lost, delete {batch.path}: its answers are "
                    "judged again"
                )
            raise InputError(text) from error


def _may_have_arrived(error: Exception) -> bool:
    """Whether what was asked for may have been done, although the answer is an error."""
    return isinstance(error, (TimeoutError, APIConnectionError)) or (
        isinstance(error, InternalServerError) and error.status_code not in ABSENT
    )
