"""
Judging request by request: one queue over the answers of all models and all judges. Imports without torch.

The first request to each judge goes alone, as it shows what the endpoint can do; after that, as many are in flight as
the endpoint takes, whichever models they are about. Each row is written as it arrives, to the file of each model that
gave the answer, and a file is summed up as soon as its last row is in.
"""

import asyncio
import collections
import gc
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from finetuning.endpoint import Endpoint
from finetuning.errors import InputError
from finetuning.interrupts import SoftStop
from finetuning.judge.client import Judge
from finetuning.judge.form import RequestSettings
from finetuning.judge.jobs import Item, Job
from finetuning.judge.money import Budget
from finetuning.judge.plan import Plan
from finetuning.judge.rate import RateControl, RateLimits
from finetuning.judge.rows import add_usage, read_earlier, share
from finetuning.judge.summary import summarize
from finetuning.judge.work import Work
from finetuning.results import RowFile, item_key, iterate_rows


class LiveJudging:
    """Judges what is to be asked of some jobs.

    Args:
        files: Where the rows of each job go.
        plans: By the name of their judge.
        finished: Gets the files of rows that are complete and have been summed up.
    """

    def __init__(self, work: Work, files: list[RowFile], plans: dict[str, Plan], budget: Budget, finished: set[Path]):
        self.work, self.plans, self.budget, self.finished = work, plans, budget, finished
        self.files = {file.path: file for file in files}
        self.judges: dict[str, Judge] = {}
        self._missing: dict[Path, set[str]] = {}  # keys of items
        self._earlier: dict[Path, dict[str, dict]] = {}  # what was paid for these items before
        self._counts: collections.Counter[str] = collections.Counter()
        self._spent = 0.0
        self._workers: set[asyncio.Task] = set()
        self._fault: BaseException | None = None  # after which nothing more is sent

    async def run(self, endpoint: Endpoint, settings: RequestSettings, limits: RateLimits) -> SoftStop:
        """Judge until all is judged, the budget is used up or a signal asks to stop; returns what knows that signal.

        Raises:
            InputError: Nothing more can be judged; what was in flight has been written before.
        """

        def describe_wait() -> str:
            number = sum(judge.num_in_flight for judge in self.judges.values())
            return f"waiting for the {number} requests in flight, at most {endpoint.timeout:g} s"

        gc.freeze()  # the garbage collector would go through all that was imported, again and again
        with SoftStop(asyncio.get_running_loop(), describe_wait) as stop:
            self._rate = RateControl(limits, stop.event)
            async with endpoint.open_client() as client:
                self.judges = {
                    name: Judge(endpoint, client, plan, settings, self._rate, self.budget)
                    for name, plan in self.plans.items()
                }
                num_items = self._look_at_jobs()
                num_missing = sum(map(len, self._missing.values()))
                with tqdm(total=num_items, initial=num_items - num_missing, unit="answer") as self._progress:
                    for job in self.work.jobs:
                        self._finish_if_complete(job)
                    await self._ask_all(self.work.requests())
            return stop

    def _look_at_jobs(self) -> int:
        """Take note of what is missing and what was paid for it; returns the number of all items."""
        num_items = 0
        for job in self.work.jobs:
            num_items += sum(1 for _ in job.items())
            missing = {item.key for item in job.missing(self.work.retry_failed)}
            self._missing[job.path] = missing
            self._earlier[job.path] = read_earlier(job.path, missing)
            judge = self.judges[job.judge_model]
            judge.has_replied = judge.has_replied or any(row["status"] == "ok" for row in iterate_rows(job.path))
        return num_items

    async def _ask_all(self, requests: Iterator[tuple[Job, Item]]) -> None:
        self._waiting, self._next = requests, next(requests, None)
        try:
            while True:
                while len(self._workers) < int(self._rate.limit) and (request := self._take()) is not None:
                    self._workers.add(asyncio.create_task(self._work(*request)))
                if not self._workers:
                    break
                done, self._workers = await asyncio.wait(self._workers, return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    self._fault = self._fault or worker.exception()  # looked at in any case, or asyncio complains
            if self._fault is not None:
                raise self._fault
        finally:
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)

    def _take(self) -> tuple[Job, Item] | None:
        """The next request if it may leave, with money set aside for it."""
        self._fault = self._fault or next((judge.fault for judge in self.judges.values() if judge.fault), None)
        if self._next is None or self._fault is not None or self._rate.stop.is_set():
            return None
        job, item = self._next
        judge = self.judges[job.judge_model]
        if judge.is_trying:
            return None
        if not self.budget.set_aside(judge.max_cost(item, job.form)):
            self.budget.exhausted |= not self._workers  # else others may yet cost less than they could
            return None
        judge.is_trying = judge.num_rows == 0
        self._next = next(self._waiting, None)
        return job, item

    async def _work(self, job: Job, item: Item) -> None:
        """Ask for one item after the other, as long as there are as many workers as there may be requests in flight.

        A worker goes on by itself, since one that is started anew would wait until all replies that came together with
        its own have been read.
        """
        request: tuple[Job, Item] | None = (job, item)
        while request is not None:
            await self._ask(*request)
            request = self._take() if len(self._workers) == int(self._rate.limit) else None

    async def _ask(self, job: Job, item: Item) -> None:
        judge = self.judges[job.judge_model]
        try:
            row = await judge.judge(item, job.form)
        except InputError as error:
            self._fault = self._fault or error
            return
        finally:
            judge.is_trying = False
        if row is None:
            return
        is_first = not self._counts
        for taker in self.work.takers(job, item):
            self._write(taker, row if taker is job else share(row, job.path.stem))
        if is_first and self.work.fresh:  # earlier rows stay until there is a reply
            known = self.work.write_known(list(self.files.values()))
            for taker in (taker for taker in self.work.jobs if taker.path in known):
                self._missing[taker.path] -= known[taker.path]
                self._progress.update(len(known[taker.path]))
                self._finish_if_complete(taker)
        self._counts[row["status"]] += 1
        self._spent += row["cost"] or 0.0
        money = {"spent": f"${self._spent:.4f}"} if judge.plan.price is not None else {}
        self._progress.set_description(job.name, refresh=False)
        self._progress.set_postfix({**self._counts, **money, "at_once": str(int(self._rate.limit))}, refresh=False)

    def _write(self, job: Job, row: dict) -> None:
        before = self._earlier[job.path].pop(item_key(row), None)
        self.files[job.path].append(row if before is None else add_usage(row, before))
        self._missing[job.path].discard(item_key(row))
        self._progress.update()
        self._finish_if_complete(job)

    def _finish_if_complete(self, job: Job) -> None:
        if not self._missing[job.path]:
            file = self.files[job.path]
            file.keep_latest(item_key)
            self._progress.write(summarize(job, file))
            self.finished.add(job.path)
