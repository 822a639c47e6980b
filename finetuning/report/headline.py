"""
The verdict in two lines: which model to use, and why. Imports without torch.

The rule (docs/scoring.md has its reasons): a baseline stays unless another model is shown to be better than it. Among the
models that are shown to be (among all, without a baseline), the one with the highest mean is used, or one of the same run
with less training that is within a standard error of it (Breiman et al. 1984). Where the scores cannot tell it from a model
that the judge prefers side by side, that one is. With a hold-out the choice was made before, so it only stands or falls.
"""

import math
from dataclasses import dataclass, field

import pandas as pd

from finetuning.report.comparison import Comparison
from finetuning.report.opinions import PairResult
from finetuning.report.verdict import DECIMALS, MOST_NAMED, STOPPING_NEEDED, Verdict, say_samples
from finetuning.report.verdict import WORDS as VERDICT_WORDS
from finetuning.runs import checkpoint_step
from finetuning.wording import say_number, say_p, say_share

WORDS = {
    "en": {
        "none": "No model can be named",
        "alone": "Use {use}: the only model with answers",
        "alone ranked": "Use {use}: the only model that is ranked",
        "clear": "Use {use}: better than every other model",
        "clear ranked": "Use {use}: better than every other model that is ranked",
        "clear one": "Use {use}: better than {other}",
        "highest": "Use {use}: the highest mean, though these samples cannot tell it from {close}",
        "highest shared": "Use {use}: no mean is higher, and these samples cannot tell it from {close}",
        "highest shown": "Use {use}: the highest mean of the models that are shown to be better than {baseline}",
        "chosen": "Use {use}: chosen on {chosen}; the other {samples} do not show that it is the best",
        "less training": "Use {use}: it had less training than {top}, and these samples cannot tell them apart",
        "side by side": "Use {use}: the scores cannot tell it from {top}, and side by side it is preferred",
        "keep": "Keep {use}: no {kind} is shown to be better",
        "keep one": "Keep {use}: {other} is not shown to be better",
        "keep all worse": "Keep {use}: every {kind} is worse",
        "keep all worse one": "Keep {use}: {other} is worse",
        "keep held out": "Keep {use}: {best}, chosen on {chosen}, is not shown to be better on the other {samples}",
        "keep held out worse": "Keep {use}: {best}, chosen on {chosen}, is worse on the other {samples}",
        "use held out": "Use {use}: {best}, chosen on {chosen}, is worse than it on the other {samples}",
        "checkpoint": "checkpoint",
        "model": "other model",
        "model ranked": "other model that is ranked",
        "and more": "{list} and {num} more",
        "mean": "{measure}{why}: {use} has a mean of {mean}{points}{interval} on {samples}",
        "interval": " (95 % {low} to {high})",
        "not judged": ", as nothing was judged",
        "few judged": ", as too few answers have a judgement",
        "more": "that is {difference} more than {other} ({figures}).",
        "less": "that is {difference} less than {other} ({figures}).",
        "same": "{other} has the same.",
        "figures": "95 % {low} to {high}; {chance}, p {p}",
        "certain": "hardly chance",
        "unlikely": "unlikely to be chance",
        "maybe": "may well be chance",
        "one sample": "one sample shows nothing",
    },
    "ko": {
        "none": "고를 수 있는 모델이 없습니다",
        "alone": "{use} 사용: 답변이 있는 유일한 모델입니다",
        "alone ranked": "{use} 사용: 순위에 든 유일한 모델입니다",
        "clear": "{use} 사용: 다른 모든 모델보다 낫습니다",
        "clear ranked": "{use} 사용: 순위에 든 다른 모든 모델보다 낫습니다",
        "clear one": "{use} 사용: {other}보다 낫습니다",
        "highest": "{use} 사용: 평균이 가장 높지만, 이 샘플들로는 {close}와(과) 구별되지 않습니다",
        "highest shared": "{use} 사용: 평균이 더 높은 모델이 없고, 이 샘플들로는 {close}와(과) 구별되지 않습니다",
        "highest shown": "{use} 사용: {baseline}보다 낫다고 할 수 있는 모델 중 평균이 가장 높습니다",
        "chosen": "{use} 사용: {chosen}로 골랐고, 나머지 {samples}로는 가장 낫다고 할 수 없습니다",
        "less training": "{use} 사용: {top}보다 적게 훈련되었고, 이 샘플들로는 둘이 구별되지 않습니다",
        "side by side": "{use} 사용: 점수로는 {top}와(과) 구별되지 않지만, 나란히 견주면 선호됩니다",
        "keep": "{use} 유지: {kind} 중 더 낫다고 할 수 있는 것이 없습니다",
        "keep one": "{use} 유지: {other}이(가) 더 낫다고 할 수 없습니다",
        "keep all worse": "{use} 유지: 모든 {kind}이(가) 더 못합니다",
        "keep all worse one": "{use} 유지: {other}이(가) 더 못합니다",
        "keep held out": "{use} 유지: {chosen}로 고른 {best}이(가) 나머지 {samples}에서 더 낫다고 할 수 없습니다",
        "keep held out worse": "{use} 유지: {chosen}로 고른 {best}이(가) 나머지 {samples}에서 더 못합니다",
        "use held out": "{use} 사용: {chosen}로 고른 {best}이(가) 나머지 {samples}에서 이보다 못합니다",
        "checkpoint": "체크포인트",
        "model": "다른 모델",
        "model ranked": "순위에 든 다른 모델",
        "and more": "{list} 외 {num}개",
        "mean": "{measure}{why}: {samples}에서 {use}의 평균은 {mean}{points}{interval}입니다",
        "interval": " (95 % {low}~{high})",
        "not judged": " (심사된 것이 없음)",
        "few judged": " (심사된 답변이 너무 적음)",
        "more": "{other}보다 {difference} 높습니다 ({figures}).",
        "less": "{other}보다 {difference} 낮습니다 ({figures}).",
        "same": "{other}도 같습니다.",
        "figures": "95 % {low}~{high}, {chance}, p {p}",
        "certain": "우연이라고 보기 어려움",
        "unlikely": "우연일 가능성이 낮음",
        "maybe": "우연일 수 있음",
        "one sample": "샘플 하나로는 알 수 없음",
    },
}


