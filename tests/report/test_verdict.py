"""Which models are ranked, by what, and which is the best."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import make_run
from judged_run import FAIR, GOOD, POOR, add_evaluations

from finetuning.report.samples import load_samples
from finetuning.report.sentences import say_verdict
from finetuning.report.tables import format_comparisons, format_table, summarize
from finetuning.report.verdict import choose_measure, decide, find_lacking, is_held_out


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


def verdict_of(run_dir, **settings):
    return decide(load_samples(run_dir), **settings)


def test_without_a_judge_rouge_decides(run_dir):
    verdict = verdict_of(run_dir)
    assert (verdict.best, verdict.measure) == ("checkpoint-10", "rouge1")
    assert "nothing was judged" in say_verdict(verdict)[0] and "심사된 것이 없기" in say_verdict(verdict, "ko")[0]


def test_a_model_with_few_judgements_is_shown_and_not_ranked(run_dir):
    for name, scores in (("base", [1] * 20), ("checkpoint-9", [9] * 20), ("checkpoint-10", [10] * 18 + [None] * 2)):
        add_evaluations(run_dir, name, scores)
    verdict = verdict_of(run_dir)
    assert (verdict.best, verdict.measure, list(verdict.means)) == ("checkpoint-9", "overall", ["base", "checkpoint-9"])
    expected = "checkpoint-10 is shown but not ranked: only 90% of its answers have a judgement, under 95%."
    assert expected in say_verdict(verdict)
    table = format_table(summarize(load_samples(run_dir)))
    assert table.loc["checkpoint-10", "coverage"] == "90% (not ranked)" and table.loc["base", "coverage"] == "100%"


def test_the_judge_does_not_rank_a_single_model_among_several(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [10] * 20)
    measure, (reason, figures), unranked = choose_measure(load_samples(run_dir))
    assert (measure, reason, figures["model"], unranked) == ("rouge1", "few judged", "base", {})


def test_the_judge_decides_where_all_are_judged(run_dir):
    rng = np.random.default_rng(0)
    for name, mean in (("base", 2), ("checkpoint-9", 8), ("checkpoint-10", 8)):
        add_evaluations(run_dir, name, [int(s) for s in np.clip(rng.normal(mean, 1, 20).round(), 1, 10)])
    verdict = verdict_of(run_dir)
    text = " ".join(say_verdict(verdict))
    assert verdict.measure == "overall" and f"{verdict.best} is better than base by" in text and "points of 10" in text
    assert "these samples do not show that it is better than checkpoint-" in text
    assert re.search(r"With 20 samples, nothing under about \d\.\d\d points of 10 could be seen", text)
    assert "adjusted for all 3 comparisons" in text and "chosen on the same 20 samples" in text
    assert all(re.search("[가-힣]", sentence) for sentence in say_verdict(verdict, "ko"))


def test_models_are_ranked_on_the_samples_that_all_have(tmp_path):
    run_dir = make_run(tmp_path / "run", {"checkpoint-9": FAIR, "checkpoint-10": GOOD[:5]})
    expected = "Compared on the 5 samples that every ranked model has a score of; left out: 15 samples."
    assert expected in say_verdict(verdict_of(run_dir))


def test_prompts_without_an_answer_do_not_lower_the_coverage(tmp_path):
    run_dir = make_run(tmp_path / "run", {"checkpoint-9": [*GOOD[:10], *[None] * 10]})
    add_evaluations(run_dir, "checkpoint-9", [8] * 10)
    assert choose_measure(load_samples(run_dir))[0] == "overall"


def test_every_model_is_compared_with_the_baseline(run_dir):
    verdict = verdict_of(run_dir, baseline="checkpoint-9")
    assert {(c.better, c.other) for c in verdict.against("checkpoint-9")} == {("checkpoint-9", "base"), ("checkpoint-9", "checkpoint-10")}  # fmt: skip
    assert any(s.startswith("Against checkpoint-9: base is worse (difference -0.") for s in say_verdict(verdict))
    table = format_comparisons(verdict)
    assert len(table) == 3 and table["shown"].tolist() == ["yes", "yes", "yes"]


def test_with_a_holdout_the_best_is_chosen_on_other_samples_than_it_is_reported_on(run_dir):
    samples = load_samples(run_dir)
    verdict = decide(samples, holdout=0.5)
    ids = {sample_id for sample_id in samples["id"] if is_held_out(sample_id, 0.5)}
    assert 0 < len(ids) < 20 and (verdict.num_samples, verdict.num_chosen_on) == (len(ids), 20 - len(ids))
    reported = samples[(samples["model"] == "checkpoint-9") & samples["id"].isin(ids)]
    assert verdict.means["checkpoint-9"] == pytest.approx(reported["rouge1"].mean())
    assert any("had no part in it" in sentence for sentence in say_verdict(verdict))
    assert not any("same 20 samples" in sentence for sentence in say_verdict(verdict))


def test_many_models_are_summed_up(tmp_path):
    models = {"base": POOR, **{f"checkpoint-{i}": FAIR for i in range(1, 8)}, "checkpoint-9": GOOD}
    verdict = verdict_of(make_run(tmp_path / "run", models))
    assert any(re.search(r"worse in 0 of 20\) and 5 others\.$", sentence) for sentence in say_verdict(verdict))
    assert any("of the 7 other models: 7 better, 0 worse, 0 not" in sentence for sentence in say_verdict(verdict))
    assert max(map(len, say_verdict(verdict))) < 600


def test_equal_answers_are_said_to_be_equal(tmp_path):
    verdict = verdict_of(make_run(tmp_path / "run", {"base": GOOD, "checkpoint-9": GOOD}))
    assert any("have the same score on every sample" in sentence for sentence in say_verdict(verdict))


def test_rouge_and_the_judge_are_correlated_within_models(run_dir):
    for name, scores in (("base", [1] * 20), ("checkpoint-9", [4, 8, 8] * 6 + [4, 8]), ("checkpoint-10", [9] * 20)):
        add_evaluations(run_dir, name, scores)
    verdict = verdict_of(run_dir)
    samples = load_samples(run_dir)
    its = samples[samples["model"] == "checkpoint-9"]  # all answers of the others have the same score
    expected = scipy.stats.spearmanr(its["rouge1"], its["overall"]).statistic
    assert verdict.agreement.value == pytest.approx(expected)
    found = next(sentence for sentence in say_verdict(verdict) if "Within each model" in sentence)
    assert f"a rank correlation of {expected:.2f}" in found and "20 answers" in found


@pytest.mark.parametrize(
    "counts, lacking",
    [
        ([50, 50, 50, 2], [3]), ([50, 50, 2, 2], [2, 3]), ([20, 20, 10, 10], []), ([50, 2], []), ([50, 0], [1]), ([50, 50, 40], []),
        ([50] * 9 + [39], [9]), ([50] * 9 + [41], []), ([7], []), ([0, 0], []),
    ],
)  # fmt: skip
def test_models_are_ranked_where_that_leaves_enough_samples(counts, lacking):
    scores = pd.DataFrame({i: [1.0] * count + [math.nan] * (50 - count) for i, count in enumerate(counts)})
    assert list(find_lacking(scores)) == lacking
