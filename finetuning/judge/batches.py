"""
Judging through the Batch API, at a part of the price and within a day: write, upload, submit, wait, collect.

A batch belongs to one file of rows, whatever else a start is asked to judge. Beside that file:

    batches/<model>.<key>.json            how far the batch is, rewritten at every step, and what its rows are made under
    batches/<model>.<key>.jsonl           its requests
    batches/<model>.<key>.items.jsonl     what each request is about
    batches/<model>.<key>.output.jsonl    the replies, until their rows are written

A kill at any moment loses nothing and submits nothing twice: a batch carries its key as metadata, by which a start that
does not know whether it was submitted finds it at the endpoint. A batch counts from its submission, as nothing is paid
for before: one that was only written, or that the endpoint refused, is dropped by the next start, in either mode, and
its file at the endpoint is deleted where that can be done. Imports without torch.
"""

import asyncio
import contextlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from openai import (
    APIConnectionError,
    APIStatusError,
    InternalServerError,
    OpenAIError,
)
from openai.types import Batch
from openai.types.chat import ChatCompletion
from tqdm import tqdm

from finetuning.config.arguments import JudgeArguments
from finetuning.credentials import hide
from finetuning.endpoint import MIN_BYTES_PER_SECOND, check_key, find_endpoint, seconds_to_wait, show_url
from finetuning.errors import InputError
from finetuning.judge.client import (
    Budget,
    add_usage,
    build_request,
    cost_of,
    failure,
    most_cost,
    prompt_bytes,
    read_completion,
)
from finetuning.judge.form import Form, Item, Job
from finetuning.judge.jobs import Work
from finetuning.judge.prices import Price
from finetuning.results import RowFile, item_key, iterate_rows
from finetuning.runs import read_json, write_json
from finetuning.schemas import BATCH, BATCH_ITEM

BATCHES = "batches"  # folder
ENDPOINT = "/v1/chat/completions"
WINDOW = "24h"  # the only one there is
POLL_SECONDS = 30.0
MOST_REQUESTS = 50_000  # in one batch, and bytes of its file
MOST_BYTES = 100_000_000
WAITS = (0, 2, 10)  # seconds before a submission is looked for and tried again
CLOCKS_APART = 3600.0  # seconds, at most, of this machine and the endpoint
ABSENT = (404, 405, 501)  # statuses of what an endpoint does not have
UNSENT = ("written",)
OPEN = ("uploaded", "submitted", "downloaded")
ENDED = ("completed", "expired", "cancelled")  # with replies to whatever was done until then
NUM_ATTEMPTS = 2  # for replies that were cut off or do not fit


@dataclass
class PendingBatch:
    """One batch and how far it is.

    It is written, uploaded (and may be submitted, which a kill or a lost answer leaves open), submitted, downloaded and
    collected; or it has failed, or was given up.
    """

    path: Path
    state: dict

    @property
    def key(self) -> str:
        return self.path.stem.rpartition(".")[2]

    @property
    def requests(self) -> Path:
        return self.path.with_suffix(".jsonl")

    @property
    def items(self) -> Path:
        return self.path.with_suffix(".items.jsonl")

    @property
    def output(self) -> Path:
        return self.path.with_suffix(".output.jsonl")

    def record(self, **state) -> None:
        self.state.update(state)
        write_json(self.path, self.state)

    def finish(self, status: str) -> None:
        """Nothing more is to be done with it; its record stays."""
        self.record(status=status)
        for path in (self.requests, self.items, self.output):
            path.unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """Whether each request has its line in the output that was fetched."""
        return sum(1 for _ in iterate_rows(self.output)) >= self.state["num_requests"]

    def read_items(self) -> dict[str, dict]:
        """What names the row of each request, by custom id.

        Raises:
            InputError: Some are missing, so that replies would be nobody's.
        """
        items = {line["custom_id"]: line["row"] for line in iterate_rows(self.items, BATCH_ITEM)}
        if len(items) != self.state["num_requests"]:
            raise InputError(
                f"{self.items} names {len(items)} of the {self.state['num_requests']} requests of its batch; take it "
                f"from a copy, or delete {self.path}: its answers are judged again"
            )
        return items


