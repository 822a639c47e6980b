"""
Personal data in texts, Korean and international, and its masking by tokens such as #PhoneNumber#.

Rules find what has a form (a phone number, a check digit, a date after "born"), so masking is a help and no guarantee:
docs/cleaning.md says what it misses. The words that the rules look for are in pii_words.yaml. Imports without torch.
"""

import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

import yaml

from finetuning.data.jamo import compose

PII_TOKENS = {
    "email": "#Email#",
    "ssn": "#SSN#",
    "card_number": "#CardNumber#",
    "passport_number": "#PassportNumber#",
    "car_number": "#CarNumber#",
    "date_of_birth": "#DateOfBirth#",
    "phone_number": "#PhoneNumber#",
    "address": "#Address#",
}
TOKEN = re.compile("|".join(PII_TOKENS.values()))
MAX_TOKEN_LENGTH = max(map(len, PII_TOKENS.values()))

# Numbers are matched on a copy of the same length in which full-width digits and the many dashes are plain ones.
FOLD = str.maketrans("０１２３４５６７８９－‐‑‒–—−．（）＠＋\u00a0\u3000", "0123456789-------.()@+  ")

Found = re.Match[str]

# --- Words -----------------------------------------------------------------------------------------------------------

WORDS = yaml.safe_load((Path(__file__).parent / "pii_words.yaml").read_text(encoding="utf-8"))


def _any(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _one_of(name: str) -> str:
    """A pattern for any of the words of a list."""
    return f"(?:{'|'.join(WORDS[name].split())})"


def _context(words: list[str] | None = None, anywhere: list[str] | None = None) -> re.Pattern[str]:
    return _any("|".join([*([rf"(?<![A-Za-z#])(?:{'|'.join(words)})"] if words else []), *(anywhere or [])]))


CONTEXT = {name: _context(**words) for name, words in WORDS["context"].items()}


def _gap_before(context: str, found: Found, window: int) -> str | None:
    """What stands between the last word of a context and what was found; None if no such word is in the window.

    The window is in characters, and ends at a token: what was masked has used up the words before it.
    """
    text, start = found.string, found.start()
    begin = max(0, start - window)
    for token in TOKEN.finditer(text, max(0, begin - MAX_TOKEN_LENGTH), start):
        begin = max(begin, token.end())
    ends = [word.end() for word in CONTEXT[context].finditer(text, begin, start)]
    return text[ends[-1] : start] if ends else None


def _has_before(context: str, found: Found, window: int) -> bool:
    return _gap_before(context, found, window) is not None


# --- What personal data looks like, and under which condition it is some ---------------------------------------------
# Every quantifier that could be tried again is bounded, and so is the window in which a context word is looked for: the
# time is linear in the text.

EMAIL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z][A-Za-z0-9-]{1,23}"
    r"(?![A-Za-z0-9-])(?!:[A-Za-z_/~])"  # git@host:path is an address of a repository
)
PICTURE = _any(r"@\dx\.\w+$")  # logo@2x.png


def _valid_date(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


# Resident registration number: birth date, then 1-8 for century, sex and nationality, then six digits or asterisks
RESIDENT = re.compile(r"(?<![\d-])(\d{2})(\d{2})(\d{2})([- ]{0,3})([1-8*])(\d{6}|[*xX●○]{6})(?![\d*-])")
US_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}([- ]?)(?!00)\d{2}\1(?!0000)\d{4}(?![\d-])")
NATIONAL_INSURANCE = re.compile(r"(?<!\w)[A-CEGHJ-PQR-TW-Z]{2}( ?)\d{2}\1\d{2}\1\d{2}\1[A-D](?!\w)")
CHINESE_ID = re.compile(r"(?<!\d)\d{6}(\d{4})(\d{2})(\d{2})\d{3}[\dXx](?!\d)")


def _weighted_sum(number: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(number, weights, strict=False))


