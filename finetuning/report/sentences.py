"""
What step 5 says of a verdict: which model to use, in two lines, and all that the samples show or cannot show.

Imports without torch.
"""

import math
from collections.abc import Iterator

from finetuning.measures import describe_measure
from finetuning.report.comparison import Comparison, fewest_samples
from finetuning.report.headline import Headline, training_step
from finetuning.report.opinion_sentences import say_pair
from finetuning.report.verdict import COVERAGE_NEEDED, SAMPLES_NEEDED, STOPPING_NEEDED, Verdict
from finetuning.report.words import Words
from finetuning.wording import MIN_KEPT, say_number, say_p, say_share

MAX_NAMED = 4  # models in one sentence; the table has all


def say_verdict(verdict: Verdict, language: str = "en") -> list[str]:
    """The verdict in full, in English (en) or Korean (ko)."""
    return list(_VerdictSpeaker(verdict, "verdict", language).sentences())


def say_headline(headline: Headline, language: str = "en") -> list[str]:
    """Which model to use and why, in two lines, and warnings if there are any."""
    if headline.use is None:
        return [Words("headline", language)("none"), say_verdict(headline.verdict, language)[-1]]
    return list(_HeadlineSpeaker(headline, headline.use, language).lines())


class _Speaker:
    """Puts what is known of a verdict into the words of one language."""

    def __init__(self, verdict: Verdict, part: str, language: str):
        self.verdict, self.words = verdict, Words(part, language)
        self.decimals = describe_measure(verdict.measure)[1]
        self.points = self.words("points") if verdict.measure == "overall" else ""

    def number(self, value: float) -> str:
        return say_number(value, self.decimals)

    def interval(self, low: float, high: float) -> str:
        return "" if math.isnan(low) else self.words("interval", low=self.number(low), high=self.number(high))

    def not_stopping(self, model: str, share: float) -> Iterator[str]:
        if share < STOPPING_NEEDED:
            yield self.words("not stopping", best=model, share=say_share(share, STOPPING_NEEDED))

    def losing(self, model: str, needed: float) -> Iterator[str]:
        """The dtypes in which rounding to nearest keeps less of what a model has learned than is needed."""
        for dtype, share in self.verdict.kept.get(model, {}).items():
            if share < needed:
                yield self.words("kept", best=model, dtype=dtype, share=say_share(min(share, 1.0), MIN_KEPT))


