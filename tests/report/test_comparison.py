"""Statistics against scipy's, and against simulation: do the intervals, the p-values and the detectable differences hold?"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from finetuning.agreement import correlation_within_models, measure_against_people, rank_correlation
from finetuning.report.comparison import (
    bootstrap_interval,
    compare_all,
    detectable_difference,
    fewest_samples,
    holm,
    randomisation_p,
    share_interval,
)

RNG = np.random.default_rng(20260101)
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_draws_whatever_runs_before():
    RNG.bit_generator.state = STATE


def judge_scores(n: int, quality: float, difficulty: np.ndarray | None = None) -> np.ndarray:
    """Overall scores as a judge gives them: the mean of six whole numbers from 1 to 10, many of them at the top."""
    difficulty = RNG.normal(0, 1.2, n) if difficulty is None else difficulty
    return np.clip(np.round(quality + difficulty[:, None] + RNG.normal(0, 1, (n, 6))), 1, 10).mean(axis=1)


def rouge_scores(n: int) -> np.ndarray:
    """F1 on short texts: a fifth of the answers is the reference itself."""
    return np.where(RNG.random(n) < 0.2, 1.0, RNG.beta(0.8, 0.6, n))


def paired_differences(n: int) -> np.ndarray:
    """Two checkpoints of one run: two fifths of the answers are the same."""
    difficulty = RNG.normal(0, 1.2, n)
    differences = judge_scores(n, 7, difficulty) - judge_scores(n, 6.7, difficulty)
    return np.where(RNG.random(n) < 0.4, 0.0, differences)


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


def test_holm_multiplies_each_p_by_the_number_that_is_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


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


def test_a_correlation_resamples_whole_samples():
    """Two models whose answers are copies of each other: the interval is that of the samples, not of the answers."""
    x = pd.DataFrame({"a": RNG.normal(size=60)})
    y = x + RNG.normal(size=(60, 1))
    single, doubled = correlation_within_models(x, y), correlation_within_models(x[["a", "a"]], y[["a", "a"]])
    assert single.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert (doubled.value, doubled.low, doubled.high) == pytest.approx((single.value, single.low, single.high))
    assert (single.num_samples, doubled.num_samples) == (60, 120)
    assert math.isnan(correlation_within_models(x, x * 0).value)


def test_a_difference_between_models_is_no_correlation_within_them():
    judge = pd.DataFrame({"base": RNG.normal(3, 1, 300), "checkpoint-1": RNG.normal(8, 1, 300)})
    rouge = pd.DataFrame({"base": RNG.normal(0.2, 0.1, 300), "checkpoint-1": RNG.normal(0.7, 0.1, 300)})
    pooled = scipy.stats.spearmanr(judge.melt()["value"], rouge.melt()["value"]).statistic
    found = correlation_within_models(judge, rouge)
    assert pooled > 0.7 and abs(found.value) < 0.1 and found.low < 0 < found.high


def test_a_difference_between_models_is_no_agreement_with_people():
    models, ids = ["base"] * 60 + ["checkpoint-1"] * 60, [*map(str, range(60))] * 2
    judge, human = (np.concatenate([RNG.normal(3, 1, 60), RNG.normal(8, 1, 60)]) for _ in range(2))
    assert scipy.stats.spearmanr(judge, human).statistic > 0.7
    pairs = list(zip(models, ids, judge, human, strict=True))
    for estimate in measure_against_people(pairs).values():
        assert abs(estimate.value) < 0.3 and estimate.low < 0 < estimate.high and estimate.num_samples == 120
    few = [*pairs[:60], *pairs[60:64]]  # of checkpoint-1, about which so few say nothing
    found, alone = measure_against_people(few), measure_against_people(pairs[:60])
    assert found["kappa"] == alone["kappa"] and found["kappa"].num_samples == 60
    assert alone["kendall"].value == pytest.approx(scipy.stats.kendalltau(judge[:60], human[:60]).statistic)
    assert all(math.isnan(estimate.value) for estimate in measure_against_people([*pairs[:4], *pairs[60:64]]).values())
    twice = measure_against_people([*pairs[:60], *pairs[:60]])  # of two people, who say the same
    assert twice["spearman"].value == pytest.approx(alone["spearman"].value)
    assert twice["spearman"].low == pytest.approx(alone["spearman"].low)


def test_a_correlation_of_few_answers_is_none():
    scores = pd.DataFrame({"a": [1.0, 2, 3, 4, *[math.nan] * 6]})
    assert math.isnan(correlation_within_models(scores, scores).value)
    assert math.isnan(rank_correlation(range(4), range(4)).value)
    assert rank_correlation(range(5), range(5)).value == pytest.approx(1)


@pytest.mark.parametrize("num_comparisons, num_samples", [(1, 6), (3, 7), (15, 10)])
def test_so_few_samples_can_show_nothing(num_comparisons, num_samples):
    """All differences have the same sign: the smallest p that flipping signs can give, under Holm's correction."""
    assert fewest_samples(num_comparisons) == num_samples
    for number, shown in ((num_samples - 1, False), (num_samples, True)):
        p = randomisation_p([0.455] * number)
        assert p == 2 ** (1 - number) and (holm([p] * num_comparisons)[0] < 0.05) == shown
    assert math.isnan(detectable_difference(RNG.normal(size=num_samples - 1), num_comparisons))
    assert math.isnan(detectable_difference([0.455] * 50))
