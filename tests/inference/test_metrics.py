import json
import re
import statistics
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

from finetuning.inference.metrics import (
    SIMILARITIES,
    compute_chrf,
    compute_rouge,
    score_predictions,
    sequence_repetition,
)
from finetuning.inference.rouge import RougeTokenizer
from finetuning.inference.words import TOKENIZERS, detect_language

DIALOGSUM = Path(__file__).parents[3] / "shared/data/dialogsum/test.jsonl"  # https://github.com/cylnlp/dialogsum

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
    assert compute_rouge(["#Person1#은 밥을 짓고 #Person2#는 책을 읽었다."], [[other]])["rouge1"] < 0.25


def test_korean_is_compared_by_morphemes():
    assert RougeTokenizer("morphemes").tokenize("#Person1#은 시청에서 3시에") == [
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


@pytest.mark.parametrize("odd", ["\0", "\x1b", "\ud800", "\r\n", "\u2028"])
def test_what_stands_behind_a_control_character_or_half_a_character_is_read(odd):
    assert RougeTokenizer("morphemes").tokenize(f"시청{odd}에서") == ["시청", "에서"]


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
    assert sequence_repetition("a b c") is None


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
    assert (metrics["limit_rate"], metrics["empty_rate"]) == (0.5, 0)
    assert metrics["per_sample"]["id"] == ["1", "2"] and metrics["per_sample"]["rouge1"] == [1, 1]


def test_no_answer_at_all_gives_no_score():
    metrics = score_predictions([row(prediction=None, finish_reason="error")])
    counts = {key: value for key, value in metrics.items() if key.startswith("num_")}
    assert counts == {"num_samples": 1, "num_errors": 1}
    others = [value for key, value in metrics.items() if key not in (*counts, "per_sample", "rouge_tokenizer")]
    assert all(value is None or value == {} for value in others) and not any(metrics["per_sample"].values())


def test_an_empty_answer_scores_zero_and_what_it_does_not_define_is_none():
    metrics = score_predictions([row(prediction="")])
    assert (metrics["rouge1"], metrics["chrf"], metrics["empty_rate"], metrics["length_ratio"]) == (0, 0, 1, 0)
    assert metrics["seq_rep_4"] is None and metrics["distinct_2"] is None


def test_a_reference_without_words_defines_no_score():
    metrics = score_predictions([row(references=["..."]), row(id="2", references=["a b c", "!"])])
    assert metrics["per_sample"]["rouge1"] == [None, 1] and metrics["rouge1"] == 1
    assert metrics["per_sample"]["length_ratio"] == [None, 2]


def test_answers_that_are_all_the_same_have_few_different_bigrams():
    same = [row(id=str(i), prediction="the same words again") for i in range(30)]
    unlike = [row(id=str(i), prediction=f"{i} words of number {i + 100}") for i in range(30)]
    assert score_predictions(same)["distinct_2"] == pytest.approx(3 / 90)
    assert score_predictions(unlike)["distinct_2"] == pytest.approx((30 + 1 + 1 + 30) / 120)


def test_scores_do_not_depend_on_how_many_rows_are_read_at_once(monkeypatch):
    rows = [row(id=str(i), prediction=f"a b {i % 7}", references=["a b 3", f"{i}"]) for i in range(40)]
    rows[5] = row(id="5", prediction=None, finish_reason="error")
    whole = score_predictions(iter(rows))
    monkeypatch.setattr("finetuning.inference.metrics.CHUNK", 3)
    pieces = score_predictions(rows)
    assert pieces["per_sample"] == whole["per_sample"] and pieces["tokenizers"] == whole["tokenizers"]
    numbers = [key for key, value in whole.items() if isinstance(value, (int, float))]
    assert {key: pieces[key] for key in numbers} == pytest.approx({key: whole[key] for key in numbers})


def test_removed_tokens_are_counted_by_name():
    rows = [row(removed_tokens={"<|im_end|>": 1}), row(id="2", removed_tokens={"<|im_end|>": 1, "<|im_start|>": 3})]
    assert score_predictions(rows)["removed_tokens"] == {"<|im_end|>": 2, "<|im_start|>": 3}


def test_the_tokenizer_is_named_and_says_what_it_cannot_read():
    result = compute_rouge(["The cat sat", "고양이가 앉았다"], [["A cat sat."], ["고양이가 앉았다."]])
    assert [name.split()[0].strip(",") for name in result["tokenizers"]] == ["words", "morphemes"]
    assert result["discarded_characters"] == 0
    assert compute_rouge(["I am 🙂🙂🙂"], [["I am"]])["discarded_characters"] == pytest.approx(
        0.25
    )  # 3 of 6, and 0 of 3
    assert compute_rouge(["हिन्दी में"], [["हिन्दी में"]])["discarded_characters"] == 0  # vowel signs belong to their letters


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer, tokens", [("words", ["#person1#", "cat이", "왔다"]), ("characters", ["#person1#", "c", "a", "t", "이", "왔", "다"])])  # fmt: skip
def test_words_and_characters_are_counted_on_request(tokenizer, tokens):
    assert RougeTokenizer(tokenizer).tokenize("#Person1#: cat이 왔다!") == tokens
    assert compute_rouge(["cat이"], [["cat이"]], tokenizer=tokenizer)["rouge1"] == 1
    with pytest.raises(ValueError, match="auto, words, morphemes, characters"):
        compute_rouge(["a"], [["a"]], tokenizer="letters")


def test_chrf_is_sacrebleus_for_each_reference():
    from sacrebleu import sentence_chrf

    prediction, references = ENGLISH[0], [ENGLISH[1], "Nobody went."]
    scores = [sentence_chrf(prediction, [reference]).score / 100 for reference in references]
    found = compute_chrf([prediction], [references])
    assert found["chrf"] == pytest.approx(statistics.fmean(scores))
    assert (found["chrf_first"], found["chrf_max"]) == pytest.approx((scores[0], max(scores)))


def dialogsum() -> list[dict]:
    if not DIALOGSUM.is_file():
        pytest.skip("DialogSum is not here; it is not part of the repository")
    return [json.loads(line) for line in DIALOGSUM.read_text(encoding="utf-8").splitlines()]


def percent(result: dict) -> list[float]:
    return [100 * result[rouge_type] for rouge_type in ("rouge1", "rouge2", "rougeL")]


def test_the_first_three_turns_of_dialogsum_score_what_they_score_elsewhere():
    """LEAD-3 with speaker tags, mean of three references, stemming."""
    rows = dialogsum()
    lead = [" ".join(re.split(r"\n+", row["dialogue"].strip())[:3]) for row in rows]
    references = [[row[f"summary{i}"] for i in (1, 2, 3)] for row in rows]
    assert percent(compute_rouge(lead, references)) == pytest.approx([26.95, 6.71, 20.39], abs=0.1)


def test_people_agree_on_dialogsum_as_they_do_elsewhere():
    """Each summary against the other two."""
    rows = dialogsum()
    summaries = [[row[f"summary{i}"] for i in (1, 2, 3)] for row in rows]
    scores = [
        percent(compute_rouge([s[i] for s in summaries], [[s[j] for j in range(3) if j != i] for s in summaries]))
        for i in range(3)
    ]
    assert [statistics.fmean(one) for one in zip(*scores, strict=True)] == pytest.approx([53.4, 26.7, 45.0], abs=0.1)


def test_without_references_only_what_needs_them_is_undefined():
    row = {
        "id": "1",
        "prediction": "민수는 집에 갔다 민수는 집에 갔다",
        "references": [],
        "finish_reason": "stop",
        "num_new_tokens": 9,
    }
    metrics = score_predictions([row])
    assert {name for name, value in metrics.items() if value is None} == {
        *(f"{name}{variant}" for name in SIMILARITIES for variant in ("", "_first", "_max")), "length_ratio"
    }  # fmt: skip
    assert metrics["seq_rep_4"] > 0 and list(metrics["tokenizers"]) == [TOKENIZERS["morphemes"]]
