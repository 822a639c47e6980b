"""Comparisons of models, against simulation: do the adjusted p-values and the detectable differences hold?"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from drawn_scores import RNG, STATE, judge_scores, paired_differences

from finetuning.report.comparison import compare_all, detectable_difference, fewest_samples, holm
from finetuning.resampling import bootstrap_interval, randomisation_p


@pytest.fixture(autouse=True)
def same_draws_whatever_runs_before():
    RNG.bit_generator.state = STATE


def test_holm_multiplies_each_p_by_the_number_that_is_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


@pytest.mark.slow
def test_false_alarms_stay_under_5_percent_although_the_best_is_chosen_on_the_same_samples():
    """Six checkpoints that are equally good: how often is the best of them said to be better than another?"""
    num_alarms = 0
    for _ in range(400):
        difficulty = RNG.normal(0, 1.2, 50)
        scores = pd.DataFrame({f"checkpoint-{i}": judge_scores(50, 7, difficulty) for i in range(6)})
        best = scores.mean().idxmax()
        pairs = [(scores[a] - scores[b]).to_numpy() for a, b in itertools.combinations(scores, 2)]
        adjusted = holm([randomisation_p(values) for values in pairs])
        names = list(itertools.combinations(scores, 2))
        num_alarms += any(p < 0.05 and best in pair for p, pair in zip(adjusted, names, strict=True))
    assert num_alarms / 400 < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("num_comparisons", [1, 3])
def test_the_detectable_difference_is_found_80_percent_of_the_time(num_comparisons):
    """A true difference as large as what is stated; the other comparisons have none."""
    spread = np.std(paired_differences(1_000_000))
    true = (scipy.stats.norm.ppf(1 - 0.025 / num_comparisons) + scipy.stats.norm.ppf(0.8)) * spread / math.sqrt(50)
    num_found, stated = 0, []
    for _ in range(2000):
        samples = [paired_differences(50) for _ in range(num_comparisons)]
        stated.append(detectable_difference(samples[0], num_comparisons))
        p_values = [
            randomisation_p(samples[0] - MEAN + true),
            *(randomisation_p(other - MEAN) for other in samples[1:]),
        ]
        num_found += holm(p_values)[0] < 0.05
    assert np.mean(stated) == pytest.approx(true, rel=0.03)
    assert num_found / 2000 == pytest.approx(0.8, abs=0.03)


MEAN = paired_differences(2_000_000).mean()


def test_comparisons_are_paired_and_counted():
    scores = pd.DataFrame({"a": [1.0, 2, 3, 4], "b": [1.0, 1, 4, 2], "c": [0.0, 0, 0, 0]})
    first, second, third = compare_all(scores)
    assert (first.better, first.other, first.wins, first.ties, first.losses) == ("a", "b", 2, 1, 1)
    assert first.difference == pytest.approx(0.5) and (first.low, first.high) == bootstrap_interval([0, 1, -1, 2])
    turned = first.turned()
    assert (turned.better, turned.wins, turned.losses, turned.difference, turned.low) == ("b", 1, 2, -0.5, -first.high)
    assert not first.is_clear and math.isnan(third.detectable)  # of four samples


@pytest.mark.parametrize("num_comparisons, num_samples", [(1, 6), (3, 7), (15, 10)])
def test_so_few_samples_can_show_nothing(num_comparisons, num_samples):
    """All differences have the same sign: the smallest p that flipping signs can give, under Holm's correction."""
    assert fewest_samples(num_comparisons) == num_samples
    for number, shown in ((num_samples - 1, False), (num_samples, True)):
        p = randomisation_p([0.455] * number)
        assert p == 2 ** (1 - number) and (holm([p] * num_comparisons)[0] < 0.05) == shown
    assert math.isnan(detectable_difference(RNG.normal(size=num_samples - 1), num_comparisons))
    assert math.isnan(detectable_difference([0.455] * 50))
