import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import ROOT, make_run, run
from judge_servers import evaluation
from large_run import add_all_kinds_of_rows, write_run

from finetuning.agreement import measure_jury
from finetuning.errors import InputError
from finetuning.judge.form import Evaluation
from finetuning.measures import criterion_column, describe_measure
from finetuning.report.__main__ import ScoreArguments, main
from finetuning.report.headline import build_headline
from finetuning.report.opinion_sentences import say_opinions
from finetuning.report.opinions import load_opinions
from finetuning.report.page_tables import build_models
from finetuning.report.plots import plot_criteria
from finetuning.report.samples import find_runs, load_runs, load_samples
from finetuning.report.sentences import say_headline, say_verdict
from finetuning.report.tables import format_comparisons, format_table, summarize
from finetuning.report.verdict import choose_measure, decide, find_lacking, is_held_out
from finetuning.results import RowFile, prediction_hash, read_rows
from finetuning.wording import say_number, say_p, say_share

CRITERIA = list(Evaluation.model_fields)
GOOD = [f"#Person1# asks question number {i} about the old house" for i in range(20)]
FAIR = [f"#Person1# asks number {i} about a house" if i % 3 else GOOD[i] for i in range(20)]
POOR = ["something else <script>alert(1)</script>"] * 20


def add_evaluations(run_dir, name, scores):
    """Judge the first answers of a model with these scores; None is a failure."""
    predictions = read_rows(run_dir / "predictions" / f"{name}.jsonl")
    file = RowFile(run_dir / "qa_evaluation_results" / f"{name}.jsonl", {"judge_model": "m", "criteria": CRITERIA})
    for row, score in zip(predictions, scores, strict=False):
        failed = {"status": "truncated", "evaluation": None, "error": "..."}
        ok = {"status": "ok", "evaluation": json.loads(evaluation(score or 1)), "error": None}
        paid = {"expected": None, "usage": None, "cost": None, "possible_cost": 0.0}
        file.append(
            {"id": row["id"], "prediction_hash": prediction_hash(row), **paid, **(failed if score is None else ok)}
        )
    file.close()


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


def test_models_stand_in_the_order_of_their_steps(run_dir):
    summary = summarize(load_samples(run_dir))
    assert list(summary.index) == ["base", "checkpoint-9", "checkpoint-10"]
    assert summary["rouge1"].is_monotonic_increasing and summary.loc["checkpoint-10", "rouge1"] == 1
    assert (summary["rouge1_low"] <= summary["rouge1"]).all() and (summary["rouge1"] <= summary["rouge1_high"]).all()
    assert "overall" not in summary  # nothing was judged


def test_failed_judgements_are_counted_and_in_no_mean(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9, 7, None, None])
    row = summarize(load_samples(run_dir)).loc["checkpoint-10"]
    assert (row["judged"], row["failed"], row["overall"], row["judge[relevance]"]) == (2, 2, 8, 8)


def test_a_success_counts_however_often_it_failed_before(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [None])
    add_evaluations(run_dir, "checkpoint-10", [9])
    assert summarize(load_samples(run_dir)).loc["checkpoint-10", ["judged", "failed"]].tolist() == [1, 0]


def test_an_evaluation_of_another_answer_does_not_count(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9] * 20)
    path = run_dir / "predictions" / "checkpoint-10.jsonl"
    rows = read_rows(path)
    rows[0]["prediction"] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize(load_samples(run_dir)).loc["checkpoint-10", "judged"] == 19


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


# --- Each sentence is true --------------------------------------------------------------------------------------------


