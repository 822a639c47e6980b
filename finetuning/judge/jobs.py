"""
What is to be asked of the judges, and what that costs: each answer once, whichever models gave it. Imports without torch.

Checkpoints often give the same answer to the same sample, word for word. It is judged once, and each model has its row:
one holds what was paid, the others say with which model they share it (`shared_with`). Asked twice, the judge's noise
would count as a difference between the models. Two answers that are compared and are the same are a tie without a judge.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from finetuning.config.arguments import JudgeArguments
from finetuning.errors import InputError
from finetuning.judge.client import add_usage, prompt_bytes
from finetuning.judge.form import Item, Job
from finetuning.judge.prices import (
    COUNTED_PROMPTS,
    TOKENS_PER_CRITERION,
    Plan,
    find_token_counter,
    load_price,
    measure_tokens_per_byte,
)
from finetuning.results import RowFile, item_key, iterate_rows
from finetuning.runs import read_json

Key = tuple[str, str, str]  # judge, sample (and order, of a pair), hash of what is judged


class Work:
    """What is missing of some jobs, and what of it is asked.

    Args:
        retry_failed: What failed on an earlier start is missing.
        fresh: The rows there are will be deleted.
        under_way: By path of rows, (item key, prediction hash) of what a batch is judging.
    """

    def __init__(
        self,
        jobs: list[Job],
        retry_failed: bool,
        fresh: bool = False,
        under_way: dict[Path, set[tuple[str, str]]] | None = None,
    ):
        self.jobs, self.retry_failed, self.fresh = jobs, retry_failed, fresh
        self._pending = {(job.judge_model, *named) for job in jobs for named in (under_way or {}).get(job.path, ())}
        self.num_certain = 0  # missing items that need no judge
        wanting: dict[Key, list[Job]] = defaultdict(list)
        for job in jobs:
            for item in job.missing(retry_failed, fresh):
                if item.certain is None:
                    wanting[_key(job, item.row)].append(job)
                else:
                    self.num_certain += 1
        self._known = {} if fresh else _find_known(wanting)  # path of the row of another model that says it
        self._takers = {key: takers for key, takers in wanting.items() if len(takers) > 1 or key in self._known}
        num_asked = sum(key not in self._known and key not in self._pending for key in wanting)
        num_waiting = sum(key in self._pending for key in wanting)
        self.num_shared = sum(map(len, wanting.values())) - num_asked - num_waiting  # missing, and another model's too

    def is_asked(self, job: Job, item: Item) -> bool:
        """Whether a missing item is to be sent, and not only to be written."""
        key = _key(job, item.row)
        if item.certain is not None or key in self._known or key in self._pending:
            return False
        return self.takers(job, item)[0] is job

    def takers(self, job: Job, item: Item) -> list[Job]:
        """The jobs that what is said of an item is for; the first one's is asked."""
        return self._takers.get(_key(job, item.row)) or [job]

    def requests(self) -> Iterator[tuple[Job, Item]]:
        """What is to be sent, in the order of the jobs."""
        for job in self.jobs:
            for item in job.missing(self.retry_failed, self.fresh):
                if self.is_asked(job, item):
                    yield job, item

    def write_known(self, files: list[RowFile]) -> dict[Path, set[str]]:
        """Write the rows of what needs no request; what was paid for about the same samples before stays with them.

        Returns:
            Keys of the items, by path of their rows.
        """
        found: dict[Path, list[dict]] = defaultdict(list)
        for job in self.jobs if self.num_certain else ():
            for item in job.missing(self.retry_failed, self.fresh):
                if item.certain is not None:
                    found[job.path].append({**item.row, **certain_reply(item.certain)})
        for path in sorted(set(self._known.values())):
            judge = next(job for job in self.jobs if job.path.parent == path.parent)  # a folder has one judge
            for row in iterate_rows(path):
                key = _key(judge, row)
                if row["status"] == "ok" and self._known.get(key) == path:
                    for job in self._takers[key]:
                        found[job.path].append(share(row, path.stem))
        for file in files:
            if file.path in found:
                earlier = read_earlier(file.path, {item_key(row) for row in found[file.path]})
                for row in found[file.path]:
                    file.append(add_usage(row, earlier[item_key(row)]) if item_key(row) in earlier else row)
                file.keep_latest(item_key)
        return {path: {item_key(row) for row in rows} for path, rows in found.items()}


def _find_known(wanting: dict[Key, list[Job]]) -> dict[Key, Path]:
    """Where the row of another model, made under the same identity, holds what is wanted."""
    known: dict[Key, Path] = {}
    for folder, job in {takers[0].path.parent: takers[0] for takers in wanting.values()}.items():
        identity = json.loads(json.dumps(job.identity))
        for path in sorted(folder.glob("*.jsonl")):
            info = path.with_suffix(".json")
            if info.is_file() and read_json(info).get("identity") == identity:
                known |= {
                    key: path
                    for row in iterate_rows(path)
                    if row["status"] == "ok" and (key := _key(job, row)) in wanting
                }
    return known


def _key(job: Job, row: dict) -> Key:
    return job.judge_model, item_key(row), row["prediction_hash"]


def read_earlier(rows: Path, keys: set[str]) -> dict[str, dict]:
    """What was paid for about some items before: failures, and answers that have changed since."""
    paid = ("usage", "cost", "possible_cost")
    return {item_key(row): {name: row[name] for name in paid} for row in iterate_rows(rows) if item_key(row) in keys}


def share(row: dict, name: str) -> dict:
    """The row of another model that gave the same answer.

    Args:
        name: Of the model that `row` is of.
    """
    free = {"usage": None, "cost": None if row["cost"] is None else 0.0, "possible_cost": 0.0}
    return {**row, **free, "shared_with": row.get("shared_with", name)}


def certain_reply(evaluation: dict) -> dict:
    """What a row holds that needed no judge."""
    return {
        "status": "ok", "evaluation": evaluation, "expected": None, "usage": None, "cost": None, "possible_cost": 0.0,
        "replied_as": None, "error": None,
    }  # fmt: skip


def make_plans(work: Work, judge_models: list[str], args: JudgeArguments) -> dict[str, Plan]:
    """What is to be sent to each judge, and what it costs.

    Raises:
        InputError: The price table cannot be read, or a judge is not in it and there is a limit of money.
    """
    prices = {model: load_price(args.prices, model) for model in judge_models}
    for model, price in prices.items():
        if args.max_cost is not None and price is None:
            raise InputError(f"max_cost needs the price of `{model}`, which the price table lacks; see --prices")
    num_requests, num_bytes = dict.fromkeys(judge_models, 0), dict.fromkeys(judge_models, 0)
    counted: dict[str, list[str]] = {model: [] for model in judge_models}
    for job, item in work.requests():
        num_requests[job.judge_model] += 1
        num_bytes[job.judge_model] += prompt_bytes(item, job.form)
        if len(counted[job.judge_model]) < COUNTED_PROMPTS:
            counted[job.judge_model].append(job.form.instructions + item.data)
    plans = {}
    for model in judge_models:
        count, how = find_token_counter(model) if counted[model] else (len, "")
        plans[model] = Plan(
            model=model,
            num_requests=num_requests[model],
            prompt_bytes=num_bytes[model],
            tokens_per_byte=measure_tokens_per_byte(count, counted[model]),
            completion_tokens=TOKENS_PER_CRITERION * (1 if args.compare else len(work.jobs[0].form.criteria)),
            max_tokens=args.max_tokens,
            how_counted=how,
            price=prices[model],
        )
    return plans
