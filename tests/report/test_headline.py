"""Which model to use, in two lines."""

import re

import pytest
from conftest import make_run
from judged_run import FAIR, GOOD, POOR, add_evaluations

from finetuning.report.headline import build_headline
from finetuning.report.opinions import load_opinions
from finetuning.report.samples import load_samples
from finetuning.report.sentences import say_headline
from finetuning.report.tables import summarize
from finetuning.report.verdict import decide, is_held_out


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


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
