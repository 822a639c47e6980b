"""
Personal data: what is masked and what is kept is in pii_samples.jsonl, one labelled text a line.
"""

import json
import re
import runpy
import sys
import time
import unicodedata

import pytest
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.data.jamo import clean_jamo, find_jamo
from finetuning.data.pii import PII_TOKENS, mask_pii

BENCHMARK, SAMPLES_FILE = ROOT / "benchmarks/masking.py", ROOT / "tests/data/pii_samples.jsonl"
SAMPLES = [json.loads(line) for line in SAMPLES_FILE.read_text(encoding="utf-8").splitlines()]
KNOWN_FAILURES = [sample for sample in SAMPLES if sample.get("known_failure")]
RIGHT = [sample for sample in SAMPLES if not sample.get("known_failure")]
TAGS = ["#Person1#", "#Person2#", "#Location#", *PII_TOKENS.values()]
# Text that comes close to what is masked: pieces of samples, words, marks and tags in any order
PIECES = [piece for sample in SAMPLES for piece in re.findall(r"\S+\s?", sample["text"])]
NEARLY_PII = st.lists(st.one_of(st.sampled_from([*PIECES, *TAGS, *" -.,()#@+\n"]), st.text("0123456789", max_size=5)))


@pytest.mark.parametrize("sample", RIGHT, ids=lambda sample: sample["text"])
def test_sample_is_masked_exactly(sample):
    assert mask_pii(sample["text"]) == sample["masked"]


@pytest.mark.parametrize("sample", KNOWN_FAILURES, ids=lambda sample: sample["text"])
def test_known_failure_still_fails(sample):
    """One that no longer fails must lose its mark here, and its line in docs/cleaning.md."""
    assert mask_pii(sample["text"]) != sample["masked"]


def test_every_kind_and_100_look_alikes_are_in_the_samples():
    positives = [sample for sample in RIGHT if sample["masked"] != sample["text"]]
    negatives = [sample for sample in RIGHT if sample["masked"] == sample["text"]]
    assert len(positives) >= 100 and len(negatives) >= 100
    assert {sample["kind"] for sample in positives} == set(PII_TOKENS)


def test_a_wrong_end_of_a_span_counts_as_wrong_and_missed():
    samples = [
        {"text": "Call 010-1234-5678.", "masked": "Call #PhoneNumber#."},
        {"text": "Call 010-1234-5678 now.", "masked": "Call #PhoneNumber#."},
        {"text": "Call #PhoneNumber# now.", "masked": "Call #PhoneNumber# now."},
    ]
    measure = runpy.run_path(str(BENCHMARK))["measure"]
    assert measure(samples)["phone_number"] == (1, 1, 1)


@pytest.mark.slow
def test_table_in_the_documentation_is_the_printed_one():
    printed = run([sys.executable, str(BENCHMARK)]).stdout
    assert printed == run([sys.executable, str(BENCHMARK), str(SAMPLES_FILE)]).stdout
    assert re.search(r"^\| all \| \d+ \| 0\.\d\d \| 0\.\d\d \|$", printed, re.MULTILINE)
    assert printed.strip() in (ROOT / "docs" / "cleaning.md").read_text(encoding="utf-8")


@settings(max_examples=300, deadline=None, database=None)
@given(NEARLY_PII.map("".join))
def test_masking_twice_changes_nothing_more(text):
    masked = mask_pii(text)
    assert mask_pii(masked) == masked


@settings(max_examples=300, deadline=None, database=None)
@given(NEARLY_PII)
def test_tags_are_never_altered(pieces):
    """Without the new tokens, the tags before and after are the same, in the same order."""
    text = "".join(pieces)
    speakers = r"#Person\d#|#Location#"
    assert re.findall(speakers, mask_pii(text)) == re.findall(speakers, text)
    for token in PII_TOKENS.values():
        assert mask_pii(text).count(token) >= text.count(token)


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["N", "Cs"], exclude_characters="@")))
def test_text_without_digits_at_or_jamo_is_unchanged(text):
    if find_jamo(text) or unicodedata.normalize("NFC", text) != text:
        return
    assert mask_pii(text) == text
    assert clean_jamo(text) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        "1", "-", " ", "1-", "1 ", "010-", "+1", "+82 10 ", "900101-1", "900101-1234567", "4111 ", "1990-01-01 ", "a@", "a.", "a",
        "Aaaa ", "1 Aaaa ", "서울 ", "가로 ", "서울 강남구 가로 ", "가동 1번지", "12가3456", "ㅋ", "ㅋ ", "ㅋ.", "ㄱ, ",
        "(555) 987-6543", "+821098765432", "750630-2XXXXXX", "passport 123456789 ", "born in 1990 ", "call 555-0147",
        "order 070-8123-4567", "1990-01-01/", "#", "'ㄱ'", "\u1100",
    ],
)  # fmt: skip
def test_time_is_linear(unit):
    text = unit * (100_000 // len(unit))
    for function in (mask_pii, clean_jamo):
        start = time.process_time()
        function(text)
        assert time.process_time() - start < 1


def test_other_scripts_are_not_composed():
    decomposed = unicodedata.normalize("NFD", "café")
    assert clean_jamo(decomposed) == mask_pii(decomposed) == decomposed
