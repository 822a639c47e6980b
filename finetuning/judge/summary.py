"""
What a judge's rows amount to: coverage, means, money, and how far they can be trusted. Written beside the rows; the
mean of several judges is made here, too.

Imports without torch.
"""

import math
from array import array
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from finetuning.agreement import count_pairs, measure_jury, rank_correlation
from finetuning.errors import to_line
from finetuning.judge.audit import measure_preferences
from finetuning.judge.jobs import Item, Job, identity_of_jury, juries
from finetuning.judge.people import Labels, compare_with_people
from finetuning.judge.rows import add_usage
from finetuning.results import RowFile, item_key, iterate_rows, read_info
from finetuning.wording import plural, say_p, say_share

AUDITED = "in {value:.1%} of {num_samples} pairs (95 % {low:.1%} to {high:.1%})"


def report(jobs: list[Job], files: list[RowFile], finished: set[Path], labels: Labels | None, folder: Path) -> None:
    """Print what the rows of each job amount to, and write it beside them; `finished` ones have been summed up already.

    Args:
        labels: What people gave to the same answers.
        folder: Of the evaluations.
    """
    for job, file in zip(jobs, files, strict=True):
        if job.path not in finished:
            file.keep_latest(item_key)
            print(summarize(job, file))
    same_model: dict[str, list[str]] = {}
    for path, its_jobs in juries(jobs).items():
        print(combine_jury(path, its_jobs))
        same_model |= read_info(path)["one_model"]
    for model, judges in same_model.items():
        names = " and ".join(judges)
        print(f"warning: {names} all replied as {to_line(model)}: one model asked several times is no jury")
    if labels is not None:
        print(compare_with_people(labels, folder))
    for judge in dict.fromkeys(job.judge_model for job in jobs if job.audits):
        asked = zip(jobs, files, strict=True)
        print(_report_audit(judge, [(job, file) for job, file in asked if job.judge_model == judge]))
    costs = [file.info["cost"] for file in files if file.info["cost"] is not None]
    possible = sum(file.info["possible_cost"] for file in files)
    if costs or possible:
        unsure = f", and up to ${possible:.6g} more for replies that never came" if possible else ""
        print(f"cost of these evaluations: ${sum(costs):.6g}{unsure}")


def describe_rest(files: list[RowFile], num_pending: int, again: str) -> str:
    """Lines that say which answers have no score, and that the command `again` does something about them."""
    num_failed = sum(file.info["num_predictions"] - file.info["statuses"].get("ok", 0) for file in files) - num_pending
    pending = (
        f"{num_pending} requests are under way in batches; --mode batch waits for them, --collect true looks once\n"
    )
    failed = f"{num_failed} answers have no score and count in no mean; {again} tries them again\n"
    return (pending if num_pending else "") + (failed if num_failed > 0 else "")


def summarize(job: Job, file: RowFile) -> str:
    """Record coverage, tokens and cost of all rows beside them, and return them in a line."""
    statuses, usage = Counter[str](), Counter[str]()
    costs, possible_cost, num_shared = list[float](), 0.0, 0
    scores, lengths, expected = array("d"), array("d"), array("d")
    replied_as, first_error = set[str | None](), None
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
        replied_as.add(row.get("replied_as"))
        if row["status"] == "error":
            first_error = first_error or row["error"]
        if row["status"] == "ok" and job.compares is None:
            scores.append(fmean(judged["score"] for judged in row["evaluation"].values()))
            lengths.append(length)
            if row["expected"] is not None:
                expected.append(fmean(row["expected"].values()))
    info = {
        "num_predictions": len(current),
        "statuses": dict(statuses),
        "coverage": statuses["ok"] / len(current) if current else None,
        "usage": dict(usage),
        "cost": sum(costs) if costs else None,
        "possible_cost": possible_cost,
        "num_shared": num_shared,  # paid for in the rows of other models that gave the same answers
        "replied_as": sorted(name for name in replied_as if name is not None),
        "limit": job.limit,  # what was judged beyond it, on an earlier start, is not counted here
    }
    means, below = [], ""
    if job.compares is None:
        means.append(f"mean {fmean(scores):.2f} of 10" if scores else "no score")
        by_length = rank_correlation(scores, lengths)
        info["length_correlation"] = asdict(by_length)
        below = f"\n  rank correlation of the score with the length of the answer: {by_length}" if scores else ""
    else:
        below = "\n" + _summarize_pairs(job, job.compares, info)
    if job.identity["expected_scores"] and scores:
        info["num_expected"] = len(expected)
        mean = f"expected {fmean(expected):.2f}" if expected else "no log-probabilities from the endpoint"
        means.append(mean)
    file.write_info(**info)
    return _describe(job.name, info, means, first_error) + below


