"""
Generates short dialogues with their summaries, in English and Korean, from templates written for this project.

Who, what, when and where are drawn at random and stand only in the dialogue, so a summary can be right only by
copying them. In some dialogues the first proposal is turned down: then the summary needs the second one.
"""

import random
import re
from dataclasses import dataclass
from string import Formatter

NAMES = {
    "en": (
        "Alice Adam Brian Carol Clara Daniel Diana Edward Ella Emma Ethan Frank Grace Hannah Henry Irene Jack James "
        "Jason Julia Karen Kevin Laura Leo Lily Lucas Maria Mark Martin Megan Michael Mina Nancy Nathan Nina Oliver "
        "Oscar Paul Peter Rachel Robert Rose Ruth Sam Sarah Simon Sofia Steve Susan Thomas Tina Tom Victor Walter Zoe"
    ).split(),
    "ko": (
        "민수 지영 서준 하은 도윤 서연 시우 지우 예준 민서 주원 하린 지호 수아 준서 다은 건우 채원 현우 지민 우진 소율 "
        "선우 예은 연우 가은 유준 윤서 정우 나은 승현 유진 준혁 은서 지훈 수빈 태윤 예린 민재 시은 동현 아린 재윤 서영 "
        "성민 보라 영호 미나 철수 혜진 상훈 은지 진우 소연 경수"
    ).split(),
}
DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "ko": "월요일 화요일 수요일 목요일 금요일 토요일 일요일".split(),
}
PLACES = {
    "en": (
        "Riverside Park|Central Library|Luna Cafe|Oak Street Gym|Hilltop Museum|Blue Door Restaurant|Harbor Station|"
        "City Hall|Maple Garden|Green Lake|Sunrise Bakery|Star Theater|North Campus|Old Market|Rainbow Bridge|"
        "Silver Tower|West Gate|Pine Hotel|Ocean Plaza|Moonlight Hall|Cherry Square|Grand Arena|Willow Farm|Coral Beach"
    ).split("|"),
    "ko": (
        "강변 공원|중앙 도서관|달빛 카페|참나무 체육관|언덕 박물관|푸른문 식당|항구역|시청|단풍 정원|초록 호수|해돋이 빵집|"
        "별 극장|북쪽 캠퍼스|옛 시장|무지개 다리|은빛 타워|서문|소나무 호텔|바다 광장|달맞이 회관|벚꽃 광장|대운동장|버들 농장|산호 해변"
    ).split("|"),
}
ACTIVITIES = {  # what two people do together
    "en": (
        "play tennis|have dinner|watch a movie|study English|go jogging|practice the piano|visit the exhibition|"
        "play chess|have lunch|take photos|ride bikes|go fishing|play badminton|see the concert|paint a picture|go shopping"
    ).split("|"),
    "ko": (
        "테니스를 치|저녁을 먹|영화를 보|영어를 공부하|달리기를 하|피아노를 연습하|전시회를 보|바둑을 두|점심을 먹|사진을 찍|"
        "자전거를 타|낚시를 하|배드민턴을 치|연주회를 보|그림을 그리|쇼핑을 하"
    ).split("|"),
}
SERVICES = {
    "en": "a haircut|a dental check|an eye test|a massage|a piano lesson|a car wash|a table for two|a phone repair|a flu shot|a cooking class".split(
        "|"
    ),
    "ko": "머리 손질|치과 검진|시력 검사|마사지|피아노 수업|세차|두 사람 자리|휴대폰 수리|독감 주사|요리 수업".split(
        "|"
    ),
}
ITEMS = {
    "en": "camera|umbrella|dictionary|guitar|tent|laptop|bicycle|drill|novel|suitcase|jacket|printer|backpack|lamp|blanket|watch".split(
        "|"
    ),
    "ko": "카메라|우산|사전|기타|텐트|노트북|자전거|드릴|소설책|여행 가방|재킷|프린터|배낭|램프|담요|시계".split("|"),
}
REASONS = {  # why the first proposal is turned down: (said by the speaker, told in the summary)
    "en": (
        ("I have to work late", "has to work late"),
        ("I have an exam", "has an exam"),
        ("my parents are visiting", "has parents visiting"),
        ("I must see a doctor", "must see a doctor"),
        ("I am moving house", "is moving house"),
        ("I have a long meeting", "has a long meeting"),
    ),
    "ko": (
        ("야근을 해야 해요", "야근을 해야 해서"),
        ("시험이 있어요", "시험이 있어서"),
        ("부모님이 오세요", "부모님이 오셔서"),
        ("병원에 가야 해요", "병원에 가야 해서"),
        ("이사를 해요", "이사를 해서"),
        ("회의가 길어요", "회의가 길어서"),
    ),
}