@dataclass
class Headline:
    """Which model to use, and what a reader must know with it.

    Args:
        use: None where nothing is ranked.
        key: Of the sentence that says why.
        top: The model that would be used if its mean alone counted.
        stop_rate: Share of the answers of `use` that ended by themselves.
        decided_by: The comparison side by side that decided for `use`.
        against: Those in which another model is preferred to `use`.
    """

    verdict: Verdict
    use: str | None
    key: str
    top: str | None = None
    stop_rate: float = 1.0
    decided_by: PairResult | None = None
    against: list[PairResult] = field(default_factory=list)

    def say(self, language: str) -> list[str]:
        """The headline, its reason, and warnings if there are any, in English (en) or Korean (ko)."""
        words = WORDS[language]
        if self.use is None:
            return [words["none"], self.verdict.say(language)[-1]]
        warnings = [pair.say(language, self.verdict) for pair in self.against]
        if self.stop_rate < STOPPING_NEEDED:
            not_stopping = VERDICT_WORDS[language]["not stopping"]
            share = say_share(self.stop_rate, STOPPING_NEEDED)
            warnings.append(not_stopping.format(best=self.use, share=share))
        reason = self._reason(words, VERDICT_WORDS[language])
        if self.decided_by is not None:
            reason += " " + self.decided_by.say(language, self.verdict)
        return [self._headline(words, VERDICT_WORDS[language]), reason, *warnings]

    def _headline(self, words: dict[str, str], verdict_words: dict[str, str]) -> str:
        verdict = self.verdict
        others = [c.other for c in verdict.against(self.use)]
        close = [c.other for c in verdict.against(self.use) if not c.is_shown]
        if len(close) > MOST_NAMED:
            shown = ", ".join(close[: MOST_NAMED - 1])
            close = [words["and more"].format(list=shown, num=len(close) - MOST_NAMED + 1)]
        are_checkpoints = training_step(self.use) == 0 and all(training_step(name) > 0 for name in others)
        kind = "model ranked" if verdict.unranked else "checkpoint" if are_checkpoints else "model"
        ending = " one" if len(others) == 1 else " ranked" if verdict.unranked else ""
        key = self.key + ending if self.key + ending in words else self.key
        return words[key].format(
            use=self.use, top=self.top, close=", ".join(close), best=verdict.best, kind=words[kind], other=", ".join(others),
            chosen=say_samples(verdict.num_chosen_on or 0, verdict_words), baseline=verdict.baseline,
            samples=say_samples(verdict.num_samples, verdict_words),
        )  # fmt: skip

    def _reason(self, words: dict[str, str], verdict_words: dict[str, str]) -> str:
        verdict = self.verdict
        points = verdict_words["points"] if verdict.measure == "overall" else ""

        def number(value: float) -> str:
            return say_number(value, DECIMALS[verdict.measure])

        def interval(low: float, high: float) -> str:
            return words["interval"].format(low=number(low), high=number(high)) if low == low else ""

        measure = verdict_words[verdict.measure]
        why = ""
        if verdict.measure != "overall":
            why = words["not judged" if verdict.reason[0] == "not judged" else "few judged"]
        reason = words["mean"].format(
            measure=measure.replace("the judge", "The judge"), why=why, use=self.use, mean=number(verdict.means[self.use]),
            points=points, interval=interval(*verdict.intervals[self.use]),
            samples=say_samples(verdict.num_samples, verdict_words),
        )  # fmt: skip
        if len(verdict.means) == 1:
            return reason + "."
        compared = self._compared_with()
        c = next(c for c in verdict.against(self.use) if c.other == compared)
        if math.isclose(c.difference, 0, abs_tol=1e-9):
            return f"{reason}; {words['same'].format(other=compared)}"
        key = "more" if c.difference > 0 else "less"
        c = c if c.difference > 0 else c.turned()
        chance = "certain" if c.p < 0.001 else "unlikely" if c.is_shown else "maybe"
        figures = words["figures"].format(low=number(c.low), high=number(c.high), chance=words[chance], p=say_p(c.p))
        if verdict.num_samples < 2:
            figures = words["one sample"]
        return f"{reason}; " + words[key].format(
            difference=number(abs(c.difference)) + points, other=compared, figures=figures
        )

    def _compared_with(self) -> str:
        """The baseline; of the baseline itself, and where there is none, what comes closest to it."""
        verdict = self.verdict
        if verdict.baseline not in (None, self.use):
            return verdict.baseline
        if verdict.num_chosen_on is not None and verdict.best != self.use:
            return verdict.best
        return max((name for name in verdict.means if name != self.use), key=verdict.means.get)


