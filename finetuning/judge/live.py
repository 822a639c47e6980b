"""
Judging request by request: one queue over the answers of all models and all judges. Imports without torch.

The first request to each judge goes alone, as it shows what the endpoint can do; after that, as many are in flight as
the endpoint takes, whichever models they are about. Each row is written as it arrives, to the file of each model that
gave the answer, and a file is summed up as soon as its last row is in.
"""

import asyncio
import collections
import gc
from pathlib import Path

from tqdm import tqdm

from finetuning.endpoint import Endpoint
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
        files: Where the rows of each job go; they are open.
        plans: By the name of their judge.

    Attributes:
        finished: The files of rows that are complete and have been summed up.
    """

    def __init__(self, work: Work, files: list[RowFile], plans: dict[str, Plan], budget: Budget, limits: RateLimits):
        self.work, self.plans, self.budget = work, plans, budget
        self.files = {file.path: file for file in files}
        self.finished: set[Path] = set()
        self.judges: dict[str, Judge] = {}
        self._rate = RateControl(limits)
        self._requests = work.requests()
        self._next = next(self._requests, None)
        self._missing = {job.path: {item.key for item in job.missing(work.retry_failed)} for job in work.jobs}
        self._earlier = {path: read_earlier(path, keys) for path, keys in self._missing.items()}  # what they have cost
        num_items, num_missing = sum(1 for job in work.jobs for _ in job.items()), sum(map(len, self._missing.values()))
        self._progress = tqdm(total=num_items, initial=num_items - num_missing, unit="answer")
        self._counts: collections.Counter[str] = collections.Counter()
        self._spent = 0.0
        self._workers: set[asyncio.Task] = set()
        self._crashes: list[BaseException] = []  # of workers, as where a disk is full

    async def run(self, endpoint: Endpoint, settings: RequestSettings) -> SoftStop:
        """Judge until all is judged, the budget is used up or a signal asks to stop; returns what knows that signal.

        Raises:
            InputError: Nothing more can be judged; what was in flight has been written before.
        """

        def describe_wait() -> str:
            number = sum(judge.num_in_flight for judge in self.judges.values())
            return f"waiting for the {number} requests in flight, at most {endpoint.timeout:g} s"

        gc.freeze()  # the garbage collector would go through all that was imported, again and again
        with SoftStop(asyncio.get_running_loop(), describe_wait, self._rate.stop) as stop, self._progress:
            async with endpoint.open_client() as client:
                for name, plan in self.plans.items():
                    self.judges[name] = Judge(endpoint, client, plan, settings, self._rate, self.budget)
                for job in self.work.jobs:
                    judge = self.judges[job.judge_model]
                    judge.has_judged = judge.has_judged or any(row["status"] == "ok" for row in iterate_rows(job.path))
                    self._finish_if_complete(job)
                await self._ask_all()
            return stop

    async def _ask_all(self) -> None:
        try:
            while True:
                while len(self._workers) < int(self._rate.limit) and (request := self._take()) is not None:
                    self._workers.add(asyncio.create_task(self._ask_in_turn(*request)))
                if not self._workers:
                    break
                done, self._workers = await asyncio.wait(self._workers, return_when=asyncio.FIRST_COMPLETED)
                self._crashes += [error for worker in done if (error := worker.exception()) is not None]
            if (fault := self._find_fault()) is not None:
                raise fault
        finally:
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)

    def _find_fault(self) -> BaseException | None:
        """Why nothing more is sent, if there is a reason."""
        return next(filter(None, (*(judge.fault for judge in self.judges.values()), *self._crashes)), None)

    def _take(self) -> tuple[Job, Item] | None:
        """The next request if it may leave, with money set aside for it."""
        if self._next is None or self._rate.stop.is_set() or self._find_fault() is not None:
            return None
        job, item = self._next
        judge = self.judges[job.judge_model]
        if judge.first_in_flight:
            return None
        if not self.budget.set_aside(judge.worst_cost(item, job.form)):
            # requests in flight may settle for less; exhausted only if none is
            self.budget.exhausted |= not self._workers
            return None
        judge.first_in_flight = judge.num_rows == 0
        self._next = next(self._requests, None)
        return job, item

    async def _ask_in_turn(self, job: Job, item: Item) -> None:
        """Ask for one item after the other, as long as there are as many workers as there may be requests in flight.

        A worker goes on by itself, since one that is started anew would wait until all replies that came together with
        its own have been read.
        """
        request: tuple[Job, Item] | None = (job, item)
        while request is not None:
            await self._judge(*request)
            request = self._take() if len(self._workers) == int(self._rate.limit) else None

    async def _judge(self, job: Job, item: Item) -> None:
        judge = self.judges[job.judge_model]
        try:
            row = await judge.judge(item, job.form)
        finally:
            judge.first_in_flight = False
        if row is None:
            return
        is_first = not self._counts
        for taker in self.work.takers(job, item):
            self._write(taker, row if taker is job else share(row, job.path.stem))
        if is_first and self.work.waits_for_reply:
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
