"""How far raters agree, within models."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from drawn_scores import RNG, STATE

from finetuning.agreement import correlation_within_models, measure_against_people, rank_correlation


@pytest.fixture(autouse=True)
def same_draws_whatever_runs_before():
    RNG.bit_generator.state = STATE


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


@pytest.mark.slow
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