def sentences(models, baseline="base", holdout=0.0, **columns):
    """What is said of these scores (ROUGE-1, or the columns given), one list a model; None is no answer."""
    rows = [
        {
            "model": model, "id": f"sample{i:04d}", "finish_reason": "error" if value is None else "stop", "rouge1": value,
            "chrf": value, "stopped": 1.0, "overall": math.nan, "status": None,
        }
        | {name: values[model][i] for name, values in columns.items()}
        for model, its_values in models.items()
        for i, value in enumerate(its_values)
    ]  # fmt: skip
    samples = pd.DataFrame(rows).astype({"rouge1": float, "chrf": float, "overall": float})
    verdict = decide(samples, baseline, holdout)
    assert len(say_verdict(verdict, "ko")) == len(say_verdict(verdict, "en"))
    stopped = pd.DataFrame({"stopped": 1.0}, index=list(models))
    headline = build_headline(verdict, stopped, [])
    headlines = [say_headline(headline, language) for language in ("en", "ko")]
    for sentence in (*say_verdict(verdict, "en"), *say_verdict(verdict, "ko"), *headlines[0], *headlines[1]):
        assert "nan" not in sentence and "{" not in sentence and "-0.000" not in sentence
        assert not re.search(r"\b1 (samples|others|answers|of the other models are)|\b0\.000 (more|less)", sentence)
    verdict.headline = headlines[0][0]
    return verdict, " ".join(say_verdict(verdict))


def test_a_chosen_model_that_is_worse_on_the_held_out_samples_is_said_to_be():
    held_out = [is_held_out(f"sample{i:04d}", 0.5) for i in range(60)]
    base = [0.2 + i / 500 if held else 0.9 for i, held in enumerate(held_out)]
    checkpoint = [0.6 if held else 0.5 for held in held_out]
    verdict, text = sentences({"base": base, "checkpoint-9": checkpoint}, holdout=0.5)
    assert verdict.best == "base" and re.search(r"base is worse than checkpoint-9 \(difference -0\.3\d\d; 95 %", text)
    assert "do not show" not in text and "No other model" not in text and "no checkpoint" not in text.lower()


def test_a_model_with_few_answers_does_not_shrink_the_comparison_of_the_others():
    models = {"base": [0.1] * 50, "checkpoint-1": [0.8] * 50, "checkpoint-2": [0.9] * 2}
    verdict, text = sentences(models)
    assert (
        verdict.best == "checkpoint-1" and verdict.num_samples == 50 and list(verdict.means) == ["base", "checkpoint-1"]
    )
    assert "checkpoint-2 is shown but not ranked: it has a score of only 4% of the samples" in text


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


def test_five_samples_are_said_to_show_nothing():
    for num, expected in ((1, "(1)"), (2, "(2)"), (5, "(5)")):
        verdict, text = sentences({"base": [0.1] * num, "checkpoint-1": [0.555] * num})
        assert (
            f"So few samples {expected} cannot show a difference, however large: at least 6 are needed for 2 models"
            in text
        )
        assert "could be seen" not in text and verdict.best == "checkpoint-1"
    assert "checkpoint-1 is better than base by 0.455" in sentences({"base": [0.1] * 6, "checkpoint-1": [0.555] * 6})[1]


def test_equal_means_are_said_to_be_equal():
    _, text = sentences({"base": [0.1, 0.3] * 10, "checkpoint-1": [0.3, 0.1] * 10, "checkpoint-2": [0.1] * 19 + [0.2]})
    assert "base has the same mean as checkpoint-1 (difference" in text and "highest" not in text
    assert "No other model has a higher mean than base." in text


@pytest.mark.parametrize(
    "rouge, chrf, status, expected",
    [
        (math.nan, 0.5, None, ["Ranked by chrF, since nothing was judged.", "no reference has a word in it; chrF"]),
        (math.nan, math.nan, None, ["no reference has a text", "let step 4 judge"]),
        (0.5, 0.5, "refusal", ["since no judgement gave a score"]),
    ],
    ids=["no words", "no text", "all refused"],
)
def test_why_nothing_better_could_be_measured_is_said(rouge, chrf, status, expected):
    models = {"base": [0.1] * 8, "checkpoint-1": [0.2] * 8}
    columns = {name: dict.fromkeys(models, [value] * 8) for name, value in (("rouge1", rouge), ("chrf", chrf), ("status", status))}  # fmt: skip
    _, text = sentences(models, **columns)
    assert all(part in text for part in expected) and "same samples with each" not in text