def _is_resident(found: Found) -> bool:
    year, month, day, separator, century, rest = found.groups()
    if not any(_valid_date(thousand + int(year), int(month), int(day)) for thousand in (1900, 2000)):
        return False
    # 13 digits in a row may be an order number that begins with a date
    bare = separator == "" and (century + rest).isdigit()
    if not (bare or _has_before("other_number", found, 20)) or _has_before("resident", found, 20):
        return True
    if not rest.isdigit():
        return False
    digits = re.sub(r"\D", "", found[0])
    return (11 - _weighted_sum(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)) % 11) % 10 == int(digits[12])


def _is_chinese(found: Found) -> bool:
    year, month, day = map(int, found.groups())
    check = _weighted_sum(found[0], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)) % 11
    return _valid_date(year, month, day) and "10X98765432"[check] == found[0][17].upper()


CARD = re.compile(r"(?<![\d.-])(?:[2-69]\d{3}([- ]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([- ]?)\d{6}\2\d{5})(?![\d-])")


def _is_card(found: Found) -> bool:
    """Luhn's check of the last digit."""
    digits = [int(digit) for digit in reversed(found[0]) if digit.isdigit()]
    return sum(d if i % 2 == 0 else (2 * d if d < 5 else 2 * d - 9) for i, d in enumerate(digits)) % 10 == 0


PASSPORT = re.compile(
    r"(?<![A-Za-z0-9])(?:[A-Z]\d{7,8}|[A-Z]{2}\d{6,7}|[A-Z]\d{3}[A-Z]\d{4}|\d{9}|(?=(?:[A-Z]*\d){4})[A-Z][A-Z0-9]{8})"
    r"(?![A-Za-z0-9])"
)


def _is_passport(found: Found) -> bool:
    following = found.string[found.end() : found.end() + 30].partition("#")[0]
    return _has_before("passport", found, 60) or CONTEXT["passport"].search(following) is not None


KOREAN_PLATE = re.compile(
    rf"(?<![\d.,:-])(?:{_one_of('plate_regions')}\s?\d{{1,2}}|(?<!제)\d{{2,3}})\s?[{WORDS['plate_letters']}]\s?\d{{4}}"
    r"(?![\d,.][\d#]|\d|[-:~][\d#]|\s?[억만천원년월일명개번호쪽%조항미]|\s?(?:km|m)\b)"
)
FOREIGN_PLATE = re.compile(
    r"(?<![\w-])(?=[A-Z -]{0,8}\d)(?=[\d -]{0,8}[A-Z])[A-Z0-9]{2,7}(?:[- ][A-Z0-9]{2,4})?(?![A-Za-z0-9-])"
)

# Area codes and mobile prefixes begin with 0; a service number such as 1588-1234 belongs to a company and is kept.
MOBILE = re.compile(r"(?<![\d.-])\(?01[016789]\)?[-. ]{0,3}\d{3,4}[-. ]{0,3}\d{4}(?![\d-])")
DOMESTIC = re.compile(
    r"(?<![\d.-])(?:\(0\d{1,3}\)\s?|0\d{1,3}(?:[-. ]|\)\s?))\d{3,4}[-. ]\d{4}(?![\d-])"
    r"|(?<![\d.-])07\d{3} \d{3} ?\d{3}(?![\d-])"
)
NORTH_AMERICAN = re.compile(
    r"(?<![\d.-])(?:\+?1[-. ]?)?(?:\([1-9]\d{2}\) ?\d{3}[-. ]|[1-9]\d{2}([-. ])\d{3}\1)\d{4}"
    r"(?: ?(?:ext\.?|x) ?\d{1,5})?(?![\d-])"
)
INTERNATIONAL = re.compile(
    r"(?<![\d+])\+[1-9]\d{0,2}[-. ]?(?:\(\d{1,4}\)[-. ]?)?\d{1,4}(?:[-. ]?\d{2,4}){1,4}(?!,[\d#]|\d)"
)
LOCAL = re.compile(r"(?<![\d.-])(?!(?:19|20)\d\d-(?:19|20)\d\d)(?:\d{3}-?\d{4}|\d{4}-\d{4}|1[3-9]\d{9})(?![\d-])")


