"""
The samples of a test split: rows that ask the same are one, named by a hash of what it holds. Imports without torch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from datasets import Dataset

from finetuning.data.files import load_split
from finetuning.data.row_format import FORMAT_KEYS, RowFormat, format_of
from finetuning.data.rows import describe_bad_rows, to_sample
from finetuning.errors import InputError

ASKING = ("user", "human", "tool", "observation", "function_response")  # roles of messages that an assistant answers


class TestSamples(Sequence[dict]):
    """Samples of a test split, {"id", "prompt", "references"}, ordered by `id`; each is read when it is asked for."""

    __test__ = False  # no test of pytest's

    def __init__(self, dataset: Dataset, row_format: RowFormat, rows: list[tuple[str, list[int]]]):
        self.dataset, self.row_format = dataset, row_format
        self._rows = rows  # id, and the rows that ask the same
        self._places = {sample_id: place for place, (sample_id, _) in enumerate(rows)}

    @property
    def ids(self) -> list[str]:
        return [sample_id for sample_id, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> dict: ...
    @overload
    def __getitem__(self, place: slice) -> "TestSamples": ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            return TestSamples(self.dataset, self.row_format, self._rows[place])
        sample_id, rows = self._rows[place]
        return {"id": sample_id, **_join_rows(self.dataset, self.row_format, rows)}

    @property
    def have_references(self) -> bool:
        return bool(self.row_format.reference_keys)

    def rows_of(self, place: int) -> list[int]:
        """The rows of the split that a sample is made of."""
        return self._rows[place][1]

    def by_id(self, sample_id: str) -> dict:
        return self[self._places[sample_id]]


def _join_rows(dataset: Dataset, row_format: RowFormat, rows: list[int]) -> dict:
    """Rows that ask the same, as one sample."""
    samples = [to_sample(dataset[row], row_format) for row in rows]
    references = dict.fromkeys(reference for sample in samples for reference in sample["references"])
    return {**samples[0], "references": list(references)}


def load_test_samples(config: dict) -> TestSamples:
    """Load the test split as samples, ordered by `id`.

    Rows that ask the same are one sample with several references, as in DialogSum's test split on the Hub. An id is a
    hash of the sample's content, so it stays the same wherever the sample stands in the file, and the first N samples
    are a random choice that contains the first N - 1. How a run phrases a question (system_prompt, question_template)
    is no part of it, so that runs which phrase it in other ways are compared.

    Args:
        config: The keys of ScriptArguments, as `run.json` has them.
    """
    name, split = config["dataset_name"], config["dataset_test_split"]
    dataset, where = load_split(name, split, config.get("dataset_config")), f"{name} ({split})"
    given = {key: config[key] for key in FORMAT_KEYS if config.get(key) is not None}
    row_format = _format_of_test(dataset, where, given)
    by_prompt: dict[bytes, list[int]] = {}
    ids: dict[bytes, str] = {}  # of the first row of each prompt, by itself
    for index, row in enumerate(dataset):
        try:
            sample, plain = (to_sample(row, form) for form in (row_format, row_format.unphrased))
        except InputError:
            raise InputError(describe_bad_rows(dataset, row_format, where)) from None
        prompt = hashlib.sha256(json.dumps(_question_of(sample)).encode()).digest()
        by_prompt.setdefault(prompt, []).append(index)
        ids.setdefault(prompt, _id_of(plain))
    samples: dict[str, list[int]] = {}
    for prompt, rows in by_prompt.items():
        joined = len(rows) > 1
        sample_id = _id_of(_join_rows(dataset, row_format.unphrased, rows)) if joined else ids[prompt]
        if sample_id in samples:  # the phrasing alone tells them apart
            sample_id = _id_of(_join_rows(dataset, row_format, rows))
        samples[sample_id] = rows
    return TestSamples(dataset, row_format, sorted(samples.items()))


def _format_of_test(dataset: Dataset, where: str, given: dict) -> RowFormat:
    """How the rows of a test split are read. It may have no answers: of conversations, the first one shows it."""
    row_format = format_of(dataset, where, {**given, "needs_answer": False})
    if row_format.kind == "messages":
        match dataset[0][row_format.question_key]:
            case [*_, dict(last)] if last.get("role", last.get("from")) in ASKING:
                return replace(row_format, reference_keys=())
    return row_format


def _question_of(sample: dict) -> list:
    return [sample["prompt"], *([sample["tools"]] if "tools" in sample else [])]


def _id_of(sample: dict) -> str:
    references = sorted(set(sample["references"]))
    content = json.dumps([*_question_of(sample), references], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
