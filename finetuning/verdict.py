"""
Which model to use, how sure that is, and what the samples cannot show, in words. Imports without torch.
"""

import hashlib
import math
from dataclasses import dataclass, field

import pandas as pd

from finetuning.comparison import Comparison, bootstrap_interval, compare_all, correlation_within_samples

COVERAGE_NEEDED = 0.95  # of its answers a model must have a score of, to be ranked
STOPPING_NEEDED = 0.95
MOST_NAMED = 4  # models in one sentence; the table has all
DECIMALS = {"overall": 2, "rouge1": 3}
WORDS = {
    "en": {
        "overall": "the judge's overall score",
        "rouge1": "ROUGE-1",
        "points": " points of 10",
        "judged": "the judge has scored the answers of every model",
        "some judged": "the judge has scored the answers of all models that are ranked",
        "not judged": "nothing was judged",
        "few judged": "only {coverage} of the answers of {model} have a judgement, under {needed}",
        "no answers": "nothing was answered",
        "ranked by": "Ranked by {measure}, since {reason}.",
        "unranked": "{model} is shown but not ranked: only {coverage} of its answers have a judgement, under {needed}.",
        "no common": "There is no sample that every model has a score of; answer the same samples with each of them.",
        "left out": "Compared on the {num} samples that every model has a score of; {left_out} others are left out.",
        "held out": (
            "{best} was chosen on {chosen} samples; the figures here are of the {num} others, which had no part in it."
        ),
        "same samples": (
            "{best} was chosen on the same {num} samples that its figures are from, which makes them a little too good; "
            "`--holdout 0.5` chooses on one half and reports the other."
        ),
        "alone": "{best} is the only model with answers, so there is nothing to compare it with.",
        "better": "{best} is better than {list}.",
        "better than one": "{other} by {figures}",
        "figures": "{difference}{points} (95 % {low} to {high}; p = {p}; better in {wins}, worse in {losses} of {num})",
        "not shown": "{best} has the highest mean, but these samples do not show that it is better than {list}.",
        "not shown held out": "These samples do not show that {best} is better than {list}.",
        "all equal": "{best} and {list} have the same score on every sample.",
        "detectable": "With {num} samples, nothing under about {detectable}{points} could be seen (with a probability of 80 %).",
        "more samples": "Answer more samples to tell them apart.",
        "one sample": "One sample shows nothing about a difference; answer more.",
        "and others": "{list} and {num} others, all of them further behind",
        "baseline": "Against {baseline}: {list}.",
        "baseline many": "Against {baseline}, {better} of the other models are better, {worse} worse, and {same} not shown to differ.",
        "baseline better": "{model} is better by {figures}",
        "baseline worse": "{model} is worse by {figures}",
        "baseline same": "{model} is not shown to differ ({figures})",
        "worse than base": "No checkpoint is better than {baseline}, which training started from.",
        "not stopping": (
            "Only {share} of the answers of {best} ended by themselves: raise --max_new_tokens, or the model has not learned "
            "to stop."
        ),
        "metric": "Over all answers, ROUGE-1 and the judge agree with a rank correlation of {value}{interval}.",
        "p note": "p-values are of approximate randomisation, adjusted for all {num} comparisons between models (Holm).",
    },
    "ko": {
        "overall": "심사 모델의 종합 점수",
        "rouge1": "ROUGE-1",
        "points": "점(10점 만점)",
        "judged": "모든 모델의 답변이 심사되었기 때문입니다",
        "some judged": "순위에 든 모든 모델의 답변이 심사되었기 때문입니다",
        "not judged": "심사된 것이 없기 때문입니다",
        "few judged": "{model}의 답변 중 {coverage}만 심사되어 {needed}에 못 미치기 때문입니다",
        "no answers": "답변이 없기 때문입니다",
        "ranked by": "순위는 {measure} 기준입니다. {reason}.",
        "unranked": "{model}: 보이기는 하지만 순위에는 들지 않습니다. 답변 중 {coverage}만 심사되어 {needed}에 못 미칩니다.",
        "no common": "모든 모델이 점수를 가진 샘플이 없습니다. 모델마다 같은 샘플에 답하게 하십시오.",
        "left out": "모든 모델이 점수를 가진 샘플 {num}개로 비교했습니다. 나머지 {left_out}개는 뺐습니다.",
        "held out": "{best}: 샘플 {chosen}개로 골랐고, 여기의 수치는 선택에 쓰이지 않은 나머지 {num}개의 것입니다.",
        "same samples": (
            "{best}: 수치를 낸 바로 그 샘플 {num}개로 골랐으므로 수치가 실제보다 조금 좋게 나옵니다. `--holdout 0.5`는 절반으로 "
            "고르고 나머지 절반으로 보고합니다."
        ),
        "alone": "답변이 있는 모델이 {best} 하나뿐이라 비교할 것이 없습니다.",
        "better": "{best}이(가) 다음보다 낫습니다: {list}.",
        "better than one": "{other} (차이 {figures})",
        "figures": "{difference}{points} (95 % {low}~{high}, p = {p}, {num}개 중 {wins}개에서 낫고 {losses}개에서 못함)",
        "not shown": "{best}의 평균이 가장 높지만, 이 샘플들로는 다음보다 낫다고 할 수 없습니다: {list}.",
        "not shown held out": "이 샘플들로는 {best}이(가) 다음보다 낫다고 할 수 없습니다: {list}.",
        "all equal": "{best}와(과) {list}: 모든 샘플에서 점수가 같습니다.",
        "detectable": "샘플 {num}개로는 약 {detectable}{points} 아래의 차이를 볼 수 없었습니다 (확률 80 % 기준).",
        "more samples": "구별하려면 더 많은 샘플에 답하게 하십시오.",
        "one sample": "샘플 하나로는 차이에 대해 아무것도 알 수 없습니다. 더 많은 샘플에 답하게 하십시오.",
        "and others": "{list}, 그리고 더 뒤처진 {num}개",
        "baseline": "{baseline}과(와) 견주면: {list}.",
        "baseline many": "{baseline}과(와) 견주면 다른 모델 중 {better}개가 낫고, {worse}개가 못하며, {same}개는 다르다고 할 수 없습니다.",
        "baseline better": "{model}이(가) {figures} 낫습니다",
        "baseline worse": "{model}이(가) {figures} 못합니다",
        "baseline same": "{model}은(는) 다르다고 할 수 없습니다 ({figures})",
        "worse than base": "훈련을 시작한 {baseline}보다 나은 체크포인트가 없습니다.",
        "not stopping": (
            "{best}의 답변 중 {share}만 스스로 끝났습니다. --max_new_tokens를 늘리십시오. 그래도 같다면 모델이 멈추는 법을 배우지 못한 "
            "것입니다."
        ),
        "metric": "모든 답변에서 ROUGE-1과 심사 모델의 순위 상관은 {value}{interval}입니다.",
        "p note": "p값은 근사 무작위화 검정의 것이며, 모델 사이의 비교 {num}개 모두에 대해 보정했습니다 (Holm).",
    },
}