class _VerdictSpeaker(_Speaker):
    def sentences(self) -> Iterator[str]:
        verdict, words = self.verdict, self.words
        if verdict.best is None:
            yield from self._unranked()
            yield words(
                "no common" if verdict.num_left_out else "no references" if verdict.num_undefined else "no answers"
            )
            return
        key, figures = verdict.reason
        reason = words(key, **figures, needed=f"{COVERAGE_NEEDED:.0%}")
        yield words("ranked by", measure=words(verdict.measure), reason=reason)
        if verdict.measure == "chrf":
            yield words("chrf instead")
        yield from self._unranked()
        if verdict.num_undefined:
            yield words("undefined", samples=words.samples(verdict.num_undefined), measure=words(verdict.measure))
        if verdict.num_left_out:
            samples = words.samples(verdict.num_samples + (verdict.num_chosen_on or 0))
            yield words("left out", samples=samples, left_out=words.samples(verdict.num_left_out))
        if verdict.comparisons:
            yield from self._comparisons(verdict.best)
        else:
            yield words("alone", best=verdict.best)
        yield from self.not_stopping(verdict.best, verdict.stop_rate)
        yield from self.losing(verdict.best, math.inf)
        agreement = verdict.agreement
        if not math.isnan(agreement.value):
            value, low, high = (say_number(number, 2) for number in (agreement.value, agreement.low, agreement.high))
            interval = "" if math.isnan(agreement.low) else words("interval", low=low, high=high)
            yield words("metric", value=value, interval=interval, num=agreement.num_samples)

    def _unranked(self) -> Iterator[str]:
        for name, share in self.verdict.unranked.items():
            lacks_samples = name in self.verdict.lacking
            needed = SAMPLES_NEEDED if lacks_samples else COVERAGE_NEEDED
            key = "lacking" if lacks_samples else "unranked"
            yield self.words(key, model=name, share=say_share(share, needed), needed=f"{needed:.0%}")

    def _comparisons(self, best: str) -> Iterator[str]:
        """The best model against the others, what so many samples can show, and where the figures are from."""
        verdict, words = self.verdict, self.words
        against = verdict.against(best)
        clear = [c for c in against if c.is_clear]
        worse = [c for c in against if c.turned().is_clear]  # as only held-out samples can show
        equal = [c for c in against if c.ties == c.num_samples]
        close = [c for c in against if c not in (*clear, *worse, *equal)]
        same = [c for c in close if c.has_same_mean]
        is_highest = verdict.means[best] == max(verdict.means.values())
        for key, comparisons, form in (
            ("better", clear, "better than one"),
            ("worse", worse, "close one"),
            ("all equal", equal, "equal one"),
            ("same mean", same, "close one"),
            ("not shown" if is_highest else "not shown held out", [c for c in close if c not in same], "close one"),
        ):
            if comparisons:
                yield words(key, best=best, list=self._list(comparisons, form))
        if close:
            yield from self._power(close)
        yield from self._against_baseline(best, is_highest)
        num_comparisons = len(verdict.comparisons)
        yield words("p note" if num_comparisons > 1 else "p note one", num=num_comparisons)
        samples = words.samples(verdict.num_samples)
        if verdict.num_chosen_on is not None:
            yield words("held out", best=best, chosen=words.samples(verdict.num_chosen_on), samples=samples)
        else:
            yield words("no holdout" if verdict.holdout else "same samples", best=best, samples=samples)

    def _power(self, close: list[Comparison]) -> Iterator[str]:
        """What so many samples can show at all."""
        verdict, words = self.verdict, self.words
        needed = fewest_samples(len(verdict.comparisons))
        if verdict.num_samples < needed:
            yield words("too few", num=verdict.num_samples, needed=needed, models=len(verdict.means))
            return
        detectable = self.number(max(c.detectable for c in close))
        samples = words.samples(verdict.num_samples)
        yield words("detectable", samples=samples, detectable=detectable, points=self.points)
        yield words("more samples")

    def _against_baseline(self, best: str, is_highest: bool) -> Iterator[str]:
        verdict, words, baseline = self.verdict, self.words, self.verdict.baseline
        if baseline is None:
            return
        others = [c.turned() for c in verdict.against(baseline) if c.other != best]
        if best == baseline:
            if is_highest:
                yield words("best is base", baseline=baseline)
        elif len(others) > MAX_NAMED:
            counts = {
                "same": sum(not c.is_shown for c in others),
                "better": sum(c.is_clear for c in others),
                "worse": sum(c.turned().is_clear for c in others),
            }
            yield words("baseline many", baseline=baseline, num=len(others), **counts)
        elif others:
            outcomes = ("same" if not c.is_shown else "better" if c.difference > 0 else "worse" for c in others)
            texts = [self._one(c, f"baseline {outcome}") for c, outcome in zip(others, outcomes, strict=True)]
            yield words("baseline", baseline=baseline, list="; ".join(texts))

    def _list(self, comparisons: list[Comparison], form: str) -> str:
        """Each comparison in this form; of many those with the smallest differences, and the number of the others."""
        if len(comparisons) <= MAX_NAMED:
            return ", ".join(self._one(c, form) for c in comparisons)
        closest = sorted(comparisons, key=lambda c: c.difference)[: MAX_NAMED - 1]
        text = ", ".join(self._one(c, form) for c in closest)
        return self.words("and others", list=text, num=len(comparisons) - len(closest))

    def _one(self, c: Comparison, form: str) -> str:
        details = self.words(
            "details", interval=self.interval(c.low, c.high), p=f"p {say_p(c.p)}", wins=c.wins, losses=c.losses,
            num=c.num_samples,
        )  # fmt: skip
        difference = self.number(c.difference)
        return self.words(
            form, model=c.better, other=c.other, difference=difference, points=self.points, details=details
        )


