"""
Cleaning of text before training: bare Hangul jamo are removed, personal data is masked by tags such as #PhoneNumber#.

    python -m finetuning.data.cleaning tests/data/pii_samples.jsonl    # precision and recall of the masking on labelled samples

Rules find what has a form (a phone number, a check digit, a date after "born"), so masking is a help and no guarantee:
docs/cleaning.md says what it misses. Imports without torch.
"""

import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path

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

# --- Bare jamo -------------------------------------------------------------------------------------------------------

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


def _compose(text: str) -> str:
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
    listed = set()
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
    text, removed = _compose(text), []
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
    - a single one, not right after a syllable, before 자, 받침, 발음, 소리, 모양 or a particle: ㄱ자, ㄷ자형, ㄹ 받침, ㅂ은.
      The particles 이, 가, 도, 로, 에, 만 do not count after ㅋ ㅎ ㅠ ㅜ ㅡ ㅗ, which are more likely laughter or tears.
    - different single ones in a list or a range: ㄱ, ㄴ, ㄷ and ㄱ~ㅎ and ㅏ와 ㅓ
    - a label at the start of a line: ㄱ. and ㄴ)
    - the beginning of the alphabet, three letters or more: ㄱㄴㄷ
    """
    return _clean(text)[0]


# --- Personal data ---------------------------------------------------------------------------------------------------
# Every quantifier that could be tried again is bounded, and so is the window in which a context word is looked for: the
# time is linear in the text.

# Numbers are matched on a copy of the same length in which full-width digits and the many dashes are plain ones.
FOLD = str.maketrans("０１２３４５６７８９－‐‑‒–—−．（）＠＋\u00a0\u3000", "0123456789-------.()@+  ")


def _any(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.IGNORECASE)


def _words(english: str, korean: str = "(?!)") -> re.Pattern:
    """English words begin after no letter; nor in a token, since the number after #PhoneNumber# need not be one."""
    return _any(rf"(?<![A-Za-z#])(?:{english})|{korean}")


def _valid_date(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def _luhn(number: str) -> bool:
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    return sum(d if i % 2 == 0 else (2 * d if d < 5 else 2 * d - 9) for i, d in enumerate(digits)) % 10 == 0


TOKEN = re.compile("|".join(PII_TOKENS.values()))
LONGEST_TOKEN = max(map(len, PII_TOKENS.values()))


def _gap_before(words: re.Pattern, text: str, start: int, window: int) -> str | None:
    """What stands between `start` and the last of `words` in the window before it; None where there is no such word.

    The window ends at a token: what was masked has used up the words before it.
    """
    begin = max(0, start - window)
    for token in TOKEN.finditer(text, max(0, begin - LONGEST_TOKEN), start):
        begin = max(begin, token.end())
    ends = [match.end() for match in words.finditer(text, begin, start)]
    return text[ends[-1] : start] if ends else None


def _context_before(words: re.Pattern, text: str, start: int, window: int) -> bool:
    return _gap_before(words, text, start, window) is not None


# Numbers that are no phone number
OTHER_NUMBER_WORDS = _any(
    r"(?<![A-Za-z])(?:order|tracking|invoice|ISBN|serial|account)"
    r"|주문|송장|등기|접수|예약\s?번호|계좌|사업자|회원|관리\s?번호"
)

EMAIL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z][A-Za-z0-9-]{1,23}"
    r"(?![A-Za-z0-9-])(?!:[A-Za-z_/~])"  # git@host:path is an address of a repository
)
PICTURE = _any(r"@\dx\.\w+$")  # logo@2x.png


def _find_emails(text: str) -> Iterator[tuple[int, int]]:
    for match in EMAIL.finditer(text):
        if not PICTURE.search(match[0]):
            yield match.span()