@dataclass
class Verdict:
    """Which model to use, by which measure, and how sure that is.

    Args:
        best: None where no model has an answer.
        comparisons: Of all pairs of the models that are ranked, on the samples that are reported.
        means: Of the models that are ranked, on the same samples.
        intervals: 95 % intervals of these means.
        unranked: Coverage of the models that have too few judgements.
        num_left_out: Samples that not every ranked model has a score of.
        num_chosen_on: Samples that the best was chosen on, if they are not those that are reported.
        agreement: Rank correlation of ROUGE-1 and the judge's overall score, with its 95 % interval.
    """

    best: str | None
    measure: str
    reason: tuple[str, dict]
    baseline: str | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unranked: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_left_out: int = 0
    num_chosen_on: int | None = None
    stop_rate: float = math.nan
    agreement: tuple[float, float, float] = (math.nan, math.nan, math.nan)

    def against(self, model: str) -> list[Comparison]:
        """A model against each other one, in the order of the models."""
        found = {c.other: c for c in self.comparisons if c.better == model}
        found |= {c.better: c.turned() for c in self.comparisons if c.other == model}
        return [found[name] for name in self.means if name in found]

    @property
    def sentences(self) -> list[str]:
        return self.say("en")

    def say(self, language: str) -> list[str]:
        """The verdict in sentences, in English (en) or Korean (ko)."""
        return _Speaker(self, WORDS[language]).sentences()


