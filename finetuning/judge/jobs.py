"""
What is to be judged: which answers of step 3, by which judge, under which identity. Imports without torch.

    Job        one judge and one model, or two to compare        a file of rows
     |
    Item       one answer, or one pair in one order              a row of that file, in the end
     |
    Work       the items without a row, each answer once         another model's row may hold it already (work.py)
     |
    Plan       what these cost at most and about                 one for each judge (plan.py)
     |
    request    an item in the words of the form                  attempts at it (client.py), or a line of a batch
     |
    row        the reply as it was read, and what it cost        (rows.py)
"""

import functools
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetuning.config.arguments import JudgeArguments, split_names
from finetuning.errors import InputError
from finetuning.judge.audit import build_texts
from finetuning.judge.form import Form, build_form, to_data
from finetuning.judge.rubric import load_rubric
from finetuning.results import check_identity, item_key, iterate_rows, pair_hash, prediction_hash, read_info
from finetuning.runs import EVALUATIONS, PREDICTIONS, audit_file, file_name, names_of_files, shorten
from finetuning.schemas import COMPARISON, EVALUATION, PREDICTION

TIE = {"explanation": "Both answers are the same.", "better": "tie"}  # without asking

Mask = Callable[[str], str]


@dataclass(frozen=True)
class Item:
    """One thing to judge."""

    row: dict  # what names it in its evaluation row: id, prediction_hash and, of a pair, order
    material: dict  # what the judge is given
    mask: Mask | None = None  # what removes personal data from a text, if it is to be removed before it is sent
    known_evaluation: dict | None = None  # if it needs no judge

    @property
    def key(self) -> str:
        return item_key(self.row)

    @cached_property
    def data(self) -> str:
        """The material as it is sent."""
        return to_data(self.material if self.mask is None else _mask(self.material, self.mask))


@dataclass
class Job:
    """What one judge is to say about the answers of one model, or of two."""

    name: str
    path: Path  # of its rows
    judge_model: str
    form: Form
    identity: dict  # what must be the same for two evaluations to be comparable
    items: Callable[[], Iterator[Item]]  # what is to be judged, anew at each call
    limit: int | None = None  # answers of each model that are judged at most; None means all
    compares: list[str] | None = None  # the names of the two models, if it is two
    jury: Path | None = None  # the file of the mean, if the judge is one of several
    audits: bool = False  # the judge itself, by texts that are made of references

    def missing(self, retry_failed: bool, overwrite: bool = False) -> Iterator[Item]:
        """The items that have no evaluation, or one that failed; all of them if existing rows are to be deleted."""
        rows = () if overwrite else iterate_rows(self.path, EVALUATION if self.compares is None else COMPARISON)
        latest = {item_key(row): (row["prediction_hash"], row["status"]) for row in rows}
        for item in self.items():
            judged, status = latest.get(item.key, (None, None))
            if judged != item.row["prediction_hash"] or (status != "ok" and retry_failed):
                yield item


def build_jobs(run: Path, args: JudgeArguments, mask: Mask | None) -> list[Job]:
    """Everything that is to be judged, by each judge.

    Raises:
        InputError: There are no such predictions, or the rubric cannot be used.
    """
    form = build_form(load_rubric(args.rubric), args.judge_language, compares=args.compare is not None)
    if args.compare is not None:
        return [_build_comparison(run, args.compare, form, args, mask)]
    names = names_of_files(run / PREDICTIONS, args.model_name)
    if not names:
        raise InputError(f"no predictions of `{args.model_name}` in {run / PREDICTIONS}; run 3_test.py first")
    paths = [run / PREDICTIONS / f"{name}.jsonl" for name in names]
    ids = _first_ids(paths, args.limit)
    answers = {name: functools.partial(_read_answers, path, ids) for name, path in zip(names, paths, strict=True)}
    if args.audit:
        rows = {row["id"]: row for path in paths for row in iterate_rows(path, PREDICTION)}
        answers = {kind: functools.partial(iter, texts) for kind, texts in build_texts(rows, ids).items()}
    jobs = []
    for judge_model in [args.judge_model] if args.judges is None else dict.fromkeys(split_names(args.judges)):
        identity = _build_identity(judge_model, form, args)
        for name, read in answers.items():
            items = functools.partial(answers_to_judge, read, mask)
            path, label, jury = run / EVALUATIONS / f"{name}.jsonl", name, None
            if args.audit:
                label, path = f"{name} by {judge_model}", audit_file(run / EVALUATIONS, judge_model, name)
            elif args.judges is not None:
                label, jury = f"{name} by {judge_model}", path
                path = run / EVALUATIONS / "judges" / file_name(judge_model) / path.name
            jobs.append(Job(label, path, judge_model, form, identity, items, args.limit, jury=jury, audits=args.audit))
    return jobs