# Resident registration number: birth date, then 1-8 for century, sex and nationality, then six digits or asterisks
RESIDENT = re.compile(r"(?<![\d-])(\d{2})(\d{2})(\d{2})([- ]{0,3})([1-8*])(\d{6}|[*xX●○]{6})(?![\d*-])")
RESIDENT_WORDS = _words("RRN|resident registration", r"주민|등록\s?번호")
US_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}([- ]?)(?!00)\d{2}\1(?!0000)\d{4}(?![\d-])")
SSN_WORDS = _words(r"(?:SSN|social)\b", r"사회\s?보장")
NATIONAL_INSURANCE = re.compile(r"(?<!\w)[A-CEGHJ-PQR-TW-Z]{2}( ?)\d{2}\1\d{2}\1\d{2}\1[A-D](?!\w)")
NATIONAL_INSURANCE_WORDS = _words(r"national insurance|NINO\b|NI n")
CHINESE_ID = re.compile(r"(?<!\d)\d{6}(\d{4})(\d{2})(\d{2})\d{3}[\dXx](?!\d)")


def _resident_check(digits: str) -> bool:
    weights = [2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5]
    total = sum(int(d) * w for d, w in zip(digits, weights, strict=False))
    return (11 - total % 11) % 10 == int(digits[12])


