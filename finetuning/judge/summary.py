"""
What a judge's rows amount to: coverage, means, money, and how far they can be trusted. Written beside the rows.

Imports without torch.
"""

import statistics
from array import array
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

from finetuning.agreement import (
    count_pairs,
    measure_against_people,
    measure_jury,
    rank_correlation,
)
from finetuning.judge.client import add_usage
from finetuning.judge.form import Item, Job, identity_of_jury
from finetuning.judge.people import HumanScore, read_earlier_scores
from finetuning.results import RowFile, item_key, iterate_rows
from finetuning.runs import HUMAN_AGREEMENT_FILE, names_of_files, write_json
from finetuning.wording import plural, say_p, say_share


def summarize(job: Job, file: RowFile, limit: int | None) -> str:
    """Record coverage, tokens and cost of all rows beside them, and say them in a line."""
    statuses, usage, costs, possible_cost = Counter(), Counter(), [], 0.0
    replied_as, num_shared = set(), 0
    scores, lengths, expected, first_error = array("d"), array("d"), array("d"), None
    current = {item.key: (item.row["prediction_hash"], len(item.material.get("answer", ""))) for item in job.items()}
    for row in iterate_rows(file.path):
        usage.update(row["usage"] or {})  # paid for, also where the answer has changed since
        costs += [] if row["cost"] is None else [row["cost"]]
        possible_cost += row["possible_cost"]
        answer, length = current.get(item_key(row), (None, 0))
        if answer != row["prediction_hash"]:
            continue
        statuses[row["status"]] += 1
        num_shared += "shared_with" in row
        replied_as |= {row.get("replied_as")} - {None}
        if row["status"] == "error":
            first_error = first_error or row["error"]
        if row["status"] == "ok" and job.compares is None:
            scores.append(statistics.fmean(judged["score"] for judged in row["evaluation"].values()))
            lengths.append(length)
            if row["expected"] is not None:
                expected.append(statistics.fmean(row["expected"].values()))
    info = {
        "num_predictions": len(current),
        "statuses": dict(statuses),
        "coverage": statuses["ok"] / len(current) if current else None,
        "usage": dict(usage),
        "cost": sum(costs) if costs else None,
        "possible_cost": possible_cost,
        "num_shared": num_shared,  # paid for in the rows of other models that gave the same answers
        "replied_as": sorted(replied_as),
        "limit": limit,  # what was judged beyond it, on an earlier start, is not counted here
    }
    line = f"{job.name}: judged {statuses['ok']} of {len(current)}"
    by_length = None
    if job.compares is None:
        line += f", mean {statistics.fmean(scores):.2f} of 10" if scores else ", no score"
        by_length = rank_correlation(scores, lengths)
        info["length_correlation"] = asdict(by_length)
    if job.identity["expected_scores"] and scores:
        info["num_expected"] = len(expected)
        line += (
            f", expected {statistics.fmean(expected):.2f}" if expected else ", no log-probabilities from the endpoint"
        )
    line += f", {plural(usage['prompt_tokens'] + usage['completion_tokens'], 'token')}"
    line += f", ${sum(costs):.6g}" if costs else ""
    line += f", {num_shared} shared with another model" if num_shared else ""
    failed = ", ".join(f"{number} {status}" for status, number in statuses.items() if status != "ok")
    line += f"; failed: {failed}" if failed else ""
    line += f" ({first_error})" if first_error else ""
    if scores:
        line += f"\n  rank correlation of the score with the length of the answer: {by_length}"
    if job.compares is not None:
        line += "\n" + _summarize_pairs(job, file, info)
    file.write_info(**info)
    return line


def _summarize_pairs(job: Job, file: RowFile, info: dict) -> str:
    """Who won, and how often the judge looked at the place rather than at the answer."""
    current, same = {}, set()
    for item in job.items():
        current[item.key] = item.row["prediction_hash"]
        same |= set() if item.certain is None else {item.row["id"]}
    replies: dict[str, dict[str, str]] = defaultdict(dict)
    for row in iterate_rows(file.path):
        if row["status"] == "ok" and current.get(item_key(row)) == row["prediction_hash"]:
            replies[row["id"]][row["order"]] = row["evaluation"]["better"]
    counts = count_pairs((orders["AB"], orders["BA"]) for orders in replies.values() if len(orders) == 2)
    info["pairs"] = asdict(counts)
    if counts.num_pairs == 0:
        return "no pair was judged in both orders"
    first, second = job.compares
    line = f"{first} is better in {counts.wins} of {plural(counts.num_pairs, 'pair')}, {second} in {counts.losses}, neither in {counts.ties}"
    if counts.wins + counts.losses:
        line += f"; sign test p {say_p(counts.p)}"
    if counts.first_place == counts.first_place:  # not nan
        line += f"\n  {say_share(counts.first_place)} of the preferences were for the answer that stood first"
    num_same = len(same & {sample for sample, orders in replies.items() if len(orders) == 2})
    info["num_same"] = num_same
    if num_same:
        line += f"\n  in {num_same} of them both gave the same answer, a tie that no judge was asked about"
    if num_same == counts.num_pairs:
        return line
    return line + (
        f"\n  flip rate {say_share(counts.flips / (counts.num_pairs - num_same))}: so often the other answer was preferred once "
        "their order changed, which is a tie"
    )