def _is_no_other_number(found: Found) -> bool:
    return not _has_before("other_number", found, 20)


def _is_local(found: Found) -> bool:
    is_service = re.match(r"1[568]\d\d[- ]", found[0]) is not None
    return not is_service and _is_no_other_number(found) and _has_before("phone", found, 25)


MONTHS = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    "|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
DATE = _any(
    r"(?<![\d.,/-])(?:"
    r"(?:\d{4}|\d{2})년 ?\d{1,2}월(?: ?\d{1,2}일)?|\d{1,2}월 ?\d{1,2}일"
    r"|(?:19|20)\d{2}\. \d{1,2}\. \d{1,2}\.?"
    r"|(?:19|20)\d{2} ?[-./] ?\d{1,2} ?[-./] ?\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](?:19|20)?\d{2}"
    rf"|{MONTHS},? (?:19|20)\d{{2}}|{MONTHS}\.? \d{{1,2}}(?:st|nd|rd|th)?(?:,? (?:19|20)\d{{2}})?"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {MONTHS}(?:\.?,? (?:19|20)\d{{2}})?"
    r"|(?:19|20)?\d{6}"
    r"|(?:19|20)\d{2}년?|\d{2}년"
    r")(?![\d,][\d#]|\d|[-/:][\d#])"
)
OTHER_DAY = _any(r"^(?:이|을)?\s?(?:party|gift|present|cake|파티|선물|케이크|잔치|카드|지난|지나)")
BIRTH_AFTER = _any(
    r"^(?:[에이은는,)\s]){0,3}(?:생(?!활)|출생(?!률|율|신고|아)|태어|(?:제|내|저의|우리 [가-힣]{1,3}) 생일"
    r"|is (?:my|his|her|our) birthday|\(DOB\)|I was born)"
)
SENTENCE_END = re.compile(r"!|(?<=[a-z다요])[.]\s")
REQUEST = _any(r"please|tell me|give me|주세요|주십시오|부탁")  # its answer is in the next sentence


def _is_birth(found: Found) -> bool:
    text, (start, end) = found.string, found.span()
    if re.fullmatch(r"\d{6,8}", found[0]) and not _valid_date(2000, int(found[0][-4:-2]), int(found[0][-2:])):
        return False
    if re.fullmatch(r"\d{2,4}년?", found[0]):  # a year alone
        return bool(
            re.match(r"생|\s?출생(?!률|율|신고|아)", text[end : end + 5])
            or re.search(r"(?:\bborn in|출생 ?년도[는:]?|출생[:]?) ?$", text[max(0, start - 12) : start])
        )
    if BIRTH_AFTER.search(text[end : end + 20]):
        return True
    gap = _gap_before("birth", found, 60)
    return gap is not None and not OTHER_DAY.search(gap) and (not SENTENCE_END.search(gap) or bool(REQUEST.search(gap)))


