"""
What is to be asked of the judges: each answer once, whichever models gave it. Imports without torch.

Checkpoints often give the same answer to the same sample, word for word. It is judged once, and each model has its row:
one holds what was paid, the others say with which model they share it (`shared_with`). Asked twice, the judge's noise
would count as a difference between the models. Two answers that are compared and are the same are a tie, unasked.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from finetuning.judge.jobs import Item, Job
from finetuning.judge.rows import add_usage, make_reply, read_earlier, share
from finetuning.results import RowFile, item_key, iterate_rows
from finetuning.runs import read_json

Key = tuple[str, str, str]  # judge, sample (and order, of a pair), hash of what is judged


class Work:
    """What is missing of some jobs, and what of it is asked.

    Args:
        retry_failed: What failed on an earlier start is missing.
        overwrite: Existing rows will be deleted, so that all is missing.
        pending: (item key, prediction hash) of what batches are judging, by the file of their rows.
        only: (file of rows, item key) of what alone is looked at; None means all.
    """

    def __init__(
        self,
        jobs: list[Job],
        retry_failed: bool,
        overwrite: bool = False,
        pending: dict[Path, set[tuple[str, str]]] | None = None,
        only: set[tuple[Path, str]] | None = None,
    ):
        self.jobs, self.retry_failed, self.overwrite, self._only = jobs, retry_failed, overwrite, only
        self._pending = {(job.judge_model, *named) for job in jobs for named in (pending or {}).get(job.path, ())}
        self.num_ties = 0  # missing items that need no judge, as both answers are the same
        wanting: dict[Key, list[Job]] = defaultdict(list)
        for job, item in self._missing():
            if item.known_evaluation is None:
                wanting[_key(job, item.row)].append(job)
            else:
                self.num_ties += 1
        # file that already holds this judgement, of another model
        self._known = {} if overwrite else _find_known(wanting)
        self._takers = {key: takers for key, takers in wanting.items() if len(takers) > 1 or key in self._known}
        num_pending = sum(key in self._pending for key in wanting)
        self.num_requests = sum(key not in self._known and key not in self._pending for key in wanting)
        # missing, but asked for another model or judged there
        self.num_shared = sum(map(len, wanting.values())) - self.num_requests - num_pending

    def _missing(self) -> Iterator[tuple[Job, Item]]:
        return (
            (job, item)
            for job in self.jobs
            for item in job.missing(self.retry_failed, self.overwrite)
            if self._only is None or (job.path, item.key) in self._only
        )

    def takers(self, job: Job, item: Item) -> list[Job]:
        """The jobs that have this answer, and take the same judgement; it is asked for the first one."""
        return self._takers.get(_key(job, item.row)) or [job]

    def requests(self) -> Iterator[tuple[Job, Item]]:
        """What is to be sent, and not only to be written, in the order of the jobs."""
        for job, item in self._missing():
            key = _key(job, item.row)
            is_known = item.known_evaluation is not None or key in self._known or key in self._pending
            if not is_known and self.takers(job, item)[0] is job:
                yield job, item

    @property
    def waits_for_reply(self) -> bool:
        """Whether what needs no request is written only after the first reply.

        The first new row deletes those that are overwritten, which are kept if the key turns out to be refused.
        """
        return self.overwrite and self.num_requests > 0

    def write_known(self, files: list[RowFile]) -> dict[Path, set[str]]:
        """Write the rows of what needs no request; what was paid for about the same samples before stays with them.

        Returns:
            Keys of the items, by the file of their rows.
        """
        found: dict[Path, list[dict]] = defaultdict(list)
        for job, item in self._missing() if self.num_ties else ():
            if item.known_evaluation is not None:
                found[job.path].append({**item.row, **make_reply("ok", item.known_evaluation)})
        for path in sorted(set(self._known.values())):
            judge = next(job for job in self.jobs if job.path.parent == path.parent)  # a folder has one judge
            for row in iterate_rows(path):
                key = _key(judge, row)
                if row["status"] == "ok" and self._known.get(key) == path:
                    for job in self._takers[key]:
                        found[job.path].append(share(row, path.stem))
        keys = {path: {item_key(row) for row in rows} for path, rows in found.items()}
        for file in files:
            if file.path in found:
                earlier = read_earlier(file.path, keys[file.path])
                for row in found[file.path]:
                    file.append(add_usage(row, earlier[item_key(row)]) if item_key(row) in earlier else row)
                file.keep_latest(item_key)
        return keys


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