def choose_measure(samples: pd.DataFrame) -> tuple[str, tuple[str, dict], dict[str, float]]:
    """The measure that models are ranked by, and why; and the coverage of the models that it leaves out.

    The judge's overall score, if nearly all answers of at least two models (or of the only one) have one.
    """
    answered = samples[samples["finish_reason"] != "error"]
    if answered.empty:
        return "rouge1", ("no answers", {}), {}
    coverage = answered.groupby("model", sort=False)["overall"].apply(lambda scores: scores.notna().mean())
    covered = coverage[coverage >= COVERAGE_NEEDED]
    if len(covered) == len(coverage):
        return "overall", ("judged", {}), {}
    if coverage.max() == 0:
        return "rouge1", ("not judged", {}), {}
    if len(covered) >= 2:
        return "overall", ("some judged", {}), coverage.drop(covered.index).to_dict()
    worst = coverage.idxmin()
    figures = {"coverage": f"{coverage[worst]:.0%}", "model": worst, "needed": f"{COVERAGE_NEEDED:.0%}"}
    return "rouge1", ("few judged", figures), {}


def is_held_out(sample_id: str, holdout: float) -> bool:
    """Whether a sample is reported on rather than chosen on: a share of all, the same whatever else there is."""
    return int(hashlib.sha256(sample_id.encode()).hexdigest()[:8], 16) < holdout * 2**32


def decide(samples: pd.DataFrame, baseline: str = "base", holdout: float = 0.0) -> Verdict:
    """Name the best model and say what the samples can and cannot show.

    Args:
        samples: As scores.load_samples gives them.
        baseline: The model that all are compared with, if it is there.
        holdout: Share of the samples that have no part in choosing the best, and are reported on. 0 chooses and
            reports on all of them.
    """
    measure, reason, unranked = choose_measure(samples)
    order = [name for name in samples["model"].unique() if name not in unranked]
    ranked = samples[samples["model"].isin(order)]
    table = ranked.pivot(index="id", columns="model", values=measure)
    table = table[[name for name in order if table[name].notna().any()]]
    num_known = int(table.notna().any(axis=1).sum())
    table = table.dropna()
    verdict = Verdict(None, measure, reason, unranked=unranked, num_left_out=num_known - len(table))
    if table.empty or not len(table.columns):
        return verdict
    reported, chosen_on = table, table
    if holdout > 0:
        held_out = [is_held_out(sample_id, holdout) for sample_id in table.index]
        reported, chosen_on = table[held_out], table[[not held for held in held_out]]
        if reported.empty or chosen_on.empty:
            reported = chosen_on = table  # too few samples to split
        else:
            verdict.num_chosen_on = len(chosen_on)
    verdict.best = str(chosen_on.mean().idxmax())
    verdict.num_samples = len(reported)
    verdict.baseline = baseline if baseline in reported.columns else None
    verdict.means = {str(name): float(mean) for name, mean in reported.mean().items()}
    verdict.intervals = {name: bootstrap_interval(reported[name]) for name in verdict.means}
    verdict.comparisons = compare_all(reported)
    stopped = samples[(samples["model"] == verdict.best) & samples["id"].isin(reported.index)]["stopped"]
    verdict.stop_rate = float(stopped.mean())
    verdict.agreement = correlation_within_samples(
        ranked["id"].tolist(), ranked["rouge1"].tolist(), ranked["overall"].tolist()
    )
    return verdict