PROVINCE = (
    r"(?:(?:서울|부산|대구|인천|광주|대전|울산|세종)(?:특별자치시|특별시|광역시|시)?"
    r"|(?:경기|강원|충청[남북]|전라[남북]|경상[남북]|제주|전북)(?:특별자치도|도)|경기|강원|충북|충남|전북|전남|경북|경남|제주)"
)
CITY_NAME = _one_of("cities")
MUNICIPALITY = rf"(?:{CITY_NAME}시|{_one_of('counties')}군|{_one_of('districts')}구)"
ADMIN = rf"(?:{PROVINCE}\s(?:{CITY_NAME}시?\s)?)?{MUNICIPALITY}(?:\s{MUNICIPALITY})?"
WIDE_CITY = r"(?:서울|부산|대구|인천|광주|대전|울산|세종|제주)(?:특별자치시|특별시|광역시|시)?"
TOWN = r"(?:\s[가-힣]{1,5}[읍면])?"
NUMBER = r"\d{1,5}(?:-\d{1,4})?(?!\d)"
NO_COUNTER = rf"(?!\s?{_one_of('counters')})"
ROAD = rf"(?!{_one_of('no_roads')}로)[가-힣][가-힣0-9·.]{{0,12}}(?:대로|(?<!으)로|길)"
ROAD_NUMBER = rf"{ROAD}\s?(?:\d{{1,4}}번?[가-힣]?길\s?)?{NUMBER}{NO_COUNTER}"
LOT = r"[가-힣]{1,5}\d{0,2}(?:동|리|가)"
DETAIL = (
    rf"(?:,?\s?\([가-힣0-9, ]{{2,20}}\)|,?\s[가-힣A-Za-z0-9]{{1,15}}{_one_of('buildings')}"
    r"|,?\s(?:\d{1,4}|[A-Z가나다라마])동|,?\s(?:지하\s?|B)?\d{1,3}층|,?\sB?\d{1,5}호(?!선))"
)
KOREAN_ADDRESS = re.compile(
    rf"(?<![가-힣])(?:{ADMIN}{TOWN}\s(?:{ROAD_NUMBER}|{LOT}\s(?:산\s?)?{NUMBER}(?:번지)?{NO_COUNTER})"
    rf"|{WIDE_CITY}\s{ROAD_NUMBER}"
    rf"|{LOT}\s(?:산\s?)?{NUMBER}번지){DETAIL}{{0,5}}"
)
BARE_ADDRESS = re.compile(rf"(?<![가-힣])(?:{ROAD_NUMBER}|{LOT}\s{NUMBER}{NO_COUNTER}){DETAIL}{{0,5}}")
LIVING_AFTER = re.compile(r"에(?:서)?\s(?:살|삽|산다|사는|거주|이사)")

CAPITAL = r"(?:[A-Z][A-Za-z'’]{1,20}\.?|\d{1,3}(?:st|nd|rd|th))"
STREET = rf"(?:{_one_of('streets_in_short')}\b\.?|{_one_of('streets')}\b)"
UNIT = (
    r"(?:,? (?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Room)\.? ?#?[A-Z0-9]{1,5}\b"
    r"|,? (?:[A-Z][a-z]{2,8}|\d{1,3}(?:st|nd|rd|th)) Floor\b|,? #\d{1,5}\b)"
)
POSTCODE = r"[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}\b"
CITY = r"[A-Z][A-Za-z.]{1,20}(?: [A-Z][A-Za-z.]{1,20}){0,2}"
ZIP = r"[A-Z]{2}(?: \d{5}(?:-\d{4})?)?(?![A-Za-z0-9])"
TAIL = rf"(?:,?\s(?:{CITY},? )?{POSTCODE}|,?\s{CITY},? {ZIP}|,? {ZIP})"
WESTERN_ADDRESS = re.compile(
    rf"(?<![\w.,$£€#-])\d{{1,5}}[A-Za-z]?(?:-\d{{1,5}})? (?:(?:[NSEW]|NE|NW|SE|SW)\.? )?(?:{CAPITAL} ){{1,3}}?{STREET}"
    rf"(?: (?:[NSEW]|NE|NW|SE|SW)\b\.?)?{UNIT}?{TAIL}?"
)
POST_BOX = re.compile(rf"\bP\.? ?O\.? Box \d{{1,6}}{TAIL}?")
ROMANIZED_ROAD = r"[A-Z][a-z]{1,20}(?:-?\d{0,3}[a-z]{0,6})?-(?:ro|gil|daero)\b"
ROMANIZED = re.compile(
    rf"(?:(?<![\w-])\d{{1,5}}(?:-\d{{1,4}})?,? {ROMANIZED_ROAD}|\b{ROMANIZED_ROAD} \d{{1,5}}(?:-\d{{1,4}})?(?![\d-]))"
    r"(?:,? [A-Z][a-z]{1,15}-(?:gu|dong|si|do|gun|myeon|eup)\b){0,4}(?:,? Seoul\b)?"
)


