"""
How far a judge can be trusted: its scores against the length of the answers, other judges, and people.

Imports without torch.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import krippendorff
import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from finetuning.resampling import percentile_interval
from finetuning.wording import plural

MIN_RANKED = 5  # answers; of fewer, nothing is said of their agreement


@dataclass
class Estimate:
    """A value with its 95 % interval; NaN where there is too little to take it from."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    num_samples: int = 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"not defined (n = {self.num_samples})"
        interval = "" if math.isnan(self.low) else f" (95 % {self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{interval}"


def rank_correlation(first: Iterable[float], second: Iterable[float]) -> Estimate:
    """Spearman's correlation, its interval by Fisher's z with the variance of Bonett and Wright (2000)."""
    x, y = np.asarray(list(first), float), np.asarray(list(second), float)
    n = len(x)
    if n < MIN_RANKED or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(num_samples=n)
    rho = float(scipy.stats.spearmanr(x, y).statistic)
    if abs(rho) >= 1 - 1e-12:
        return Estimate(rho, num_samples=n)
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Estimate(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), n)


def correlation_within_models(first: ArrayLike, second: ArrayLike) -> Estimate:
    """How far two scores rank the answers of a model alike: Spearman's correlation within each model, their mean.

    Args:
        first, second: One row a sample, one column a model; NaN where there is no score.
    """
    return _estimate_within_models(_spearman, np.asarray(first, float), np.asarray(second, float))


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(scipy.stats.rankdata(first), scipy.stats.rankdata(second))[0, 1])


def _estimate_within_models(statistic: Callable, first: np.ndarray, second: np.ndarray) -> Estimate:
    """Mean of a statistic of two scores within each model.

    Each model counts with the number of its scores. Over the answers of all models together, scores would agree as soon
    as both prefer the same model. Answers to the same sample are not independent, so whole samples are resampled.

    Args:
        first, second: Samples x models, or samples x models x people; NaN where there is no score.
    """
    known = ~(np.isnan(first) | np.isnan(second))
    by_sample_and_model = known.sum(axis=tuple(range(2, known.ndim)))
    # a model of few scores is in no resample, either, which might draw them more than once
    models = by_sample_and_model.sum(axis=0) >= MIN_RANKED
    has_scores = by_sample_and_model[:, models].any(axis=1)
    first, second = (np.where(known, table, np.nan)[has_scores][:, models] for table in (first, second))
    value, num_scores = _mean_within_models(statistic, first, second)
    if len(first) < MIN_RANKED or num_scores == 0:
        return Estimate(num_samples=int(known.sum()))
    interval = percentile_interval(
        lambda rows: _mean_within_models(statistic, first[rows], second[rows])[0], len(first)
    )
    return Estimate(value, *interval, num_scores)


