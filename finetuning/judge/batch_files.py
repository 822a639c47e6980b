"""
The batches of a file of rows, and how far each of them is. Imports without torch.

A batch belongs to one file of rows, whatever else a start is asked to judge. Beside that file:

    batches/<model>.<key>.json           how far the batch is, rewritten at every step; the identity of its rows
    batches/<model>.<key>.jsonl          its requests
    batches/<model>.<key>.items.jsonl    what each request is about
    batches/<model>.<key>.output.jsonl   the replies, until their rows are written

Its status:

    written ---> uploaded ---> submitted ---> downloaded ---> collected
                                   |
                                   +--------> failed            the endpoint could not read it
    (any of the first four) --------------->  given up

A batch that is uploaded may be submitted, too: a kill or a lost answer leaves that open. It is written again where the
endpoint has refused it, and submitted again where the replies on this machine are not whole.
"""

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from finetuning.errors import InputError
from finetuning.judge.jobs import Item, Job
from finetuning.judge.rows import cost_of
from finetuning.results import item_key, iterate_rows
from finetuning.runs import read_json, write_json
from finetuning.schemas import BATCH, BATCH_ITEM
from finetuning.wording import describe_differences

BATCHES = "batches"  # folder
UNSENT = ("written",)
OPEN = ("uploaded", "submitted", "downloaded")  # the endpoint may be at work on it, or its replies are not rows yet
CHAT_COMPLETIONS: Final = "/v1/chat/completions"
MAX_REQUESTS = 50_000  # in one batch
MAX_BYTES = 100_000_000  # of its file


class PendingBatch:
    """One batch, and how far it is by its `state`."""

    def __init__(self, path: Path, state: dict):
        self.path, self.state = path, state
        self.key = path.stem.rpartition(".")[2]
        self.requests, self.items, self.output = (
            path.with_suffix(suffix) for suffix in (".jsonl", ".items.jsonl", ".output.jsonl")
        )

    def record(self, **state) -> None:
        self.state.update(state)
        write_json(self.path, self.state)

    def finish(self, status: str) -> None:
        """Note that nothing more is to be done with it; its record stays."""
        self.record(status=status)
        for path in (self.requests, self.items, self.output):
            path.unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """Whether each request has its line in the output that was fetched."""
        return sum(1 for _ in iterate_rows(self.output)) >= self.state["num_requests"]

    def read_items(self) -> dict[str, dict]:
        """What each request is about, by custom id: what names its `row`, and its `worst_cost`.

        Raises:
            InputError: Some are missing, so that replies would be nobody's.
        """
        items = {line["custom_id"]: line for line in iterate_rows(self.items, BATCH_ITEM)}
        if len(items) != self.state["num_requests"]:
            raise InputError(
                f"{self.items} names {len(items)} of the {self.state['num_requests']} requests of its batch; take it "
                f"from a copy, or delete {self.path}: its answers are judged again"
            )
        return items


def list_batches(rows: Path, statuses: tuple[str, ...] = OPEN) -> list[PendingBatch]:
    """The batches of a file of rows with one of some statuses, in the order in which they were made."""
    remedy = "take it from a copy, or delete it: the answers of its batch are judged again"
    found = [
        PendingBatch(path, read_json(path, BATCH, remedy))
        for path in (rows.parent / BATCHES).glob("*.json")
        if path.stem.rpartition(".")[0] == rows.stem
    ]
    return sorted((b for b in found if b.state["status"] in statuses), key=lambda batch: batch.state["created"])


def pending_items(rows: Path) -> set[tuple[str, str]]:
    """(item key, prediction hash) of what batches of a file of rows are judging."""
    return {
        (item_key(item["row"]), item["row"]["prediction_hash"])
        for batch in list_batches(rows)
        for item in batch.read_items().values()
    }


def spent_on(rows: Path) -> float:
    """US dollars that a file of rows has cost, or may have, with what its open batches may cost."""
    return cost_of(iterate_rows(rows)) + sum(batch.state["most_cost"] for batch in list_batches(rows))


def check_pending(jobs: list[Job], live: bool) -> None:
    """Refuse to go on beside an open batch whose rows would not belong here, or would be paid for twice.

    Raises:
        InputError: It was made under another identity (says which field differs), or this start asks `live`.
    """
    for job in jobs:
        for batch in list_batches(job.path):
            if what := describe_differences(batch.state["identity"], json.loads(json.dumps(job.identity))):
                raise InputError(
                    f"a batch is under way for {job.name} under other conditions: {what}. Collect it under those "
                    "(--mode batch), or give it up with --overwrite true"
                )
            if live:
                raise InputError(
                    f"a batch is under way for {job.name}; go on with it (--mode batch), or give it up and judge all "
                    f"again (--overwrite true). If its endpoint has lost it, delete {batch.path}: only its answers are "
                    "judged again"
                )


def write_batches(job: Job, requests: Iterable[tuple[Item, dict, float]], attempt: int) -> Iterator[PendingBatch]:
    """Write requests into as few files as the API takes.

    Args:
        requests: The item, the body and the US dollars at most of each.
    """
    folder = job.path.parent / BATCHES
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jsonl"):
        record = folder / f"{path.name.removesuffix('.jsonl').removesuffix('.items')}.json"
        if record.stem.rpartition(".")[0] == job.path.stem and not record.exists():
            path.unlink()  # a kill has left it unfinished
    waiting = iter(requests)
    request = next(waiting, None)
    while request is not None:
        batch = PendingBatch(folder / f"{job.path.stem}.{uuid.uuid4().hex[:12]}.json", {})
        num_requests, num_bytes, worst_cost = 0, 0, 0.0
        with batch.requests.open("w", encoding="utf-8") as file, batch.items.open("w", encoding="utf-8") as items:
            while request is not None:
                item, body, cost = request
                custom_id = f"{batch.key}-{num_requests}"
                line = {"custom_id": custom_id, "method": "POST", "url": CHAT_COMPLETIONS, "body": body}
                text = json.dumps(line, ensure_ascii=False) + "\n"
                size = len(text.encode())
                if num_requests == MAX_REQUESTS or (num_requests and num_bytes + size > MAX_BYTES):
                    break
                file.write(text)
                about = {"custom_id": custom_id, "row": item.row, "worst_cost": cost}
                items.write(json.dumps(about, ensure_ascii=False) + "\n")
                num_requests, num_bytes, worst_cost = num_requests + 1, num_bytes + size, worst_cost + cost
                request = next(waiting, None)
        # only now is it a batch: what a kill leaves before this is never sent
        batch.record(
            status="written", identity=job.identity, attempt=attempt, num_requests=num_requests, most_cost=worst_cost,
            created=time.time(),
        )  # fmt: skip
        yield batch
