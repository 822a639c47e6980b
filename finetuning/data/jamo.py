"""
Bare Hangul jamo, such as ㅋㅋㅋ and ㅠㅠ: what they are, and a text without them. Imports without torch.
"""

import re
import unicodedata

CONJOINING = "\u1100-\u11ff\ua960-\ua97c\ud7b0-\ud7fb"  # a decomposed (NFD) syllable is two or three of these
JAMO = rf"\u3131-\u318e\uffa0-\uffdc{CONJOINING}"  # and the compatibility jamo of a keyboard, full and half width
DECOMPOSED = re.compile(rf"[가-힣]?[{CONJOINING}]+")
# A syllable of older Korean, such as ᄒᆞᆫ, which has no composed form
OLD_SYLLABLE = r"[\u1100-\u115f\ua960-\ua97c][\u1160-\u11a7\ud7b0-\ud7c6][\u11a8-\u11ff\ud7cb-\ud7fb]?"
# ㅠ.ㅠ and ㅡ_ㅡ are one string
JAMO_STRING = re.compile(
    rf"(?P<syllable>{OLD_SYLLABLE})"
    rf"|(?:(?!{OLD_SYLLABLE})[{JAMO}])+(?:(?<=[ㅠㅜㅡㅇㅎㅋㅗ])[._^;]{{1,2}}(?=[ㅠㅜㅡㅇㅎㅋㅗ])[{JAMO}]+)*"
)
ALPHABET = "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎ"
LAUGHING = "ㅋㅎㅠㅜㅡㅗ"
QUOTES = {"'": "'", '"': '"', "‘": "’", "“": "”", "「": "」", "『": "』", "`": "`"}
# What follows a letter that is talked about: ㄱ자, ㄷ자형, ㄹ 받침, ㅂ은, ㄱ부터 ㅎ까지
LETTER_NOUN = re.compile(
    r"자(?:[형로가는를의도와집]|\s|$|[,.!?])|\s?(?:받침|발음|소리|모양|형태|키(?![가-힣])|으?로 (?:시작|끝))"
)
PARTICLE = re.compile(r"(?:은|는|을|를|의|과|와|부터|까지)(?![가-힣])")
WEAK_PARTICLE = re.compile(r"(?:이|가|도|로|에|만)(?![가-힣])")
LETTER_LIST = re.compile(rf"(?<![{JAMO}가-힣])[ㄱ-ㅣ](?:(?:\s?[,·/~∼-]\s?|[과와]\s)[ㄱ-ㅣ](?![{JAMO}]))+")
LABEL = re.compile(r"[.)]\s")


def compose(text: str) -> str:
    """NFC for Hangul alone: other scripts stay as they were written."""
    return DECOMPOSED.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)


def _is_letter(text: str, start: int, end: int) -> bool:
    """Whether the jamo at text[start:end] are talked about as letters; the rules are in the docstring of clean_jamo."""
    letters = text[start:end]
    before, after = text[start - 1 : start], text[end : end + 1]
    if len(letters) >= 3 and ALPHABET.startswith(letters):
        return True
    if len(letters) > 1:
        return False
    if before and QUOTES.get(before) == after:
        return True
    if re.match(r"[가-힣]", before):
        return False  # 갔다ㅋ
    following = text[end : end + 8]
    if LETTER_NOUN.match(following) or PARTICLE.match(following):
        return True
    if letters in LAUGHING:
        return False
    return bool(WEAK_PARTICLE.match(following) or (before in ("", "\n") and LABEL.match(following)))


def _jamo_spans(text: str) -> list[tuple[int, int]]:
    listed: set[int] = set()
    for match in LETTER_LIST.finditer(text):
        letters = re.findall("[ㄱ-ㅣ]", match[0])
        if len(set(letters)) == len(letters) and not set(letters) <= set(LAUGHING):
            listed.update(range(*match.span()))
    spans = (match.span() for match in JAMO_STRING.finditer(text) if not match["syllable"])
    return [span for span in spans if span[0] not in listed and not _is_letter(text, *span)]


def _cut(text: str, spans: list[tuple[int, int]]) -> str:
    """Text without the spans and without the space that each leaves doubled, at an end of a line or before . , ! ?"""
    ends = [end for _, end in spans]
    starts = [*(start for start, _ in spans[1:]), len(text)]
    pieces = [text[: spans[0][0]]]
    for piece in (text[end:start] for end, start in zip(ends, starts, strict=True)):
        if not pieces[-1] or pieces[-1][-1] in " \n":
            piece = piece.lstrip(" ")
        if piece:
            if piece[0] in "\n.,!?":
                pieces[-1] = pieces[-1].rstrip(" ")
            pieces.append(piece)
    if ends[-1] == len(text.rstrip(" ")):
        pieces[-1] = pieces[-1].rstrip(" ")
    return "".join(pieces)


def _clean(text: str) -> tuple[str, list[str]]:
    text, removed = compose(text), []
    while spans := _jamo_spans(text):  # again, because the ㄱ of "ㄱ, ㄴㅋㅋ" is in no list once ㄴㅋㅋ is gone
        removed += [text[start:end] for start, end in spans]
        text = _cut(text, spans)
    return text, removed


def find_jamo(text: str) -> list[str]:
    """The strings of bare jamo that `clean_jamo` would remove."""
    return _clean(text)[1]


def clean_jamo(text: str) -> str:
    """Remove strings of bare Hangul jamo, as in ㅋㅋㅋ, ㅠㅠ, ㅇㅋ or ㅠ.ㅠ, and the space that each leaves doubled.

    Decomposed (NFD) Hangul is composed first, so only jamo that form no syllable are bare; half-width jamo are, too. A
    space that would then stand at an end of a line or before . , ! ? goes as well. Everything else is kept, and so are
    jamo that are talked about as letters:

    - a single one in quotes: 'ㄱ'
    - a single one, not right after a syllable, before 자, 받침, 발음, 소리, 모양 or a particle: ㄱ자, ㄷ자형,
      ㄹ 받침, ㅂ은. The particles 이, 가, 도, 로, 에, 만 do not count after ㅋ ㅎ ㅠ ㅜ ㅡ ㅗ, which are more likely
      laughter or tears.
    - different single ones in a list or a range: ㄱ, ㄴ, ㄷ and ㄱ~ㅎ and ㅏ와 ㅓ
    - a label at the start of a line: ㄱ. and ㄴ)
    - the beginning of the alphabet, three letters or more: ㄱㄴㄷ
    """
    return _clean(text)[0]