def _describe(name: str, info: dict, means: list[str], first_error: str | None) -> str:
    statuses, usage = info["statuses"], info["usage"]
    num_tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    parts = [
        f"{name}: judged {statuses.get('ok', 0)} of {info['num_predictions']}",
        *means,
        plural(num_tokens, "token"),
    ]
    parts += [] if info["cost"] is None else [f"${info['cost']:.6g}"]
    parts += [f"{info['num_shared']} shared with another model"] if info["num_shared"] else []
    failed = ", ".join(f"{number} {status}" for status, number in statuses.items() if status != "ok")
    return ", ".join(parts) + (f"; failed: {failed}" if failed else "") + (f" ({first_error})" if first_error else "")


def _summarize_pairs(job: Job, names: list[str], info: dict) -> str:
    """Who won, and how often the judge looked at the place rather than at the answer."""
    same = {item.row["id"] for item in job.items() if item.known_evaluation is not None}
    replies: dict[str, dict[str, str]] = defaultdict(dict)
    for row in _scored_rows(job):
        replies[row["id"]][row["order"]] = row["evaluation"]["better"]
    both = {sample: (orders["AB"], orders["BA"]) for sample, orders in replies.items() if len(orders) == 2}
    counts = count_pairs(both.values())
    info["pairs"] = asdict(counts)
    if counts.num_pairs == 0:
        return "no pair was judged in both orders"
    line = (
        f"{names[0]} is better in {counts.wins} of {plural(counts.num_pairs, 'pair')}, {names[1]} in {counts.losses}, "
        f"neither in {counts.ties}"
    )
    if counts.wins + counts.losses:
        line += f"; sign test p {say_p(counts.p)}"
    if not math.isnan(counts.first_place):
        line += f"\n  {say_share(counts.first_place)} of the preferences were for the answer that stood first"
    num_same = info["num_same"] = len(same & both.keys())
    if num_same:
        line += f"\n  in {num_same} of them both gave the same answer, a tie that no judge was asked about"
    if num_same < counts.num_pairs:
        flips = say_share(counts.flips / (counts.num_pairs - num_same))
        line += (
            f"\n  flip rate {flips}: so often the other answer was preferred once their order changed, which is a tie"
        )
    return line


def _scored_rows(job: Job) -> list[dict]:
    """The rows with a judgement of what is to be judged as it is now."""
    current = {item.key: item.row["prediction_hash"] for item in job.items()}
    rows = (row for row in iterate_rows(job.path) if row["status"] == "ok")
    return [row for row in rows if current.get(item_key(row)) == row["prediction_hash"]]


def _report_audit(judge: str, asked: list[tuple[Job, RowFile]]) -> str:
    """Write how often a judge prefers the references, which it was asked first, beside its scores of them; in lines."""
    scores: dict[str, dict[str, dict[str, float]]] = {"score": {}, "expected score": {}}
    for job, _ in asked:
        rows, kind = _scored_rows(job), job.path.stem
        scores["score"][kind] = {r["id"]: fmean(j["score"] for j in r["evaluation"].values()) for r in rows}
        scores["expected score"][kind] = {r["id"]: fmean(r["expected"].values()) for r in rows if r["expected"]}
    preferred = {name: measure_preferences(its) for name, its in scores.items()}
    asked[0][1].write_info(preferred=preferred)
    text = f"audit of {judge}: how often it prefers the true reference, a tie counting one half"
    for job, file in asked[1:]:
        num_left_out = asked[0][1].info["num_predictions"] - file.info["num_predictions"]
        text += f"\n  to `{job.path.stem}`" + (f", which {num_left_out} samples cannot have" if num_left_out else "")
        for name, its in preferred.items():
            text += f"; by {name} {AUDITED.format(**its[job.path.stem])}" if job.path.stem in its else ""
    return text


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
            one_model=_find_same_model(rows),
        )
    return f"{path.stem}: {agreement or 'no answer was scored by all of the jury'}"


def _find_same_model(rows: dict[str, dict[str, dict]]) -> dict[str, list[str]]:
    """The judges behind which the same model is, by the name that it has in their replies."""
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
            "score": fmean(judged[criterion]["score"] for judged in evaluations.values()),
        }
        for criterion in next(iter(evaluations.values()))
    }
    if all(row["expected"] is not None for row in found.values()):
        result["expected"] = {
            criterion: fmean(row["expected"][criterion] for row in found.values()) for criterion in result["evaluation"]
        }
    return result
