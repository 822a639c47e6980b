"""
The mean of several judges, as the evaluations of a model. Imports without torch.
"""

import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from finetuning.agreement import measure_jury
from finetuning.judge.jobs import Item, Job, identity_of_jury
from finetuning.judge.rows import add_usage
from finetuning.results import RowFile, item_key, iterate_rows


def combine_jury(path: Path, jobs: list[Job]) -> str:
    """Write the mean of several judges as the evaluations of a model, and how far they agree.

    An answer has a score if all of them have scored it; else it has the status of the first that has not.

    Args:
        path: The file of the evaluations.
        jobs: About the same answers, one for each judge.
    """
    rows = {job.judge_model: {item_key(row): row for row in iterate_rows(job.path)} for job in jobs}
    scores: dict[str, list[dict[str, float]]] = {judge: [] for judge in rows}
    num_items = 0
    with RowFile(path, identity_of_jury(jobs), overwrite=True) as file:
        for item in jobs[0].items():
            num_items += 1
            found = {
                judge: its_rows[item.key]
                for judge, its_rows in rows.items()
                if its_rows.get(item.key, {}).get("prediction_hash") == item.row["prediction_hash"]
            }
            if len(found) < len(rows):
                continue
            row = _mean_row(item, found)
            file.append(row)
            for judge, its_row in found.items() if row["status"] == "ok" else ():
                scores[judge].append({name: judged["score"] for name, judged in its_row["evaluation"].items()})
        agreement = measure_jury(scores)
        num_ok = agreement.num_samples if agreement is not None else 0
        file.write_info(
            num_predictions=num_items,
            coverage=num_ok / num_items if num_items else None,
            jury=asdict(agreement) if agreement is not None else None,
            one_model=_find_one_model(rows),
        )
    return f"{path.stem}: {agreement or 'no answer was scored by all of the jury'}"


def _find_one_model(rows: dict[str, dict[str, dict]]) -> dict[str, list[str]]:
    """Models that have replied as several judges, by the name in their replies, and those judges."""
    judges = defaultdict(set)
    for judge, its_rows in rows.items():
        for row in its_rows.values():
            judges[row.get("replied_as")].add(judge)
    return {model: sorted(names) for model, names in judges.items() if model is not None and len(names) > 1}


def _mean_row(item: Item, found: dict[str, dict]) -> dict:
    paid: dict = {"usage": None, "cost": None, "possible_cost": 0.0}
    for row in found.values():
        paid = add_usage(paid, row)
    result = {**item.row, "status": "ok", "evaluation": None, "expected": None, **paid, "error": None}
    for judge, row in found.items():
        if row["status"] != "ok":
            return {**result, "status": row["status"], "error": f"{judge}: {row['error']}"}
    evaluations = {judge: row["evaluation"] for judge, row in found.items()}
    result["evaluation"] = {
        criterion: {
            "explanation": "\n".join(
                f"{judge} ({judged[criterion]['score']}): {judged[criterion]['explanation']}"
                for judge, judged in evaluations.items()
            ),
            "score": statistics.fmean(judged[criterion]["score"] for judged in evaluations.values()),
        }
        for criterion in next(iter(evaluations.values()))
    }
    if all(row["expected"] is not None for row in found.values()):
        result["expected"] = {
            criterion: statistics.fmean(row["expected"][criterion] for row in found.values())
            for criterion in result["evaluation"]
        }
    return result
