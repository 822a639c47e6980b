"""
What step 4 knows besides scores: which of two answers is better, what each judge of a jury says, what people say.

Imports without torch.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from finetuning.agreement import (
    Estimate,
    PairCounts,
    count_pairs,
    measure_against_people,
    measure_jury,
    rank_correlation,
)
from finetuning.errors import InputError
from finetuning.report.comparison import holm
from finetuning.report.samples import name_runs
from finetuning.resampling import bootstrap_interval, share_interval
from finetuning.results import iterate_rows, pair_hash, read_info
from finetuning.runs import EVALUATIONS, HUMAN_AGREEMENT_FILE, audit_file, is_there, names_of_files, read_json
from finetuning.schemas import AUDIT_INFO, COMPARISON, COMPARISON_INFO, EVALUATION, HUMAN_AGREEMENT, JUDGES_INFO
from finetuning.wording import LEVEL

ALL_MODELS = "all models"
ASKED_BY = ("prompt", "temperature", "mask_pii")  # the same where a judge was audited as it has scored
TURNED = {"first": "second", "second": "first", "tie": "tie"}
Hashes = dict[tuple[str, str], str]  # of each answer as it is now, by model and id of the sample


@dataclass
class PairResult:
    """What a judge says of the answers of two models side by side. Each sample is one vote, of both orders.

    Args:
        replies: For each sample, which answer is preferred (first, second, tie), and the explanation, in either order.
        share: Of the samples on which `first` is preferred, among those on which either is; with its 95 % interval.
        p: Of the sign test, adjusted for all pairs of models that were judged side by side (Holm).
    """

    first: str
    second: str
    judge: str
    counts: PairCounts
    replies: dict[str, list[tuple[str, str]]]
    share: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)
    p: float = field(init=False)

    def __post_init__(self):
        wins, losses = self.counts.wins, self.counts.losses
        self.share = wins / (wins + losses) if wins + losses else math.nan
        self.low, self.high = share_interval([1] * wins + [0] * losses)
        self.p = self.counts.p

    @property
    def is_clear(self) -> bool:
        return self.p < LEVEL

    @property
    def winner(self) -> str:
        return self.first if self.counts.wins >= self.counts.losses else self.second

    @property
    def loser(self) -> str:
        return self.second if self.winner == self.first else self.first

    def outcome(self, sample_id: str) -> str:
        """first, second, or tie, as which all counts that is not the same in both orders."""
        votes = {preferred for preferred, _ in self.replies[sample_id]}
        return votes.pop() if len(votes) == 1 else "tie"


@dataclass
class Opinions:
    """What is known of the answers besides their scores.

    Args:
        pairs: One for each pair of models and judge.
        jury: One row a model and judge: answers (that all judges have scored), mean with its interval, and, of the
            model, disagreement (standard deviation between the judges) and alpha (Krippendorff's).
        people: One row a measure, and one a model for the overall score: scores, mean with its interval, judged (scores
            beside which the judge has one), judge_mean on the same answers, spearman and kappa with their intervals.
        scores: Of people: model, id, measure, score.
        num_changed: Scores of people of answers that have changed since.
        lacking: Files without the scores of people that they are about.
        audits: By judge, how often it scores a reference higher than a worse text, by the kind of that text. Nothing is
            known where the audit has not ended, or asked in another way than the scores were asked for.
    """

    pairs: list[PairResult] = field(default_factory=list)
    jury: pd.DataFrame = field(default_factory=pd.DataFrame)
    people: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    num_changed: int = 0
    lacking: list[Path] = field(default_factory=list)
    audits: dict[str, dict[str, dict]] = field(default_factory=dict)

    def tables(self) -> dict[str, pd.DataFrame]:
        """What there is of pairs, jury and people, for other tools."""
        pairs = [
            {
                "first": pair.first, "second": pair.second, "judge": pair.judge, "wins": pair.counts.wins,
                "ties": pair.counts.ties, "losses": pair.counts.losses, "share": pair.share, "share_low": pair.low,
                "share_high": pair.high, "p": pair.p, "flips": pair.counts.flips,
                "first_place": pair.counts.first_place,
            }
            for pair in self.pairs
        ]  # fmt: skip
        found = {"pairs": pd.DataFrame(pairs), "jury": self.jury, "people": self.people}
        return {name: table for name, table in found.items() if len(table)}


def load_opinions(runs: list[Path], samples: pd.DataFrame) -> Opinions:
    """What step 4 has written besides scores, of the answers as they are now.

    Args:
        samples: As samples.load_runs gives them.
    """
    hashes = dict(zip(zip(samples["model"], samples["id"], strict=True), samples["prediction_hash"], strict=True))
    opinions, juries, people = Opinions(), [], []
    for run_name, run in name_runs(runs).items():
        prefix = f"{run_name}/" if len(runs) > 1 else ""
        opinions.pairs += _load_pairs(run / EVALUATIONS / "pairs", prefix, hashes)
        juries += _load_jury(run / EVALUATIONS, prefix, hashes)
        opinions.audits |= {prefix + judge: shares for judge, shares in _load_audits(run / EVALUATIONS)}
        path = run / EVALUATIONS / HUMAN_AGREEMENT_FILE
        if is_there(path):
            written = read_json(path, HUMAN_AGREEMENT, "start 4_openai_test.py with --human again")
            if "scores" not in written:
                opinions.lacking.append(path)
            people += [{**row, "model": prefix + row["model"]} for row in written.get("scores", [])]
    known = [pair for pair in opinions.pairs if not math.isnan(pair.p)]
    for pair, p in zip(known, holm([pair.p for pair in known]), strict=True):
        pair.p = p
    order = {name: i for i, name in enumerate(samples["model"].unique())}
    opinions.jury = pd.DataFrame(sorted(juries, key=lambda row: order[row["model"]]))
    current = [row for row in people if hashes.get((row["model"], row["id"])) == row["prediction_hash"]]
    opinions.num_changed = len(people) - len(current)
    if current:
        opinions.scores = pd.DataFrame(current)[["model", "id", "measure", "score"]]
        opinions.people = _measure_people(opinions.scores, samples)
    return opinions


def _load_pairs(folder: Path, prefix: str, hashes: Hashes) -> list[PairResult]:
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        identity = read_info(path, COMPARISON_INFO)["identity"]
        first, second = (prefix + model for model in identity["models"])
        replies: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
        for row in iterate_rows(path, COMPARISON):
            answers = (first, row["id"]), (second, row["id"])
            is_known = row["status"] == "ok" and all(answer in hashes for answer in answers)
            if is_known and row["prediction_hash"] == pair_hash(*(hashes[answer] for answer in answers)):
                replies[row["id"]][row["order"]] = (row["evaluation"]["better"], row["evaluation"]["explanation"])
        whole = {sample_id: (orders["AB"], orders["BA"]) for sample_id, orders in replies.items() if len(orders) == 2}
        found.append(
            PairResult(
                first,
                second,
                judge=identity["judge_model"],
                counts=count_pairs((forward[0], backward[0]) for forward, backward in whole.values()),
                # in the second order, the answer that stood first is that of the second model
                replies={
                    sample_id: [forward, (TURNED[backward[0]], backward[1])]
                    for sample_id, (forward, backward) in whole.items()
                },
            )
        )
    return found


def _load_jury(folder: Path, prefix: str, hashes: Hashes) -> list[dict]:
    """Rows of the table of juries."""
    scores: dict[str, dict[str, dict]] = defaultdict(dict)  # by model and judge, the evaluation of each sample
    jury_of: dict[str, list[str]] = {}
    for path in sorted((folder / "judges").glob("*/*.jsonl")):
        mean = folder / path.name
        members = read_info(mean, JUDGES_INFO)["identity"]["judge_model"] if is_there(mean) else None
        judge = read_info(path, JUDGES_INFO)["identity"]["judge_model"]
        if not isinstance(members, list) or judge not in members:
            continue  # its part in a jury was given up
        jury_of[path.stem] = members
        scores[path.stem][judge] = {
            row["id"]: {name: judged["score"] for name, judged in row["evaluation"].items()}
            for row in iterate_rows(path, EVALUATION)
            if row["status"] == "ok" and row["prediction_hash"] == hashes.get((prefix + path.stem, row["id"]))
        }
    rows = []
    for model, by_judge in scores.items():
        lost = [judge for judge in jury_of[model] if judge not in by_judge]
        if lost:
            raise InputError(
                f"{folder / 'judges'} has no rows of {', '.join(lost)} for {model}, which are in its mean; "
                "take them from a copy, or start 4_openai_test.py with the same --judges again"
            )
        common = sorted(set.intersection(*map(set, by_judge.values())))
        agreement = measure_jury({judge: [its[i] for i in common] for judge, its in by_judge.items()})
        if agreement is None:
            continue
        for judge, its in by_judge.items():
            low, high = bootstrap_interval([statistics.fmean(its[i].values()) for i in common])
            rows.append(
                {
                    "model": prefix + model, "judge": judge, "answers": agreement.num_samples,
                    "mean": agreement.means[judge], "mean_low": low, "mean_high": high,
                    "disagreement": agreement.disagreement, "alpha": agreement.alpha,
                }
            )  # fmt: skip
    return rows


def _load_audits(folder: Path) -> Iterator[tuple[str, dict[str, dict]]]:
    """Each audited judge of those whose scores there are, with what its audit found."""
    for name in names_of_files(folder, "all")[:1]:  # all models are judged in the same way
        identity = read_info(folder / f"{name}.jsonl", JUDGES_INFO)["identity"]
        judges = identity["judge_model"]
        for judge in judges if isinstance(judges, list) else [judges]:
            path = audit_file(folder, judge)
            if is_there(path):
                audit = read_info(path, AUDIT_INFO)
                is_same = all(audit["identity"].get(key) == identity.get(key) for key in ASKED_BY)
                yield judge, audit.get("preferred", {}).get("score", {}) if is_same else {}


def _measure_people(scores: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """People's means and their agreement with the judge: of all models for each measure, of each model overall."""
    by_answer = samples.set_index(["model", "id"])
    rows = []
    for measure, of_measure in scores.groupby("measure", sort=False):
        answers = pd.MultiIndex.from_frame(of_measure[["model", "id"]])
        judge = by_answer[measure].reindex(answers).to_numpy(dtype=float) if measure in by_answer else math.nan
        of_measure = of_measure.assign(judge=judge)
        rows.append({"model": ALL_MODELS, "measure": measure, **_compare_with_judge(of_measure)})
        for model, group in of_measure.groupby("model", sort=False) if measure == "overall" else ():
            rows.append({"model": model, "measure": measure, **_compare_with_judge(group, of_one_model=True)})
    return pd.DataFrame(rows)


def _compare_with_judge(scores: pd.DataFrame, of_one_model: bool = False) -> dict[str, float]:
    """Scores of people (model, id, score) beside the judge's."""
    judged = scores[scores["judge"].notna()]
    means = scores.groupby(["model", "id"])["score"].mean()  # several people may have scored an answer
    low, high = bootstrap_interval(means)
    if of_one_model:
        estimates = {"spearman": rank_correlation(judged["judge"], judged["score"]), "kappa": Estimate()}
    else:
        pairs = list(judged[["model", "id", "judge", "score"]].itertuples(index=False, name=None))
        estimates = measure_against_people(pairs)
    found = {
        "scores": len(scores), "mean": means.mean(), "mean_low": low, "mean_high": high, "judged": len(judged),
        "judge_mean": judged["judge"].mean(), "within_models": estimates["spearman"].num_samples,
    }  # fmt: skip
    for name in ("spearman", "kappa"):
        estimate = estimates[name]
        found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return found
