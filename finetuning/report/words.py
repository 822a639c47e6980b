"""
What step 5 says in English and Korean: the words stand in words.yaml, and the code says which of them.

Imports without torch.
"""

import functools
from pathlib import Path

import yaml

LANGUAGES = ("en", "ko")


@functools.cache
def read_words(part: str, language: str) -> dict:
    """The texts of one part of words.yaml in one language, by their names; titles of columns are a dict in it."""
    texts = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))[part]
    return {key: text[language] for key, text in texts.items() if language in text}


class Words:
    """Sentences of one part in one language, and those that all parts share."""

    def __init__(self, part: str, language: str):
        self._texts = {**read_words("common", language), **read_words(part, language)}

    def __call__(self, key: str, **figures: str | float | None) -> str:
        """The sentence of this name, with these figures in it."""
        return self._texts[key].format(**figures)

    def __contains__(self, key: str) -> bool:
        return key in self._texts

    def samples(self, num: int) -> str:
        """A number of samples."""
        return self("sample" if num == 1 else "samples", num=num)