def test_samples_without_a_measure_and_models_without_an_answer_are_counted():
    models = {
        "base": [0.1] * 8 + [math.nan] * 2,
        "checkpoint-1": [0.2] * 8 + [math.nan] * 2,
        "checkpoint-2": [None] * 10,
    }
    _, text = sentences(models)
    assert "Left out as they have no ROUGE-1, since no reference of theirs has a word in it: 2 samples." in text
    assert "checkpoint-2 is shown but not ranked: it has a score of only 0%" in text
    assert "No model has an answer" in sentences({"base": [None] * 3})[1]


def test_samples_that_are_too_few_to_be_held_out_are_said_to_be():
    _, text = sentences({"base": [0.1], "checkpoint-1": [0.2]}, holdout=0.5)
    assert "No samples were held out, as 1 sample cannot be split so" in text and "--holdout 0.5" not in text


@pytest.mark.parametrize(
    "num_judged, num_samples, share", [(18, 19, "94.7%"), (947, 1000, "94.7%"), (9499, 10_000, "94.99%")]
)
def test_a_share_under_a_limit_is_not_rounded_to_it(num_judged, num_samples, share):
    columns = {"overall": {"base": [5.0] * num_judged + [math.nan] * (num_samples - num_judged)}}
    _, text = sentences({"base": [0.5] * num_samples}, **columns)
    assert f"only {share} of the answers of base have a judgement, under 95%" in text


def test_rounding_makes_no_other_claim():
    assert (say_share(0.996), say_share(1), say_share(0.004), say_share(1 - 1e-12)) == ("99.6%", "100%", "0.4%", "100%")
    assert [say_p(p) for p in (0.0496, 0.05, 0.050004, 0.00099, 1)] == [
        "= 0.0496",
        "= 0.050",
        "= 0.050004",
        "< 0.001",
        "= 1.000",
    ]
    assert [say_number(value, 3) for value in (0.00004, -0.00004, -1e-18, 0.12345)] == [
        "0.00004",
        "-0.00004",
        "0.000",
        "0.123",
    ]


HELD_OUT = [is_held_out(f"sample{i:04d}", 0.5) for i in range(20)]


