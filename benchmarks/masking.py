"""
What mask_pii finds in labelled samples: precision and recall of each kind of personal data, as a table in Markdown.

    python benchmarks/masking.py

The samples are those of tests/data/pii_samples.jsonl, unless another file is named.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetuning.data.pii import PII_TOKENS, TOKEN, mask_pii

SAMPLES = ROOT / "tests/data/pii_samples.jsonl"


def _spans(text: str, masked: str) -> set[tuple[int, int, str]]:
    """Where the tokens of `masked` stand in `text`, as (start, end, kind)."""
    kinds = {token: kind for kind, token in PII_TOKENS.items()}
    parts = re.split(f"({TOKEN.pattern})", masked)
    pattern = "".join("(.+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    match = re.fullmatch(pattern, text, re.DOTALL)
    if match is None:
        raise ValueError(f"{masked!r} is not {text!r} with tokens in it")
    tokens = enumerate(parts[1::2], start=1)
    return {(*match.span(group), kinds[token]) for group, token in tokens if match[group] != token}


def measure(samples: list[dict]) -> dict[str, tuple[int, int, int]]:
    """For each kind: spans masked right, masked wrongly (or with wrong ends), and missed (or with wrong ends)."""
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for sample in samples:
        expected = _spans(sample["text"], sample["masked"])
        found = _spans(sample["text"], mask_pii(sample["text"]))
        for counts, spans in ((right, expected & found), (wrong, found - expected), (missed, expected - found)):
            counts.update(kind for _, _, kind in spans)
    return {kind: (right[kind], wrong[kind], missed[kind]) for kind in PII_TOKENS}


def format_table(title: str, samples: list[dict]) -> str:
    """A Markdown table of `measure`, with the sum over all kinds as its last row."""
    counts = measure(samples)
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines = [f"| {title} | spans | precision | recall |", "|---|---|---|---|"]
    for kind, (right, wrong, missed) in [*counts.items(), ("all", total)]:
        precision, recall = (f"{right / n:.2f}" if n else "-" for n in (right + wrong, right + missed))
        lines.append(f"| {kind} | {right + missed} | {precision} | {recall} |")
    return "\n".join(lines)


if __name__ == "__main__":
    samples = [
        json.loads(line)
        for line in (Path(sys.argv[1]) if sys.argv[1:] else SAMPLES).read_text(encoding="utf-8").splitlines()
    ]
    print(format_table(f"all {len(samples)} samples", samples))
    for part in ("held_out", "final_check"):
        rows = [sample for sample in samples if sample.get(part)]
        print(f"\n{format_table(f'{part}, {len(rows)} samples', rows)}")
