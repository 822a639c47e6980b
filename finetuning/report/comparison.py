"""
Paired comparisons of scores on the same samples, and what the samples cannot show. Imports without torch.

Nothing here knows what a score is of; tables of samples come from tables.py, sentences are in sentences.py.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import scipy.stats

from finetuning.resampling import NUM_FLIPS, bootstrap_interval, randomisation_p
from finetuning.wording import LEVEL

POWER = 0.8


def holm(p_values: list[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979), in the same order: each under 0.05 is a finding."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def fewest_samples(num_comparisons: int = 1) -> int:
    """The fewest samples with which any difference can be shown, however large it is.

    If all n differences have the same sign, flipping signs gives p = 2 ** (1 - n), and Holm multiplies the smallest p
    by the number of comparisons: 6 samples are needed for one comparison, 7 for three.
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
        detectable: The smallest difference that so many samples show with a probability of 80 %; NaN where unknown.
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

    @property
    def has_same_mean(self) -> bool:
        """Whether the two have the same mean, but for the error of floats."""
        return abs(self.difference) <= 1e-9

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