# Turns alternate between #Person1# and #Person2#; a turn is one of several wordings. `{name}` is always #Person2#.
# `(은/는)` and the like are Korean particles, chosen after the sound before them.
SCENARIOS = {
    "en": {
        "plan": {
            "turns": [
                ["Hi {name}, would you like to {activity} on {day}?", "{name}, do you want to {activity} this {day}?"],
                ["Sure, I would love to. Where shall we meet?", "That sounds great. Where and when?"],
                ["Let's meet at {place} at {time}.", "How about {place} at {time}?"],
                ["Perfect. I will be at {place} at {time}.", "Good, see you on {day} then."],
            ],
            "summary": "#Person1# and {name} will {activity} at {place} on {day} at {time}.",
        },
        "postpone": {
            "turns": [
                ["Hello {name}. Let's {activity} on {other_day}.", "{name}, can we {activity} on {other_day}?"],
                ["Sorry, {reason} on {other_day}. How about {day}?", "I can't, {reason}. Is {day} fine with you?"],
                [
                    "{day} is fine. Then at {time} in front of {place}.",
                    "No problem. Let's meet at {place}, {day} at {time}.",
                ],
                ["Thank you. See you there.", "Great, I will be there on {day}."],
            ],
            "summary": "{name} {told} on {other_day}, so #Person1# and {name} will {activity} at {place} on {day} at {time}.",
        },
        "booking": {
            "turns": [
                ["Good morning, {place}. How can I help you?", "This is {place}. What can I do for you?"],
                ["I would like to book {service} for {day}.", "Can I get {service} on {day}, please?"],
                [
                    "Of course. Is {time} good for you? And your name, please?",
                    "We have {time} free. May I have your name?",
                ],
                ["{time} is good. My name is {name}.", "Yes, that works. I am {name}."],
            ],
            "summary": "{name} books {service} at {place} on {day} at {time}.",
        },
        "borrow": {
            "turns": [
                [
                    "{name}, may I borrow your {item} until {day}?",
                    "Could you lend me your {item}, {name}? I need it until {day}.",
                ],
                ["Yes, but I need it back by {day} evening.", "Of course. Just bring it back on {day}."],
                ["Thanks! Where can I pick it up?", "That is kind. Where shall I come?"],
                ["Come to {place} at {time} today.", "I am at {place}. Come at {time}."],
            ],
            "summary": "{name} lends #Person1# a {item} until {day}. #Person1# will pick it up at {place} at {time}.",
        },
        "move": {
            "turns": [
                [
                    "{name}, the meeting on {other_day} has been moved.",
                    "Did you hear, {name}? We do not meet on {other_day}.",
                ],
                ["Really? When is it now?", "Oh, I did not know. What is the new time?"],
                ["It is on {day} at {time} now, at {place}.", "We meet at {place} on {day} at {time}."],
                ["Thank you for telling me. I will bring the {item}.", "All right. Shall I bring the {item}? I will."],
            ],
            "summary": "#Person1# tells {name} that the meeting is moved from {other_day} to {day} at {time} at {place}. {name} will bring the {item}.",
        },
        "lost": {
            "turns": [
                ["Excuse me, I lost my {item} on {day}.", "Hello, I think I left my {item} here on {day}."],
                ["Where did you last see it? And what is your name?", "Let me check. Who are you and where was it?"],
                ["I am {name}. It was at {place}, around {time}.", "My name is {name}. I had it at {place} at {time}."],
                ["We found it. You can take it home.", "I am sorry, nobody has found it yet."],
            ],
            "summary": "{name} lost a {item} at {place} on {day} around {time}. {outcome}",
            "outcomes": ["#Person2# found it.", "#Person2# has not found it yet."],
        },
    },
    "ko": {
        "plan": {
            "turns": [
                ["{name} 씨, {day}에 같이 {activity}지 않을래요?", "{name} 씨, {day}에 {activity}는 거 어때요?"],
                ["좋아요. 어디서 만날까요?", "좋은 생각이에요. 언제 어디서 볼까요?"],
                ["{time}에 {place}에서 만나요.", "{place}에서 {time}에 보는 게 어때요?"],
                ["네, {time}에 {place}(으로/로) 갈게요.", "좋아요, {day}에 봐요."],
            ],
            "summary": "#Person1#(과/와) {name}(은/는) {day} {time}에 {place}에서 {activity}기로 했다.",
        },
        "postpone": {
            "turns": [
                ["{name} 씨, {other_day}에 {activity}ㅂ시다.", "{name} 씨, {other_day}에 같이 {activity}ㄹ까요?"],
                ["미안해요, {other_day}에는 {reason}. {day}(은/는) 어때요?", "안 돼요, {reason}. {day}에 괜찮아요?"],
                ["{day} 좋아요. {time}에 {place} 앞에서 만나요.", "괜찮아요. 그럼 {place}에서 {day} {time}에 봐요."],
                ["고마워요. 거기서 봐요.", "좋아요, {day}에 갈게요."],
            ],
            "summary": "{name}(은/는) {other_day}에 {told} #Person1#(과/와) {day} {time}에 {place}에서 {activity}기로 했다.",
        },
        "booking": {
            "turns": [
                ["안녕하세요, {place}입니다. 무엇을 도와드릴까요?", "네, {place}입니다. 말씀하세요."],
                ["{day}에 {service}(을/를) 예약하고 싶어요.", "{day}에 {service} 예약 되나요?"],
                ["네, {time} 괜찮으세요? 성함이 어떻게 되세요?", "{time}에 자리가 있어요. 성함을 알려 주세요."],
                ["{time} 좋아요. {name}입니다.", "네, 괜찮아요. 저는 {name}입니다."],
            ],
            "summary": "{name}(은/는) {place}에서 {day} {time}에 {service}(을/를) 예약했다.",
        },
        "borrow": {
            "turns": [
                [
                    "{name} 씨, {item}(을/를) {day}까지 빌려 줄래요?",
                    "{name} 씨 {item}(을/를) 좀 빌릴 수 있을까요? {day}까지 필요해요.",
                ],
                ["네, 그런데 {day} 저녁에는 꼭 돌려주세요.", "그럼요. {day}에 돌려주면 돼요."],
                ["고마워요! 어디로 가면 돼요?", "감사합니다. 어디서 받을까요?"],
                ["오늘 {time}에 {place}(으로/로) 오세요.", "{place}에 있을게요. {time}에 오세요."],
            ],
            "summary": "{name}(은/는) #Person1#에게 {item}(을/를) {day}까지 빌려준다. #Person1#(은/는) {time}에 {place}에서 받기로 했다.",
        },
        "move": {
            "turns": [
                ["{name} 씨, {other_day} 회의가 바뀌었어요.", "들었어요, {name} 씨? {other_day}에는 회의를 안 해요."],
                ["정말요? 이제 언제예요?", "몰랐어요. 새로 정한 시간이 언제예요?"],
                ["{day} {time}에 {place}에서 해요.", "{place}에서 {day} {time}에 모여요."],
                ["알려 줘서 고마워요. {item}(을/를) 가져갈게요.", "알겠어요. {item}(은/는) 제가 가져갈게요."],
            ],
            "summary": "#Person1#(은/는) {name}에게 {other_day} 회의가 {day} {time} {place}(으로/로) 바뀌었다고 알린다. {name}(은/는) {item}(을/를) 가져갈 것이다.",
        },
        "lost": {
            "turns": [
                [
                    "실례합니다, {day}에 {item}(을/를) 잃어버렸어요.",
                    "안녕하세요, {day}에 여기에 {item}(을/를) 두고 간 것 같아요.",
                ],
                ["어디서 마지막으로 보셨어요? 성함은요?", "확인해 볼게요. 누구시고 어디에 두셨어요?"],
                ["저는 {name}이고, {time}쯤 {place}에서 봤어요.", "{name}입니다. {time}에 {place}에 있었어요."],
                ["찾았습니다. 가져가세요.", "죄송합니다, 아직 못 찾았어요."],
            ],
            "summary": "{name}(은/는) {day} {time}쯤 {place}에서 {item}(을/를) 잃어버렸다. {outcome}",
            "outcomes": ["#Person2#(이/가) 찾았다.", "#Person2#(은/는) 아직 못 찾았다."],
        },
    },
}
SMALL_TALK = {
    "en": [
        "Hello, how are you?",
        "Nice weather today.",
        "Long time no see.",
        "I am glad to hear from you.",
        "It has been a busy week.",
    ],
    "ko": [
        "안녕하세요, 잘 지냈어요?",
        "오늘 날씨가 좋네요.",
        "오랜만이에요.",
        "연락 줘서 반가워요.",
        "이번 주는 정말 바빴어요.",
    ],
}
NOTE = {"en": "Note", "ko": "메모"}
READ_BACK = {"en": "Let me repeat that.", "ko": "다시 말할게요."}
DETAIL_LABELS = {  # of a form that someone fills in while listening
    "en": {
        "name": "Name",
        "day": "Day",
        "other_day": "Not on",
        "time": "Time",
        "place": "Place",
        "activity": "Plan",
        "service": "Service",
        "item": "Item",
    },
    "ko": {
        "name": "이름",
        "day": "요일",
        "other_day": "안 되는 날",
        "time": "시간",
        "place": "장소",
        "activity": "할 일",
        "service": "예약",
        "item": "물건",
    },
}
SYSTEM_PROMPTS = {
    "en": "Summarize the dialogue.",
    "ko": "대화를 요약하세요.",
}
LANGUAGES = tuple(SCENARIOS)