@pytest.mark.parametrize(
    "models, settings, headline",
    [
        ({"base": [0.5] * 8, "checkpoint-1": [0.1] * 8}, {}, "Keep base: checkpoint-1 is worse"),
        ({"base": [0.5] * 8, "checkpoint-1": [0.5] * 8}, {}, "Keep base: checkpoint-1 is not shown to be better"),
        ({"base": [0.1] * 8, "checkpoint-1": [0.5] * 8}, {}, "Use checkpoint-1: better than base"),
        ({"base": [0.5] * 8, "mine": [0.1] * 8, "checkpoint-1": [0.1] * 8}, {}, "Keep base: every other model is worse"),
        ({"base": [0.5] * 8, "a": [None] * 8}, {}, "Use base: the only model that is ranked"),
        (
            {"base": [0.1] * 8, "checkpoint-1": [0.5] * 8, "checkpoint-2": [0.3] * 8, "a": [None] * 8}, {},
            "Use checkpoint-1: better than every other model that is ranked",
        ),
        ({"a": [0.1, 0.3] * 8, "b": [0.3, 0.1] * 8}, {}, "Use b: no mean is higher, and these samples cannot tell it from a"),
        (
            {"base": [0.1] * 8, "a": [0.5] * 8, "b": [0.0, 0.05, *[0.8] * 6]}, {},
            "Use a: the highest mean of the models that are shown to be better than base",
        ),
        (
            {"a": [0.3 if held else 0.5 for held in HELD_OUT], "b": [0.2 + i / 100 if held else 0.4 for i, held in enumerate(HELD_OUT)]},
            {"holdout": 0.5},
            f"Use a: chosen on {20 - sum(HELD_OUT)} samples; the other {sum(HELD_OUT)} samples do not show that it is the best",
        ),
        (
            {"base": [0.1] * 20, "a": [0.1 if held else 0.5 for held in HELD_OUT]}, {"holdout": 0.5},
            f"Keep base: a, chosen on {20 - sum(HELD_OUT)} samples, is not shown to be better on the other {sum(HELD_OUT)} samples",
        ),
    ],
    ids=range(10),
)  # fmt: skip
def test_the_first_line_claims_no_more_than_is_so(models, settings, headline):
    assert sentences(models, **settings)[0].headline == headline


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_few_samples_models_and_others_are_spoken_of_in_sentences(num):
    for num_models in (1, 2, 6):
        models = {f"checkpoint-{i}": [0.1 * i + 0.01 * k for k in range(num)] + [None] for i in range(num_models)}
        models |= {"base": [0.1] * (num + 1)}
        for holdout in (0.0, 0.5):
            verdict, text = sentences(models, holdout=holdout)
            assert num == 0 or "left out: 1 sample." in text


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["👍🎉", "   "])
def test_references_that_rouge_cannot_read_have_a_report(run_dir, reference, capsys):
    from finetuning.inference.metrics import score_predictions

    for path in (run_dir / "predictions").glob("*.jsonl"):
        rows = [{**row, "references": [reference]} for row in read_rows(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        info = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**info, "metrics": score_predictions(rows)}))
    main(ScoreArguments(output_dir=[str(run_dir)]))
    assert ("chrF" if reference.strip() else "no reference has a text") in capsys.readouterr().out


# --- In two lines -----------------------------------------------------------------------------------------------------

SURE = [8, 7, 8, 7] * 5
UNSURE = [7, 8, 9, 6] * 5  # by a point better or worse than SURE, and the same on average


def headline_of(run_dir, **settings):
    samples = load_samples(run_dir)
    return build_headline(decide(samples, **settings), summarize(samples), load_opinions([run_dir], samples).pairs)


@pytest.mark.parametrize(
    "scores, english, korean",
    [
        ([[2] * 20, [5] * 20, SURE], "Use checkpoint-10: better than every other model", "checkpoint-10 사용"),
        ([[2] * 20, UNSURE, SURE], "Use checkpoint-9: it had less training than checkpoint-10, and these samples cannot tell them apart", "checkpoint-9 사용"),
        ([[2] * 20, [7, 6, 7, *SURE[3:]], SURE], "Use checkpoint-10: the highest mean, though these samples cannot tell it from checkpoint-9", "평균이 가장 높지만"),
        ([UNSURE, SURE, UNSURE], "Keep base: no checkpoint is shown to be better", "base 유지"),
        ([SURE, [3] * 20, [2] * 20], "Keep base: every checkpoint is worse", "base 유지"),
    ],
)  # fmt: skip
def test_the_first_line_says_which_model_to_use(run_dir, scores, english, korean):
    for name, its_scores in zip(("base", "checkpoint-9", "checkpoint-10"), scores, strict=True):
        add_evaluations(run_dir, name, its_scores)
    headline = headline_of(run_dir)
    first, reason, *_ = say_headline(headline)
    assert first == english and f" {headline.use}" in first and korean in say_headline(headline, "ko")[0]
    other = "checkpoint-9" if headline.use == "base" else "base"
    expected = rf"The judge's overall score: {headline.use} has a mean of \d\.\d\d points of 10 \(95 % .* on 20 samples; .*{other}"
    assert re.match(expected, reason) or headline.use == "base"


def test_the_reason_says_how_sure_the_difference_is(run_dir):
    first, reason = say_headline(headline_of(run_dir))
    assert first == "Use checkpoint-10: better than every other model"
    assert reason.startswith(
        "ROUGE-1, as nothing was judged: checkpoint-10 has a mean of 1.000 (95 % 1.000 to 1.000) on 20 samples; that is"
    )
    assert "more than base (95 %" in reason and reason.endswith("; hardly chance, p < 0.001).")


