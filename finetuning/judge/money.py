"""
What judging costs: the table of prices, and the budget, which each attempt at a request draws on. Without torch.

    set aside ---> sent ---> settled    a reply has come that says what it used: it costs that much
        |           |
        |           +------> refused    the endpoint has refused it, by a status of 400 or more: it costs nothing
        |           |
        |           +------> lost       no reply has come, or it does not say what it used: it may have been billed, and
        |                               counts with all that was set aside, on later starts too (`possible_cost`)
        +------------------> stopped    it never left: it costs nothing
"""

import math
import re
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

from finetuning.errors import InputError
from finetuning.judge.rubric import read_yaml

PRICES = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens of each kind, and the share of them that a batch costs."""

    prompt: float
    cached_prompt: float
    completion: float
    batch: float
    date: str

    def cost(self, usage: dict, batch: bool = False) -> float:
        """US dollars of what a reply used."""
        cached = usage.get("cached_tokens", 0)
        dollars = (
            (usage["prompt_tokens"] - cached) * self.prompt
            + cached * self.cached_prompt
            + usage["completion_tokens"] * self.completion
        ) / 1e6
        return dollars * self.batch if batch else dollars


def load_price(path: str | None, model: str) -> Price | None:
    """The price of a judge; None where the table has none.

    Raises:
        InputError: There is no such table, or an entry of it is not a price.
    """
    file = Path(path) if path is not None else PRICES
    table = read_yaml(file, "prices")
    if not isinstance(table, dict) or not isinstance(table.get("models"), dict):
        raise InputError(f"prices {file}: write `date:` and `models:`, as in finetuning/judge/{PRICES.name}")
    if not isinstance(table.get("date"), date):
        raise InputError(f"prices {file}: `date:` must say of which day the prices are, as in 2026-06-04")
    kinds = [field.name for field in fields(Price) if field.name != "date"]
    for name, entry in table["models"].items():
        if not isinstance(entry, dict) or set(entry) != set(kinds):
            raise InputError(f"prices {file}: {name} needs {', '.join(kinds)}, and nothing else")
        for kind, value in entry.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf or (kind == "batch" and value > 1):
                rule = "a share, as 0.5" if kind == "batch" else "a number of at least 0, as 0.75"
                raise InputError(f"prices {file}: {kind} of {name} must be {rule}, got {value}")
    entry = table["models"].get(model) or table["models"].get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))
    return None if entry is None else Price(**entry, date=str(table["date"]))


class Budget:
    """Money. What a request could cost at most is set aside before it leaves, so that the limit cannot be passed.

    Args:
        limit: US dollars, of earlier starts too; None means that there is no limit.
        spent: What existing rows have cost.
    """

    def __init__(self, limit: float | None, spent: float):
        self.limit, self.spent, self._set_aside = limit, spent, 0.0
        self.exhausted = False  # something was not sent for want of money

    def start_from(self, spent: float) -> None:
        """Count anew, with nothing set aside."""
        self.spent, self._set_aside = spent, 0.0

    def set_aside(self, worst_cost: float) -> bool:
        """Whether a request that costs at most this much may be sent."""
        if self.limit is not None and self.spent + self._set_aside + worst_cost > self.limit:
            return False
        self._set_aside += worst_cost
        return True

    def settle(self, worst_cost: float, cost: float) -> None:
        """The request for which `worst_cost` was set aside has cost this much."""
        self._set_aside -= worst_cost
        self.spent += cost
