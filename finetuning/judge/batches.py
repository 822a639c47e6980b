"""
Judging through the Batch API, at a part of the price and within a day: write, upload, submit, wait, collect.

A kill at any moment loses nothing and submits nothing twice. A batch counts from its submission, as nothing is paid for
before: one that was only written, or that the endpoint refused, is dropped by the next start, in either mode, and its
file at the endpoint is deleted where that can be done. Imports without torch.
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai.types.chat import ChatCompletion

from finetuning.judge.batch_api import ENDED, BatchApi
from finetuning.judge.batch_files import UNSENT, PendingBatch, list_batches, spent_on, write_batches
from finetuning.judge.form import Form, RequestSettings
from finetuning.judge.jobs import Item, Job
from finetuning.judge.money import Budget, Price
from finetuning.judge.plan import Plan
from finetuning.judge.rows import add_usage, failure, read_completion
from finetuning.judge.work import Work
from finetuning.results import RowFile, item_key, iterate_rows

NUM_ATTEMPTS = 2  # for replies that were cut off or do not fit


def clear_batches(jobs: list[Job], api: BatchApi, overwrite: bool) -> None:
    """Drop the batches that were never submitted and, to `overwrite` their rows, give up those that are open."""
    unwanted = [batch for job in jobs for batch in list_batches(job.path, UNSENT)]
    unwanted += [batch for job in jobs for batch in list_batches(job.path)] if overwrite else []
    if unwanted:
        with api:
            for batch in unwanted:
                api.give_up(batch)


@dataclass
class BatchJudging:
    """Judges what is to be asked of some jobs in batches.

    Args:
        files: Where the rows of each job go.
        plans: By the name of their judge.
        budget: Begins anew with each round of batches, from what rows and open batches may have cost.
    """

    api: BatchApi
    work: Work
    files: list[RowFile]
    plans: dict[str, Plan]
    settings: RequestSettings
    budget: Budget

    def run(self, collect: bool) -> None:
        """Send what is missing, wait, and write the rows; to `collect`, send nothing and wait for nothing.

        Replies that were cut off or do not fit the form go into a second batch, with twice the limit. After `collect`
        they are missing, and the next start asks for them with the single limit again.
        """
        unread: set[tuple[Path, str]] = set()  # rows of first attempts, collected now, that cannot be read
        for attempt in range(1, NUM_ATTEMPTS + 1):
            if not collect:
                opened = [batch for job in self.work.jobs for batch in list_batches(job.path)]
                doubtful = [batch for batch in opened if batch.state["status"] == "uploaded"]
                work = self.work if attempt == 1 else Work(self.work.jobs, retry_failed=True, only=unread)
                for batch in doubtful + self._write(work, attempt):
                    self.api.submit(batch)
            unread = set()
            for job, file in zip(self.work.jobs, self.files, strict=True):
                for batch in list_batches(job.path):
                    if self._fetch(batch, collect):
                        keys = self._collect(batch, job, file)
                        unread |= {(job.path, key) for key in keys if batch.state["attempt"] < NUM_ATTEMPTS}
                        self.api.delete_files(batch)
                        batch.finish("collected")
            if collect or not unread:
                break
        # what batches have judged for one of several models, and what has waited for their replies
        Work(self.work.jobs, self.work.retry_failed).write_known(self.files)

    def _write(self, work: Work, attempt: int) -> list[PendingBatch]:
        """Write batches of what is to be asked, as far as the money goes."""
        self.budget.start_from(sum(spent_on(job.path) for job in work.jobs))
        written = []
        for job, items in itertools.groupby(work.requests(), key=operator.itemgetter(0)):
            for batch in write_batches(job, self._requests(job, (item for _, item in items), attempt), attempt):
                print(f"batch {batch.key}: {batch.state['num_requests']:,} requests about {job.name} written")
                written.append(batch)
        return written

    def _requests(self, job: Job, items: Iterator[Item], attempt: int) -> Iterator[tuple[Item, dict, float]]:
        max_tokens = attempt * self.settings.max_tokens
        for item in items:
            num_bytes = job.form.count_bytes(item.data)
            worst_cost = self.plans[job.judge_model].worst_cost(num_bytes, max_tokens, batch=True)
            if not self.budget.set_aside(worst_cost):
                self.budget.exhausted = True
                return
            yield item, self.settings.build_request(job.judge_model, job.form, item.data, max_tokens), worst_cost

    def _fetch(self, batch: PendingBatch, collect: bool) -> bool:
        """Have the replies of a batch on this machine; False means that they are not there yet."""
        if batch.state["status"] == "downloaded" and not batch.is_whole():
            batch.record(status="submitted")  # the endpoint has its replies until they are rows
        if batch.state["status"] == "submitted":
            found = self.api.look(batch) if collect else self.api.wait(batch)
            if found.status not in ENDED:
                print(f"batch {batch.state['batch_id']}: {found.status}; start with --collect true again later")
                return False
            self.api.download(batch, found)
        return batch.state["status"] == "downloaded"

    def _collect(self, batch: PendingBatch, job: Job, file: RowFile) -> set[str]:
        """Write the rows of a batch that was downloaded, and return the keys of those that cannot be read."""
        items = batch.read_items()
        current = {item.key: item.row["prediction_hash"] for item in job.items()}
        present = {item_key(row): row for row in iterate_rows(file.path)}
        price, expected = self.plans[job.judge_model].price, self.settings.expected_scores
        num_replies, unread, without_schema = 0, set[str](), False
        for line in iterate_rows(batch.output):
            custom_id = line.get("custom_id")
            item = items.get(custom_id) if isinstance(custom_id, str) else None
            if item is None:
                continue
            num_replies += 1
            reply = read_line(line, job.form, price, expected, item.get("worst_cost", 0.0))
            row = {**item["row"], **reply, "custom_id": custom_id}
            before = present.get(item_key(row))
            if before is not None and before.get("custom_id") == custom_id:
                row = before  # a kill came after it was written
            else:
                row = row if before is None else _choose(row, before, current.get(item_key(row)))
                file.append(row)
            without_schema |= row["status"] == "error" and "response_format" in (row["error"] or "")
            if row["status"] in ("truncated", "invalid"):
                unread.add(item_key(row))
        file.keep_latest(item_key)
        num_requests = batch.state["num_requests"]
        rest = "; the next start of --mode batch asks for the others" if num_replies < num_requests else ""
        name, ended = batch.state["batch_id"], batch.state["ended"]
        print(f"batch {name}: {ended}, {num_replies:,} of {num_requests:,} requests have a reply{rest}")
        if without_schema:
            print("the endpoint takes no JSON schema; --mode live asks for replies in words")
        return unread


def _choose(row: dict, before: dict, current: str | None) -> dict:
    """The better of two rows about a sample, with what both have cost: what is about the answer as it is now stays.

    Args:
        current: Hash of the answer as it is now.
    """
    if before["prediction_hash"] == row["prediction_hash"]:
        keep_before = before["status"] == "ok"
    else:
        keep_before = row["prediction_hash"] != current
    return add_usage(before, row) if keep_before else add_usage(row, before)


def read_line(line: dict, form: Form, price: Price | None, expected: bool, worst_cost: float) -> dict:
    """What a row holds of one line of a batch's output, whatever stands in it.

    Args:
        worst_cost: US dollars that a reply costs at most, as which one counts that does not say what it used.
    """
    response, error = line.get("response"), line.get("error")
    if isinstance(response, dict):
        body = response.get("body")
        if response.get("status_code") == 200 and isinstance(body, dict):
            reply = read_completion(ChatCompletion.construct(**body), form, price, expected, batch=True)
            return {**reply, "possible_cost": worst_cost if reply["usage"] is None else 0.0}
        error = body.get("error", body) if isinstance(body, dict) else body
        error = error or f"status {response.get('status_code')}"
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error
    return failure(f"in a batch: {' '.join(str(error or 'no reply and no reason').split())[:300]}")