@pytest.mark.parametrize(
    "models, expected",
    [({"checkpoint-9": GOOD}, "Use checkpoint-9: the only model with answers"), ({"base": [None] * 3}, "No model can be named")],
)  # fmt: skip
def test_the_first_line_where_there_is_nothing_to_compare(tmp_path, models, expected):
    lines = say_headline(headline_of(make_run(tmp_path / "run", models)))
    assert lines[0] == expected and len(lines) == 2 and lines[1].endswith(".")


def test_a_choice_that_the_held_out_samples_contradict_is_not_used(run_dir):
    held_out = [is_held_out(f"sample{i:04d}", 0.5) for i in range(20)]
    add_evaluations(run_dir, "base", [2 if held else 9 for held in held_out])
    add_evaluations(run_dir, "checkpoint-9", [8] * 20)
    add_evaluations(run_dir, "checkpoint-10", [3 if held else 4 for held in held_out])
    num = sum(held_out)
    headline = headline_of(run_dir, holdout=0.5)
    assert (
        say_headline(headline)[0]
        == f"Use checkpoint-9: base, chosen on {20 - num} samples, is worse than it on the other {num} samples"
    )
    lines = say_headline(headline_of(run_dir, holdout=0.5, baseline="checkpoint-9"))
    assert lines[0] == f"Keep checkpoint-9: base, chosen on {20 - num} samples, is worse on the other {num} samples"


def test_a_model_that_does_not_stop_is_used_with_a_warning(run_dir):
    path = run_dir / "predictions" / "checkpoint-10.jsonl"
    path.write_text(path.read_text().replace('"stop"', '"length"', 5))
    assert say_headline(headline_of(run_dir))[2].startswith(
        "Only 75% of the answers of checkpoint-10 ended by themselves"
    )


# --- Judges and people ------------------------------------------------------------------------------------------------


@pytest.fixture
def full_run(tmp_path):
    models = ["base", "checkpoint-1", "checkpoint-2"]
    run_dir = write_run(tmp_path / "run", 40, models)
    add_all_kinds_of_rows(run_dir, models)
    return run_dir


@pytest.mark.slow
def test_pairs_juries_and_people_reach_the_verdict_and_the_tables(full_run, capsys):
    main(ScoreArguments(output_dir=[str(full_run)]))
    printed = capsys.readouterr().out
    assert printed.startswith("Use checkpoint-2: better than every other model\n")
    pairs = pd.read_csv(full_run / "scores" / "pairs.csv").iloc[0]
    assert (pairs["first"], pairs["second"], pairs["judge"], pairs["losses"]) == (
        "checkpoint-1",
        "checkpoint-2",
        "strict",
        0,
    )
    assert pairs["wins"] + pairs["ties"] == summarize(load_samples(full_run))["judged"].loc["checkpoint-2"]
    assert pairs["p"] == pytest.approx(scipy.stats.binomtest(int(pairs["wins"]), int(pairs["wins"])).pvalue)
    contradiction = (
        f"Side by side, strict prefers checkpoint-1 to checkpoint-2 in {pairs['wins']} of the {pairs['wins']} samples"
    )
    verdict = json.loads((full_run / "scores" / "verdict.json").read_text())
    assert verdict["use"] == "checkpoint-2" and verdict["headline"][0] in printed
    assert any(
        contradiction in line and "the scores say that checkpoint-2 is better" in line for line in verdict["headline"]
    )
    assert any(contradiction in line for line in verdict["judges_and_people"]) and contradiction in printed
    jury = pd.read_csv(full_run / "scores" / "jury.csv")
    assert len(jury) == 6 and set(jury["judge"]) == {"strict", "kind"}
    means = jury.pivot(index="model", columns="judge", values="mean")
    assert (means["kind"] > means["strict"]).all() and jury["alpha"].between(0.3, 1).all()
    people = pd.read_csv(full_run / "scores" / "people.csv").set_index("model")
    assert people.loc["all models", "scores"] == 24 and people.loc["checkpoint-1", "scores"] == 12
    assert people.loc["all models", "spearman_low"] < people.loc["all models", "spearman"] <= 1
    assert "over 24 scores" in printed and all(re.search("[가-힣]", line) for line in verdict["judges_and_people_ko"])
    assert 'id="judges-and-people"' in (full_run / "report.html").read_text()
    shutil.rmtree(full_run / "qa_evaluation_results")
    main(ScoreArguments(output_dir=[str(full_run)]))
    assert len(list((full_run / "scores").glob("*.csv"))) == 3
    assert 'id="judges-and-people"' not in (full_run / "report.html").read_text()


