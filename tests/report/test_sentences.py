"""Each sentence is true, and the first line claims no more than is so."""

import math
import re

import pandas as pd
import pytest

from finetuning.report.headline import build_headline
from finetuning.report.sentences import say_headline, say_verdict
from finetuning.report.verdict import decide, is_held_out


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


def test_what_rounding_loses_is_said_and_warned_of_where_it_is_too_much():
    scores = {"base": [0.1] * 20, "checkpoint-1": [0.5] * 20}
    for share, number_of_warnings in ((0.513, 1), (0.8996, 1), (0.93, 0)):
        kept = {"base": [{}] * 20, "checkpoint-1": [{"bfloat16": share, "float16": 1.0001}] * 20}
        verdict, text = sentences(scores, kept=kept)
        shown = {0.513: "51%", 0.8996: "89.96%", 0.93: "93%"}[share]
        assert f"Rounded to bfloat16, to nearest as most tools do, checkpoint-1 keeps {shown} of what it has" in text
        assert "Rounded to float16, to nearest as most tools do, checkpoint-1 keeps 100% of what" in text
        headline = build_headline(verdict, pd.DataFrame({"stopped": 1.0}, index=list(scores)), [])
        for language in ("en", "ko"):
            lines = say_headline(headline, language)
            assert len(lines) == 2 + number_of_warnings and all(shown in line for line in lines[2:])
    assert "Rounded to" not in sentences(scores)[1]
