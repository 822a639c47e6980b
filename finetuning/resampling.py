"""
Intervals and p-values by drawing samples again, the same on every call. Imports without torch and pandas.

tests/test_resampling.py has their coverage by simulation, on skewed scores with ties.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

NUM_FLIPS = 9999
NO_INTERVAL = (math.nan, math.nan)


def bootstrap_interval(values: ArrayLike) -> tuple[float, float]:
    """95 % interval of the mean: BCa bootstrap over samples (Efron 1987). Values that are NaN do not count.

    For few samples its level is raised as Student's t is wider than the normal (Hesterberg 2015), without which it
    would cover less than 95 %. (nan, nan) for fewer than two values; the value itself where all are equal. Values that
    no resample can vary enough for BCa (one outlier among equals) get the percentile interval.
    """
    values = _known(values)
    n = len(values)
    if n < 2:
        return NO_INTERVAL
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    level = 2 * scipy.stats.norm.cdf(scipy.stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))) - 1
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # nan says it, too
            result = scipy.stats.bootstrap(
                (values,), np.mean, n_resamples=2000, method=method, confidence_level=level,
                rng=np.random.default_rng(0), batch=max(1, 4_000_000 // n),
            )  # fmt: skip
        low, high = result.confidence_interval
        if not math.isnan(low):
            break
    return float(low), float(high)


def share_interval(values: ArrayLike) -> tuple[float, float]:
    """95 % interval of a share of ones among ones and zeros (Wilson 1927), which is no point where all are equal."""
    values = _known(values)
    if len(values) == 0:
        return NO_INTERVAL
    interval = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _known(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[~np.isnan(values)]


def percentile_interval(statistic: Callable[[np.ndarray], float], num_samples: int) -> tuple[float, float]:
    """95 % interval of any statistic: percentile bootstrap over samples, of 500 resamples.

    Args:
        statistic: Of the samples at these places, which may be repeated; NaN where it is not defined.
    """
    rng = np.random.default_rng(0)
    values = np.array([statistic(rng.integers(num_samples, size=num_samples)) for _ in range(500)])
    if np.isnan(values).all():
        return NO_INTERVAL
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def randomisation_p(differences: ArrayLike, num_flips: int = NUM_FLIPS) -> float:
    """Two-sided p of paired differences by approximate randomisation (Noreen 1989): their signs are flipped at random.

    (1 + flips with a mean at least as far from 0) / (1 + flips); 1 where all differences are 0 or there are none. Where
    there are no more ways to flip them than that, each way is taken once, and p is exact (Fisher 1935).
    """
    differences = np.asarray(differences, dtype=float)
    nonzero = differences[differences != 0].astype(np.float32)
    if len(nonzero) == 0:
        return 1.0
    observed = abs(float(nonzero.sum(dtype=np.float64)))
    tolerance = 1e-5 * float(np.abs(nonzero).sum())  # sums of the same numbers in float32

    def is_as_far(signs: np.ndarray) -> np.ndarray:
        return np.abs(signs.astype(np.float32) @ nonzero) >= observed - tolerance

    if 2 ** len(nonzero) <= num_flips:
        ways = np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
        return float(is_as_far(2 * ways - 1).mean())
    rng, num_extreme = np.random.default_rng(0), 0
    for start in range(0, num_flips, 1000):
        shape = (min(1000, num_flips - start), len(nonzero))
        num_extreme += int(is_as_far(rng.integers(0, 2, size=shape, dtype=np.int8) * np.int8(2) - np.int8(1)).sum())
    return (1 + num_extreme) / (1 + num_flips)