def _build_comparison(run: Path, names: list[str], form: Form, args: JudgeArguments, mask: Mask | None) -> Job:
    answered = names_of_files(run / PREDICTIONS, "all")
    for name in names:
        if name not in answered:
            others = ", ".join(answered) or "none"
            raise InputError(f"compare: no predictions of `{name}` in {run / PREDICTIONS}, but of {others}")
    first, second = (run / PREDICTIONS / f"{name}.jsonl" for name in names)
    items = functools.partial(pairs_to_judge, first, second, _first_ids([first, second], args.limit), mask)
    path = run / EVALUATIONS / "pairs" / f"{shorten('--'.join(names))}.jsonl"
    identity = {**_build_identity(args.judge_model, form, args), "models": names}
    return Job(" against ".join(names), path, args.judge_model, form, identity, items, args.limit, compares=names)


def _build_identity(judge_model: str, form: Form, args: JudgeArguments) -> dict:
    return {
        "judge_model": judge_model, "temperature": args.temperature, "criteria": list(form.criteria),
        "prompt": form.hash, "mask_pii": args.mask_pii, "expected_scores": args.expected_scores,
    }  # fmt: skip


def juries(jobs: list[Job]) -> dict[Path, list[Job]]:
    """The jobs whose judges are a jury, by the file of their mean."""
    found: dict[Path, list[Job]] = {}
    for job in jobs:
        if job.jury is not None:
            found.setdefault(job.jury, []).append(job)
    return found


def identity_of_jury(jobs: list[Job]) -> dict:
    """What must be the same for the means of juries to be comparable; one job for each judge."""
    return {**jobs[0].identity, "judge_model": [job.judge_model for job in jobs]}


def check_identities(run: Path, jobs: list[Job], overwrite: bool) -> None:
    """Refuse, before anything is paid for, what could not be compared afterwards.

    Raises:
        InputError: There are rows that were made under other conditions; says which differ.
    """
    means = {path: identity_of_jury(its_jobs) for path, its_jobs in juries(jobs).items()}
    if not overwrite:
        for job in jobs:
            check_identity(job.path, job.identity)
        for path, identity in means.items():
            # the mean is made anew, of other judges too, but no rows of a single judge are replaced by it
            members = read_info(path)["identity"].get("judge_model") if path.with_suffix(".json").is_file() else None
            check_identity(path, {**identity, "judge_model": members} if isinstance(members, list) else identity)
    if jobs[0].compares is None and not jobs[0].audits:
        identity = next(iter(means.values()), jobs[0].identity)
        for name in names_of_files(run / EVALUATIONS, "all"):
            path = run / EVALUATIONS / f"{name}.jsonl"
            if path not in {job.jury or job.path for job in jobs}:
                check_identity(path, identity, "All models are judged in the same way (--model_name all)")


def answers_to_judge(read: Callable[[], Iterable[dict]], mask: Mask | None = None) -> Iterator[Item]:
    """The answers of one model, from rows of predictions that are read anew."""
    for row in read():
        material = {"task": _task(row), "references": row["references"], "answer": row["prediction"]}
        yield Item({"id": row["id"], "prediction_hash": prediction_hash(row)}, material, mask)


def pairs_to_judge(first: Path, second: Path, ids: set[str] | None, mask: Mask | None) -> Iterator[Item]:
    """Each sample that both models have answered, in either order. The same answer twice is a tie without a judge."""
    others = {row["id"]: row for row in _read_answers(second, ids)}
    for row in _read_answers(first, ids):
        other = others.get(row["id"])
        if other is None:
            continue
        known = TIE if row["prediction"] == other["prediction"] else None
        pair = pair_hash(prediction_hash(row), prediction_hash(other))
        for order, one, two in (("AB", row, other), ("BA", other, row)):
            answers = {"first": one["prediction"], "second": two["prediction"]}
            material = {"task": _task(row), "references": row["references"], **answers}
            yield Item({"id": row["id"], "order": order, "prediction_hash": pair}, material, mask, known)


def _read_answers(predictions: Path, ids: set[str] | None) -> Iterator[dict]:
    """The rows of step 3, but for those in which it could not answer."""
    for row in iterate_rows(predictions, PREDICTION):
        if row["finish_reason"] != "error" and (ids is None or row["id"] in ids):
            yield row


def _first_ids(predictions: list[Path], limit: int | None) -> set[str] | None:
    """The first ids that any model was asked, answered or not: the same for all. None means all of them."""
    if limit is None:
        return None
    return set(heapq.nsmallest(limit, {row["id"] for path in predictions for row in iterate_rows(path, PREDICTION)}))


def _task(row: dict) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]


def _mask(node, mask: Mask):
    if isinstance(node, str):
        return mask(node)
    if isinstance(node, list):
        return [_mask(item, mask) for item in node]
    return {key: _mask(value, mask) for key, value in node.items()}