def _batches(rows: Path, statuses: tuple[str, ...]) -> list[PendingBatch]:
    """The batches of a file of rows that are so far, in the order in which they were made."""
    remedy = "take it from a copy, or delete it: the answers of its batch are judged again"
    found = [
        PendingBatch(path, read_json(path, BATCH, remedy))
        for path in (rows.parent / BATCHES).glob("*.json")
        if path.stem.rpartition(".")[0] == rows.stem
    ]
    return sorted((b for b in found if b.state["status"] in statuses), key=lambda batch: batch.state["created"])


def open_batches(rows: Path) -> list[PendingBatch]:
    """The batches of a file of rows that the endpoint may be at work on, or whose replies are not rows yet."""
    return _batches(rows, OPEN)


def under_way(rows: Path) -> set[tuple[str, str]]:
    """(item key, prediction hash) of what batches of a file of rows are judging."""
    return {
        (item_key(row), row["prediction_hash"]) for batch in open_batches(rows) for row in batch.read_items().values()
    }


def clear_batches(jobs: list[Job], args: JudgeArguments) -> None:
    """Drop the batches that were never submitted and, with `overwrite`, give up those under way."""
    unsent = [batch for job in jobs for batch in _batches(job.path, UNSENT)]
    unwanted = [batch for job in jobs for batch in open_batches(job.path)] if args.overwrite else []
    if unsent or unwanted:
        with BatchClient(args) as api:
            for batch in unsent + unwanted:
                api.give_up(batch)


def check_pending(job: Job, args: JudgeArguments) -> None:
    """Refuse to go on beside a batch under way whose rows would not belong here, or would be paid for twice.

    Raises:
        InputError: It was made under another identity (says which field differs), or this start is a live one.
    """
    identity = json.loads(json.dumps(job.identity))
    for batch in open_batches(job.path):
        old = batch.state["identity"]
        differing = sorted(key for key in old.keys() | identity.keys() if old.get(key) != identity.get(key))
        if differing:
            what = "; ".join(f"{key} was {old.get(key)!r} and is {identity.get(key)!r}" for key in differing)
            raise InputError(
                f"a batch is under way for {job.name} under other conditions: {what}. Collect it under those "
                "(--mode batch), or give it up with --overwrite true"
            )
        if args.mode == "live" and not args.dry_run:
            raise InputError(
                f"a batch is under way for {job.name}; go on with it (--mode batch), or give it up and judge all again "
                f"(--overwrite true). If its endpoint has lost it, delete {batch.path}: only its answers are judged again"
            )


def write_batches(job: Job, requests: Iterable[tuple[Item, dict, float]], attempt: int) -> Iterator[PendingBatch]:
    """Write requests into as few files as the API takes.

    Args:
        requests: The item, the body and the US dollars at most of each.
    """
    folder = job.path.parent / BATCHES
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jsonl"):
        batch = PendingBatch(folder / f"{path.name.removesuffix('.jsonl').removesuffix('.items')}.json", {})
        if batch.path.stem.rpartition(".")[0] == job.path.stem and not batch.path.exists():
            path.unlink()  # a kill has left it unfinished
    waiting = iter(requests)
    request = next(waiting, None)
    while request is not None:
        batch = PendingBatch(folder / f"{job.path.stem}.{uuid.uuid4().hex[:12]}.json", {})
        num_requests, num_bytes, sum_most = 0, 0, 0.0
        with batch.requests.open("w", encoding="utf-8") as file, batch.items.open("w", encoding="utf-8") as items:
            while request is not None:
                item, body, most = request
                custom_id = f"{batch.key}-{num_requests}"
                line = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}
                text = json.dumps(line, ensure_ascii=False) + "\n"
                size = len(text.encode())
                if num_requests == MOST_REQUESTS or (num_requests and num_bytes + size > MOST_BYTES):
                    break
                file.write(text)
                items.write(json.dumps({"custom_id": custom_id, "row": item.row}, ensure_ascii=False) + "\n")
                num_requests, num_bytes, sum_most = num_requests + 1, num_bytes + size, sum_most + most
                request = next(waiting, None)
        # only now is it a batch: what a kill leaves before this is never sent
        batch.record(
            status="written", identity=job.identity, attempt=attempt, num_requests=num_requests, most_cost=sum_most,
            created=time.time(),
        )  # fmt: skip
        yield batch


