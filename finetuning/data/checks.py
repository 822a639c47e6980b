"""
Faults of data that no trainer notices: empty, repeated and unreadable rows, and what a chat template makes of rows.

`where` is what stands before the text of a finding, for another split than the training set. Imports without torch.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from finetuning.data.conversations import text_of
from finetuning.data.jamo import find_jamo
from finetuning.wording import plural

# the replacement character of a failed decoding, lone surrogates, and control characters other than tab and line ends
UNREADABLE = re.compile("[\ufffd\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers of Hangul, and Braille without dots

PUNCTUATION = re.compile("[.,;:!?'\"()\\[\\]{}…“”‘’„«»、。·]")  # not the signs that arithmetic and code are made of


@dataclass
class Finding:
    """What a check found.

    Attributes:
        check: Its name, as `allow` takes it.
        level: ok, note, warning, refused, or allowed (refused, and let through by `allow`).
        text: What was found and, where it is a fault, what to do.
        rows: Numbers of the rows, the first of the split being 0.
        numbers: What was counted, for preflight.json.
    """

    check: str
    level: str
    text: str
    rows: list[int] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)


def normalize(text: str) -> str:
    """The text without what does not make it another one: case, width, spaces, the punctuation of sentences.

    >>> normalize("Ｈｉ,  there!") == normalize("hi there"), normalize("3 + 4") == normalize("3 * 4")
    (True, False)
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = PUNCTUATION.sub(" ", folded).split()
    return " ".join(words) if words else " ".join(folded.split())


def question_of(prompt: list[dict]) -> str:
    """What a prompt asks, without the system message that all rows share."""
    return "\n".join(text_of(message) for message in prompt if message["role"] != "system")


def check_turns(num_turns: list[int], num_learned: list[int], left_out: list[int], where: str) -> list[Finding]:
    """How many of the assistant's turns are learned, where rows have several.

    Args:
        num_turns, num_learned, left_out: Of each row the assistant's turns, those that the data lets be learned, and
            those of them that the chat template writes in another way than as the last turn.
    """
    turns, missing = sum(num_turns), sum(left_out)
    learned = sum(num_learned) - missing
    if turns == learned == len(num_turns):
        return []
    share = "all learned" if learned == turns else f"{learned / len(num_turns):.1f} of them learned"
    text = f"{where}{turns / len(num_turns):.1f} a row, {share}"
    rows = [row for row, number in enumerate(left_out) if number]
    if rows:
        text += (
            f"; {missing} in {plural(len(rows), 'row')} are not learned, as the chat template writes an earlier answer "
            "in another way than the last one, without its thinking for instance. Use one that writes them alike "
            "(chat_template_path; trl has some in its folder chat_templates, as qwen3_training.jinja), or make a row "
            "of each answer"
        )
    level = "warning" if rows else "ok" if learned == turns else "note"
    return [Finding("assistant_turns", level, text, rows, {"turns": turns, "learned": learned, "left_out": missing})]


def check_template(hidden: list[str], begins_alike: list[bool], where: str) -> list[Finding]:
    """What the chat template makes of the rows that nobody would expect.

    Args:
        hidden: Of each row what the template does not show, separated by spaces.
        begins_alike: Of each row whether it begins with the tokens of its prompt.
    """
    findings = []
    keys = Counter(key for row in hidden for key in row.split())
    if keys:
        shown = ", ".join(f"{key} ({plural(number, 'row')})" for key, number in keys.items())
        text = f"{where}it does not show {shown}, so the model never sees them; use one that does (chat_template_path)"
        rows = [row for row, hidden_here in enumerate(hidden) if hidden_here]
        level = "note" if set(keys) == {"name"} else "warning"
        findings.append(Finding("chat_template", level, text, rows, dict(keys)))
    unlike = [row for row, alike in enumerate(begins_alike) if not alike]
    if unlike:
        text = (
            f"{where}{plural(len(unlike), 'row')} do not begin with the tokens of their prompt, as step 3 will give "
            "it: the chat template writes a prompt alone in another way, or a token spans the end of it and the "
            "beginning of the answer"
        )
        findings.append(Finding("prompt_tokens", "warning", text, unlike))
    return findings


def check_control_tokens(texts: list[str], tokens: list[str], where: str) -> list[Finding]:
    """Control tokens that stand in the text of rows, where they end a turn or begin another.

    Args:
        texts: All that is said in a row.
        tokens: The control tokens that the tokenizer does not read as text.
    """
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    found = {row: set(matches) for row, text in enumerate(texts) if (matches := pattern.findall(text))}
    if not tokens or not found:
        return []
    counts = Counter(token for matches in found.values() for token in matches)
    shown = ", ".join(f"{token} ({plural(number, 'row')})" for token, number in counts.most_common())
    share = f"{len(found) / len(texts):.1%}".replace("%", " %")
    text = (
        f"{where}{plural(len(found), 'row')} ({share}) with control tokens in their text, which the tokenizer "
        f"does not read as text: {shown}; take them out, or the model learns turns that nobody has said"
    )
    return [Finding("control_tokens", "warning", text, list(found), dict(counts))]


def is_visible(text: str) -> bool:
    """Whether a text has anything to read: neither white space, nor marks without width, nor blank letters."""
    return any(c.isprintable() and not c.isspace() and c not in BLANK_LETTERS for c in text)


def check_rows(questions: list[str], answers: list[str]) -> list[Finding]:
    """Empty, repeated and unreadable rows, and strings of bare jamo."""
    pairs = list(zip(questions, answers, strict=True))

    def find(is_faulty: Callable[[tuple[str, str]], bool]) -> list[int]:
        return [row for row, pair in enumerate(pairs) if is_faulty(pair)]

    first: dict[tuple[str, str], int] = {}
    keys = [(normalize(question), normalize(answer)) for question, answer in pairs]
    repeated = [row for row, key in enumerate(keys) if first.setdefault(key, row) != row]
    faults = [
        ("empty_rows", "refused", find(lambda pair: not all(map(is_visible, pair))),
         "with an empty question or answer; delete them"),
        ("duplicate_rows", "warning", repeated,
         "with the question and answer of an earlier one; they weigh twice in training"),
        ("unreadable_text", "warning", find(lambda pair: UNREADABLE.search("".join(pair)) is not None),
         "with undecodable or control characters; read the source in its own encoding"),
        ("bare_jamo", "note", find(lambda pair: any(find_jamo(text) for text in pair)),
         "with strings of bare jamo such as ㅋㅋㅋ; clean_jamo: true removes them"),
    ]  # fmt: skip
    findings = [
        Finding(check, level, f"{plural(len(rows), 'row')} {text}", rows) for check, level, rows, text in faults if rows
    ]
    return findings or [Finding("rows", "ok", "no row is empty, repeated or unreadable")]