def _chinese_check(number: str) -> bool:
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]
    total = sum(int(d) * w for d, w in zip(number, weights, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def _find_ssns(text: str) -> Iterator[tuple[int, int]]:
    for match in RESIDENT.finditer(text):
        year, month, day, separator, century, rest = match.groups()
        if not any(_valid_date(thousand + int(year), int(month), int(day)) for thousand in (1900, 2000)):
            continue
        # 13 digits in a row may be an order number that begins with a date
        bare = separator == "" and (century + rest).isdigit()
        another = bare or _context_before(OTHER_NUMBER_WORDS, text, match.start(), 20)
        named = _context_before(RESIDENT_WORDS, text, match.start(), 20)
        if another and not named and not (rest.isdigit() and _resident_check(re.sub(r"\D", "", match[0]))):
            continue
        yield match.span()
    for match in US_SSN.finditer(text):
        if match[1] == "-" or _context_before(SSN_WORDS, text, match.start(), 40):
            yield match.span()
    for match in NATIONAL_INSURANCE.finditer(text):
        if match[1] or _context_before(NATIONAL_INSURANCE_WORDS, text, match.start(), 40):
            yield match.span()
    for match in CHINESE_ID.finditer(text):
        if _valid_date(*map(int, match.groups())) and _chinese_check(match[0]):
            yield match.span()


CARD = re.compile(r"(?<![\d.-])(?:[2-69]\d{3}([- ]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([- ]?)\d{6}\2\d{5})(?![\d-])")


def _find_cards(text: str) -> Iterator[tuple[int, int]]:
    for match in CARD.finditer(text):
        if _luhn(match[0]):
            yield match.span()


PASSPORT = re.compile(
    r"(?<![A-Za-z0-9])(?:[A-Z]\d{7,8}|[A-Z]{2}\d{6,7}|[A-Z]\d{3}[A-Z]\d{4}|\d{9}|(?=(?:[A-Z]*\d){4})[A-Z][A-Z0-9]{8})"
    r"(?![A-Za-z0-9])"
)
PASSPORT_WORDS = _words("passport", "여권")


def _find_passports(text: str) -> Iterator[tuple[int, int]]:
    for match in PASSPORT.finditer(text):
        after = text[match.end() : match.end() + 30].partition("#")[0]
        if _context_before(PASSPORT_WORDS, text, match.start(), 60) or PASSPORT_WORDS.search(after):
            yield match.span()


PLATE_LETTERS = "가나다라마거너더러머버서어저고노도로모보소오조구누두루무부수우주바사아자허하호배육공해국합"
REGIONS = "서울 부산 대구 인천 광주 대전 울산 세종 경기 강원 충북 충남 전북 전남 경북 경남 제주".split()
KOREAN_PLATE = re.compile(
    rf"(?<![\d.,:-])(?:(?:{'|'.join(REGIONS)})\s?\d{{1,2}}|(?<!제)\d{{2,3}})\s?[{PLATE_LETTERS}]\s?\d{{4}}"
    r"(?![\d,.][\d#]|\d|[-:~][\d#]|\s?[억만천원년월일명개번호쪽%조항미]|\s?(?:km|m)\b)"
)
FOREIGN_PLATE = re.compile(
    r"(?<![\w-])(?=[A-Z -]{0,8}\d)(?=[\d -]{0,8}[A-Z])[A-Z0-9]{2,7}(?:[- ][A-Z0-9]{2,4})?(?![A-Za-z0-9-])"
)
PLATE_WORDS = _words(
    "licen[sc]e plate|number plate|plate number|registration plate|plate (?:is|was|reads)", r"번호판|차량\s?번호"
)


def _find_plates(text: str) -> Iterator[tuple[int, int]]:
    for match in KOREAN_PLATE.finditer(text):
        yield match.span()
    for match in FOREIGN_PLATE.finditer(text):
        if _context_before(PLATE_WORDS, text, match.start(), 30):
            yield match.span()


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
PHONE_WORDS = _words(
    r"phone|call|tel\b|telephone|cell\b|mobile|dial|fax\b|my number is", r"전화|연락처|휴대폰|핸드폰|폰\s?번호|팩스"
)


def _find_phones(text: str) -> Iterator[tuple[int, int]]:
    for match in MOBILE.finditer(text):
        yield match.span()
    for match in INTERNATIONAL.finditer(text):
        if 8 <= sum(character.isdigit() for character in match[0]) <= 15:
            yield match.span()
    for pattern in (DOMESTIC, NORTH_AMERICAN):
        for match in pattern.finditer(text):
            if not _context_before(OTHER_NUMBER_WORDS, text, match.start(), 20):
                yield match.span()
    for match in LOCAL.finditer(text):
        if re.match(r"1[568]\d\d[- ]", match[0]) or _context_before(OTHER_NUMBER_WORDS, text, match.start(), 20):
            continue
        if _context_before(PHONE_WORDS, text, match.start(), 25):
            yield match.span()


MONTHS = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    "|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
DATE = re.compile(
    r"(?<![\d.,/-])(?:"
    r"(?:\d{4}|\d{2})년 ?\d{1,2}월(?: ?\d{1,2}일)?|\d{1,2}월 ?\d{1,2}일"
    r"|(?:19|20)\d{2}\. \d{1,2}\. \d{1,2}\.?"
    r"|(?:19|20)\d{2} ?[-./] ?\d{1,2} ?[-./] ?\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](?:19|20)?\d{2}"
    rf"|{MONTHS},? (?:19|20)\d{{2}}|{MONTHS}\.? \d{{1,2}}(?:st|nd|rd|th)?(?:,? (?:19|20)\d{{2}})?"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {MONTHS}(?:\.?,? (?:19|20)\d{{2}})?"
    r"|(?:19|20)?\d{6}"
    r"|(?:19|20)\d{2}년?|\d{2}년"
    r")(?![\d,][\d#]|\d|[-/:][\d#])",
    re.IGNORECASE,
)
BIRTH_WORDS = _words(
    r"born\b|birth ?day|birth ?date|date of birth|DOB\b|D\.O\.B",
    "생년월일|출생(?!률|율|신고|아|지)(?:일|년도)?|태어난|생일|생신",
)
OTHER_DAY = _any(r"^(?:이|을)?\s?(?:party|gift|present|cake|파티|선물|케이크|잔치|카드|지난|지나)")
BIRTH_AFTER = _any(
    r"^(?:[에이은는,)\s]){0,3}(?:생(?!활)|출생(?!률|율|신고|아)|태어|(?:제|내|저의|우리 [가-힣]{1,3}) 생일"
    r"|is (?:my|his|her|our) birthday|\(DOB\)|I was born)"
)
SENTENCE_END = re.compile(r"!|(?<=[a-z다요])[.]\s")
REQUEST = _any(r"please|tell me|give me|주세요|주십시오|부탁")  # its answer is in the next sentence


def _is_birth(text: str, start: int, end: int) -> bool:
    found = text[start:end]
    if re.fullmatch(r"\d{6,8}", found) and not _valid_date(2000, int(found[-4:-2]), int(found[-2:])):
        return False
    if re.fullmatch(r"\d{2,4}년?", found):  # a year alone
        return bool(
            re.match(r"생|\s?출생(?!률|율|신고|아)", text[end : end + 5])
            or re.search(r"(?:\bborn in|출생 ?년도[는:]?|출생[:]?) ?$", text[max(0, start - 12) : start])
        )
    if BIRTH_AFTER.search(text[end : end + 20]):
        return True
    gap = _gap_before(BIRTH_WORDS, text, start, 60)
    return gap is not None and not OTHER_DAY.search(gap) and (not SENTENCE_END.search(gap) or bool(REQUEST.search(gap)))


def _find_births(text: str) -> Iterator[tuple[int, int]]:
    for match in DATE.finditer(text):
        if _is_birth(text, *match.span()):
            yield match.span()


# Cities (시), counties (군) and districts (구) of Korea. A list, because 다시, 입구 and 친구 end the same way.
CITIES = """
수원 성남 의정부 안양 부천 광명 평택 동두천 안산 고양 과천 구리 남양주 오산 시흥 군포 의왕 하남 용인 파주 이천 안성 김포 화성 광주 양주 포천 여주
춘천 원주 강릉 동해 태백 속초 삼척 청주 충주 제천 천안 공주 보령 아산 서산 논산 계룡 당진 전주 군산 익산 정읍 남원 김제 목포 여수 순천 나주 광양
포항 경주 김천 안동 구미 영주 영천 상주 문경 경산 창원 진주 통영 사천 김해 밀양 거제 양산 제주 서귀포 서울 부산 대구 인천 대전 울산 세종
""".split()
COUNTIES = """
연천 가평 양평 홍천 횡성 영월 평창 정선 철원 화천 양구 인제 고성 양양 보은 옥천 영동 증평 진천 괴산 음성 단양 금산 부여 서천 청양 홍성 예산 태안
완주 진안 무주 장수 임실 순창 고창 부안 담양 곡성 구례 고흥 보성 화순 장흥 강진 해남 영암 무안 함평 영광 장성 완도 진도 신안 의성 청송 영양 영덕
청도 고령 성주 칠곡 예천 봉화 울진 울릉 의령 함안 창녕 남해 하동 산청 함양 거창 합천 기장 달성 군위 강화 옹진 울주
""".split()
DISTRICTS = """
종로 중 용산 성동 광진 동대문 중랑 성북 강북 도봉 노원 은평 서대문 마포 양천 강서 구로 금천 영등포 동작 관악 서초 강남 송파 강동 서 동 영도 부산진
동래 남 북 해운대 사하 금정 연제 수영 사상 수성 달서 미추홀 연수 남동 부평 계양 광산 유성 대덕 장안 권선 팔달 영통 수정 중원 분당 만안 동안 원미
소사 오정 상록 단원 덕양 일산동 일산서 처인 기흥 수지 상당 서원 흥덕 청원 동남 서북 완산 덕진 의창 성산 마산합포 마산회원 진해
""".split()
PROVINCE = (
    r"(?:(?:서울|부산|대구|인천|광주|대전|울산|세종)(?:특별자치시|특별시|광역시|시)?"
    r"|(?:경기|강원|충청[남북]|전라[남북]|경상[남북]|제주|전북)(?:특별자치도|도)|경기|강원|충북|충남|전북|전남|경북|경남|제주)"
)
MUNICIPALITY = rf"(?:(?:{'|'.join(CITIES)})시|(?:{'|'.join(COUNTIES)})군|(?:{'|'.join(DISTRICTS)})구)"
ADMIN = rf"(?:{PROVINCE}\s(?:(?:{'|'.join(CITIES)})시?\s)?)?{MUNICIPALITY}(?:\s{MUNICIPALITY})?"
WIDE_CITY = r"(?:서울|부산|대구|인천|광주|대전|울산|세종|제주)(?:특별자치시|특별시|광역시|시)?"
TOWN = r"(?:\s[가-힣]{1,5}[읍면])?"
NUMBER = r"\d{1,5}(?:-\d{1,4})?(?!\d)"
NO_COUNTER = (
    r"(?!\s?(?:분|시간|초|명|개|원|년|월|일|주|번(?!지|길)|가|호선|칸|미터|킬로|%|억|만|천|차선|배|km|m\b|대\b|위))"
)
# Not a road: the particle (으)로 and adverbs, as in 서울시 기준으로 3 or 경기 결과로 3-2
ROAD = r"(?!(?:바|따|서|주|새|별|위|아래|앞|뒤|옆|제대|그대|실제|결과|차례|마음대|전체|대체)로)[가-힣][가-힣0-9·.]{0,12}(?:대로|(?<!으)로|길)"
ROAD_NUMBER = rf"{ROAD}\s?(?:\d{{1,4}}번?[가-힣]?길\s?)?{NUMBER}{NO_COUNTER}"
LOT = r"[가-힣]{1,5}\d{0,2}(?:동|리|가)"
BUILDING = (
    r"[가-힣A-Za-z0-9]{1,15}(?:아파트|빌딩|타워|오피스텔|빌라|맨션|파크|센터|테크노파크|하이츠|자이|푸르지오|래미안)"
)
DETAIL = (
    rf"(?:,?\s?\([가-힣0-9, ]{{2,20}}\)|,?\s{BUILDING}|,?\s(?:\d{{1,4}}|[A-Z가나다라마])동|,?\s(?:지하\s?|B)?\d{{1,3}}층"
    r"|,?\sB?\d{1,5}호(?!선))"
)
KOREAN_ADDRESS = re.compile(
    rf"(?<![가-힣])(?:{ADMIN}{TOWN}\s(?:{ROAD_NUMBER}|{LOT}\s(?:산\s?)?{NUMBER}(?:번지)?{NO_COUNTER})"
    rf"|{WIDE_CITY}\s{ROAD_NUMBER}"
    rf"|{LOT}\s(?:산\s?)?{NUMBER}번지){DETAIL}{{0,5}}"
)
BARE_ADDRESS = re.compile(rf"(?<![가-힣])(?:{ROAD_NUMBER}|{LOT}\s{NUMBER}{NO_COUNTER}){DETAIL}{{0,5}}")
ADDRESS_WORDS = _any(r"주소|배송지|사는 곳|집은|집이|장소")
LIVING_AFTER = re.compile(r"에(?:서)?\s(?:살|삽|산다|사는|거주|이사)")

CAPITAL = r"(?:[A-Z][A-Za-z'’]{1,20}\.?|\d{1,3}(?:st|nd|rd|th))"
STREET = (
    r"(?:(?:St|Ave|Rd|Blvd|Ln|Dr|Ct|Pl|Sq|Pkwy|Hwy)\b\.?|(?:Street|Avenue|Road|Boulevard|Lane|Drive|Court|Place|Square"
    r"|Terrace|Way|Parkway|Highway|Circle|Crescent|Close|Gardens|Mews)\b)"
)
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
YEAR_BEFORE = _any(r"\b(?:in|since|by|of|until|from) $")


def _find_addresses(text: str) -> Iterator[tuple[int, int]]:
    for match in KOREAN_ADDRESS.finditer(text):
        yield match.span()
    for match in BARE_ADDRESS.finditer(text):
        if _context_before(ADDRESS_WORDS, text, match.start(), 20) or LIVING_AFTER.match(text, match.end()):
            yield match.span()
    for pattern in (WESTERN_ADDRESS, POST_BOX, ROMANIZED):
        for match in pattern.finditer(text):
            is_year = re.match(r"(?:19|20)\d\d ", match[0]) and _context_before(YEAR_BEFORE, text, match.start(), 8)
            if not is_year:
                yield match.span()


# The order is the priority: what an earlier one has masked, a later one does not see.
FINDERS = {
    "email": _find_emails,
    "ssn": _find_ssns,
    "card_number": _find_cards,
    "passport_number": _find_passports,
    "car_number": _find_plates,
    "phone_number": _find_phones,
    "date_of_birth": _find_births,
    "address": _find_addresses,
}


def _mask_once(text: str) -> str:
    tokens = tuple(PII_TOKENS.values())
    for kind, find in FINDERS.items():
        pieces, position = [], 0
        for start, end in sorted(find(text.translate(FOLD)), key=lambda span: (span[0], -span[1])):
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
    (passport, 여권), foreign plates (license plate, 번호판), birth dates (born, birthday, 생년월일, 태어난, 년생), numbers
    without an area code (call, 전화).

    A company's service number such as 1588-1234 is kept, and so are tags such as #Person1#; masking twice changes
    nothing more. Full-width digits and dashes count as plain ones, and decomposed Hangul is composed. What is glued to
    a token, without a space or a mark between, stays.
    """
    text = _compose(text)
    while (masked := _mask_once(text)) != text:  # ends: every round leaves fewer digits or @; two are the rule
        text = masked
    return text


# --- How well it works -----------------------------------------------------------------------------------------------


def _spans(text: str, masked: str) -> set[tuple[int, int, str]]:
    """Where the tokens of `masked` stand in `text`, as (start, end, kind)."""
    kinds = {token: kind for kind, token in PII_TOKENS.items()}
    parts = re.split(f"({'|'.join(kinds)})", masked)
    match = re.fullmatch(
        "".join("(.+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts)), text, re.DOTALL
    )
    return {
        (*match.span(group), kinds[token]) for group, token in enumerate(parts[1::2], start=1) if match[group] != token
    }


def measure(samples: list[dict]) -> dict[str, tuple[int, int, int]]:
    """For each kind: spans masked right, masked wrongly (or with wrong ends), and missed (or with wrong ends)."""
    counts = Counter()
    for sample in samples:
        expected = _spans(sample["text"], sample["masked"])
        found = _spans(sample["text"], mask_pii(sample["text"]))
        for name, spans in (("right", expected & found), ("wrong", found - expected), ("missed", expected - found)):
            counts.update((kind, name) for _, _, kind in spans)
    return {kind: tuple(counts[kind, name] for name in ("right", "wrong", "missed")) for kind in PII_TOKENS}


def format_table(title: str, samples: list[dict]) -> str:
    """A Markdown table of `measure`, with the sum over all kinds as its last row."""
    counts = measure(samples)
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    lines = [f"| {title} | spans | precision | recall |", "|---|---|---|---|"]
    for kind, (right, wrong, missed) in counts.items():
        precision, recall = (f"{right / n:.2f}" if n else "-" for n in (right + wrong, right + missed))
        lines.append(f"| {kind} | {right + missed} | {precision} | {recall} |")
    return "\n".join(lines)


if __name__ == "__main__":
    samples = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    print(format_table(f"all {len(samples)} samples", samples))
    for part in ("held_out", "final_check"):
        rows = [sample for sample in samples if sample.get(part)]
        print(f"\n{format_table(f'{part}, {len(rows)} samples', rows)}")
