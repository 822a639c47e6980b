"""
Judging through the Batch API, at a part of the price and within a day: write, upload, submit, wait, collect.

    qa_evaluation_results/batches/<key>.json            how far the batch is, rewritten at every step
    qa_evaluation_results/batches/<key>.jsonl           its requests
    qa_evaluation_results/batches/<key>.output.jsonl    the replies, until their rows are written

A kill at any moment loses nothing and submits nothing twice: a batch carries its key as metadata, by which a start that
does not know whether it was submitted finds it at the endpoint. Imports without torch.
"""

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import AuthenticationError, NotFoundError, OpenAI, OpenAIError, PermissionDeniedError
from openai.types import Batch
from openai.types.chat import ChatCompletion
from pydantic import ValidationError
from tqdm import tqdm

from finetuning.configs import JudgeArguments
from finetuning.errors import InputError
from finetuning.judge import Item, Job, item_key
from finetuning.judge_client import (
    Budget,
    add_usage,
    build_request,
    describe_error,
    failure,
    most_cost,
    prompt_bytes,
    read_completion,
    show_url,
)
from finetuning.prices import Price
from finetuning.results import RowFile, iterate_rows
from finetuning.runs import read_json, write_json

BATCHES = "batches"  # folder
ENDPOINT = "/v1/chat/completions"
WINDOW = "24h"  # the only one there is
MOST_REQUESTS = 50_000  # in one batch, and bytes of its file
MOST_BYTES = 100_000_000
ENDED = ("completed", "expired", "cancelled")  # with replies to whatever was done until then


def custom_id(key: str, item_name: str, prediction_hash: str) -> str:
    """What a reply is joined on: the same for the same answer in the same batch."""
    return hashlib.sha256(json.dumps([key, item_name, prediction_hash]).encode()).hexdigest()[:32]


@dataclass
class PendingBatch:
    """One batch and how far it is: written, uploaded, submitted, downloaded, collected or failed."""

    path: Path
    state: dict

    @property
    def key(self) -> str:
        return self.path.stem

    @property
    def requests(self) -> Path:
        return self.path.with_suffix(".jsonl")

    @property
    def output(self) -> Path:
        return self.path.with_suffix(".output.jsonl")

    def record(self, **state) -> None:
        self.state.update(state)
        write_json(self.path, self.state)

    def finish(self) -> None:
        """Its rows are written."""
        self.record(status="collected")
        self.requests.unlink(missing_ok=True)
        self.output.unlink(missing_ok=True)

    def custom_ids(self) -> set[str]:
        return {row["custom_id"] for row in iterate_rows(self.requests)}


def open_batches(folder: Path, judge_model: str, endpoint: str) -> list[PendingBatch]:
    """The batches of a judge that are not collected yet, in the order in which they were made."""
    found = [PendingBatch(path, read_json(path)) for path in folder.glob("*.json")]
    found = [
        batch
        for batch in found
        if (batch.state["judge_model"], batch.state["endpoint"]) == (judge_model, endpoint)
        and batch.state["status"] not in ("collected", "failed")
    ]
    return sorted(found, key=lambda batch: batch.state["created"])


