"""
Numbers in sentences and tables, as texts that rounding does not make untrue. Imports without torch.
"""

LEVEL = 0.05  # a difference is shown where its p is under it


def say_number(value: float, decimals: int, sign: str = "") -> str:
    """A number with these decimals, or with as many more as show that it is not 0; one that is 0 but for the error of floats is.

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
    others = [other for other in others if abs(value - other) > 1e-9]  # nearer is the error of floats
    while any(f"{value:.{decimals}{kind}}" == f"{other:.{decimals}{kind}}" for other in others):
        decimals += 1
    return f"{value:.{decimals}{kind}}"


def plural(num: int, thing: str) -> str:
    """A number of things.

    >>> plural(1, "sample"), plural(0, "sample"), plural(1200, "answer")
    ('1 sample', '0 samples', '1,200 answers')
    """
    return f"{num:,} {thing}{'' if num == 1 else 's'}"
