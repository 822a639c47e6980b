"""
The samples as the page's script reads them: what page.js finds in its `data`. Imports without torch.
"""

import math
from typing import TypedDict

import pandas as pd

from finetuning.measures import criterion_column, describe_measure
from finetuning.report.opinions import Opinions
from finetuning.report.samples import criteria_of
from finetuning.report.verdict import Verdict
from finetuning.report.words import LANGUAGES, read_words
from finetuning.runs import to_json


class Judgement(TypedDict):
    score: float
    explanation: str


class Score(TypedDict):
    measure: str
    score: float


class Answer(TypedDict):
    """A model's answer to a sample, under the names of the rows; null is what is not known."""

    prediction: str | None
    finish_reason: str
    error: str | None
    num_new_tokens: float | None
    rouge1: float | None
    seq_rep_4: float | None
    status: str | None  # of the judgement
    overall: float | None
    judgements: list[Judgement]  # one for each of the criteria; none where there is no score
    people: list[Score]


class Reply(TypedDict):
    preferred: str  # first, second, tie
    explanation: str


class Preference(TypedDict):
    """What a judge says of two answers side by side."""

    pair: int  # its place in `pairs`
    outcome: str  # first, second, tie
    replies: list[Reply]  # in either order of the answers


class Message(TypedDict):
    role: str
    content: str


class Sample(TypedDict):
    id: str
    messages: list[Message]
    references: list[str]
    answers: list[Answer | None]  # one for each of the models; null where there is none
    preferences: list[Preference]


class Pair(TypedDict):
    first: int | None  # its place in `models`
    second: int | None
    judge: str


class PageData(TypedDict):
    words: dict[str, dict[str, str]]  # of each language
    models: list[str]
    criteria: list[str]
    judged: bool  # whether models are ranked by the judge
    successors: list[
        tuple[int, int]
    ]  # places of a checkpoint and of the one after it, between which answers can get worse
    pairs: list[Pair]
    samples: list[Sample]


def build_page_data(samples: pd.DataFrame, summary: pd.DataFrame, verdict: Verdict, opinions: Opinions) -> PageData:
    """All that page.js reads."""
    models, runs, steps = [str(name) for name in summary.index], list(summary["run"]), list(summary["step"])
    place = {name: i for i, name in enumerate(models)}
    return {
        "words": {language: read_words("page", language) for language in LANGUAGES},
        "models": models,
        "criteria": [describe_measure(criterion_column(criterion))[0] for criterion in criteria_of(samples)],
        "judged": verdict.measure == "overall",
        "successors": [
            (i - 1, i) for i in range(1, len(models)) if runs[i] == runs[i - 1] and 0 <= steps[i - 1] < steps[i]
        ],
        "pairs": [
            {"first": place.get(pair.first), "second": place.get(pair.second), "judge": pair.judge}
            for pair in opinions.pairs
        ],
        "samples": _build_samples(samples, place, opinions),
    }


def _build_samples(samples: pd.DataFrame, place: dict[str, int], opinions: Opinions) -> list[Sample]:
    criteria = criteria_of(samples)
    found: dict[str, Sample] = {}
    answers: dict[tuple[str, str], Answer] = {}
    for row in samples.to_dict("records"):
        if row["id"] not in found:
            found[row["id"]] = {
                "id": row["id"],
                "messages": [{"role": message["role"], "content": message["content"]} for message in row["messages"]],
                "references": row["references"],
                "answers": [None] * len(place),
                "preferences": [],
            }
        answer = answers[row["id"], row["model"]] = _build_answer(row, criteria)
        found[row["id"]]["answers"][place[row["model"]]] = answer
    for row in opinions.scores.to_dict("records"):
        score: Score = {"measure": row["measure"].replace("_", " "), "score": row["score"]}
        answers[row["id"], row["model"]]["people"].append(score)
    for number, pair in enumerate(opinions.pairs):
        for sample_id, replies in pair.replies.items():
            found[sample_id]["preferences"].append(
                {
                    "pair": number,
                    "outcome": pair.outcome(sample_id),
                    "replies": [{"preferred": preferred, "explanation": text} for preferred, text in replies],
                }
            )
    return list(found.values())


def _build_answer(row: dict, criteria: list[str]) -> Answer:
    judged = [row["evaluation"][criterion] for criterion in criteria] if row["status"] == "ok" else []
    return {
        "prediction": row["prediction"],
        "finish_reason": row["finish_reason"],
        "error": row["error"],
        "num_new_tokens": _round(row["num_new_tokens"], 0),
        "rouge1": _round(row["rouge1"], 3),
        "seq_rep_4": _round(row["seq_rep_4"], 3),
        "status": row["status"],
        "overall": _round(row["overall"], 2),
        "judgements": [{"score": its["score"], "explanation": its["explanation"]} for its in judged],
        "people": [],
    }


def _round(value: float, decimals: int) -> float | None:
    return None if math.isnan(value) else round(value, decimals)


def to_script_data(content: PageData) -> str:
    """JSON that can stand in a <script> element: no text in it can close the element."""
    return to_json(content, separators=(",", ":")).replace("<", "\\u003c")