def write_batches(
    folder: Path, judge_model: str, endpoint: str, requests: Iterable[tuple[str, str, dict, float]], max_tokens: int
) -> Iterator[PendingBatch]:
    """Write requests into as few files as the API takes.

    Args:
        requests: (item name, prediction hash, body, US dollars at most) of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jsonl"):  # a kill has left it unfinished
        if "." not in path.stem and not path.with_suffix(".json").exists():
            path.unlink()
    waiting = iter(requests)
    request = next(waiting, None)
    while request is not None:
        batch = PendingBatch(folder / f"{uuid.uuid4().hex[:12]}.json", {})
        num_requests, num_bytes, most_cost = 0, 0, 0.0
        with batch.requests.open("w", encoding="utf-8") as file:
            while request is not None:
                name, prediction_hash, body, most = request
                line = {
                    "custom_id": custom_id(batch.key, name, prediction_hash),
                    "method": "POST",
                    "url": ENDPOINT,
                    "body": body,
                }
                text = json.dumps(line, ensure_ascii=False) + "\n"
                size = len(text.encode())
                if num_requests == MOST_REQUESTS or (num_requests and num_bytes + size > MOST_BYTES):
                    break
                file.write(text)
                num_requests, num_bytes, most_cost = num_requests + 1, num_bytes + size, most_cost + most
                request = next(waiting, None)
        # only now is it a batch: what a kill leaves before this is never sent
        batch.record(
            status="written", judge_model=judge_model, endpoint=endpoint, num_requests=num_requests, max_tokens=max_tokens,
            most_cost=most_cost, created=time.time(),
        )  # fmt: skip
        yield batch


class BatchClient:
    """The Batch API of one endpoint."""

    def __init__(self, client: OpenAI, poll_seconds: float):
        self.client, self.poll_seconds = client, poll_seconds

    def submit(self, batch: PendingBatch) -> None:
        """Bring a batch to the endpoint, from wherever a kill has left it.

        Raises:
            InputError: The endpoint refuses it.
        """
        with _explained(self.client):
            if batch.state["status"] == "written":
                with batch.requests.open("rb") as file:
                    uploaded = self.client.files.create(file=(f"{batch.key}.jsonl", file), purpose="batch")
                batch.record(status="uploaded", input_file_id=uploaded.id)
            if batch.state["status"] == "uploaded":
                found = self._find(batch.key) or self.client.batches.create(
                    input_file_id=batch.state["input_file_id"],
                    endpoint=ENDPOINT,
                    completion_window=WINDOW,
                    metadata={"key": batch.key},
                )
                batch.record(status="submitted", batch_id=found.id)
                print(f"batch {found.id}: submitted with {batch.state['num_requests']:,} requests", flush=True)

    def _find(self, key: str) -> Batch | None:
        """The batch that was submitted right before a kill, if one was."""
        for batch in self.client.batches.list(limit=100):
            if batch.metadata is not None and batch.metadata.get("key") == key:
                return batch
        return None

    def look(self, batch: PendingBatch) -> Batch:
        with _explained(self.client):
            return self.client.batches.retrieve(batch.state["batch_id"])

    def wait(self, batch: PendingBatch) -> Batch:
        """Look again and again until the batch has ended; it goes on at the endpoint if this does not."""
        with tqdm(
            total=batch.state["num_requests"], desc=f"batch {batch.state['batch_id']}", unit="answer"
        ) as progress:
            while True:
                found = self.look(batch)
                counts = found.request_counts
                if counts is not None:
                    progress.n = counts.completed + counts.failed
                    progress.set_postfix(status=found.status, failed=counts.failed)
                if found.status in (*ENDED, "failed"):
                    return found
                time.sleep(self.poll_seconds)

    def download(self, batch: PendingBatch, found: Batch) -> None:
        """Fetch the replies of a batch that has ended.

        Raises:
            InputError: The endpoint could not read the batch at all.
        """
        if found.status == "failed":
            batch.record(status="failed")
            reasons = [error.message for error in (found.errors.data if found.errors is not None else None) or []]
            raise InputError(
                f"batch {found.id} was refused, and nothing was judged: {'; '.join(reasons[:3]) or 'no reason'}"
            )
        partial = batch.output.with_suffix(".partial")
        with _explained(self.client), partial.open("wb") as file:
            for file_id in (found.output_file_id, found.error_file_id):
                if file_id is not None:
                    with self.client.files.with_streaming_response.content(file_id) as response:
                        for chunk in response.iter_bytes():
                            file.write(chunk)
                    file.write(b"\n")  # whether or not the file ended in one
        partial.replace(batch.output)
        batch.record(status="downloaded", ended=found.status)


@contextlib.contextmanager
def _explained(client: OpenAI) -> Iterator[None]:
    """Errors of the client become one line that says what to do."""
    url = show_url(str(client.base_url))
    try:
        yield
    except (AuthenticationError, PermissionDeniedError) as error:
        raise InputError(
            f"the judge's endpoint refuses the key (status {error.status_code}); check OPENAI_API_KEY"
        ) from error
    except NotFoundError as error:
        raise InputError(
            f"{url} has no Batch API, or has lost the batch ({describe_error(error)}); use --mode live"
        ) from error
    except (OpenAIError, json.JSONDecodeError) as error:
        raise InputError(
            f"the Batch API at {url} cannot be used now: {describe_error(error)}. Nothing is lost; the same command goes on"
        ) from error


def read_replies(path: Path, read: Callable[[ChatCompletion | None, dict | None], dict]) -> Iterator[tuple[str, dict]]:
    """What a batch has replied, by custom id; requests that it never came to are not among them.

    Args:
        read: Takes a completion, or None and the error instead, and gives what a row holds of it.
    """
    for line in iterate_rows(path):
        response, error, completion = line.get("response") or {}, line.get("error"), None
        if response.get("status_code") == 200:
            try:
                completion = ChatCompletion.model_validate(response["body"])
            except ValidationError:
                error = {"message": "the reply is no chat completion"}
        elif response:
            error = (response.get("body") or {}).get("error") or {"message": f"status {response['status_code']}"}
        yield line["custom_id"], read(completion, error)


@dataclass
class BatchJudge:
    """Judges jobs in batches.

    Args:
        files: Where the rows of each job go.
        prices: Of each judge.
    """

    client: OpenAI
    folder: Path
    jobs: list[Job]
    files: list[RowFile]
    prices: dict[str, Price | None]
    args: JudgeArguments

    def run(self) -> bool:
        """Send what is missing, wait, and write the rows; whether the budget was enough.

        Replies that were cut off or do not fit the form go into a second batch, with twice the limit. With
        `collect`, nothing is sent or waited for.
        """
        api = BatchClient(self.client, self.args.poll_seconds)
        collected: set[str] = set()  # custom ids of this start
        enough = True
        for attempt in (1, 2):
            pending = self._open_batches()
            if not self.args.collect:
                enough = self._write(pending, attempt, collected)
                pending = self._open_batches()
                for batch in pending:
                    api.submit(batch)
            for batch in pending:
                if batch.state["status"] == "submitted":
                    found = api.look(batch) if self.args.collect else api.wait(batch)
                    if found.status not in (*ENDED, "failed"):
                        print(f"batch {found.id}: {found.status}; start with --collect true again later")
                        continue
                    api.download(batch, found)
                if batch.state["status"] == "downloaded":
                    collected |= self._collect(batch)
            if self.args.collect or not self._unread(collected):
                break
        return enough

    @property
    def endpoint(self) -> str:
        return show_url(str(self.client.base_url))

    def _open_batches(self) -> list[PendingBatch]:
        return [batch for judge_model in self.prices for batch in open_batches(self.folder, judge_model, self.endpoint)]

    def _unread(self, collected: set[str]) -> bool:
        """Whether a reply that was collected cannot be read."""
        return any(_is_unread(row, collected) for file in self.files for row in iterate_rows(file.path))

    def _write(self, pending: list[PendingBatch], attempt: int, collected: set[str]) -> bool:
        """Write batches of what is missing; whether the budget was enough for all of it."""
        spent = sum(row["cost"] or 0.0 for file in self.files for row in iterate_rows(file.path))
        budget = Budget(self.args.max_cost, spent + sum(batch.state["most_cost"] for batch in pending))
        under_way = {batch.key: batch.custom_ids() for batch in pending}
        for judge_model in self.prices:
            requests = self._requests(judge_model, under_way, budget, attempt, collected)
            for batch in write_batches(
                self.folder, judge_model, self.endpoint, requests, attempt * self.args.max_tokens
            ):
                print(f"batch {batch.key}: {batch.state['num_requests']:,} requests written")
        return not budget.exhausted

    def _requests(
        self, judge_model: str, under_way: dict[str, set[str]], budget: Budget, attempt: int, collected: set[str]
    ) -> Iterator[tuple[str, str, dict, float]]:
        """What is missing and not under way; on the second attempt, what could not be read after the first."""
        max_tokens = attempt * self.args.max_tokens
        price = self.prices[judge_model]
        for job in self.jobs:
            if job.judge_model != judge_model:
                continue
            unread = {item_key(row) for row in iterate_rows(job.path) if _is_unread(row, collected)}
            for item in job.missing(self.args.retry_failed or attempt == 2):
                name, answer = _name_of(job, item), item.row["prediction_hash"]
                if any(custom_id(key, name, answer) in ids for key, ids in under_way.items()):
                    continue
                if attempt == 2 and item.key not in unread:
                    continue
                most = 0.0
                if price is not None:
                    most = most_cost(price, prompt_bytes(item, job.form), max_tokens, batch=True)
                if not budget.set_aside(most):
                    budget.exhausted = True
                    return
                yield name, answer, build_request(judge_model, item, job.form, self.args, max_tokens), most

    def _collect(self, batch: PendingBatch) -> set[str]:
        """Write the rows of a batch that was downloaded; gives the custom ids of its replies."""
        judge_model = batch.state["judge_model"]
        waiting: dict[
            str, tuple[RowFile, dict, dict | None]
        ] = {}  # by custom id: the file, what names the row, its earlier row
        for job, file in zip(self.jobs, self.files, strict=True):
            if job.judge_model == judge_model:
                earlier = {item_key(row): row for row in iterate_rows(file.path)}
                for item in job.items():
                    key = custom_id(batch.key, _name_of(job, item), item.row["prediction_hash"])
                    waiting[key] = (file, item.row, earlier.get(item.key))
        form = self.jobs[0].form

        def read(completion: ChatCompletion | None, error: dict | None) -> dict:
            if completion is None:
                return failure(f"batch {batch.state['batch_id']}: {error.get('message') or error.get('code') or error}")
            return read_completion(completion, form, self.prices[judge_model], self.args.expected_scores, batch=True)

        replied, num_unknown = set(), 0
        for key, reply in read_replies(batch.output, read):
            replied.add(key)
            if key not in waiting:
                num_unknown += 1
                continue
            file, item_row, before = waiting[key]
            if before is not None and before.get("custom_id") == key:
                continue  # a kill came after this row was written
            row = {**item_row, **reply, "custom_id": key}
            if before is not None and before["prediction_hash"] == row["prediction_hash"]:
                row = before if before["status"] == "ok" else add_usage(row, before)
            file.append(row)
        for file in self.files:
            file.keep_latest(item_key)
        batch.finish()
        print(
            f"batch {batch.state['batch_id']}: {batch.state['ended']}, {len(replied):,} of "
            f"{batch.state['num_requests']:,} requests have a reply"
            + (
                f"; {num_unknown} are about answers that have changed since, or were not asked for now"
                if num_unknown
                else ""
            )
        )
        return replied


def _name_of(job: Job, item: Item) -> str:
    return f"{job.name} {item.key}"


def _is_unread(row: dict, collected: set[str]) -> bool:
    return row["status"] in ("truncated", "invalid") and row.get("custom_id") in collected