def _is_no_year(found: Found) -> bool:
    return re.match(r"(?:19|20)\d\d ", found[0]) is None or not _has_before("year", found, 8)


# The order is the priority: what an earlier kind has masked, a later one does not see. None has no condition.
RULES: dict[str, list[tuple[re.Pattern[str], Callable[[Found], bool] | None]]] = {
    "email": [(EMAIL, lambda found: PICTURE.search(found[0]) is None)],
    "ssn": [
        (RESIDENT, _is_resident),
        (US_SSN, lambda found: found[1] == "-" or _has_before("social_security", found, 40)),
        (NATIONAL_INSURANCE, lambda found: found[1] != "" or _has_before("national_insurance", found, 40)),
        (CHINESE_ID, _is_chinese),
    ],
    "card_number": [(CARD, _is_card)],
    "passport_number": [(PASSPORT, _is_passport)],
    "car_number": [(KOREAN_PLATE, None), (FOREIGN_PLATE, lambda found: _has_before("plate", found, 30))],
    "phone_number": [
        (MOBILE, None),
        (INTERNATIONAL, lambda found: 8 <= sum(character.isdigit() for character in found[0]) <= 15),
        (DOMESTIC, _is_no_other_number),
        (NORTH_AMERICAN, _is_no_other_number),
        (LOCAL, _is_local),
    ],
    "date_of_birth": [(DATE, _is_birth)],
    "address": [
        (KOREAN_ADDRESS, None),
        (BARE_ADDRESS, lambda m: _has_before("address", m, 20) or LIVING_AFTER.match(m.string, m.end()) is not None),
        (WESTERN_ADDRESS, _is_no_year),
        (POST_BOX, _is_no_year),
        (ROMANIZED, _is_no_year),
    ],
}


def _find(kind: str, text: str) -> list[tuple[int, int]]:
    """Where data of this kind may stand, from the left, the longest first."""
    folded = text.translate(FOLD)
    spans = [
        m.span() for pattern, is_one in RULES[kind] for m in pattern.finditer(folded) if is_one is None or is_one(m)
    ]
    return sorted(spans, key=lambda span: (span[0], -span[1]))


def _mask_once(text: str) -> str:
    tokens = tuple(PII_TOKENS.values())
    for kind in RULES:
        pieces, position = [], 0
        for start, end in _find(kind, text):
            # What is glued to a token stays: else masking one number could free the one glued to it, and so on, and a
            # text of numbers without spaces would need as many rounds as it has numbers.
            glued = text.endswith(tokens, 0, start) or text.startswith(tokens, end)
            if start >= position and not glued:
                pieces += [text[position:start], PII_TOKENS[kind]]
                position = end
        text = "".join([*pieces, text[position:]])
    return text


def mask_pii(text: str) -> str:
    """Replace personal data, Korean and international, by the tokens of PII_TOKENS.

    What has a form of its own is masked wherever it stands: e-mail addresses, phone numbers, resident registration
    numbers with a date that exists, US social security numbers, cards whose check digit is right, Korean plates, street
    addresses with a number. What could be anything is masked only next to a word that says what it is: passport numbers
    (passport, 여권), foreign plates (license plate, 번호판), birth dates (born, birthday, 생년월일, 태어난, 년생),
    numbers without an area code (call, 전화).

    A company's service number such as 1588-1234 is kept, and so are tags such as #Person1#; masking twice changes
    nothing more. Full-width digits and dashes count as plain ones, and decomposed Hangul is composed. What is glued to
    a token, without a space or a mark between, stays.
    """
    text = compose(text)
    while (masked := _mask_once(text)) != text:  # ends: every round leaves fewer digits or @; two are the rule
        text = masked
    return text
