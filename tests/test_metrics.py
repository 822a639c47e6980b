import math
import statistics

import pytest
from rouge_score import rouge_scorer

from finetuning.metrics import RougeTokenizer, compute_rouge, detect_language, score_predictions, sequence_repetition

ENGLISH = (
    "#Person1# invites Jimmy to go workout and persuades him into working out on arms at 3:30.",
    "Jimmy's working arms with #Person1#, who persuaded him at 3:30",
)
KOREAN = "#Person1#은 민수에게 금요일 회의가 시청으로 바뀌었다고 알린다."


def test_english_scores_are_those_of_rouge_score():
    prediction, reference = ENGLISH
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, prediction)
    ours = compute_rouge([prediction], [[reference]])
    assert {t: ours[t] for t in theirs} == pytest.approx({t: score.fmeasure for t, score in theirs.items()})


def test_equal_korean_sentences_score_one_and_unlike_ones_with_the_same_tags_do_not():
    other = "#Person1#이 사과를 먹자 #Person2#가 웃었습니다."
    assert compute_rouge([KOREAN], [[KOREAN]])["rougeL"] == 1
    assert compute_rouge(["#Person1#은 밥을 짓고 #Person2#는 책을 읽었다."], [[other]])["rouge1"] < 0.3


def test_korean_is_compared_by_morphemes():
    assert RougeTokenizer("ko").tokenize("#Person1#은 시청에서 3시에") == [
        "#person1#",
        "은",
        "시청",
        "에서",
        "3",
        "시",
        "에",
    ]
    same_noun = compute_rouge(["시청에서"], [["시청으로"]])["rouge1"]
    assert same_noun == pytest.approx(0.5)  # one of two morphemes


def test_several_references_give_mean_first_and_best():
    result = compute_rouge(["a b"], [["a b", "a x", "x y"]])
    assert (result["rouge1"], result["rouge1_first"], result["rouge1_max"]) == (pytest.approx(0.5), 1, 1)
    assert result["rouge1_per_sample"] == [pytest.approx(0.5)]


def test_means_are_plain_means_over_samples():
    result = compute_rouge(["a b", "x"], [["a b"], ["y"]])
    assert result["rouge1"] == statistics.fmean([1, 0])


@pytest.mark.parametrize("text, language", [("Hello", "en"), ("안녕", "ko"), ("LLM을 SFT로 튜닝", "ko"), ("#Person1#: ", "en"), ("", "en")])  # fmt: skip
def test_language_is_told_by_script(text, language):
    assert detect_language(text) == language


def test_scripts_without_spaces_count_by_character():
    assert compute_rouge(["今日は晴れ"], [["今日は雨"]])["rouge1"] == pytest.approx(2 * 3 / (5 + 4))


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert sequence_repetition("a b c d e f") == 0
    assert sequence_repetition("a b c d " * 5) == pytest.approx(1 - 4 / 17)
    assert sequence_repetition("a b") == 0


def row(**changes):
    base = {"id": "1", "references": ["a b c"], "prediction": "a b c", "num_new_tokens": 4, "finish_reason": "stop"}
    return {**base, **changes}


def test_answers_that_are_missing_are_counted_and_in_no_mean():
    rows = [
        row(),
        row(id="2", finish_reason="length", num_new_tokens=8),
        row(id="3", prediction=None, finish_reason="error"),
    ]
    metrics = score_predictions(rows)
    assert (metrics["num_samples"], metrics["num_errors"]) == (3, 1)
    assert (metrics["rouge1"], metrics["stop_rate"], metrics["mean_new_tokens"]) == (1, 0.5, 6)
    assert set(metrics["per_sample"]) == {"1", "2"}


def test_no_answer_at_all_gives_no_score():
    metrics = score_predictions([row(prediction=None, finish_reason="error")])
    assert metrics["rouge1"] is None and metrics["stop_rate"] is None and metrics["per_sample"] == {}


def test_an_empty_answer_scores_zero():
    metrics = score_predictions([row(prediction="")])
    assert metrics["rouge1"] == 0 and not math.isnan(metrics["seq_rep_4"])
