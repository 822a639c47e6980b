"""Intervals and p-values against scipy's, and against simulation: do they hold?"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from drawn_scores import RNG, STATE, judge_scores, paired_differences, rouge_scores

from finetuning.resampling import bootstrap_interval, randomisation_p, share_interval


@pytest.fixture(autouse=True)
def same_draws_whatever_runs_before():
    RNG.bit_generator.state = STATE


@pytest.mark.slow
@pytest.mark.parametrize("draw", [lambda n: judge_scores(n, 8.5), rouge_scores, paired_differences], ids=["judge", "rouge", "differences"])  # fmt: skip
def test_intervals_cover_the_mean_95_percent_of_the_time(draw):
    truth = draw(2_000_000).mean()
    num_covered = 0
    for _ in range(2000):
        low, high = bootstrap_interval(draw(50))
        num_covered += low <= truth <= high
    assert num_covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_an_interval_of_many_samples_is_scipys():
    values = RNG.normal(size=400)
    n = len(values)
    level = 2 * scipy.stats.norm.cdf(scipy.stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))) - 1
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=level, rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(values) == bootstrap_interval([*values, math.nan]) == pytest.approx(tuple(expected))
    assert level == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize("values, low, high", [([], None, None), ([3.0], None, None), ([2.0, 2.0], 2, 2), ([math.nan], None, None)])  # fmt: skip
def test_degenerate_intervals(values, low, high):
    result = bootstrap_interval(values)
    assert result == (low, high) if low is not None else all(map(math.isnan, result))


def test_all_of_50_answers_stopped_is_no_certainty():
    low, high = share_interval([1.0] * 50)
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 50), abs=1e-4) and high == 1  # Wilson's closed form


def test_one_outlier_among_equals_has_an_interval():
    low, high = bootstrap_interval([1.0] * 49 + [0.0])
    assert low <= 0.98 <= high <= 1


def test_p_is_that_of_all_flips():
    differences = np.array([0.5, 1.0, -0.25, 0.75, 0, 2.0, -1.5, 0.25, 1.25, 0.5])
    exact = scipy.stats.permutation_test(
        (differences, np.zeros(10)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=10)]
    assert exact == pytest.approx(np.mean(np.array(flips) >= abs(differences.sum()) - 1e-9))
    assert randomisation_p(differences) == pytest.approx(exact, abs=0.012)
    assert randomisation_p([0, 0, 0]) == randomisation_p([]) == 1 and randomisation_p([1.0]) == 1
    assert randomisation_p(np.ones(50)) == 1 / 10_000