_FINALS_OF_DIGITS = {
    "0": True,
    "1": True,
    "2": False,
    "3": True,
    "4": False,
    "5": False,
    "6": True,
    "7": True,
    "8": True,
    "9": False,
}


@dataclass
class Example:
    language: str
    scenario: str
    dialogue: str
    summary: str
    details: dict[str, str]  # the slots that the summary needs


def _final_consonant(text: str) -> int:
    """Index of the final consonant of the last sound of `text`: 0 none, 8 rieul, others as in Unicode."""
    last = text.rstrip("#")[-1]
    if last in _FINALS_OF_DIGITS:  # #Person1# is read "il", #Person2# "i"
        return 8 if last in "178" else int(_FINALS_OF_DIGITS[last])
    code = ord(last) - 0xAC00
    return code % 28 if 0 <= code < 11172 else 0


def resolve_particles(text: str) -> str:
    """Choose Korean particles by the sound before them and join verb endings to their stems.

    >>> resolve_particles("민수(은/는) 지훈(을/를) 시청(으로/로) 오라고 했다")
    '민수는 지훈을 시청으로 오라고 했다'
    """

    def choose(match: re.Match) -> str:
        before, closed, open_ = match.groups()
        final = _final_consonant(before)
        if closed == "으로" and final == 8:  # after rieul it is "ro"
            final = 0
        return before + (closed if final else open_)

    text = re.sub(r"(\S+?)\((\w+)/(\w+)\)", choose, text)
    # 치 + ㅂ시다 -> 칩시다, 먹 + ㅂ시다 -> 먹읍시다; 치 + ㄹ까요 -> 칠까요, 먹 + ㄹ까요 -> 먹을까요
    for jamo, final_index, syllable in (("ㅂ", 17, "읍"), ("ㄹ", 8, "을")):
        text = re.sub(
            rf"([가-힣]){jamo}",
            lambda match, i=final_index, s=syllable: (
                match[1] + s if _final_consonant(match[1]) else chr(ord(match[1]) + i)
            ),
            text,
        )
    return text