def test_a_judge_of_a_jury_whose_rows_are_lost_is_named(full_run):
    (full_run / "qa_evaluation_results/judges/strict/checkpoint-2.jsonl").unlink()
    with pytest.raises(InputError, match="judges has no rows of strict for checkpoint-2, which are in its mean"):
        load_opinions([full_run], load_samples(full_run))
    alone = measure_jury({"strict": [{"clarity": 3}, {"clarity": 5}]})
    assert alone.means == {"strict": 4} and np.isnan([alone.alpha, alone.disagreement]).all()


def test_what_was_said_of_answers_that_have_changed_does_not_count(full_run):
    path = full_run / "predictions" / "checkpoint-1.jsonl"
    path.write_text("".join(json.dumps({**row, "prediction": "new"}) + "\n" for row in read_rows(path)))
    samples = load_samples(full_run)
    opinions = load_opinions([full_run], samples)
    assert opinions.pairs[0].counts.num_pairs == 0 and set(opinions.jury["model"]) == {"base", "checkpoint-2"}
    assert len(opinions.scores) == 12 and opinions.num_changed == 12
    said = say_opinions(opinions, decide(samples))
    assert "No pair of answers of checkpoint-1 and checkpoint-2 was judged in both orders." in said
    assert "Scores of people of answers that have changed since, which are left out: 12." in said


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("pairs/checkpoint-1--checkpoint-2.jsonl", '"first"', '"best"', r"jsonl:1 cannot be read: `evaluation.better`"),
        ("pairs/checkpoint-1--checkpoint-2.json", '"models"', '"modles"', r"2.json has no `identity.models`"),
        ("judges/kind/base.jsonl", '"score"', '"socre"', r"jsonl:1 has no `evaluation.relevance.score`"),
        ("human_agreement.json", '"model"', '"modle"', r"has no `scores.0.model`; start 4_openai_test.py with --human"),
    ],
)
def test_damaged_files_of_judges_and_people_are_named(full_run, file, old, new, fault):
    path = full_run / "qa_evaluation_results" / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=fault):
        load_opinions([full_run], load_samples(full_run))


@pytest.mark.slow
def test_a_preference_side_by_side_decides_where_the_scores_do_not(full_run):
    samples = load_samples(full_run)
    samples.loc[samples["model"] == "checkpoint-1", "overall"] = samples[samples["model"] == "checkpoint-2"][
        "overall"
    ].tolist()
    pairs = load_opinions([full_run], samples).pairs
    pairs[0].first, pairs[0].second = "checkpoint-2", "checkpoint-1"
    lines = say_headline(build_headline(decide(samples), summarize(samples), pairs))
    assert lines[0] == "Use checkpoint-2: the scores cannot tell it from checkpoint-1, and side by side it is preferred"
    assert "Side by side, strict prefers checkpoint-2 to checkpoint-1" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("answers", [GOOD[:1], [None, None], GOOD], ids=["one sample", "all failed", "one model"])
