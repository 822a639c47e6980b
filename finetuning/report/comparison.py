"""
Statistics of scores on the same samples: intervals, paired comparisons, what the samples cannot show. Imports without torch.

Nothing here knows what a score is of; tables of samples come from tables.py, sentences are in verdict.py.
"""

import math
import warnings
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import scipy.stats

from finetuning.wording import LEVEL

NUM_RESAMPLES = 2000
NUM_FLIPS = 9999
POWER = 0.8


def bootstrap_interval(values) -> tuple[float, float]:
    """95 % interval of the mean: BCa bootstrap over samples (Efron 1987), the same on every call.

    For few samples its level is raised as Student's t is wider than the normal (Hesterberg 2015), without which it
    would cover less than 95 %; tests/report/test_comparison.py has the coverage on skewed scores with ties. (nan, nan) for
    fewer than two values; the value itself where all are equal. Values that no resample can vary enough for BCa (one
    outlier among equals) get the percentile interval.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    n = len(values)
    level = 2 * scipy.stats.norm.cdf(scipy.stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))) - 1
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # nan says it, too
            result = scipy.stats.bootstrap(
                (values,), np.mean, n_resamples=NUM_RESAMPLES, method=method, confidence_level=level,
                rng=np.random.default_rng(0), batch=max(1, 4_000_000 // n),
            )  # fmt: skip
        low, high = result.confidence_interval
        if not math.isnan(low):
            break
    return float(low), float(high)


def share_interval(values) -> tuple[float, float]:
    """95 % interval of a share of ones among ones and zeros (Wilson 1927), which is no point where all are equal."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    interval = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def randomisation_p(differences, num_flips: int = NUM_FLIPS) -> float:
    """Two-sided p of paired differences by approximate randomisation (Noreen 1989): their signs are flipped at random.

    (1 + flips with a mean at least as far from 0) / (1 + flips); 1 where all differences are 0 or there are none. Where
    there are no more ways to flip them than that, each way is taken once, and p is exact (Fisher 1935).
    """
    differences = np.asarray(differences, dtype=float)
    nonzero = differences[differences != 0].astype(np.float32)
    if len(nonzero) == 0:
        return 1.0
    rng = np.random.default_rng(0)
    observed, extreme = abs(float(nonzero.sum(dtype=np.float64))), 0
    tolerance = 1e-5 * float(np.abs(nonzero).sum())  # sums of the same numbers in float32
    if 2 ** len(nonzero) <= num_flips:
        ways = np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
        return float((np.abs((2 * ways - 1).astype(np.float32) @ nonzero) >= observed - tolerance).mean())
    for start in range(0, num_flips, 1000):
        shape = (min(1000, num_flips - start), len(nonzero))
        signs = rng.integers(0, 2, size=shape, dtype=np.int8) * np.int8(2) - np.int8(1)
        extreme += int((np.abs(signs.astype(np.float32) @ nonzero) >= observed - tolerance).sum())
    return (1 + extreme) / (1 + num_flips)


def holm(p_values: list[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979), in the same order: each under 0.05 is a finding."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def fewest_samples(num_comparisons: int = 1) -> int:
    """The fewest samples with which any difference can be shown, however large it is.

    If all n differences have the same sign, flipping signs gives p = 2 ** (1 - n), and Holm multiplies the smallest p by
    the number of comparisons: 6 samples are needed for one comparison, 7 for three.
    """
    return math.floor(1 + math.log2(num_comparisons / LEVEL)) + 1


def detectable_difference(differences, num_comparisons: int = 1) -> float:
    """Smallest true mean difference that so many samples show with a probability of 80 %, among so many comparisons.

    From the spread of the differences, at the level that Holm asks of the clearest one. NaN where the differences have
    no spread to take it from, and for fewer samples than can show anything.
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) < fewest_samples(num_comparisons) or np.ptp(differences) == 0:
        return math.nan
    quantiles = scipy.stats.norm.ppf(1 - 0.025 / num_comparisons) + scipy.stats.norm.ppf(POWER)
    return float(quantiles * np.std(differences, ddof=1) / math.sqrt(len(differences)))


@dataclass
class Comparison:
    """Paired difference of two models over the samples that both have a score of.

    Args:
        difference: Mean of better - other, with its 95 % interval.
        p: Of approximate randomisation, adjusted for the number of all comparisons that were made (Holm).
        wins, ties, losses: Samples on which `better` has the higher, the same or the lower score.
        detectable: The smallest difference that so many samples show with a probability of 80 %; NaN where that is unknown.
    """

    better: str
    other: str
    num_samples: int
    difference: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int
    detectable: float

    @property
    def is_shown(self) -> bool:
        """Whether the samples show that the two differ."""
        return self.p < LEVEL

    @property
    def is_clear(self) -> bool:
        return self.difference > 0 and self.is_shown

    def turned(self) -> "Comparison":
        """The same, seen from the other model."""
        return Comparison(
            self.other, self.better, self.num_samples, 0 - self.difference, 0 - self.high, 0 - self.low, self.p,
            self.losses, self.ties, self.wins, self.detectable,
        )  # fmt: skip


def compare_all(scores: pd.DataFrame) -> list[Comparison]:
    """Every pair of models, with p-values adjusted for all of them.

    All pairs count, also those that are not reported: which model is the best was seen on the same samples.

    Args:
        scores: One row a sample, one column a model, without missing values.
    """
    pairs = list(combinations(scores.columns, 2))
    differences = [(scores[first] - scores[second]).to_numpy(dtype=float) for first, second in pairs]
    num_flips = max(NUM_FLIPS, 100 * len(pairs) - 1)  # so that an adjusted p can be as small as 0.01
    adjusted = holm([randomisation_p(values, num_flips) for values in differences])
    return [
        Comparison(
            better=first,
            other=second,
            num_samples=len(values),
            difference=float(values.mean()) if len(values) else math.nan,
            low=low,
            high=high,
            p=p,
            wins=int((values > 0).sum()),
            ties=int((values == 0).sum()),
            losses=int((values < 0).sum()),
            detectable=detectable_difference(values, len(pairs)),
        )
        for (first, second), values, p, (low, high) in zip(
            pairs, differences, adjusted, map(bootstrap_interval, differences), strict=True
        )
    ]