class _Speaker:
    """Puts a verdict into the words of one language."""

    def __init__(self, verdict: Verdict, words: dict[str, str]):
        self.verdict, self.words = verdict, words
        self.decimals = DECIMALS[verdict.measure]
        self.points = words["points"] if verdict.measure == "overall" else ""

    def sentences(self) -> list[str]:
        verdict, words = self.verdict, self.words
        key, figures = verdict.reason
        found = [words["ranked by"].format(measure=words[verdict.measure], reason=words[key].format(**figures))]
        needed = f"{COVERAGE_NEEDED:.0%}"
        found += [
            words["unranked"].format(model=name, coverage=f"{coverage:.0%}", needed=needed)
            for name, coverage in verdict.unranked.items()
        ]
        if verdict.best is None:
            return [*found, words["no common"]]
        if verdict.num_left_out:
            num = verdict.num_samples + (verdict.num_chosen_on or 0)
            found.append(words["left out"].format(num=num, left_out=verdict.num_left_out))
        if not verdict.comparisons:
            found.append(words["alone"].format(best=verdict.best))
        else:
            found += self._comparisons()
        if verdict.stop_rate < STOPPING_NEEDED:
            found.append(words["not stopping"].format(best=verdict.best, share=f"{verdict.stop_rate:.0%}"))
        value, low, high = verdict.agreement
        if not math.isnan(value):
            interval = "" if math.isnan(low) else f" (95 % {low:.2f} – {high:.2f})"
            found.append(words["metric"].format(value=f"{value:.2f}", interval=interval))
        return found

    def _comparisons(self) -> list[str]:
        verdict, words, best = self.verdict, self.words, self.verdict.best
        against = verdict.against(best)
        found = []
        clear = [c for c in against if c.is_clear]
        if clear:
            found.append(words["better"].format(best=best, list=self._list(clear)))
        equal = [c for c in against if c.ties == c.num_samples]
        if equal:
            found.append(words["all equal"].format(best=best, list=", ".join(c.other for c in equal)))
        close = [c for c in against if not c.is_clear and c not in equal]
        if close and verdict.num_samples < 2:
            found.append(words["one sample"])
        elif close:
            key = "not shown" if verdict.means[best] == max(verdict.means.values()) else "not shown held out"
            found.append(words[key].format(best=best, list=self._list(close)))
            detectable = max(c.detectable for c in close)
            found.append(
                words["detectable"].format(
                    num=verdict.num_samples, detectable=self._number(detectable), points=self.points
                )
            )
            found.append(words["more samples"])
        if best == verdict.baseline:
            found.append(words["worse than base"].format(baseline=best))
        elif verdict.baseline is not None:
            others = [c for c in verdict.against(verdict.baseline) if c.other != best]
            if len(others) > MOST_NAMED:
                counts = {
                    "same": sum(c.p >= 0.05 for c in others),
                    "better": sum(c.p < 0.05 and c.difference < 0 for c in others),
                    "worse": sum(c.p < 0.05 and c.difference > 0 for c in others),
                }
                found.append(words["baseline many"].format(baseline=verdict.baseline, **counts))
            elif others:
                texts = [self._against_baseline(c.turned()) for c in others]
                found.append(words["baseline"].format(baseline=verdict.baseline, list="; ".join(texts)))
        found.append(words["p note"].format(num=len(verdict.comparisons)))
        if verdict.num_chosen_on is not None:
            found.append(words["held out"].format(best=best, chosen=verdict.num_chosen_on, num=verdict.num_samples))
        else:
            found.append(words["same samples"].format(best=best, num=verdict.num_samples))
        return found

    def _list(self, comparisons: list[Comparison]) -> str:
        shown = comparisons
        if len(comparisons) > MOST_NAMED:
            shown = sorted(comparisons, key=lambda c: c.difference)[: MOST_NAMED - 1]
        text = ", ".join(self.words["better than one"].format(other=c.other, figures=self._figures(c)) for c in shown)
        if len(shown) < len(comparisons):
            text = self.words["and others"].format(list=text, num=len(comparisons) - len(shown))
        return text

    def _against_baseline(self, c: Comparison) -> str:
        if c.p >= 0.05:
            return self.words["baseline same"].format(model=c.better, figures=self._figures(c))
        if c.difference > 0:
            return self.words["baseline better"].format(model=c.better, figures=self._figures(c))
        return self.words["baseline worse"].format(model=c.better, figures=self._figures(c))

    def _figures(self, c: Comparison) -> str:
        return self.words["figures"].format(
            difference=self._number(c.difference), points=self.points, low=self._number(c.low), high=self._number(c.high),
            p="< 0.001" if c.p < 0.001 else f"{c.p:.3f}", wins=c.wins, losses=c.losses, num=c.num_samples,
        ).replace("= <", "<")  # fmt: skip

    def _number(self, value: float) -> str:
        return f"{value:.{self.decimals}f}"
