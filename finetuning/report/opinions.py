"""
What step 4 knows besides scores: which of two answers is better, what each judge of a jury says, what people say.

Imports without torch.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
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
from finetuning.report.tables import name_runs
from finetuning.report.verdict import Verdict
from finetuning.resampling import bootstrap_interval, share_interval
from finetuning.results import iterate_rows, pair_hash, read_info
from finetuning.runs import EVALUATIONS, HUMAN_AGREEMENT_FILE, is_there, read_json
from finetuning.schemas import COMPARISON, COMPARISON_INFO, EVALUATION, HUMAN_AGREEMENT, JUDGES_INFO
from finetuning.wording import LEVEL, say_number, say_p, say_share

ALL_MODELS = "all models"
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)
WORDS = {
    "en": {
        "pair": "Side by side, {judge} prefers {first} to {second} in {wins} of the {decided} samples where it prefers one{share}",
        "share": " ({share}, 95 % {low} to {high}; sign test p {p})",
        "as the scores": ", as the scores say, too.",
        "unlike the scores": ", although the scores say that {second} is better: read the samples on which they differ.",
        "beyond the scores": ", which the scores do not show.",
        "not scored": ".",
        "pair unclear": "Side by side, {judge} does not show that {first} or {second} is better: {wins} against {losses}, ties: {ties}{p}",
        "p": " (sign test p {p})",
        "neither the scores": "; nor do the scores.",
        "but the scores": ", although the scores say that {better} is better.",
        "order": (
            "Samples in which the preference changed with the order of the answers, which is a tie: {flips} of {num}; {first_place} of all "
            "preferences were for the answer that stood first."
        ),
        "no pair": "No pair of answers of {first} and {second} was judged in both orders.",
        "jury": (
            "The scores are the means of a jury: {judges}. Within a model, their agreement (Krippendorff's alpha, 1 is full) is {alpha}."
        ),
        "jury unknown": "not defined",
        "jury alone": "Alone, {choices}.",
        "jury choice": "{judge} would put {model} first",
        "people": "Scores that people gave to the answers of {models}: {num}.",
        "people agree": "Within each model, judge and people agree on the overall score with a rank correlation of {spearman} and a weighted kappa of {kappa}, over {num} scores.",
        "estimate": "{value} (95 % {low} to {high})",
        "people few": "Scores of people beside one of the judge: {num}, of which too few differ within a model to say how far they agree.",
        "people best": "People give the highest mean to {model}.",
        "people again": "{file} has no scores of people in it; start 4_openai_test.py with --human again.",
        "people changed": "Scores of people of answers that have changed since, which are left out: {num}.",
    },
    "ko": {
        "pair": "나란히 견주면 {judge}은(는) 우열을 가린 샘플 {decided}개 중 {wins}개에서 {second}보다 {first}을(를) 낫다고 합니다{share}",
        "share": " ({share}, 95 % {low}~{high}, 부호 검정 p {p})",
        "as the scores": ". 점수도 같은 결과입니다.",
        "unlike the scores": ". 그러나 점수로는 {second}이(가) 낫습니다. 둘이 어긋나는 샘플을 읽어 보십시오.",
        "beyond the scores": ". 점수로는 드러나지 않는 차이입니다.",
        "not scored": ".",
        "pair unclear": "나란히 견주어도 {judge}로는 {first}과(와) {second} 중 어느 쪽이 낫다고 할 수 없습니다: {wins} 대 {losses}, 무승부 {ties}{p}",
        "p": " (부호 검정 p {p})",
        "neither the scores": ". 점수도 마찬가지입니다.",
        "but the scores": ". 그러나 점수로는 {better}이(가) 낫습니다.",
        "order": "샘플 {num}개 중 {flips}개에서 답변의 순서를 바꾸자 선호가 뒤바뀌어 무승부로 셌고, 모든 선호의 {first_place}가 앞에 놓인 답변이었습니다.",
        "no pair": "{first}과(와) {second}의 답변 중 두 순서 모두로 심사된 쌍이 없습니다.",
        "jury": "점수는 심사 모델 여럿의 평균입니다: {judges}. 한 모델의 답변에 대한 이들의 일치도(Krippendorff의 alpha, 1이면 완전 일치)는 {alpha}입니다.",
        "jury unknown": "정의되지 않음",
        "jury alone": "하나씩 보면 {choices}.",
        "jury choice": "{judge}의 1위는 {model}",
        "people": "사람이 매긴 점수가 {num}개 있습니다 (모델: {models}).",
        "people agree": "각 모델 안에서 심사 모델과 사람의 종합 점수는 점수 {num}개에 대해 순위 상관 {spearman}, 가중 kappa {kappa}입니다.",
        "estimate": "{value} (95 % {low}~{high})",
        "people few": "사람과 심사 모델의 점수가 함께 있는 것은 {num}개이며, 한 모델 안에서 서로 다른 것이 너무 적어 얼마나 일치하는지 말할 수 없습니다.",
        "people best": "사람의 평균이 가장 높은 모델은 {model}입니다.",
        "people again": "{file}에 사람의 점수가 없습니다. 4_openai_test.py를 --human과 함께 다시 실행하십시오.",
        "people changed": "사람의 점수 {num}개는 그 뒤에 바뀐 답변의 것이라 뺐습니다.",
    },
}


@dataclass
class PairResult:
    """What a judge says of the answers of two models side by side. Each sample is one vote, of both orders.

    Args:
        share: Of the samples on which `first` is preferred, among those on which either is; with its 95 % interval.
        p: Of the sign test, adjusted for all pairs of models that were judged side by side (Holm).
        replies: For each sample, which answer is preferred (first, second, tie), and the explanation, in either order.
    """

    first: str
    second: str
    judge: str
    counts: PairCounts
    replies: dict[str, list[tuple[str, str]]]
    share: float
    low: float
    high: float
    p: float

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

    def say(self, language: str, verdict: Verdict) -> str:
        """The result, and whether the scores say the same."""
        words, counts = WORDS[language], self.counts
        if counts.num_pairs == 0:
            return words["no pair"].format(first=self.first, second=self.second)
        scores = next((c for c in verdict.against(self.winner) if c.other == self.loser), None)
        p = say_p(self.p)
        if self.is_clear:
            share, low, high = self.share, self.low, self.high
            if self.winner == self.second:
                share, low, high = 1 - share, 1 - high, 1 - low
            text = words["pair"].format(
                judge=self.judge, first=self.winner, second=self.loser, wins=max(counts.wins, counts.losses),
                decided=counts.wins + counts.losses,
                share=words["share"].format(share=say_share(share), low=say_share(low), high=say_share(high), p=p),
            )  # fmt: skip
            if scores is None:
                return text + words["not scored"]
            if not scores.is_shown:
                return text + words["beyond the scores"]
            return text + words["as the scores" if scores.difference > 0 else "unlike the scores"].format(
                second=self.loser
            )
        text = words["pair unclear"].format(
            judge=self.judge, first=self.first, second=self.second, wins=counts.wins, losses=counts.losses, ties=counts.ties,
            p=words["p"].format(p=p) if counts.wins + counts.losses else "",
        )  # fmt: skip
        if scores is None:
            return text + words["not scored"]
        if not scores.is_shown:
            return text + words["neither the scores"]
        return text + words["but the scores"].format(better=self.winner if scores.difference > 0 else self.loser)

    def say_order(self, language: str) -> str:
        """How often the order of the answers decided."""
        return WORDS[language]["order"].format(
            flips=self.counts.flips, num=self.counts.num_pairs, first_place=say_share(self.counts.first_place)
        )


@dataclass
class Opinions:
    """What is known of the answers besides their scores.

    Args:
        pairs: One for each pair of models and judge.
        jury: One row a model and judge: answers (that all judges have scored), mean with its interval, and, of the model,
            disagreement (standard deviation between the judges) and alpha (Krippendorff's).
        people: One row a measure, and one a model for the overall score: scores, mean with its interval, judged (scores
            beside which the judge has one), judge_mean on the same answers, spearman and kappa with their intervals.
        scores: Of people: model, id, measure, score.
        num_changed: Scores of people of answers that have changed since.
        lacking: Files without the scores of people that they are about.
    """

    pairs: list[PairResult] = field(default_factory=list)
    jury: pd.DataFrame = field(default_factory=pd.DataFrame)
    people: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    num_changed: int = 0
    lacking: list[Path] = field(default_factory=list)

    def tables(self) -> dict[str, pd.DataFrame]:
        """What there is of pairs, jury and people, for other tools."""
        pairs = [
            {
                "first": pair.first, "second": pair.second, "judge": pair.judge, "wins": pair.counts.wins,
                "ties": pair.counts.ties, "losses": pair.counts.losses, "share": pair.share, "share_low": pair.low,
                "share_high": pair.high, "p": pair.p, "flips": pair.counts.flips, "first_place": pair.counts.first_place,
            }
            for pair in self.pairs
        ]  # fmt: skip
        found = {"pairs": pd.DataFrame(pairs), "jury": self.jury, "people": self.people}
        return {name: table for name, table in found.items() if len(table)}

    def say(self, language: str, verdict: Verdict) -> list[str]:
        """All of it in sentences, in English (en) or Korean (ko)."""
        words = WORDS[language]
        found = []
        for pair in self.pairs:
            found.append(pair.say(language, verdict))
            if pair.counts.first_place == pair.counts.first_place:  # not nan: something was preferred
                found.append(pair.say_order(language))
        if len(self.jury):
            found += self._say_jury(words)
        found += [words["people again"].format(file=file) for file in self.lacking]
        if len(self.people):
            found += self._say_people(words)
        if self.num_changed:
            found.append(words["people changed"].format(num=self.num_changed))
        return found

    def _say_jury(self, words: dict[str, str]) -> list[str]:
        alphas = self.jury["alpha"].dropna()
        alpha = words["jury unknown"]
        if len(alphas):
            alpha = " – ".join(dict.fromkeys((say_number(alphas.min(), 2), say_number(alphas.max(), 2))))
        found = [words["jury"].format(judges=", ".join(self.jury["judge"].unique()), alpha=alpha)]
        if self.jury["model"].nunique() > 1:
            choices = [
                words["jury choice"].format(judge=judge, model=_highest(its.set_index("model")["mean"]))
                for judge, its in self.jury.groupby("judge", sort=False)
            ]
            found.append(words["jury alone"].format(choices=", ".join(choices)))
        return found

    def _say_people(self, words: dict[str, str]) -> list[str]:
        models = list(self.scores["model"].unique())
        found = [words["people"].format(num=len(self.scores), models=", ".join(models))]
        overall = self.people[self.people["measure"] == "overall"].set_index("model")
        if overall.empty:
            return found
        whole = overall.loc[ALL_MODELS]
        if math.isnan(whole["spearman"]):
            found.append(words["people few"].format(num=int(whole["judged"])))
        else:
            estimates = {
                name: words["estimate"].format(
                    value=say_number(whole[name], 2), low=say_number(whole[f"{name}_low"], 2),
                    high=say_number(whole[f"{name}_high"], 2),
                )
                for name in ("spearman", "kappa")
            }  # fmt: skip
            found.append(words["people agree"].format(num=int(whole["within_models"]), **estimates))
        if len(models) > 1:
            found.append(words["people best"].format(model=_highest(overall.drop(ALL_MODELS)["mean"])))
        return found


def _highest(means: pd.Series) -> str:
    """The model with the highest mean, or all that have it."""
    return ", ".join(means.index[np.isclose(means, means.max(), rtol=0, atol=1e-9)])


def load_opinions(runs: list[Path], samples: pd.DataFrame) -> Opinions:
    """What step 4 has written besides scores, of the answers as they are now.

    Args:
        samples: As tables.load_runs gives them.
    """
    hashes = dict(zip(zip(samples["model"], samples["id"], strict=True), samples["prediction_hash"], strict=True))
    opinions, juries, people = Opinions(), [], []
    for run_name, run in name_runs(runs).items():
        prefix = f"{run_name}/" if len(runs) > 1 else ""
        opinions.pairs += _load_pairs(run / EVALUATIONS / "pairs", prefix, hashes)
        juries += _load_jury(run / EVALUATIONS, prefix, hashes)
        path = run / EVALUATIONS / HUMAN_AGREEMENT_FILE
        if is_there(path):
            written = read_json(path, HUMAN_AGREEMENT, "start 4_openai_test.py with --human again")
            if "scores" not in written:
                opinions.lacking.append(path)
            people += [{**row, "model": prefix + row["model"]} for row in written.get("scores", [])]
    known = [pair for pair in opinions.pairs if pair.p == pair.p]
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


def _load_pairs(folder: Path, prefix: str, hashes: dict[tuple[str, str], str]) -> list[PairResult]:
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        identity = read_info(path, COMPARISON_INFO)["identity"]
        first, second = (prefix + model for model in identity["models"])
        replies: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
        for row in iterate_rows(path, COMPARISON):
            now = [hashes.get((model, row["id"])) for model in (first, second)]
            if row["status"] == "ok" and None not in now and row["prediction_hash"] == pair_hash(*now):
                replies[row["id"]][row["order"]] = (row["evaluation"]["better"], row["evaluation"]["explanation"])
        whole = {sample_id: orders for sample_id, orders in replies.items() if len(orders) == 2}
        counts = count_pairs((orders["AB"][0], orders["BA"][0]) for orders in whole.values())
        low, high = share_interval([1] * counts.wins + [0] * counts.losses)
        found.append(
            PairResult(
                first=first,
                second=second,
                judge=identity["judge_model"],
                counts=counts,
                # in the second order, the answer that stood first is that of the second model
                replies={
                    sample_id: [orders["AB"], (_turned(orders["BA"][0]), orders["BA"][1])]
                    for sample_id, orders in whole.items()
                },
                share=counts.wins / (counts.wins + counts.losses) if counts.wins + counts.losses else float("nan"),
                low=low,
                high=high,
                p=counts.p,
            )
        )
    return found


def _turned(better: str) -> str:
    return {"first": "second", "second": "first", "tie": "tie"}[better]


def _load_jury(folder: Path, prefix: str, hashes: dict[tuple[str, str], str]) -> list[dict]:
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
                f"{folder / 'judges'} has no rows of {', '.join(lost)} for {model}, which are in its mean; take them from a copy, or "
                "start 4_openai_test.py with the same --judges again"
            )
        common = sorted(set.intersection(*map(set, by_judge.values())))
        agreement = measure_jury({judge: [its[i] for i in common] for judge, its in by_judge.items()})
        if agreement is None:
            continue
        for judge, its in by_judge.items():
            low, high = bootstrap_interval([statistics.fmean(its[i].values()) for i in common])
            rows.append(
                {
                    "model": prefix + model, "judge": judge, "answers": agreement.num_samples, "mean": agreement.means[judge],
                    "mean_low": low, "mean_high": high, "disagreement": agreement.disagreement, "alpha": agreement.alpha,
                }
            )  # fmt: skip
    return rows


def _measure_people(scores: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """People's means and their agreement with the judge: of all models for each measure, of each model overall."""
    by_answer = samples.set_index(["model", "id"])
    rows = []
    for measure, of_measure in scores.groupby("measure", sort=False):
        judge = math.nan
        if measure in by_answer:
            answers = pd.MultiIndex.from_frame(of_measure[["model", "id"]])
            judge = by_answer[measure].reindex(answers).to_numpy(dtype=float)
        of_measure = of_measure.assign(judge=judge)
        groups = [(ALL_MODELS, of_measure)]
        groups += list(of_measure.groupby("model", sort=False)) if measure == "overall" else []
        for model, group in groups:
            judged = group[group["judge"].notna()]
            means = group.groupby(["model", "id"])["score"].mean()  # several people may have scored an answer
            low, high = bootstrap_interval(means)
            row = {
                "model": model, "measure": measure, "scores": len(group), "mean": means.mean(), "mean_low": low,
                "mean_high": high, "judged": len(judged), "judge_mean": judged["judge"].mean(),
            }  # fmt: skip
            if model == ALL_MODELS:
                pairs = list(judged[["model", "id", "judge", "score"]].itertuples(index=False, name=None))
                estimates = measure_against_people(pairs)
            else:
                estimates = {"spearman": rank_correlation(judged["judge"], judged["score"]), "kappa": UNKNOWN}
            row["within_models"] = estimates["spearman"].num_samples
            for name in ("spearman", "kappa"):
                row |= {
                    name: estimates[name].value,
                    f"{name}_low": estimates[name].low,
                    f"{name}_high": estimates[name].high,
                }
            rows.append(row)
    return pd.DataFrame(rows)
