"""Numbers in sentences."""

from finetuning.wording import say_number, say_p, say_share


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
