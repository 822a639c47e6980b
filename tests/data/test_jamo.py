import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.data.jamo import clean_jamo, find_jamo


@settings(max_examples=300, deadline=None, database=None)
@given(st.text("ㄱㄴㅋㅎㅠㅏ가각 ,.'\"\n~자은을순\u1100\u1161\u11a8\uffa1"))
def test_no_jamo_is_left_to_remove(text):
    assert find_jamo(clean_jamo(text)) == []


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("안녕 ㅋㅋㅋ 반가워", "안녕 반가워"),
        ("ㅋㅋㅋ 안녕", "안녕"),
        ("안녕 ㅎㅎ", "안녕"),
        ("알았어 ㅇㅋ.", "알았어."),
        ("네ㅋ 알겠어요ㅠㅠ", "네 알겠어요"),
        ("#Person1#: ㅇㅇ 갈게 ㅎㅎ\n#Person2#: ㄴㄴ 오지 마 ㅠ.ㅠ", "#Person1#: 갈게\n#Person2#: 오지 마"),
        ("ㅋ ㅋ ㅋ 웃겨", "웃겨"),
        ("진짜?ㅋㅋ그래", "진짜?그래"),
        ("두  칸은 둘 다 ㄹㅇ 남아", "두  칸은 둘 다 남아"),
        ("반각 ﾡﾡ 도", "반각 도"),
        ("자모 \u1100\u1100 조각", "자모 조각"),
        (unicodedata.normalize("NFD", "한글 좋아 ㅋㅋ"), "한글 좋아"),
        ("ㅎㅎㅎ", ""),
        ("'ㅋㅋ'라고 썼어", "''라고 썼어"),
    ],
)
def test_bare_jamo_are_removed_with_the_space_they_leave(text, cleaned):
    assert clean_jamo(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "'ㄱ'은 기역이라고 읽어요.",
        "“ㅏ” 소리를 내 보세요.",
        "ㄱ자로 꺾으세요.",
        "'ㄷ자형' 주방이 좋아요.",
        "ㄱ, ㄴ, ㄷ 순서로 앉아요.",
        "ㄱ~ㅎ 가운데 고르세요.",
        "ㄱ부터 ㅎ까지 외웠어요.",
        "ㅏ와 ㅓ는 다르다.",
        "ㄹ 받침이 어려워요.",
        "ㅂ은 입술소리다.",
        "ㄱ. 사과\nㄴ. 배",
        "이름은 ㄱㄴㄷ 순입니다.",
        "ᄒᆞᆫ 글",
        "Nothing Korean here, café   included.",
        "한글만 있는 문장입니다.",
    ],
)
def test_letters_that_are_talked_about_are_kept(text):
    assert clean_jamo(text) == text
    assert find_jamo(text) == []


def test_find_jamo_names_what_clean_jamo_removes():
    assert find_jamo("ㅇㅋ 갈게 ㅋㅋㅋ, 'ㄱ'은 두고 ㅠ.ㅠ") == ["ㅇㅋ", "ㅋㅋㅋ", "ㅠ.ㅠ"]
