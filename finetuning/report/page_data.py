"""
What page.js finds in its `data`. Imports without torch.
"""

import pandas as pd

from finetuning.measures import criterion_column, describe_measure
from finetuning.report.opinions import Opinions
from finetuning.report.samples import criteria_of
from finetuning.report.verdict import Verdict
from finetuning.report.words import LANGUAGES, read_words
from finetuning.runs import to_json

OF_ANSWER = (
    "prediction", "finish_reason", "error", "num_new_tokens", "rouge1", "seq_rep_4", "status", "overall"
)  # fmt: skip
DECIMALS = {"rouge1": 3, "seq_rep_4": 3, "overall": 2}  # more would make the page larger


def build_page_data(samples: pd.DataFrame, summary: pd.DataFrame, verdict: Verdict, opinions: Opinions) -> dict:
    """All that page.js reads.

    Returns:
        words                of each language
        models, criteria     their names
        judged               whether models are ranked by the judge
        successors           places of a checkpoint and of the one after it, between which answers can get worse
        pairs                first and second (their places in `models`) and judge of each
        samples              id, messages, references, and of each
            answers          one for each of the models, or null: the columns OF_ANSWER, null where nothing is known,
                             judgements (score and explanation for each of the criteria), people (measure and score)
            preferences      pair (its place in `pairs`), outcome (first, second, tie), and the replies in either order
                             of the answers (preferred and explanation)
    """
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


def _build_samples(samples: pd.DataFrame, place: dict[str, int], opinions: Opinions) -> list[dict]:
    criteria = criteria_of(samples)
    found: dict[str, dict] = {}
    answers: dict[tuple[str, str], dict] = {}
    for row in samples.round(DECIMALS).to_dict("records"):
        if row["id"] not in found:
            named = {name: row[name] for name in ("id", "messages", "references")}
            found[row["id"]] = {**named, "answers": [None] * len(place), "preferences": []}
        judged = [row["evaluation"][criterion] for criterion in criteria] if row["status"] == "ok" else []
        answer = {**{column: row[column] for column in OF_ANSWER}, "judgements": judged, "people": []}
        found[row["id"]]["answers"][place[row["model"]]] = answers[row["id"], row["model"]] = answer
    for row in opinions.scores.to_dict("records"):
        score = {"measure": row["measure"].replace("_", " "), "score": row["score"]}
        answers[row["id"], row["model"]]["people"].append(score)
    for number, pair in enumerate(opinions.pairs):
        for sample_id, its in pair.replies.items():
            replies = [{"preferred": preferred, "explanation": text} for preferred, text in its]
            preference = {"pair": number, "outcome": pair.outcome(sample_id), "replies": replies}
            found[sample_id]["preferences"].append(preference)
    return list(found.values())


def to_script_data(content: dict) -> str:
    """JSON that can stand in a <script> element: no text in it can close the element."""
    return to_json(content, separators=(",", ":")).replace("<", "\\u003c")
