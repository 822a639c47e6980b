"""
Questions of held-out splits that are in the training set, equal or nearly so. Imports without torch.
"""

from collections.abc import Iterable

from datasketch import MinHash, MinHashLSH

from finetuning.data.checks import Finding, normalize

NEAR = 0.8  # Jaccard similarity of two texts' word triples, from which they count as near-duplicates
NUM_PERMUTATIONS = 128
CANDIDATES = 0.6  # similarity from which MinHash proposes pairs, lower than NEAR so that it misses few of those
# Beyond these, only equal questions are looked for: near ones take a third of a second per thousand rows.
MAX_ROWS = 200_000
MAX_EQUAL_SHARE = 0.1  # of a held-out split that may be equal to training rows before the run is refused


def shingles(normalized: str) -> set[str]:
    """Runs of three words; of five characters where a script has no spaces."""
    words = normalized.split()
    spaceless = len(normalized) > 12 * len(words)
    pieces, size, joint = (list(normalized), 5, "") if spaceless else (words, 3, " ")
    return {joint.join(pieces[i : i + size]) for i in range(max(1, len(pieces) - size + 1))}


def minhash(pieces: set[str]) -> MinHash:
    signature = MinHash(NUM_PERMUTATIONS, seed=1)
    signature.update_batch([piece.encode() for piece in pieces])
    return signature


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
    for row, text in enumerate(normalized[:MAX_ROWS]):
        pieces = shingles(text)
        for i in index.query(minhash(pieces)):
            if i not in near and len(pieces & rest[i]) >= NEAR * len(pieces | rest[i]):
                near[i] = row
    return equal, near


def check_leaks(train: list[str], splits: dict[str, list[str]]) -> list[Finding]:
    """Rows of held-out splits that are in the training set.

    Args:
        train: Questions of the training set.
        splits: Questions of each held-out split by name.
    """
    findings = []
    leaks = find_leaks(train, [text for questions in splits.values() for text in questions])
    start = 0
    for name, questions in splits.items():
        places = range(start, start + len(questions))
        equal, near = ([row for target, row in found.items() if target in places] for found in leaks)
        start = places.stop
        numbers = {"split": name, "samples": len(questions), "equal": len(equal), "near": len(near)}
        if equal:
            text = (
                f"{len(equal)} of {len(questions)} {name} samples are training rows, so their scores say nothing; "
                f"take them out of one of the two"
            )
            level = "refused" if len(equal) > MAX_EQUAL_SHARE * len(questions) else "warning"
            findings.append(Finding("leakage", level, text, sorted(set(equal)), numbers))
        if near:
            text = (
                f"{len(near)} of {len(questions)} {name} samples nearly equal a training row (word triples, {NEAR:.0%})"
            )
            findings.append(Finding("near_leakage", "warning", text, sorted(set(near)), numbers))
        if not equal and not near:
            nearly = "nor nearly" if len(train) <= MAX_ROWS else f"nor nearly in its first {MAX_ROWS:,} rows"
            text = f"no {name} sample is in the training set, {nearly} ({len(questions)} samples)"
            findings.append(Finding("leakage", "ok", text, numbers=numbers))
    return findings
