"""
Answers: what becomes of the tokens that an engine generates, and which prompts a model cannot take.
"""

import collections
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetuning.data.chat import control_token_ids, decode_answer
from finetuning.data.prompts import Prompt
from finetuning.models.config import load_model_config
from finetuning.models.files import is_adapter


@dataclass
class Answer:
    """What a model answered to one prompt; a row of predictions has these fields, in this order."""

    id: str
    prediction: str | None
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: str  # stop, length or error
    removed_tokens: dict[str, int] = field(default_factory=dict)  # control tokens that were taken out, by name
    error: str | None = None

    @classmethod
    def failed(cls, prompt: Prompt, error: str) -> "Answer":
        return cls(prompt.id, None, len(prompt.token_ids), 0, "error", error=error)


class Engine(Protocol):
    """What generates answers with one model."""

    def answer(self, prompts: list[Prompt]) -> Iterator[Answer]:
        """Yield one answer for each prompt, as they finish."""

    def close(self) -> None:
        """Give back the memory that the model takes."""


def check_prompts(
    prompts: list[Prompt], model: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **kwargs
) -> tuple[list[Prompt], list[Answer]]:
    """Prompts that a model can take, and answers of kind `error` for the others.

    Args:
        model: Folder or Hub id.
        kwargs: More of AutoConfig.from_pretrained's.
    """
    config = load_model_config(model, **kwargs)
    pairs, config = config.is_encoder_decoder, config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or float("inf")
    # an adapter may bring embeddings of new tokens, which the config of its base does not count
    vocabulary = max(config.vocab_size, len(tokenizer) if is_adapter(model) else 0)
    good, faulty = [], []
    for prompt in prompts:
        number, largest = len(prompt.token_ids), max(prompt.token_ids, default=0)
        error = prompt.error
        if error is None and not number:
            error = "the chat template makes no token of this sample"
        elif error is None and largest >= vocabulary:
            error = f"token {largest} is not in the model's vocabulary of {vocabulary}"
        elif error is None and pairs and max(number, max_new_tokens) > context:
            error = f"{number} prompt tokens, or {max_new_tokens} new ones, exceed the {context} positions of the model"
        elif error is None and not pairs and number + max_new_tokens > context:
            error = f"{number} prompt tokens and {max_new_tokens} new ones exceed the context of {context}"
        if error is None:
            good.append(prompt)
        else:
            faulty.append(Answer.failed(prompt, error))
    return good, faulty


class AnswerReader:
    """Makes answers of the token ids or the text that an engine has generated, in the same way for every engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.control_ids = control_token_ids(tokenizer, config.eos_token_id)

    def read(self, prompt: Prompt, new_ids: list[int]) -> Answer:
        """Cut at the first end token, take control tokens out, and cut at the first stop string."""
        end = next((place for place, token_id in enumerate(new_ids) if token_id in self.config.eos_token_id), None)
        if end is not None:
            new_ids = new_ids[: end + 1]
        counts = collections.Counter(token_id for token_id in new_ids if token_id in self.control_ids)
        removed = {self.tokenizer.convert_ids_to_tokens(token_id): n for token_id, n in counts.items()}
        whole = self.tokenizer.decode(new_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        visible = decode_answer(self.tokenizer, new_ids, self.control_ids)
        return self._cut(prompt, whole, visible, removed, len(new_ids), end is not None)

    def read_text(self, prompt: Prompt, text: str, num_new_tokens: int, stopped: bool) -> Answer:
        """The same for an engine that gives text only, in which control tokens may stand by their names."""
        names = self.tokenizer.convert_ids_to_tokens(sorted(self.control_ids))
        removed = {token: text.count(token) for token in names if token in text}
        visible = text
        for token in removed:
            visible = visible.replace(token, "")
        return self._cut(prompt, text, visible, removed, num_new_tokens, stopped)

    def _cut(
        self, prompt: Prompt, whole: str, visible: str, removed: dict[str, int], num_new_tokens: int, stopped: bool
    ) -> Answer:
        """An answer that ends before its first stop string, which may be white space or a control token of `whole`."""
        stops = self.config.stop_strings or []
        places = [visible.index(stop) for stop in stops if stop in visible]
        text = visible[: min(places, default=None)].strip()
        reason = "stop" if stopped or any(stop in whole for stop in stops) else "length"
        return Answer(prompt.id, text, len(prompt.token_ids), num_new_tokens, reason, removed)