def resolve_articles(text: str) -> str:
    """
    >>> resolve_articles("Ella lost a umbrella")
    'Ella lost an umbrella'
    """
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def make_example(language: str, rng: random.Random) -> Example:
    """Draw one dialogue with its summary."""
    scenario = rng.choice(list(SCENARIOS[language]))
    spec = SCENARIOS[language][scenario]
    day, other_day = rng.sample(DAYS[language], 2)
    hour, minute = rng.randint(1, 12), rng.choice([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55])
    if language == "en":
        time = f"{hour}:{minute:02d}"
    else:
        time = f"{hour}시 {minute}분" if minute else f"{hour}시"
    reason, told = rng.choice(REASONS[language])
    slots = {
        "name": rng.choice(NAMES[language]),
        "day": day,
        "other_day": other_day,
        "time": time,
        "place": rng.choice(PLACES[language]),
        "activity": rng.choice(ACTIVITIES[language]),
        "service": rng.choice(SERVICES[language]),
        "item": rng.choice(ITEMS[language]),
        "reason": reason,
        "told": told,
    }
    wordings = [rng.randrange(len(turn)) for turn in spec["turns"]]
    turns = [turn[wording].format(**slots) for turn, wording in zip(spec["turns"], wordings, strict=True)]
    if rng.random() < 0.5:
        turns[0] = f"{rng.choice(SMALL_TALK[language])} {turns[0]}"
    if "outcomes" in spec:  # what the last turn said
        slots["outcome"] = spec["outcomes"][wordings[-1]]
    summary = spec["summary"].format(**slots)
    dialogue = "\n".join(f"#Person{1 + i % 2}#: {turn}" for i, turn in enumerate(turns))
    fix_grammar = {"en": resolve_articles, "ko": resolve_particles}[language]
    needed = [name for _, name, _, _ in Formatter().parse(spec["summary"]) if name in DETAIL_LABELS[language]]
    details = {name: slots[name] for name in dict.fromkeys(needed)}
    return Example(language, scenario, fix_grammar(dialogue), fix_grammar(summary), details)