def combine_jury(path: Path, jobs: list[Job]) -> str:
    """Write the mean of several judges as the evaluations of a model, and how far they agree.

    An answer has a score if all of them have scored it; else it has the status of the first that has not.

    Args:
        path: Of the evaluations.
        jobs: Of the same answers, one for each judge.
    """
    rows = {job.judge_model: {item_key(row): row for row in iterate_rows(job.path)} for job in jobs}
    scores: dict[str, list[dict[str, float]]] = {judge: [] for judge in rows}
    num_items = 0
    with RowFile(path, identity_of_jury(jobs), overwrite=True) as file:
        for item in jobs[0].items():
            num_items += 1
            found = {judge: its_rows.get(item.key) for judge, its_rows in rows.items()}
            if all(row is not None and row["prediction_hash"] == item.row["prediction_hash"] for row in found.values()):
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
            one_model=find_one_model(rows),
        )
    return f"{path.stem}: {agreement or 'no answer was scored by all of the jury'}"


def find_one_model(rows: dict[str, dict[str, dict]]) -> dict[str, list[str]]:
    """Models that have replied as several judges, by the name in their replies, and those judges.

    Args:
        rows: Of each judge.
    """
    judges = defaultdict(set)
    for judge, its_rows in rows.items():
        for row in its_rows.values():
            judges[row.get("replied_as")].add(judge)
    return {model: sorted(names) for model, names in judges.items() if model is not None and len(names) > 1}


def _mean_row(item: Item, found: dict[str, dict]) -> dict:
    paid = {"usage": None, "cost": None, "possible_cost": 0.0}
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


def compare_with_people(
    labels: Path, scores: list[HumanScore], folder: Path, names: list[str], answers: dict[tuple[str, str], str]
) -> str:
    """How far the evaluations of some models agree with the scores of people, in lines; also written beside them.

    The scores themselves are written as well, each with the hash of its answer, for step 5. Those of earlier starts stay, but
    for the ones of the same answers under the same measure.

    Args:
        labels: Where the scores are from.
        answers: Hash of each answer as it is now, by model and id.
    """
    rows = []
    for label in scores:
        model = label.model or names[0]
        if (model, label.id) in answers:
            rows.append({**asdict(label), "model": model, "prediction_hash": answers[model, label.id]})
    given: dict[tuple[str, str, str], set[float]] = defaultdict(set)
    for row in rows:
        given[_answer_and_measure(row)].add(row["score"])
    earlier = read_earlier_scores(folder)
    kept = [row for row in earlier if _answer_and_measure(row) not in given]
    evaluations = {}
    for name in {row["model"] for row in kept + rows}.intersection(names_of_files(folder, "all")):
        for row in iterate_rows(folder / f"{name}.jsonl"):
            if row["status"] == "ok":
                by_criterion = {criterion: judged["score"] for criterion, judged in row["evaluation"].items()}
                judged = {**by_criterion, "overall": statistics.fmean(by_criterion.values())}
                evaluations[name, row["id"], row["prediction_hash"]] = judged
    pairs, num_judged = defaultdict(list), 0
    for row in kept + rows:
        judged = evaluations.get((row["model"], row["id"], row["prediction_hash"]), {})
        if row["measure"] in judged:  # the criteria of an earlier start may have been others
            pairs[row["measure"]].append((row["model"], row["id"], judged[row["measure"]], row["score"]))
            num_judged += 1
    lines, found = [], {}
    num_unknown = len(kept) + len(scores) - num_judged
    if kept:
        lines.append(f"{plural(len(kept), 'score')} of people from earlier starts count, too")
    num_replaced = sum(row["score"] not in given.get(_answer_and_measure(row), {row["score"]}) for row in earlier)
    if num_replaced:
        lines.append(
            f"{plural(num_replaced, 'score')} of people from earlier starts are replaced, as {labels} has others of the same answers; "
            "what several people say of one answer belongs into one file"
        )
    if num_unknown:
        lines.append(
            f"{num_unknown} of {plural(len(kept) + len(scores), 'score')} of people: of answers without a judgement, left out"
        )
    for measure, values in pairs.items():
        estimates = measure_against_people(values)
        found[measure] = {name: asdict(estimate) for name, estimate in estimates.items()}
        lines.append(
            f"judge and people on {measure}, within models, {plural(estimates['spearman'].num_samples, 'score')}: Spearman {estimates['spearman']}, "
            f"Kendall's tau-b {estimates['kendall']}, weighted kappa {estimates['kappa']}"
        )
    write_json(folder / HUMAN_AGREEMENT_FILE, {"labels": str(labels), "agreement": found, "scores": kept + rows})
    return "\n".join(lines)


def _answer_and_measure(row: dict) -> tuple[str, str, str]:
    return row["model"], row["id"], row["measure"]
