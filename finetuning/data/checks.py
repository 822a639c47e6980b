"""
Faults of data that no trainer notices: empty, repeated and unreadable rows, and test rows that are trained on.

Imports without torch.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from datasketch import MinHash, MinHashLSH

from finetuning.data.conversations import text_of
from finetuning.data.jamo import find_jamo

NEAR = 0.8  # Jaccard similarity of two texts' word triples, from which they count as near-duplicates
NUM_PERMUTATIONS = 128
CANDIDATES = 0.6  # similarity from which MinHash proposes pairs, lower than NEAR so that it misses few of those
# the replacement character of a failed decoding, lone surrogates, and control characters other than tab and line ends
UNREADABLE = re.compile("[\ufffd\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers of Hangul, and Braille without dots

PUNCTUATION = re.compile("[.,;:!?'\"()\\[\\]{}…“”‘’„«»、。·]")  # not the signs that arithmetic and code are made of
MOST_ROWS = (
    200_000  # beyond these, only equal questions are looked for: near ones take a third of a second per thousand rows
)


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


def shingles(normalized: str, size: int = 3) -> set[str]:
    """Runs of `size` words; of characters where a script has no spaces."""
    words = normalized.split()
    spaceless = len(normalized) > 12 * len(words)
    pieces, size = (list(normalized), 5) if spaceless else (words, size)
    joint = "" if spaceless else " "
    return {joint.join(pieces[i : i + size]) for i in range(max(1, len(pieces) - size + 1))}


def minhash(pieces: set[str]) -> MinHash:
    signature = MinHash(NUM_PERMUTATIONS, seed=1)
    signature.update_batch([piece.encode() for piece in pieces])
    return signature


def question_of(prompt: list[dict]) -> str:
    """What a prompt asks, without the system message that all rows share."""
    return "\n".join(text_of(message) for message in prompt if message["role"] != "system")


def check_turns(num_turns: list[int], num_learned: list[int], left_out: list[int], where: str) -> list[Finding]:
    """How many of the assistant's turns are learned, where rows have several.

    Args:
        num_turns, num_learned, left_out: Of each row the assistant's turns, those that the data lets be learned, and
            those of them that the chat template writes in another way than as the last turn.
        where: What stands before the text, for another split than the training set.
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
            f"; {missing} in {count(rows)} are not learned, as the chat template writes an earlier answer in another way than "
            "the last one, without its thinking for instance. Use one that writes them alike (chat_template_path; trl has some "
            "in its folder chat_templates, as qwen3_training.jinja), or make a row of each answer"
        )
    level = "warning" if rows else "ok" if learned == turns else "note"
    return [Finding("assistant_turns", level, text, rows, {"turns": turns, "learned": learned, "left_out": missing})]


def check_template(hidden: list[str], begins_alike: list[bool], where: str) -> list[Finding]:
    """What the chat template makes of the rows that nobody would expect.

    Args:
        hidden: Of each row what the template does not show, separated by spaces.
        begins_alike: Of each row whether it begins with the tokens of its prompt.
        where: What stands before the text, for another split than the training set.
    """
    findings = []
    keys = Counter(key for row in hidden for key in row.split())
    if keys:
        shown = ", ".join(f"{key} ({number} row{'s' if number > 1 else ''})" for key, number in keys.items())
        text = f"{where}it does not show {shown}, so the model never sees them; use one that does (chat_template_path)"
        rows = [row for row, hidden_here in enumerate(hidden) if hidden_here]
        findings.append(
            Finding("chat_template", "note" if set(keys) == {"name"} else "warning", text, rows, dict(keys))
        )
    unlike = [row for row, alike in enumerate(begins_alike) if not alike]
    if unlike:
        text = (
            f"{where}{count(unlike)} do not begin with the tokens of their prompt, as step 3 will give it: the chat template "
            "writes a prompt alone in another way, or a token spans the end of it and the beginning of the answer"
        )
        findings.append(Finding("prompt_tokens", "warning", text, unlike))
    return findings


def check_control_tokens(texts: list[str], tokens: list[str], where: str) -> list[Finding]:
    """Control tokens that stand in the text of rows, where they end a turn or begin another.

    Args:
        texts: All that is said in a row.
        tokens: The control tokens that the tokenizer does not read as text.
        where: What stands before the text, for another split than the training set.
    """
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    found = {row: set(matches) for row, text in enumerate(texts) if (matches := pattern.findall(text))}
    if not tokens or not found:
        return []
    counts = Counter(token for matches in found.values() for token in matches)
    shown = ", ".join(f"{token} ({number} row{'s' if number > 1 else ''})" for token, number in counts.most_common())
    share = f"{len(found) / len(texts):.1%}".replace("%", " %")
    text = (
        f"{where}{count(list(found))} ({share}) with control tokens in their text, which the tokenizer "
        f"does not read as text: {shown}; take them out, or the model learns turns that nobody has said"
    )
    return [Finding("control_tokens", "warning", text, list(found), dict(counts))]