def make_piece(language: str, rng: random.Random, list_share: float) -> str:
    """Draw one piece of text to pre-train on."""
    if rng.random() < list_share:  # a list, read out twice
        words = [word for source in (NAMES, DAYS, PLACES, ITEMS, ACTIVITIES) for word in source[language]]
        listed = ", ".join(rng.sample(words, rng.randint(6, 18)))
        return f"{listed}\n{listed}"
    example = make_example(language, rng)
    kind = rng.random()
    if kind < 0.1:  # a note
        return f"{NOTE[language]}: {example.summary}"
    if kind < 0.25:
        return example.dialogue
    if kind < 0.65:  # the dialogue, then a form that was filled in while listening
        labels = list(example.details)
        rng.shuffle(labels)
        return example.dialogue + "".join(f"\n{DETAIL_LABELS[language][d]}: {example.details[d]}" for d in labels)
    lines = example.dialogue.split("\n")  # the next speaker reads what was said back, from some line on
    start = rng.randrange(len(lines))
    repeated = " ".join(line.split(": ", 1)[1] for line in lines[start:])
    return f"{example.dialogue}\n#Person{1 + len(lines) % 2}#: {READ_BACK[language]} {repeated}"


def make_document(language: str, rng: random.Random, list_share: float = 0.15) -> str:
    """Draw one text to pre-train on: some pieces with an empty line between them.

    A piece is a dialogue, a dialogue whose details are read back or filled into a form, a note, or a list read out
    twice (`list_share` of the pieces). None has a dialogue followed by its summary, so the task itself is left to
    fine-tuning; what is repeated teaches the model to look back and copy.
    """
    return "\n\n".join(make_piece(language, rng, list_share) for _ in range(rng.randint(3, 8)))
