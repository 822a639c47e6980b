"""
The words and morphemes of English and Korean texts, which metrics count. Imports without torch.
"""

import functools
import importlib.metadata
import statistics
import unicodedata

import mecab_ko
import regex
from nltk.stem.porter import PorterStemmer

TAG = regex.compile(r"#\w+#")  # a speaker tag of DialogSum is one word
# Scripts written without spaces count by character.
CHARACTER = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}]"
LETTER = rf"(?:(?!{CHARACTER})[\p{{L}}\p{{N}}])"
WORD = regex.compile(rf"{CHARACTER}\p{{M}}*|{LETTER}(?:{LETTER}|\p{{M}})*")
SINGLE = regex.compile(r"[\p{L}\p{N}]\p{M}*")
HANGUL = regex.compile(r"[\uac00-\ud7a3]")
MEANINGLESS = regex.compile(r"[\s\p{P}]")  # spaces and punctuation, which no metric of words counts
# Scripts that are written without spaces give characters in `words`. All that is not Korean gives words in `morphemes`.
TOKENIZERS = {
    "words": "words, English ones stemmed (Porter)",
    "morphemes": f"morphemes (mecab-ko {importlib.metadata.version('mecab-ko')})",
    "characters": "characters",
}
TOKENIZER_OF_LANGUAGE = {"en": "words", "ko": "morphemes"}


def detect_language(text: str) -> str:
    """`ko` where at least a fifth of the letters are Hangul syllables, else `en`, which is any other language too."""
    letters = sum(c.isalpha() for c in TAG.sub("", text))
    return "ko" if letters and len(HANGUL.findall(text)) >= letters / 5 else "en"


@functools.cache
def _morphemes() -> mecab_ko.Tagger:
    return mecab_ko.Tagger("-Owakati")  # morphemes with spaces between them


@functools.cache
def _stem(word: str) -> str:
    return PorterStemmer().stem(word)


@functools.lru_cache(maxsize=64)  # an answer is compared with several references, and measured by itself
def tokenize(text: str, tokenizer: str) -> tuple[list[str], float]:
    """Tokens, and the share of the characters that belong to no token."""
    text = unicodedata.normalize("NFC", text).lower().encode("utf-8", "replace").decode()  # no half of a character
    tokens, position = [], 0
    for tag in TAG.finditer(text):
        tokens += [*_split(text[position : tag.start()], tokenizer), tag[0]]
        position = tag.end()
    tokens += _split(text[position:], tokenizer)
    meant = len(MEANINGLESS.sub("", text))
    kept = sum(len(MEANINGLESS.sub("", token)) for token in tokens)
    if tokenizer != "characters":  # as rouge_score stems: ASCII words of more than three letters
        tokens = [_stem(token) if len(token) > 3 and token.isascii() and token[0] != "#" else token for token in tokens]
    return tokens, 1 - kept / meant if meant else 0.0


def _split(text: str, tokenizer: str) -> list[str]:
    if tokenizer == "morphemes" and text.strip():
        text = _morphemes().parse(text.replace("\0", " "))  # which would end the text for it
    return (SINGLE if tokenizer == "characters" else WORD).findall(text)


def choose_tokenizer(prediction: str, references: list[str], tokenizer: str) -> str:
    """Name of the tokenizer: the one that is asked for; for `auto`, that of the language of references or answer.

    Raises:
        ValueError: No tokenizer has this name.
    """
    if tokenizer == "auto":
        return TOKENIZER_OF_LANGUAGE[detect_language(" ".join(references or [prediction]))]
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"the tokenizer is auto, {', '.join(TOKENIZERS)}; got {tokenizer!r}")
    return tokenizer


def discarded_share(texts: list[str], tokenizer: str) -> float:
    """Mean share of the characters of each text, spaces and punctuation aside, that are in no token."""
    return statistics.fmean(tokenize(text, tokenizer)[1] for text in texts)