def is_visible(text: str) -> bool:
    """Whether a text has anything to read: neither white space, nor marks without width, nor blank letters."""
    return any(c.isprintable() and not c.isspace() and c not in BLANK_LETTERS for c in text)


def check_rows(questions: list[str], answers: list[str]) -> list[Finding]:
    """Empty, repeated and unreadable rows, and strings of bare jamo."""
    findings = []
    empty = [i for i, pair in enumerate(zip(questions, answers, strict=True)) if not all(map(is_visible, pair))]
    if empty:
        text = f"{count(empty)} with an empty question or answer; delete them"
        findings.append(Finding("empty_rows", "refused", text, empty))
    first: dict[tuple[str, str], int] = {}
    repeated = []
    for i, pair in enumerate(zip(questions, answers, strict=True)):
        key = (normalize(pair[0]), normalize(pair[1]))
        if first.setdefault(key, i) != i:
            repeated.append(i)
    if repeated:
        text = f"{count(repeated)} with the question and answer of an earlier one; they weigh twice in training"
        findings.append(Finding("duplicate_rows", "warning", text, repeated))
    unreadable = [i for i, pair in enumerate(zip(questions, answers, strict=True)) if UNREADABLE.search("".join(pair))]
    if unreadable:
        text = f"{count(unreadable)} with undecodable or control characters; read the source in its own encoding"
        findings.append(Finding("unreadable_text", "warning", text, unreadable))
    jamo = [i for i, pair in enumerate(zip(questions, answers, strict=True)) if any(find_jamo(text) for text in pair)]
    if jamo:
        text = f"{count(jamo)} with strings of bare jamo such as ㅋㅋㅋ; clean_jamo: true removes them"
        findings.append(Finding("bare_jamo", "note", text, jamo))
    if not findings:
        findings.append(Finding("rows", "ok", "no row is empty, repeated or unreadable"))
    return findings


def count(rows: list[int]) -> str:
    return f"{len(rows)} row{'s' if len(rows) != 1 else ''}"


def find_leaks(train: list[str], held_out: Iterable[str]) -> tuple[dict[int, int], dict[int, int]]:
    """Training questions that held-out ones are equal to, or nearly so.

    Returns:
        {held-out index: training index} of equal ones after `normalize`, and of near-duplicates (Jaccard similarity of
        word triples at least `NEAR`, among the pairs that MinHash proposes).
    """
    known: dict[str, int] = {}
    normalized = [normalize(text) for text in train]
    for i, text in enumerate(normalized):
        known.setdefault(text, i)
    targets = [normalize(text) for text in held_out]
    equal = {i: known[text] for i, text in enumerate(targets) if text in known}
    rest = {i: shingles(text) for i, text in enumerate(targets) if i not in equal}
    if not rest:
        return equal, {}
    index = MinHashLSH(threshold=CANDIDATES, num_perm=NUM_PERMUTATIONS)
    for i, pieces in rest.items():
        index.insert(i, minhash(pieces))
    near: dict[int, int] = {}
    for row, text in enumerate(normalized[:MOST_ROWS]):
        pieces = shingles(text)
        for i in index.query(minhash(pieces)):
            if i not in near and len(pieces & rest[i]) >= NEAR * len(pieces | rest[i]):
                near[i] = row
    return equal, near


def check_leaks(train: list[str], splits: dict[str, list[str]], most: float = 0.1) -> list[Finding]:
    """Rows of held-out splits that are in the training set.

    Args:
        train: Questions of the training set.
        splits: Questions of each held-out split by name.
        most: Share of a split that may be equal to training rows before the run is refused.
    """
    findings = []
    found = defaultdict(dict)
    texts = [text for questions in splits.values() for text in questions]
    names = [(name, i) for name, questions in splits.items() for i in range(len(questions))]
    for kind, pairs in zip(("equal", "near"), find_leaks(train, texts), strict=True):
        for target, row in pairs.items():
            name, i = names[target]
            found[name].setdefault(kind, {})[i] = row
    for name, questions in splits.items():
        equal, near = found[name].get("equal", {}), found[name].get("near", {})
        numbers = {"split": name, "samples": len(questions), "equal": len(equal), "near": len(near)}
        if equal:
            text = (
                f"{len(equal)} of {len(questions)} {name} samples are training rows, so their scores say nothing; "
                f"take them out of one of the two"
            )
            level = "refused" if len(equal) > most * len(questions) else "warning"
            findings.append(Finding("leakage", level, text, sorted(set(equal.values())), numbers))
        if near:
            text = (
                f"{len(near)} of {len(questions)} {name} samples nearly equal a training row (word triples, {NEAR:.0%})"
            )
            findings.append(Finding("near_leakage", "warning", text, sorted(set(near.values())), numbers))
        if not equal and not near:
            nearly = "nor nearly" if len(train) <= MOST_ROWS else f"nor nearly in its first {MOST_ROWS:,} rows"
            text = f"no {name} sample is in the training set, {nearly} ({len(questions)} samples)"
            findings.append(Finding("leakage", "ok", text, numbers=numbers))
    return findings
