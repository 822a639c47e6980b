"""
Scores that people gave to answers, by which a judge is measured. Imports without torch.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from finetuning.errors import InputError
from finetuning.judge.jobs import Job
from finetuning.results import iterate_rows
from finetuning.runs import HUMAN_AGREEMENT_FILE, is_there, names_of_files, read_json, write_json
from finetuning.schemas import HUMAN_AGREEMENT
from finetuning.wording import plural

Measured = tuple[str, str, str]  # model, sample, and the criterion or `overall`


@dataclass
class Labels:
    """What people gave to the answers that are judged."""

    path: Path  # the file that they are from
    rows: list[dict]  # each score with its `id`, `model` and `measure`, and the hash of the answer as it is now
    num_scores: int  # all in the file, those of other answers included


def read_labels(human: str | None, jobs: list[Job], folder: Path) -> Labels | None:
    """The scores of people, if there are any, checked before anything is sent.

    Args:
        human: A csv with the columns `id`, `model` (unless only one was judged), and `score` (the overall one) or the
            names of criteria.
        folder: Of the evaluations, where the scores of earlier starts are.

    Raises:
        InputError: Something in the file cannot be read (says in which line), or none of it is of an answer that is
            judged; or the earlier scores cannot be read.
    """
    if human is None:
        return None
    path = Path(human)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_read_scores(file, path, jobs[0].form.criteria))
    except OSError as error:
        raise InputError(f"human {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"human {path} is no csv in UTF-8: {error}") from error
    _read_earlier(folder)  # which these are added to in the end
    names = list(dict.fromkeys(job.path.stem for job in jobs))
    if len(names) > 1 and any(row["model"] is None for row in rows):
        raise InputError(f"human {path}: needs a column model, as there are {', '.join(names)}; or set --model_name")
    answers = {(job.path.stem, item.row["id"]): item.row["prediction_hash"] for job in jobs for item in job.items()}
    found = []
    for row in rows:
        row["model"] = row["model"] or names[0]
        if (row["model"], row["id"]) in answers:
            found.append({**row, "prediction_hash": answers[row["model"], row["id"]]})
    if not found:
        raise InputError(
            f"human {path}: none of its {len(rows)} scores is of an answer that is judged; check id and model"
        )
    return Labels(path, found, len(rows))


def _read_scores(file: TextIO, path: Path, criteria: tuple[str, ...]) -> Iterator[dict]:
    """Each score with its `id`, `model` (None if there is none) and `measure`; empty cells are left out."""
    reader = csv.DictReader(file)
    columns = reader.fieldnames or []
    measures = {"score": "overall", "overall": "overall"} | {criterion: criterion for criterion in criteria}
    present = [name for name in columns if name in measures]
    if "id" not in columns or not present:
        raise InputError(
            f"human {path}: needs the columns id and score (or {', '.join(criteria)}); it has "
            f"{', '.join(columns) or 'none'}"
        )
    if {"score", "overall"} <= set(present):
        raise InputError(f"human {path}: score and overall mean the same; keep one of them")
    for row in reader:
        named = {"id": (row["id"] or "").strip(), "model": (row.get("model") or "").strip() or None}
        for name in present:
            text = (row[name] or "").strip()
            if not text:
                continue
            try:
                score = float(text)
            except ValueError:
                score = math.nan
            if not 1 <= score <= 10:
                raise InputError(f"human {path}:{reader.line_num}: {name} must be a number from 1 to 10, got {text}")
            yield {**named, "measure": measures[name], "score": score}


def _read_earlier(folder: Path) -> list[dict]:
    """The scores of people that stand beside evaluations."""
    path = folder / HUMAN_AGREEMENT_FILE
    if not is_there(path):
        return []
    return read_json(path, HUMAN_AGREEMENT, "take it from a copy, or delete it with its scores").get("scores", [])


def compare_with_people(labels: Labels, folder: Path) -> str:
    """How far the evaluations of some models agree with the scores of people, in lines; also written beside them.

    The scores themselves are written as well, each with the hash of its answer, for step 5. Those of earlier starts
    stay, but for the ones of the same answers under the same measure.
    """
    from finetuning.agreement import measure_against_people  # takes half a second

    given: dict[Measured, set[float]] = defaultdict(set)
    for row in labels.rows:
        given[_measured(row)].add(row["score"])
    earlier = _read_earlier(folder)
    kept = [row for row in earlier if _measured(row) not in given]
    rows = kept + labels.rows
    evaluations = _read_evaluations(folder, {row["model"] for row in rows})
    pairs, num_judged = defaultdict(list), 0
    for row in rows:
        judged = evaluations.get((row["model"], row["id"], row["prediction_hash"]), {})
        if row["measure"] in judged:  # the criteria of an earlier start may have been others
            pairs[row["measure"]].append((row["model"], row["id"], judged[row["measure"]], row["score"]))
            num_judged += 1
    lines, found = [], {}
    if kept:
        lines.append(f"{plural(len(kept), 'score')} of people from earlier starts count, too")
    num_replaced = sum(row["score"] not in given.get(_measured(row), {row["score"]}) for row in earlier)
    if num_replaced:
        lines.append(
            f"{plural(num_replaced, 'score')} of people from earlier starts are replaced, as {labels.path} has others "
            "of the same answers; what several people say of one answer belongs into one file"
        )
    num_scores = len(kept) + labels.num_scores
    if num_judged < num_scores:
        lines.append(
            f"{num_scores - num_judged} of {plural(num_scores, 'score')} of people: of answers without a judgement, "
            "left out"
        )
    for measure, values in pairs.items():
        estimates = measure_against_people(values)
        found[measure] = {name: asdict(estimate) for name, estimate in estimates.items()}
        spearman, kendall, kappa = (estimates[name] for name in ("spearman", "kendall", "kappa"))
        lines.append(
            f"judge and people on {measure}, within models, {plural(spearman.num_samples, 'score')}: Spearman "
            f"{spearman}, Kendall's tau-b {kendall}, weighted kappa {kappa}"
        )
    write_json(folder / HUMAN_AGREEMENT_FILE, {"labels": str(labels.path), "agreement": found, "scores": rows})
    return "\n".join(lines)


def _measured(row: dict) -> Measured:
    return row["model"], row["id"], row["measure"]


def _read_evaluations(folder: Path, models: set[str]) -> dict[tuple[str, str, str], dict[str, float]]:
    """The judge's scores by criterion, and `overall`, of each answer: by model, sample and hash."""
    evaluations = {}
    for name in models.intersection(names_of_files(folder, "all")):
        for row in iterate_rows(folder / f"{name}.jsonl"):
            if row["status"] == "ok":
                scores = {criterion: judged["score"] for criterion, judged in row["evaluation"].items()}
                scores["overall"] = statistics.fmean(scores.values())
                evaluations[name, row["id"], row["prediction_hash"]] = scores
    return evaluations
