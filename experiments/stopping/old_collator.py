"""
The answer-only collator of trl 0.8, rebuilt from its behaviour: padding is found by the token's id, not by its place.

It is here to be measured, not to be used: trl's own of today pads labels apart from the ids.
"""

import torch
from transformers import PreTrainedTokenizerBase

from finetuning.data.tokens import IGNORED


class OldAnswerOnlyCollator:
    """Batches of `input_ids`, whose labels are what follows the last response template of a row.

    Labels are a copy of the ids in which each padding *token* is ignored, wherever it stands. Where padding and the end
    of an answer are one token, no row has its end in the loss. A row without the response template has no labels.

    Args:
        tokenizer: Its pad token fills short rows on the right.
        response_template: The text between a question and its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, response_template: str):
        self.tokenizer = tokenizer
        self.template = torch.tensor(tokenizer.encode(response_template, add_special_tokens=False))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = {"input_ids": [row["input_ids"] for row in rows]}
        batch = self.tokenizer.pad(ids, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[labels == self.tokenizer.pad_token_id] = IGNORED
        for row in labels:
            row[: self._answer_start(row)] = IGNORED
        return {**batch, "labels": labels}

    def _answer_start(self, labels: torch.Tensor) -> int:
        size = len(self.template)
        if len(labels) < size:
            return len(labels)
        places = (labels.unfold(0, size, 1) == self.template).all(dim=1).nonzero()
        return int(places[-1]) + size if len(places) else len(labels)
