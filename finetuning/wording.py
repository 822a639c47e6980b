"""
Numbers in sentences and tables, as texts that rounding does not make untrue, and how two records differ.

Imports without torch.
"""

from collections.abc import Mapping

LEVEL = 0.05  # a difference is shown where its p is under it
MIN_KEPT = 0.9  # share of what was learned; where rounding keeps less, a warning says so


def say_number(value: float, decimals: int, sign: str = "") -> str:
    """A number with these decimals, or with as many more as show that it is not 0, but for the error of floats.

    >>> say_number(0.1234, 3), say_number(0.00012, 3), say_number(-1e-17, 3)
    ('0.123', '0.0001', '0.000')
    """
    while abs(value) >= 1e-9 and float(f"{value:.{decimals}f}") == 0:
        decimals += 1
    return f"{value:{sign}z.{decimals}f}"


def say_share(share: float, limit: float = 1.0) -> str:
    """A share in percent, with as many decimals as tell it from none, from all, and from a limit that it is not.

    >>> say_share(0.947, 0.95), say_share(0.996), say_share(1.0), say_share(0.5)
    ('94.7%', '99.6%', '100%', '50%')
    """
    return _apart(share, (0.0, 1.0, limit), "%", 0)


def say_p(p: float, decimals: int = 3) -> str:
    """A p-value behind its sign, with as many decimals as tell it from the level at which a difference is shown.

    >>> say_p(0.0496), say_p(0.0501), say_p(0.2), say_p(0.0004)
    ('= 0.0496', '= 0.0501', '= 0.200', '< 0.001')
    """
    smallest = 10**-decimals
    return f"< {smallest:.{decimals}f}" if p < smallest else f"= {_apart(p, (LEVEL,), 'f', decimals)}"


def _apart(value: float, others: tuple[float, ...], kind: str, decimals: int) -> str:
    distinct = [other for other in others if abs(value - other) > 1e-9]  # nearer is the error of floats
    while any(f"{value:.{decimals}{kind}}" == f"{other:.{decimals}{kind}}" for other in distinct):
        decimals += 1
    return f"{value:.{decimals}{kind}}"


def plural(num: int, thing: str) -> str:
    """A number of things.

    >>> plural(1, "sample"), plural(0, "sample"), plural(1200, "answer")
    ('1 sample', '0 samples', '1,200 answers')
    """
    return f"{num:,} {thing}{'' if num == 1 else 's'}"


def describe_differences(old: Mapping, new: Mapping) -> str:
    """In which keys two records differ; nothing where they are the same.

    >>> describe_differences({"seed": 1, "dtype": "float32"}, {"seed": 2, "dtype": "float32", "top_p": 0.9})
    'seed was 1 and is 2; top_p was None and is 0.9'
    """
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in keys)
