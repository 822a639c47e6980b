from dataclasses import dataclass

import pytest

from finetuning.config.checks import Checked, argument, find_faults, refuse, refuse_each


@dataclass
class Arguments(Checked):
    share: float = argument(0.5, "A share.", at_least=0, at_most=1)
    rate: float | None = argument(None, "A rate.", more_than=0)
    kind: str = argument("a", "A kind.", ["a", "b"])

    RULES = (
        refuse(lambda share, kind: kind == "b" and share > 0.5, "share: {share} is too much for kind: {kind}"),
        refuse_each({"rate": None}, lambda kind: kind == "b", "{key} has no effect with kind: b"),
    )


def texts(**values) -> list[str]:
    return [text for _, text in find_faults([Arguments], values)]


def test_all_faults_are_found_at_once():
    wrong = {"share": 2, "rate": float("nan")}
    said = ["share: must be at least 0 and at most 1, got 2", "rate: must be a finite number, got nan"]
    assert texts(**wrong) == said
    with pytest.raises(ValueError, match="; ".join(said)):
        Arguments(**wrong)
    assert texts(share=0.6, rate=1, kind="b") == [
        "share: 0.6 is too much for kind: b",
        "rate has no effect with kind: b",
    ]


def test_a_key_that_is_missing_or_out_of_its_limits_has_no_part_in_the_rules():
    assert texts(rate=0, kind="b") == ["rate: must be more than 0, got 0"]
    assert texts(rate=1) == texts(share=0.6) == []


def test_an_integer_beyond_all_floats_is_out_of_its_limits_like_another():
    assert texts(share=10**400)[0].startswith("share: must be at least 0 and at most 1, got 1000")