class BatchClient:
    """The Batch API of the judge's endpoint, to be asked within `with`. None of its requests costs money by itself."""

    def __init__(self, args: JudgeArguments):
        self.endpoint, self.max_retries = find_endpoint(args.base_url, args.timeout), args.max_retries
        self.poll_seconds = args.poll_seconds or POLL_SECONDS
        self.client = self.endpoint.open_client()
        self.address = show_url(str(self.client.base_url))
        self._runner = asyncio.Runner()

    def __enter__(self) -> "BatchClient":
        return self

    def __exit__(self, *exception) -> None:
        self._runner.run(self.client.close())
        self._runner.close()

    def _ask(self, request: Callable[[], Coroutine], max_retries: int | None = None, num_bytes: int = 0):
        """What a request gives, over as many attempts as it takes, each of which has a deadline.

        Args:
            request: Starts an attempt.
            num_bytes: Of a file that is sent.
        """
        max_retries = self.max_retries if max_retries is None else max_retries
        for num_attempts in itertools.count(1):
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
                    uploaded = self._ask(
                        lambda: self.client.files.create(file=(f"{batch.key}.jsonl", file), purpose="batch"),
                        num_bytes=batch.requests.stat().st_size,
                    )
                batch.record(status="uploaded", input_file_id=uploaded.id, endpoint=self.address)
            found = found or self._create(batch)
            batch.record(status="submitted", batch_id=found)
            print(f"batch {found}: submitted with {batch.state['num_requests']:,} requests", flush=True)

    def _create(self, batch: PendingBatch) -> str:
        """Submit once: where the answer is lost, the batch is looked for before it is tried again. Gives its id."""
        for i, wait in enumerate(WAITS):
            time.sleep(wait)
            if i and (found := self._find(batch)) is not None:
                return found
            try:
                created = self._ask(
                    lambda: self.client.batches.create(
                        input_file_id=batch.state["input_file_id"],
                        endpoint=ENDPOINT,
                        completion_window=WINDOW,
                        metadata={"key": batch.key},
                    ),
                    max_retries=0,  # else there could be two of them
                )
                return created.id
            except (OpenAIError, TimeoutError, AttributeError) as error:  # a proxy's page has no id
                if not _may_have_arrived(error):
                    self.delete_files(batch)
                    batch.record(status="written")
                    raise
                if wait == WAITS[-1]:
                    raise
        raise AssertionError("the last try returns or raises")

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

        return self._ask(look_through)

    def _check_endpoint(self, batch: PendingBatch) -> None:
        if batch.state["endpoint"] != self.address:
            raise InputError(
                f"a batch is under way at {batch.state['endpoint']}, and this start asks {self.address}; set --base_url "
                f"to go on with it, or give it up by deleting {batch.path}"
            )

    def look(self, batch: PendingBatch) -> Batch:
        self._check_endpoint(batch)
        with self._explained(batch):
            found = self._ask(lambda: self.client.batches.retrieve(batch.state["batch_id"]))
            if not isinstance(found.status, str):  # the client checks no types
                raise ValueError("the reply is no batch")
            return found

    def wait(self, batch: PendingBatch) -> Batch:
        """Look again and again until the batch has ended; it goes on at the endpoint if this does not."""
        with tqdm(
            total=batch.state["num_requests"], desc=f"batch {batch.state['batch_id']}", unit="answer"
        ) as progress:
            while True:
                found = self.look(batch)
                if found.request_counts is not None:
                    with self._explained(batch):
                        progress.n = found.request_counts.completed + found.request_counts.failed
                    progress.set_postfix(status=found.status, failed=found.request_counts.failed)
                if found.status in (*ENDED, "failed"):
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
        partial = batch.output.with_suffix(".partial")
        with self._explained(batch), partial.open("wb") as file:
            for file_id in (found.output_file_id, found.error_file_id):
                if file_id is not None:
                    self._runner.run(self._fetch(file_id, file))
                    file.write(b"\n")  # whether or not the file ended in one
        partial.replace(batch.output)
        batch.record(status="downloaded", ended=found.status, files=[found.output_file_id, found.error_file_id])

    async def _fetch(self, file_id: str, file: BinaryIO) -> None:
        async with (
            asyncio.timeout(self.endpoint.timeout) as limit,
            self.client.files.with_streaming_response.content(file_id) as response,
        ):
            async for chunk in response.iter_bytes():
                file.write(chunk)
                limit.reschedule(limit.when() + len(chunk) / MIN_BYTES_PER_SECOND)

    def delete_files(self, batch: PendingBatch) -> None:
        """Leave no questions and answers at the endpoint, as far as it can be asked now."""
        if batch.state.get("endpoint") != self.address:
            return
        for file_id in (batch.state.get("input_file_id"), *batch.state.get("files", [])):
            if file_id is not None:
                with contextlib.suppress(OpenAIError, TimeoutError, ValueError):  # they expire by themselves, too
                    self._ask(lambda name=file_id: self.client.files.delete(name), max_retries=0)

    def give_up(self, batch: PendingBatch) -> None:
        """Cancel a batch whose rows nobody wants any more, or drop one that was never submitted."""
        if batch.state["status"] in UNSENT:
            self.delete_files(batch)
            print(f"batch {batch.key}: was never submitted, so it costs nothing and is dropped")
        else:
            if "batch_id" in batch.state:
                with contextlib.suppress(OpenAIError, TimeoutError, ValueError):  # it may have ended
                    self._ask(lambda: self.client.batches.cancel(batch.state["batch_id"]))
            print(f"batch {batch.state.get('batch_id', batch.key)}: given up; what it has done until now is paid for")
        batch.finish("given up")

    @contextlib.contextmanager
    def _explained(self, batch: PendingBatch) -> Iterator[None]:
        """Errors of the client become one line that says what to do."""
        try:
            yield
        except httpx2.HTTPError as error:  # in the middle of a download
            raise InputError(
                f"the connection to {self.address} broke: {error}. Nothing is lost; the same command goes on"
            ) from error
        except InputError:
            raise
        except (OpenAIError, TimeoutError, AttributeError, TypeError, ValueError) as error:
            check_key(error)
            unsent = batch.state["status"] in UNSENT
            if isinstance(error, APIStatusError) and error.status_code in ABSENT:
                if unsent:
                    text = f"{self.address} has no Batch API ({self.endpoint.describe(error)}); use --mode live"
                else:
                    name = batch.state.get("batch_id", batch.key)
                    text = (
                        f"{self.address} does not know the batch {name} ({self.endpoint.describe(error)}): it has expired, or "
                        f"belongs to another key. Where it is lost, delete {batch.path}: its answers are judged again"
                    )
            else:
                text = (
                    f"the Batch API at {self.address} cannot be used now: {self.endpoint.describe(error)}. Nothing is lost; the "
                    f"same command goes on{', and --mode live needs no Batch API' if unsent else ''}"
                )
            raise InputError(text) from error


