"""
Which model to use, how sure that is, and what the samples cannot show, in words. Imports without torch.
"""

import hashlib
import math
from dataclasses import dataclass, field

import pandas as pd

from finetuning.agreement import Estimate, correlation_within_models
from finetuning.report.comparison import Comparison, compare_all, fewest_samples
from finetuning.resampling import bootstrap_interval
from finetuning.wording import say_number, say_p, say_share

COVERAGE_NEEDED = 0.95  # of its answers a model must have a score of, to be ranked
SAMPLES_NEEDED = 0.8  # of the samples that are compared a model must have a score of, to be ranked
STOPPING_NEEDED = 0.95
MOST_NAMED = 4  # models in one sentence; the table has all
DECIMALS = {"overall": 2, "rouge1": 3, "chrf": 3}
WORDS = {
    "en": {
        "overall": "the judge's overall score",
        "rouge1": "ROUGE-1",
        "chrf": "chrF",
        "points": " points of 10",
        "sample": "{num} sample",
        "samples": "{num} samples",
        "judged": "the judge has scored at least {needed} of the answers of every model",
        "some judged": "the judge has scored at least {needed} of the answers of all models that are ranked",
        "not judged": "nothing was judged",
        "few judged": "only {coverage} of the answers of {model} have a judgement, under {needed}",
        "none judged": "no judgement gave a score",
        "ranked by": "Ranked by {measure}, since {reason}.",
        "chrf instead": "ROUGE is undefined, as no reference has a word in it; chrF, which reads characters, stands in for it.",
        "no answers": "No model has an answer, so nothing can be ranked.",
        "no references": (
            "ROUGE and chrF are undefined, as no reference has a text, so nothing can be ranked; let step 4 judge the answers, "
            "or test on samples with references."
        ),
        "undefined": "Left out as they have no {measure}, since no reference of theirs has a word in it: {samples}.",
        "unranked": "{model} is shown but not ranked: only {coverage} of its answers have a judgement, under {needed}.",
        "lacking": "{model} is shown but not ranked: it has a score of only {share} of the samples that are compared, under {needed}.",
        "no common": "There is no sample that every model has a score of; answer the same samples with each of them.",
        "left out": "Compared on the {samples} that every ranked model has a score of; left out: {left_out}.",
        "held out": ("{best} was chosen on {chosen}; the figures here are of {samples} that had no part in it."),
        "same samples": (
            "{best} was chosen on the same {samples} that its figures are from, which makes them a little too good; "
            "`--holdout 0.5` chooses on one half and reports the other."
        ),
        "no holdout": "No samples were held out, as {samples} cannot be split so; {best} was chosen on those that its figures are from.",
        "alone": "{best} is the only model that is ranked, so there is nothing to compare it with.",
        "better": "{best} is better than {list}.",
        "better than one": "{other} by {figures}",
        "worse": "{best} is worse than {list}.",
        "close one": "{other} (difference {difference}{points}; {details})",
        "equal one": "{other}",
        "figures": "{difference}{points} ({details})",
        "interval": "95 % {low} to {high}; ",
        "details": "{interval}{p}; better in {wins}, worse in {losses} of {num}",
        "same mean": "{best} has the same mean as {list}.",
        "not shown": "{best} has a higher mean, but these samples do not show that it is better than {list}.",
        "not shown held out": "These samples do not show that {best} differs from {list}.",
        "all equal": "{best} and {list} have the same score on every sample.",
        "detectable": "With {samples}, nothing under about {detectable}{points} could be seen (with a probability of 80 %).",
        "more samples": "Answer more samples to tell them apart.",
        "too few": "So few samples ({num}) cannot show a difference, however large: at least {needed} are needed for {models} models.",
        "and others": "{list} and {num} others",
        "baseline": "Against {baseline}: {list}.",
        "baseline many": "Against {baseline}, of the {num} other models: {better} better, {worse} worse, {same} not shown to differ.",
        "baseline better": "{model} is better by {figures}",
        "baseline worse": "{model} is worse (difference {difference}{points}; {details})",
        "baseline same": "{model} is not shown to differ (difference {difference}{points}; {details})",
        "best is base": "No other model has a higher mean than {baseline}.",
        "not stopping": (
            "Only {share} of the answers of {best} ended by themselves: raise --max_new_tokens, or the model has not learned "
            "to stop."
        ),
        "metric": (
            "Within each model, ROUGE-1 and the judge agree with a rank correlation of {value} ({interval}{num} answers)."
        ),
        "p note": "p-values are of approximate randomisation, adjusted for all {num} comparisons between models (Holm).",
        "p note one": "The p-value is of approximate randomisation.",
    },
    "ko": {
        "overall": "심사 모델의 종합 점수",
        "rouge1": "ROUGE-1",
        "chrf": "chrF",
        "points": "점(10점 만점)",
        "sample": "샘플 {num}개",
        "samples": "샘플 {num}개",
        "judged": "모든 모델의 답변이 {needed} 이상 심사되었기 때문입니다",
        "some judged": "순위에 든 모든 모델의 답변이 {needed} 이상 심사되었기 때문입니다",
        "not judged": "심사된 것이 없기 때문입니다",
        "few judged": "{model}의 답변 중 {coverage}만 심사되어 {needed}에 못 미치기 때문입니다",
        "none judged": "점수가 나온 심사가 없기 때문입니다",
        "ranked by": "순위는 {measure} 기준입니다. {reason}.",
        "chrf instead": "정답에 단어가 하나도 없어 ROUGE를 정의할 수 없습니다. 글자를 읽는 chrF로 대신합니다.",
        "no answers": "답변이 있는 모델이 없어 순위를 매길 수 없습니다.",
        "no references": (
            "글이 있는 정답이 없어 ROUGE와 chrF를 정의할 수 없으므로 순위를 매길 수 없습니다. 4단계로 답변을 심사하거나, 정답이 있는 샘플로 "
            "시험하십시오."
        ),
        "undefined": "{samples}는 정답에 단어가 없어 {measure} 점수가 없으므로 뺐습니다.",
        "unranked": "{model}: 보이기는 하지만 순위에는 들지 않습니다. 답변 중 {coverage}만 심사되어 {needed}에 못 미칩니다.",
        "lacking": "{model}: 보이기는 하지만 순위에는 들지 않습니다. 비교한 샘플 중 {share}에만 점수가 있어 {needed}에 못 미칩니다.",
        "no common": "모든 모델이 점수를 가진 샘플이 없습니다. 모델마다 같은 샘플에 답하게 하십시오.",
        "left out": "순위에 든 모든 모델이 점수를 가진 {samples}로 비교했습니다. 뺀 것: {left_out}.",
        "held out": "{best}: {chosen}로 골랐고, 여기의 수치는 선택에 쓰이지 않은 {samples}의 것입니다.",
        "same samples": (
            "{best}: 수치를 낸 바로 그 {samples}로 골랐으므로 수치가 실제보다 조금 좋게 나옵니다. `--holdout 0.5`는 절반으로 "
            "고르고 나머지 절반으로 보고합니다."
        ),
        "no holdout": "{samples}는 나눌 수 없어 따로 남기지 않았습니다. {best}은(는) 수치를 낸 바로 그 샘플로 골랐습니다.",
        "alone": "순위에 든 모델이 {best} 하나뿐이라 비교할 것이 없습니다.",
        "better": "{best}이(가) 다음보다 낫습니다: {list}.",
        "better than one": "{other} (차이 {figures})",
        "worse": "{best}이(가) 다음보다 못합니다: {list}.",
        "close one": "{other} (차이 {difference}{points}, {details})",
        "equal one": "{other}",
        "figures": "{difference}{points} ({details})",
        "interval": "95 % {low}~{high}, ",
        "details": "{interval}{p}, {num}개 중 {wins}개에서 낫고 {losses}개에서 못함",
        "same mean": "{best}와(과) 평균이 같습니다: {list}.",
        "not shown": "{best}의 평균이 더 높지만, 이 샘플들로는 다음보다 낫다고 할 수 없습니다: {list}.",
        "not shown held out": "이 샘플들로는 {best}이(가) 다음과 다르다고 할 수 없습니다: {list}.",
        "all equal": "{best}와(과) {list}: 모든 샘플에서 점수가 같습니다.",
        "detectable": "{samples}로는 약 {detectable}{points} 아래의 차이를 볼 수 없었습니다 (확률 80 % 기준).",
        "more samples": "구별하려면 더 많은 샘플에 답하게 하십시오.",
        "too few": "샘플이 {num}개뿐이면 아무리 큰 차이도 보일 수 없습니다. 모델 {models}개에는 적어도 {needed}개가 필요합니다.",
        "and others": "{list} 외 {num}개",
        "baseline": "{baseline}과(와) 견주면: {list}.",
        "baseline many": "{baseline}과(와) 견주면 다른 모델 {num}개 중 {better}개가 낫고, {worse}개가 못하며, {same}개는 다르다고 할 수 없습니다.",
        "baseline better": "{model}이(가) {figures} 낫습니다",
        "baseline worse": "{model}이(가) 못합니다 (차이 {difference}{points}, {details})",
        "baseline same": "{model}은(는) 다르다고 할 수 없습니다 (차이 {difference}{points}, {details})",
        "best is base": "{baseline}보다 평균이 높은 다른 모델이 없습니다.",
        "not stopping": (
            "{best}의 답변 중 {share}만 스스로 끝났습니다. --max_new_tokens를 늘리십시오. 그래도 같다면 모델이 멈추는 법을 배우지 못한 "
            "것입니다."
        ),
        "metric": "각 모델 안에서 ROUGE-1과 심사 모델의 순위 상관은 {value}입니다 ({interval}답변 {num}개).",
        "p note": "p값은 근사 무작위화 검정의 것이며, 모델 사이의 비교 {num}개 모두에 대해 보정했습니다 (Holm).",
        "p note one": "p값은 근사 무작위화 검정의 것입니다.",
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
        unranked: The models that are shown and not ranked: the share of their answers that have a judgement, or of the
            samples that are compared that have a score.
        lacking: Those of them that lack samples, and not judgements.
        num_left_out: Samples that not every ranked model has a score of.
        num_undefined: Samples that were answered, of which the measure is undefined for every model.
        num_chosen_on: Samples that the best was chosen on, if they are not those that are reported.
        holdout: The share that was asked for; 0 if there is none.
        agreement: Rank correlation of ROUGE-1 and the judge's overall score within models, with its 95 % interval.
    """

    best: str | None
    measure: str
    reason: tuple[str, dict]
    baseline: str | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unranked: dict[str, float] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)
    num_samples: int = 0
    num_left_out: int = 0
    num_undefined: int = 0
    num_chosen_on: int | None = None
    holdout: float = 0.0
    stop_rate: float = math.nan
    agreement: Estimate = field(default_factory=lambda: Estimate(math.nan, math.nan, math.nan, 0))

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

    The judge's overall score, if nearly all answers of at least two models (or of the only one) have one. Else ROUGE-1,
    or chrF where no reference has the words that ROUGE counts.
    """
    answered = samples[samples["finish_reason"] != "error"]
    coverage = answered.groupby("model", sort=False)["overall"].apply(lambda scores: scores.notna().mean())
    covered = coverage[coverage >= COVERAGE_NEEDED]
    if len(covered) and len(covered) == len(coverage):
        return "overall", ("judged", {}), {}
    if len(covered) >= 2:
        return "overall", ("some judged", {}), coverage.drop(covered.index).to_dict()
    measure = "chrf" if answered["rouge1"].isna().all() and answered["chrf"].notna().any() else "rouge1"
    if answered["overall"].isna().all():
        return measure, ("not judged" if answered["status"].isna().all() else "none judged", {}), {}
    worst = coverage.idxmin()
    figures = {"coverage": say_share(coverage[worst], COVERAGE_NEEDED), "model": worst}
    return measure, ("few judged", figures), {}


def find_lacking(scores: pd.DataFrame) -> dict[str, float]:
    """The models that would shrink the comparison of the others too much: their share of the samples that are compared.

    That many samples are compared for which the number of models that have so many, without the one that they are
    compared with, times the samples is the largest: of three models with 50 samples and one with 2 it is 50, of two with
    20 and two with 10 it is 10.

    Args:
        scores: One row a sample, one column a model; NaN where there is no score.
    """
    counts = scores.notna().sum()
    candidates = sorted(counts[counts > 0])
    compared = max(candidates, key=lambda number: ((counts >= number).sum() - 1) * number, default=0)
    return {name: float(count / compared) for name, count in counts.items() if count < SAMPLES_NEEDED * compared}


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
    tables = {name: samples.pivot(index="id", columns="model", values=name) for name in ("overall", "rouge1", "chrf")}
    table = tables[measure][[name for name in samples["model"].unique() if name not in unranked]]
    lacking = find_lacking(table)
    known = table.drop(columns=list(lacking)).dropna(how="all")
    table = known.dropna()
    verdict = Verdict(
        None, measure, reason, unranked={**unranked, **lacking}, lacking=set(lacking), holdout=holdout,
        num_left_out=len(known) - len(table),
    )  # fmt: skip
    if measure != "overall":
        answered = samples[samples["finish_reason"] != "error"]
        verdict.num_undefined = answered["id"].nunique() - answered[answered[measure].notna()]["id"].nunique()
    if table.empty:
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
    verdict.agreement = correlation_within_models(
        *(tables[name][list(verdict.means)] for name in ("rouge1", "overall"))
    )
    return verdict


def say_samples(num: int, words: dict[str, str]) -> str:
    return words["sample" if num == 1 else "samples"].format(num=num)


class _Speaker:
    """Puts a verdict into the words of one language."""

    def __init__(self, verdict: Verdict, words: dict[str, str]):
        self.verdict, self.words = verdict, words
        self.decimals = DECIMALS[verdict.measure]
        self.points = words["points"] if verdict.measure == "overall" else ""

    def sentences(self) -> list[str]:
        verdict, words = self.verdict, self.words
        if verdict.best is None:
            return [*self._unranked(), words[self._why_none()]]
        key, figures = verdict.reason
        reason = words[key].format(**figures, needed=f"{COVERAGE_NEEDED:.0%}")
        found = [words["ranked by"].format(measure=words[verdict.measure], reason=reason)]
        if verdict.measure == "chrf":
            found.append(words["chrf instead"])
        found += self._unranked()
        if verdict.num_undefined:
            samples = self._samples(verdict.num_undefined)
            found.append(words["undefined"].format(samples=samples, measure=words[verdict.measure]))
        if verdict.num_left_out:
            samples = self._samples(verdict.num_samples + (verdict.num_chosen_on or 0))
            found.append(words["left out"].format(samples=samples, left_out=self._samples(verdict.num_left_out)))
        if not verdict.comparisons:
            found.append(words["alone"].format(best=verdict.best))
        else:
            found += self._comparisons()
        if verdict.stop_rate < STOPPING_NEEDED:
            found.append(
                words["not stopping"].format(best=verdict.best, share=say_share(verdict.stop_rate, STOPPING_NEEDED))
            )
        agreement = verdict.agreement
        if not math.isnan(agreement.value):
            value, low, high = (say_number(number, 2) for number in (agreement.value, agreement.low, agreement.high))
            interval = "" if math.isnan(agreement.low) else words["interval"].format(low=low, high=high)
            found.append(words["metric"].format(value=value, interval=interval, num=agreement.num_samples))
        return found

    def _unranked(self) -> list[str]:
        verdict, found = self.verdict, []
        for name, share in verdict.unranked.items():
            if name in verdict.lacking:
                key, needed = "lacking", SAMPLES_NEEDED
            else:
                key, needed = "unranked", COVERAGE_NEEDED
            share = say_share(share, needed)
            found.append(self.words[key].format(model=name, share=share, coverage=share, needed=f"{needed:.0%}"))
        return found

    def _why_none(self) -> str:
        if self.verdict.num_left_out:
            return "no common"
        return "no references" if self.verdict.num_undefined else "no answers"

    def _samples(self, num: int) -> str:
        return say_samples(num, self.words)

    def _comparisons(self) -> list[str]:
        verdict, words, best = self.verdict, self.words, self.verdict.best
        against = verdict.against(best)
        found = []
        clear = [c for c in against if c.is_clear]
        if clear:
            found.append(words["better"].format(best=best, list=self._list(clear, "better than one")))
        worse = [c for c in against if c.turned().is_clear]  # as only held-out samples can show
        if worse:
            found.append(words["worse"].format(best=best, list=self._list(worse, "close one")))
        equal = [c for c in against if c.ties == c.num_samples]
        if equal:
            found.append(words["all equal"].format(best=best, list=self._list(equal, "equal one")))
        close = [c for c in against if c not in (*clear, *worse, *equal)]
        same = [c for c in close if math.isclose(c.difference, 0, abs_tol=1e-9)]
        if same:
            found.append(words["same mean"].format(best=best, list=self._list(same, "close one")))
        if len(close) > len(same):
            key = "not shown" if verdict.means[best] == max(verdict.means.values()) else "not shown held out"
            others = [c for c in close if c not in same]
            found.append(words[key].format(best=best, list=self._list(others, "close one")))
        if close:
            found += self._power(close)
        if best == verdict.baseline:
            if verdict.means[best] == max(verdict.means.values()):
                found.append(words["best is base"].format(baseline=best))
        elif verdict.baseline is not None:
            others = [c for c in verdict.against(verdict.baseline) if c.other != best]
            if len(others) > MOST_NAMED:
                counts = {
                    "same": sum(not c.is_shown for c in others),
                    "better": sum(c.turned().is_clear for c in others),
                    "worse": sum(c.is_clear for c in others),
                }
                found.append(words["baseline many"].format(baseline=verdict.baseline, num=len(others), **counts))
            elif others:
                texts = [self._against_baseline(c.turned()) for c in others]
                found.append(words["baseline"].format(baseline=verdict.baseline, list="; ".join(texts)))
        found.append(
            words["p note" if len(verdict.comparisons) > 1 else "p note one"].format(num=len(verdict.comparisons))
        )
        samples = self._samples(verdict.num_samples)
        if verdict.num_chosen_on is not None:
            chosen = self._samples(verdict.num_chosen_on)
            found.append(words["held out"].format(best=best, chosen=chosen, samples=samples))
        else:
            key = "no holdout" if verdict.holdout else "same samples"
            found.append(words[key].format(best=best, samples=samples))
        return found

    def _power(self, close: list[Comparison]) -> list[str]:
        """What so many samples can show at all."""
        verdict, words = self.verdict, self.words
        needed = fewest_samples(len(verdict.comparisons))
        if verdict.num_samples < needed:
            text = words["too few"].format(num=verdict.num_samples, needed=needed, models=len(verdict.means))
            return [text]
        detectable = self._number(max(c.detectable for c in close))
        return [
            words["detectable"].format(
                samples=self._samples(verdict.num_samples), detectable=detectable, points=self.points
            ),
            words["more samples"],
        ]

    def _list(self, comparisons: list[Comparison], key: str) -> str:
        shown = comparisons
        if len(comparisons) > MOST_NAMED:
            shown = sorted(comparisons, key=lambda c: c.difference)[: MOST_NAMED - 1]
        text = ", ".join(self._one(c, key) for c in shown)
        if len(shown) < len(comparisons):
            text = self.words["and others"].format(list=text, num=len(comparisons) - len(shown))
        return text

    def _one(self, c: Comparison, key: str) -> str:
        return self.words[key].format(
            model=c.better, other=c.other, figures=self._figures(c), difference=self._number(c.difference), points=self.points,
            details=self._details(c),
        )  # fmt: skip

    def _against_baseline(self, c: Comparison) -> str:
        key = "baseline same" if not c.is_shown else "baseline better" if c.difference > 0 else "baseline worse"
        return self._one(c, key)

    def _figures(self, c: Comparison) -> str:
        return self.words["figures"].format(
            difference=self._number(c.difference), points=self.points, details=self._details(c)
        )

    def _details(self, c: Comparison) -> str:
        interval = self.words["interval"].format(low=self._number(c.low), high=self._number(c.high))
        return self.words["details"].format(
            interval="" if math.isnan(c.low) else interval,
            p=f"p {say_p(c.p)}",
            wins=c.wins,
            losses=c.losses,
            num=c.num_samples,
        )

    def _number(self, value: float) -> str:
        return say_number(value, self.decimals)