def training_step(name: str) -> int:
    """Training step of a model, whose name may have the run's in front."""
    return checkpoint_step(name.rpartition("/")[2])


def build_headline(verdict: Verdict, summary: pd.DataFrame, pairs: list[PairResult]) -> Headline:
    """Name the model to use.

    Args:
        summary: As tables.summarize gives it.
        pairs: What judges.load_opinions found of comparisons side by side.
    """
    if verdict.best is None:
        return Headline(verdict, None, "none")
    clear, decided_by = [pair for pair in pairs if pair.is_clear], None
    if verdict.num_chosen_on is not None:
        use, key, top = _confirm(verdict)
    else:
        use, key, top = _choose(verdict)
        close = [c.other for c in verdict.against(use) if not c.is_shown]
        decided_by = next((pair for pair in clear if pair.loser == use and pair.winner in close), None)
        if decided_by is not None:
            use, key, top = decided_by.winner, "side by side", use
    against = [pair for pair in clear if pair.loser == use]
    return Headline(verdict, use, key, top, float(summary.loc[use, "stopped"]), decided_by, against)


def _choose(verdict: Verdict) -> tuple[str, str, str | None]:
    """The model to use where all samples had a part in choosing: its name, why, and the highest mean."""
    means, baseline = verdict.means, verdict.baseline
    if len(means) == 1:
        return verdict.best, "alone", None
    candidates = list(means)
    if baseline is not None:
        against = verdict.against(baseline)
        candidates = [c.other for c in against if c.turned().is_clear]
        if not candidates:
            all_worse = all(c.is_clear for c in against)
            return baseline, "keep all worse" if all_worse else "keep", None
    top = max(reversed(candidates), key=means.get)  # the last one of those with the same mean
    against = verdict.against(top)
    close = [c.other for c in against if c.other in candidates and _is_within_standard_error(c)]
    use = min([top, *(name for name in close if _had_less_training(name, top))], key=training_step)
    if use != top:
        return use, "less training", top
    if all(c.is_clear for c in against):
        return top, "clear", top
    if any(means[name] > means[top] for name in means if name not in candidates):
        return top, "highest shown", top
    is_shared = any(math.isclose(c.difference, 0, abs_tol=1e-9) for c in against)
    return top, "highest shared" if is_shared else "highest", top


def _is_within_standard_error(c: Comparison) -> bool:
    """Whether the difference is no more than one standard error, which is a quarter of the width of its interval."""
    return not c.is_shown and abs(c.difference) <= (c.high - c.low) / 4


def _had_less_training(name: str, other: str) -> bool:
    """Whether a model is an earlier checkpoint of the same run."""
    return name.rpartition("/")[0] == other.rpartition("/")[0] and 0 <= training_step(name) < training_step(other)


def _confirm(verdict: Verdict) -> tuple[str, str, str | None]:
    """The model to use where it was chosen on other samples than those that are reported."""
    best, baseline, means = verdict.best, verdict.baseline, verdict.means
    against = verdict.against(best)
    better = [c.other for c in against if c.turned().is_clear]
    if baseline is not None and baseline != best:
        c = next(c for c in against if c.other == baseline)
        better = [name for name in better if name == baseline or _beats(verdict, name, baseline)]
        if not c.is_clear and not [name for name in better if name != baseline]:
            return baseline, "keep held out worse" if baseline in better else "keep held out", None
    if better:
        return max(better, key=means.get), "use held out", None
    if len(means) == 1:
        return best, "alone", None
    if best == baseline:
        return best, "keep all worse" if all(c.is_clear for c in against) else "keep", None
    return best, "clear" if all(c.is_clear for c in against) else "chosen", best


def _beats(verdict: Verdict, first: str, second: str) -> bool:
    return next(c for c in verdict.against(first) if c.other == second).is_clear
