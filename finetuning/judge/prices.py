"""
What judging costs: the price table, how tokens are counted before anything is sent, and the plan that is printed.

Imports without torch.
"""

import math
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import yaml

from finetuning.errors import InputError

PRICES = Path(__file__).with_name("prices.yaml")
BYTES_PER_TOKEN = 3.5  # of UTF-8; within 8 % of o200k_base on DialogSum (English) and the demo's data (Korean)
TOKENS_PER_CRITERION = 45  # a name, two sentences, a score, and the braces around them
COUNTED_PROMPTS = 100  # the others are taken to have as many tokens for a byte as these
SECONDS_FOR_ENCODING = 5.0  # tiktoken fetches an encoding the first time


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
        InputError: There is no such table, or an entry of it is none.
    """
    file = Path(path) if path is not None else PRICES
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"prices {file} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise InputError(f"prices {file}: brackets within brackets, too deep to read") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise InputError(f"prices {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict) or not isinstance(table.get("models"), dict):
        raise InputError(f"prices {file}: write `date:` and `models:`, as in {PRICES.name} of this project")
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


def find_token_counter(model: str) -> tuple[Callable[[str], int], str]:
    """What counts the tokens of a text for a model, and a few words that say how.

    tiktoken, where it knows the model and can get its encoding; else an estimate from the length.
    """
    import tiktoken  # only now: half of the starts of step 4 need no count

    found: list = []

    def load() -> None:
        try:
            found.append(tiktoken.encoding_for_model(model))
        except (
            Exception
        ) as error:  # KeyError: not a model that it knows; else no network, or a page in place of the file
            found.append(error)

    thread = threading.Thread(target=load, daemon=True)  # the download has no time limit of its own
    thread.start()
    thread.join(SECONDS_FOR_ENCODING)
    if found and isinstance(found[0], tiktoken.Encoding):
        encoding = found[0]
        return lambda text: len(encoding.encode_ordinary(text)), f"counted with {encoding.name} of tiktoken"
    if found and isinstance(found[0], KeyError):
        why = "tiktoken does not know this model"
    else:
        why = "tiktoken could not fetch its encoding"
    return (
        lambda text: math.ceil(len(text.encode()) / BYTES_PER_TOKEN),
        f"estimated, one for {BYTES_PER_TOKEN} bytes, as {why}",
    )


def measure_tokens_per_byte(count: Callable[[str], int], texts: Iterable[str]) -> float:
    """Tokens for a byte of UTF-8 over some texts; the estimate's where there are none."""
    num_tokens = num_bytes = 0
    for text in texts:
        num_tokens += count(text)
        num_bytes += len(text.encode())
    return num_tokens / num_bytes if num_bytes else 1 / BYTES_PER_TOKEN


@dataclass
class Plan:
    """What is about to be sent to one judge.

    Args:
        num_requests, prompt_bytes: Of all requests, whose schema is a part of the prompt.
        tokens_per_byte: Of the prompts.
        completion_tokens: Expected of one reply.
        max_tokens: Of one reply.
    """

    model: str
    num_requests: int
    prompt_bytes: int
    tokens_per_byte: float
    completion_tokens: float
    max_tokens: int
    how_counted: str
    price: Price | None

    def describe(self) -> str:
        prompt = round(self.prompt_bytes * self.tokens_per_byte)
        completion = round(self.num_requests * min(self.completion_tokens, self.max_tokens))
        lines = [
            f"plan for {self.model}: {self.num_requests:,} requests, about {prompt:,} prompt tokens ({self.how_counted}) "
            f"and {completion:,} completion tokens (expected; reasoning comes on top)"
        ]
        if self.price is None:
            lines.append("cost: unknown, as the price table has no such model; add it with --prices if it is paid for")
        elif self.num_requests:
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
            # every reply cut off, and asked for once more with twice the limit
            most = {"prompt_tokens": 2 * prompt, "completion_tokens": 3 * self.num_requests * self.max_tokens}
            lines.append(
                f"cost: about ${self.price.cost(usage):.2f}, as a batch (--mode batch) ${self.price.cost(usage, batch=True):.2f}; "
                f"${self.price.cost(most):.2f} if every reply had to be cut off at --max_tokens, twice (prices of {self.price.date})"
            )
        return "\n".join(lines)