def _may_have_arrived(error: Exception) -> bool:
    """Whether what was asked for may have been done, although the answer is an error."""
    return isinstance(error, (TimeoutError, APIConnectionError)) or (
        isinstance(error, InternalServerError) and error.status_code not in ABSENT
    )


def read_reply(line: dict, form: Form, price: Price | None, expected: bool) -> dict:
    """What a row holds of one line of a batch's output, whatever stands in it."""
    response, error = line.get("response"), line.get("error")
    if isinstance(response, dict):
        body = response.get("body")
        if response.get("status_code") == 200 and isinstance(body, dict):
            return read_completion(ChatCompletion.construct(**body), form, price, expected, batch=True)
        error = body.get("error", body) if isinstance(body, dict) else body
        error = error or f"status {response.get('status_code')}"
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error
    return failure(f"in a batch: {' '.join(str(error or 'no reply and no reason').split())[:300]}")


@dataclass
class BatchJudge:
    """Judges jobs in batches.

    Args:
        work: What of them is to be asked.
        files: Where the rows of each job go.
        prices: Of each judge.
    """

    api: BatchClient
    jobs: list[Job]
    work: Work
    files: list[RowFile]
    prices: dict[str, Price | None]
    args: JudgeArguments

    def run(self) -> bool:
        """Send what is missing, wait, and write the rows; whether the budget was enough.

        Replies that were cut off or do not fit the form go into a second batch, with twice the limit. With
        `collect`, nothing is sent or waited for.
        """
        api = self.api
        unread: set[tuple[Path, str]] = set()  # rows of first attempts, collected now, that cannot be read
        enough = True
        for attempt in range(1, NUM_ATTEMPTS + 1):
            if not self.args.collect:
                doubtful = [b for job in self.jobs for b in open_batches(job.path) if b.state["status"] == "uploaded"]
                written, could_pay = self._write(attempt, unread)
                enough = could_pay and enough
                for batch in doubtful + written:
                    api.submit(batch)
            unread = set()
            for job, file in zip(self.jobs, self.files, strict=True):
                for batch in open_batches(job.path):
                    if batch.state["status"] == "downloaded" and not batch.is_whole():
                        batch.record(status="submitted")  # the endpoint has its replies until they are rows
                    if batch.state["status"] == "submitted":
                        found = api.look(batch) if self.args.collect else api.wait(batch)
                        if found.status not in (*ENDED, "failed"):
                            print(
                                f"batch {batch.state['batch_id']}: {found.status}; start with --collect true again later"
                            )
                            continue
                        api.download(batch, found)
                    if batch.state["status"] == "downloaded":
                        keys = self._collect(batch, job, file)
                        unread |= {(job.path, key) for key in keys if batch.state["attempt"] < NUM_ATTEMPTS}
                        api.delete_files(batch)
                        batch.finish("collected")
            if self.args.collect or not unread:
                break
        return enough

    def _write(self, attempt: int, unread: set[tuple[Path, str]]) -> tuple[list[PendingBatch], bool]:
        """Batches of what is missing, or of what cannot be read; and whether the budget was enough for all of it."""
        budget = Budget(self.args.max_cost, sum(spent_on(job.path) for job in self.jobs))
        written = []
        for job in self.jobs:
            requests = self._requests(job, budget, attempt, {key for path, key in unread if path == job.path})
            for batch in write_batches(job, requests, attempt):
                print(f"batch {batch.key}: {batch.state['num_requests']:,} requests about {job.name} written")
                written.append(batch)
        return written, not budget.exhausted

    def _requests(self, job: Job, budget: Budget, attempt: int, unread: set[str]) -> Iterator[tuple[Item, dict, float]]:
        max_tokens, price, waiting = attempt * self.args.max_tokens, self.prices[job.judge_model], under_way(job.path)
        for item in job.missing(self.args.retry_failed or attempt > 1):
            if (item.key, item.row["prediction_hash"]) in waiting or (attempt > 1 and item.key not in unread):
                continue
            if not self.work.is_asked(job, item):
                continue
            most = 0.0
            if price is not None:
                most = most_cost(price, prompt_bytes(item, job.form), max_tokens, batch=True)
            if not budget.set_aside(most):
                budget.exhausted = True
                return
            yield item, build_request(job.judge_model, item, job.form, self.args, max_tokens), most

    def _collect(self, batch: PendingBatch, job: Job, file: RowFile) -> set[str]:
        """Write the rows of a batch that was downloaded; gives the keys of those that cannot be read."""
        items = batch.read_items()
        current = {item.key: item.row["prediction_hash"] for item in job.items()}
        present = {item_key(row): row for row in iterate_rows(file.path)}
        num_replies, unread, without_schema = 0, set(), 0
        for line in iterate_rows(batch.output):
            custom_id = line.get("custom_id")
            item_row = items.get(custom_id) if isinstance(custom_id, str) else None
            if item_row is None:
                continue
            num_replies += 1
            row = {
                **item_row,
                **read_reply(line, job.form, self.prices[job.judge_model], self.args.expected_scores),
                "custom_id": custom_id,
            }
            before = present.get(item_key(row))
            if before is not None and before.get("custom_id") == custom_id:
                continue  # a kill came after this row was written
            if before is not None:  # both were paid for; what is about the answer as it is now stays
                same = before["prediction_hash"] == row["prediction_hash"]
                is_current = current.get(item_key(row)) == row["prediction_hash"]
                keep_before = before["status"] == "ok" if same else not is_current
                row = add_usage(before, row) if keep_before else add_usage(row, before)
            without_schema += row["status"] == "error" and "response_format" in (row["error"] or "")
            if row["status"] in ("truncated", "invalid"):
                unread.add(item_key(row))
            file.append(row)
        file.keep_latest(item_key)
        print(
            f"batch {batch.state['batch_id']}: {batch.state['ended']}, {num_replies:,} of "
            f"{batch.state['num_requests']:,} requests have a reply"
            + (
                "; the next start of --mode batch asks for the others"
                if num_replies < batch.state["num_requests"]
                else ""
            )
        )
        if without_schema:
            print("the endpoint takes no JSON schema; --mode live asks for replies in words")
        return unread


def spent_on(rows: Path) -> float:
    """US dollars that a file of rows has cost, or may have, with what is under way."""
    return cost_of(iterate_rows(rows)) + sum(batch.state["most_cost"] for batch in open_batches(rows))
