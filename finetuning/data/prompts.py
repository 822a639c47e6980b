"""
Prompts: the token ids of a test sample, up to where the model's answer begins; and the seed of that answer.
"""

import array
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetuning.data.chat import fit_to_template


@dataclass(slots=True)
class Prompt:
    """The tokens of one test sample's question; `error` says why it has no tokens."""

    id: str
    token_ids: Sequence[int] = ()  # up to where the model's answer begins
    error: str | None = None


def encode_prompts(tokenizer: PreTrainedTokenizerBase, samples: Iterable[dict]) -> list[Prompt]:
    """Tokenise the questions of samples. One that the chat template refuses has the reason as its `error`."""
    prompts = []
    for sample in samples:
        prompt = Prompt(sample["id"])
        try:
            template = {"tools": sample.get("tools"), "add_generation_prompt": True}
            messages = fit_to_template(tokenizer, sample["prompt"], **template)
            ids = tokenizer.apply_chat_template(messages, **template)["input_ids"]
            prompt.token_ids = array.array("i", ids)  # a list would need ten times the memory
        except (TemplateError, ValueError, TypeError) as error:
            prompt.error = f"the chat template cannot phrase this sample: {error}"
        prompts.append(prompt)
    return prompts


def seed_of(seed: int, sample_id: str) -> int:
    """The seed of a sampled answer, which depends on nothing but the run's seed and the sample."""
    return int.from_bytes(hashlib.sha256(f"{seed} {sample_id}".encode()).digest()[:8]) >> 1