def test_degenerate_runs_have_a_report(tmp_path, answers):
    for models in ({"checkpoint-9": answers}, {"base": answers, "checkpoint-9": answers}):
        run_dir = make_run(tmp_path / f"run{len(models)}", models)
        main(ScoreArguments(output_dir=[str(run_dir)]))
        assert (run_dir / "report.html").is_file()


def test_predictions_that_were_not_finished_are_refused(run_dir):
    path = run_dir / "predictions" / "base.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in info.items() if k != "metrics"}))
    with pytest.raises(InputError, match="step 3 has not finished"):
        load_samples(run_dir)


def test_a_criterion_can_have_the_name_of_any_column(run_dir):
    names = [*load_samples(run_dir), *summarize(load_samples(run_dir)), *(title.replace(" ", "_") for title in format_table(summarize(load_samples(run_dir))))]  # fmt: skip
    names += ["tokens", "judge_overall", "judge_expected", "overall", "cost", "coverage", "a", "a_low", "a_low_low"]
    criteria = [name for name in dict.fromkeys(names) if name.isidentifier()]
    for name in ("base", "checkpoint-9", "checkpoint-10"):
        file = RowFile(run_dir / "qa_evaluation_results" / f"{name}.jsonl", {"judge_model": "m", "criteria": criteria})
        for row in read_rows(run_dir / "predictions" / f"{name}.jsonl"):
            evaluation = {c: {"explanation": "e", "score": 1 + i % 10} for i, c in enumerate(criteria)}
            file.append({
                "id": row["id"], "prediction_hash": prediction_hash(row), "status": "ok", "evaluation": evaluation,
                "expected": None, "usage": None, "cost": None, "possible_cost": 0.0, "error": None,
            })  # fmt: skip
        file.close()
    summary = summarize(load_samples(run_dir))
    table = format_table(summary)
    assert table.columns.is_unique and table.loc["base", "tokens"].startswith("5.0")
    _, titles, rows = build_models(summary, use=None)
    assert titles == ["model", *table] and len(titles) == len(rows[0].cells)
    found = dict(zip(titles, rows[0].cells, strict=True))
    for i, criterion in enumerate(criteria):
        title = describe_measure(criterion_column(criterion))[0]
        assert title.startswith(criterion.replace("_", " ")) and found[title].number == 1 + i % 10
    assert plot_criteria(summary) is not None


