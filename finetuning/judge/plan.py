"""
The plan: what is about to be sent to each judge, and what it costs at most and about. Imports without torch.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from finetuning.errors import InputError
from finetuning.judge.money import Price, load_price
from finetuning.judge.work import Work

BYTES_PER_TOKEN = 3.5  # of UTF-8; within 8 % of o200k_base on DialogSum (English) and the demo's data (Korean)
TOKENS_PER_CRITERION = 45  # a name, two sentences, a score, and the braces around them
COUNTED_PROMPTS = 100  # the others are taken to have as many tokens for a byte as these
SECONDS_FOR_ENCODING = 5.0  # tiktoken fetches an encoding the first time


@dataclass
class Plan:
    """What is about to be sent to one judge."""

    model: str  # the judge's name at the endpoint
    price: Price | None
    completion_tokens: float  # expected of one reply
    max_tokens: int  # of one reply
    num_requests: int = 0
    prompt_bytes: int = 0  # of all requests, whose schema is a part of the prompt
    tokens_per_byte: float = 1 / BYTES_PER_TOKEN  # of the prompts
    how_counted: str = ""

    def worst_cost(self, num_bytes: int, max_tokens: int, batch: bool = False) -> float:
        """US dollars that one request can cost at most; no token is shorter than a byte."""
        if self.price is None:
            return 0.0
        return self.price.cost({"prompt_tokens": num_bytes, "completion_tokens": max_tokens}, batch)

    def describe(self) -> str:
        prompt = round(self.prompt_bytes * self.tokens_per_byte)
        completion = round(self.num_requests * min(self.completion_tokens, self.max_tokens))
        text = (
            f"plan for {self.model}: {self.num_requests:,} requests, about {prompt:,} prompt tokens "
            f"({self.how_counted}) and {completion:,} completion tokens (expected; reasoning comes on top)"
        )
        if self.price is None:
            text += "\ncost: unknown, as the price table has no such model; add it with --prices if it is paid for"
        elif self.num_requests:
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
            # every reply cut off, and asked for once more with twice the limit
            cut_off = {"prompt_tokens": 2 * prompt, "completion_tokens": 3 * self.num_requests * self.max_tokens}
            text += (
                f"\ncost: about ${self.price.cost(usage):.2f}, as a batch (--mode batch) "
                f"${self.price.cost(usage, batch=True):.2f}; ${self.price.cost(cut_off):.2f} if every reply had to be "
                f"cut off at --max_tokens, twice (prices of {self.price.date})"
            )
        return text


def make_plans(work: Work, prices: str | None, max_tokens: int, max_cost: float | None) -> dict[str, Plan]:
    """What is to be sent to each judge, and what it costs by a table of prices (None means this project's own).

    Raises:
        InputError: The price table cannot be read, or a judge is not in it and there is a limit of money.
    """
    num_criteria = 1 if work.jobs[0].compares is not None else len(work.jobs[0].form.criteria)
    plans = {
        model: Plan(model, load_price(prices, model), TOKENS_PER_CRITERION * num_criteria, max_tokens)
        for model in dict.fromkeys(job.judge_model for job in work.jobs)
    }
    for plan in plans.values():
        if max_cost is not None and plan.price is None:
            raise InputError(f"max_cost needs the price of `{plan.model}`, which the price table lacks; see --prices")
    counted: dict[str, list[str]] = {model: [] for model in plans}
    for job, item in work.requests():
        plan = plans[job.judge_model]
        plan.num_requests += 1
        plan.prompt_bytes += job.form.count_bytes(item.data)
        if plan.num_requests <= COUNTED_PROMPTS:
            counted[job.judge_model].append(job.form.instructions + item.data)
    for model, texts in counted.items():
        if texts:
            count, plans[model].how_counted = find_token_counter(model)
            plans[model].tokens_per_byte = sum(map(count, texts)) / sum(len(text.encode()) for text in texts)
    return plans


def describe_plans(plans: dict[str, Plan], work: Work, num_pending: int, collects: bool) -> str:
    """Lines that say what is about to be sent, unless this start only `collects`, and what needs not be."""
    shared = f"{work.num_shared} answers are another model's, word for word: judged once, with a row for each model\n"
    ties = f"{work.num_ties // 2} pairs hold the same answer twice: a tie, which no judge is asked about\n"
    pending = f"{num_pending} requests are under way in batches\n"
    sends = not collects and any(plan.num_requests for plan in plans.values())
    text = (shared if work.num_shared else "") + (ties if work.num_ties else "") + (pending if num_pending else "")
    return text + "".join(f"{plan.describe()}\n" for plan in plans.values() if sends)


def describe_first_request(work: Work) -> str:
    """One full prompt, of the first answer that would be sent."""
    for job, item in work.requests():
        messages = job.form.build_messages(item.data)
        prompt = "".join(f"\n\n--- {message['role']}\n{message['content']}" for message in messages)
        return f"\nthe first request, about {item.row['id']} of {job.name}:{prompt}"
    return "nothing is missing, so nothing would be sent"


def find_token_counter(model: str) -> tuple[Callable[[str], int], str]:
    """What counts the tokens of a text for a model, and a few words that say how.

    tiktoken, where it knows the model and can get its encoding; else an estimate from the length.
    """
    import tiktoken  # only now: half of the starts of step 4 need no count

    found: list[tiktoken.Encoding | Exception] = []

    def load() -> None:
        try:
            found.append(tiktoken.encoding_for_model(model))
        # KeyError: not a model that it knows; else there is no network, or a page in place of the file
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=load, daemon=True)  # the download has no time limit of its own
    thread.start()
    thread.join(SECONDS_FOR_ENCODING)
    encoding = found[0] if found else None
    if isinstance(encoding, tiktoken.Encoding):
        encode = encoding.encode_ordinary
        return lambda text: len(encode(text)), f"counted with {encoding.name} of tiktoken"
    is_unknown = isinstance(encoding, KeyError)
    why = f"tiktoken {'does not know this model' if is_unknown else 'could not fetch its encoding'}"
    how = f"estimated, one for {BYTES_PER_TOKEN} bytes, as {why}"
    return lambda text: math.ceil(len(text.encode()) / BYTES_PER_TOKEN), how