class _HeadlineSpeaker(_Speaker):
    def __init__(self, headline: Headline, use: str, language: str):
        super().__init__(headline.verdict, "headline", language)
        self.headline, self.use, self.language = headline, use, language

    def lines(self) -> Iterator[str]:
        yield self._headline()
        decided_by = self.headline.decided_by
        pair = [] if decided_by is None else [say_pair(decided_by, self.verdict, self.language)]
        yield " ".join([self._reason(), *pair])
        for against in self.headline.against:
            yield say_pair(against, self.verdict, self.language)
        yield from self.not_stopping(self.use, self.headline.stop_rate)
        yield from self.losing(self.use, MIN_KEPT)

    def _headline(self) -> str:
        verdict, words, headline = self.verdict, self.words, self.headline
        against = verdict.against(self.use)
        others = [c.other for c in against]
        close = [c.other for c in against if not c.is_shown]
        if len(close) > MAX_NAMED:
            shown = ", ".join(close[: MAX_NAMED - 1])
            close = [words("and more", list=shown, num=len(close) - MAX_NAMED + 1)]
        are_checkpoints = training_step(self.use) == 0 and all(training_step(name) > 0 for name in others)
        kind = "model ranked" if verdict.unranked else "checkpoint" if are_checkpoints else "model"
        ending = " one" if len(others) == 1 else " ranked" if verdict.unranked else ""
        return words(
            headline.key + ending if headline.key + ending in words else headline.key,
            use=self.use, top=headline.top, best=verdict.best, baseline=verdict.baseline, kind=words(kind),
            close=", ".join(close), other=", ".join(others), chosen=words.samples(verdict.num_chosen_on or 0),
            samples=words.samples(verdict.num_samples),
        )  # fmt: skip

    def _reason(self) -> str:
        """The mean of the model to use, and how far it is from that of the model that it is compared with."""
        verdict, words = self.verdict, self.words
        why = ""
        if verdict.measure != "overall":
            why = words(verdict.reason[0] if verdict.reason[0] in words else "few judged")
        mean = words(
            "mean", measure=words(verdict.measure).replace("the judge", "The judge"), why=why, use=self.use,
            points=self.points, mean=self.number(verdict.means[self.use]),
            interval=self.interval(*verdict.intervals[self.use]), samples=words.samples(verdict.num_samples),
        )  # fmt: skip
        if len(verdict.means) == 1:
            return mean + "."
        c = verdict.between(self.use, self._compared_with())
        if c.has_same_mean:
            return f"{mean}; {words('same', other=c.other)}"
        difference = self.number(abs(c.difference)) + self.points
        key, higher = ("more", c) if c.difference > 0 else ("less", c.turned())
        chance = words("certain" if c.p < 0.001 else "unlikely" if c.is_shown else "maybe")
        figures = words(
            "figures", low=self.number(higher.low), high=self.number(higher.high), chance=chance, p=say_p(c.p)
        )
        if verdict.num_samples < 2:
            figures = words("one sample")
        return f"{mean}; {words(key, difference=difference, other=c.other, figures=figures)}"

    def _compared_with(self) -> str:
        """The baseline; of the baseline itself, and where there is none, what comes closest to it."""
        verdict = self.verdict
        if verdict.baseline is not None and verdict.baseline != self.use:
            return verdict.baseline
        if verdict.num_chosen_on is not None and verdict.best is not None and verdict.best != self.use:
            return verdict.best
        return max((name for name in verdict.means if name != self.use), key=verdict.means.__getitem__)