@pytest.mark.slow
def test_a_name_that_is_a_formula_is_a_text_in_the_csvs(run_dir):
    for path in (run_dir / "predictions").glob("base.*"):
        path.rename(path.with_stem("=HYPERLINK(1)"))
    path = run_dir / "predictions" / "checkpoint-9.jsonl"
    rows = [{**row, "error": "no reply\r=HYPERLINK(1)"} for row in read_rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(ScoreArguments(output_dir=[str(run_dir)]))
    for name in ("summary", "comparisons", "samples"):
        path = run_dir / "scores" / f"{name}.csv"
        assert b"\r" not in path.read_bytes()  # which ends a row for a spreadsheet
        table = pd.read_csv(path)
        cells = [cell for column in table for cell in table[column] if isinstance(cell, str)]
        assert "'=HYPERLINK(1)" in cells and not any(cell[0] in "=+-@\t\r" for cell in cells)
        assert all(pd.api.types.is_numeric_dtype(table[column]) for column in table if column in ("rouge1", "difference", "low"))  # fmt: skip
    assert "=HYPERLINK(1)" in json.loads((run_dir / "scores" / "verdict.json").read_text())["means"]


# --- Several runs -----------------------------------------------------------------------------------------------------


def test_no_run_at_all_is_refused():
    with pytest.raises(InputError, match="output_dirs is empty"):
        find_runs([])


@pytest.mark.slow
def test_runs_are_joined_on_their_samples(tmp_path, capsys):
    full = make_run(tmp_path / "full", {"base": POOR, "checkpoint-9": FAIR})
    lora = make_run(tmp_path / "lora", {"base": POOR[:10], "checkpoint-9": GOOD[:10]})
    samples = load_runs([full, lora])
    verdict = decide(samples, "full/base")
    assert list(verdict.means) == ["full/base", "full/checkpoint-9", "lora/base", "lora/checkpoint-9"]
    assert verdict.best == "lora/checkpoint-9" and verdict.num_samples == 10
    main(ScoreArguments(output_dir=[str(full), str(lora)]))
    printed = capsys.readouterr().out
    assert "lora/checkpoint-9" in printed and (tmp_path / "report.html").is_file() and "Against full/base" in printed
    page = (tmp_path / "report.html").read_text()
    assert "3 rows;\n20 test samples, 2 models;" in page and "3 rows;\n10 test samples, 2 models;" in page


def test_runs_with_other_test_data_are_refused(tmp_path):
    first = make_run(tmp_path / "a", {"base": GOOD})
    second = make_run(tmp_path / "b", {"base": GOOD})
    for path in (second / "predictions").iterdir():
        path.write_text(path.read_text().replace("sample00", "other00"))
    with pytest.raises(InputError, match="were tested on other samples"):
        load_runs([first, second])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    samples = load_runs([make_run(tmp_path / arm / "seed1", {"base": GOOD[:3]}) for arm in ("full", "lora")])
    assert samples["model"].unique().tolist() == ["full/seed1/base", "lora/seed1/base"]


# --- On the command line, and in the notebook -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("judged", [True, False])
def test_the_notebook_runs(run_dir, tmp_path, judged):
    if judged:
        for name in ("base", "checkpoint-9", "checkpoint-10"):
            add_evaluations(run_dir, name, [9, 8] * 10)
    notebook = tmp_path / "executed.ipynb"
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar", "-p", "output_dirs", run_dir]
    run([*papermill, "5_score_notebook.ipynb", notebook])
    outputs = [o for cell in json.loads(notebook.read_text())["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == (6 if judged else 5)
    printed = ["".join(o["text"]) for o in outputs if o.get("name") == "stdout"]
    assert printed[0].startswith(("Use checkpoint-", "Keep base")) and "Ranked by" in printed[1]
    assert (run_dir / "report.html").is_file()


def test_the_notebook_is_committed_thin_and_without_outputs():
    notebook = json.loads((ROOT / "5_score_notebook.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        code = cell["cell_type"] == "code"
        assert not code or not re.search(r"^\s*(def|for|while|class) ", "".join(cell["source"]), re.MULTILINE)
    assert any("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"])


@pytest.mark.slow
def test_tables_are_printed_and_written_for_other_tools(run_dir):
    for name in ("base", "checkpoint-9", "checkpoint-10"):
        add_evaluations(run_dir, name, [9, 8] * 10)
    result = subprocess.run(
        [sys.executable, "-m", "finetuning.report", "--output_dir", run_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "ROUGE-1" in result.stdout and f"The report is at {run_dir}/report.html" in result.stdout, result.stderr
    samples = load_samples(run_dir)
    summary = pd.read_csv(run_dir / "scores" / "summary.csv", index_col="model")
    assert summary.loc["checkpoint-9", "rouge1"] == pytest.approx(summarize(samples).loc["checkpoint-9", "rouge1"])
    assert len(pd.read_csv(run_dir / "scores" / "comparisons.csv")) == 3
    assert len(pd.read_csv(run_dir / "scores" / "samples.csv")) == 60
    verdict = json.loads((run_dir / "scores" / "verdict.json").read_text())
    assert verdict["best"] == decide(samples).best and verdict["sentences"] == say_verdict(decide(samples))


@pytest.mark.slow
def test_a_baseline_that_was_not_tested_is_named(run_dir):
    result = subprocess.run(
        [sys.executable, "-m", "finetuning.report", "--output_dir", run_dir, "--baseline", "checkpoint-99"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "no answers of `checkpoint-99`; there are those of base" in result.stderr