def _mean_within_models(statistic: Callable, first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    """The mean over the models, and the number of scores that it is of; a model of few or of equal scores has none."""
    total, num_scores = 0.0, 0
    for model in range(first.shape[1]):
        x, y = first[:, model], second[:, model]
        x, y = x[~np.isnan(x)], y[~np.isnan(y)]
        if len(x) >= MIN_RANKED and np.ptp(x) > 0 and np.ptp(y) > 0:
            total += len(x) * statistic(x, y)
            num_scores += len(x)
    return (total / num_scores if num_scores else math.nan), num_scores


def weighted_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (Fleiss and Cohen 1973), in the form that takes means of scores as well.

    1 - E[(a - b)^2] / E[(a - b)^2 if a and b were independent]; NaN where all scores are equal.
    """
    expected = np.var(first) + np.var(second) + (first.mean() - second.mean()) ** 2
    return float(1 - np.mean((first - second) ** 2) / expected) if expected > 0 else math.nan


@dataclass
class JuryAgreement:
    """How far several judges agree on the same answers.

    Args:
        means: Overall score of each judge.
        disagreement: Standard deviation of the overall scores of an answer over the judges, mean of all answers.
        alpha: Krippendorff's, of the overall score (interval level).
        alphas: Of each criterion (ordinal level).
    """

    means: dict[str, float]
    disagreement: float
    alpha: float
    alphas: dict[str, float]
    num_samples: int

    def __str__(self) -> str:
        means = ", ".join(f"{judge} {mean:.2f}" for judge, mean in self.means.items())
        unknown = "not defined (too few answers, or all scores are equal)"
        return (
            f"jury on {plural(self.num_samples, 'answer')}: means {means}; "
            f"standard deviation between the judges {self.disagreement:.2f}; "
            f"Krippendorff's alpha {unknown if math.isnan(self.alpha) else f'{self.alpha:.2f}'}"
        )


def measure_jury(scores: dict[str, list[dict[str, float]]]) -> JuryAgreement | None:
    """Agreement of judges; None where there is no answer.

    Args:
        scores: For each judge the scores of the same answers in the same order, by criterion.
    """
    answers = next(iter(scores.values()))
    if not answers:
        return None
    criteria = list(answers[0])
    table = np.array([[[answer[criterion] for criterion in criteria] for answer in its] for its in scores.values()])
    overall = table.mean(axis=2)  # judges x answers
    return JuryAgreement(
        means={judge: float(row.mean()) for judge, row in zip(scores, overall, strict=True)},
        disagreement=float(overall.std(axis=0, ddof=1).mean()) if len(scores) > 1 else math.nan,
        alpha=_alpha(overall, "interval"),
        alphas={criterion: _alpha(table[:, :, k], "ordinal") for k, criterion in enumerate(criteria)},
        num_samples=len(answers),
    )


def _alpha(table: np.ndarray, level: Literal["interval", "ordinal"]) -> float:
    if np.ptp(table) == 0 or min(table.shape) < 2:
        return math.nan
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))


def measure_against_people(pairs: list[tuple[str, str, float, float]]) -> dict[str, Estimate]:
    """Agreement of the judge with people within each model.

    Args:
        pairs: (model, id of the sample, the judge's score, a person's) for each answer that has both; several people
            may have scored an answer.

    Returns:
        spearman, kendall (tau-b) and kappa (quadratic weights).
    """
    models = {model: place for place, model in enumerate(dict.fromkeys(pair[0] for pair in pairs))}
    samples = {sample: place for place, sample in enumerate(dict.fromkeys(pair[1] for pair in pairs))}
    people = Counter((model, sample) for model, sample, _, _ in pairs)
    judge = np.full((len(samples), len(models), max(people.values(), default=1)), math.nan)
    human = judge.copy()
    for model, sample, by_judge, by_person in pairs:
        people[model, sample] -= 1
        place = samples[sample], models[model], people[model, sample]
        judge[place], human[place] = by_judge, by_person
    statistics: dict[str, Callable] = {
        "spearman": _spearman,
        "kendall": lambda a, b: scipy.stats.kendalltau(a, b).statistic,
        "kappa": weighted_kappa,
    }
    return {name: _estimate_within_models(statistic, judge, human) for name, statistic in statistics.items()}


@dataclass
class PairCounts:
    """Outcomes of comparisons in both orders; a model is better where it is so in either order, all else is a tie.

    Args:
        wins, losses, ties: Of the first model.
        flips: Ties of which the two orders named different winners: the judge looked at the place, not the answer.
        first_place: Replies that preferred the answer that stood first, of all that preferred one.
        p: Two-sided sign test over wins and losses.
    """

    wins: int
    losses: int
    ties: int
    flips: int
    first_place: float
    p: float

    @property
    def num_pairs(self) -> int:
        return self.wins + self.losses + self.ties


def count_pairs(replies: Iterable[tuple[str, str]]) -> PairCounts:
    """Outcomes of pairs.

    Args:
        replies: For each sample which answer was better, first, second or tie, with A first and then with B first.
    """
    wins = losses = ties = flips = firsts = decided = 0
    for forward, backward in replies:
        firsts += (forward == "first") + (backward == "first")
        decided += (forward != "tie") + (backward != "tie")
        if (forward, backward) == ("first", "second"):
            wins += 1
        elif (forward, backward) == ("second", "first"):
            losses += 1
        else:
            ties += 1
            flips += "tie" not in (forward, backward)
    p = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else math.nan
    return PairCounts(wins, losses, ties, flips, firsts / decided if decided else math.nan, float(p))
