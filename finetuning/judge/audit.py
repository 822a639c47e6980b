"""
An audit of the judge that needs no labels: does it score a reference higher than what is worse for certain?

Each text is judged alone, as the answers of step 3 are, so the judge does not know what it is. Imports without torch.
"""

import re

import numpy as np

from finetuning.errors import InputError
from finetuning.resampling import bootstrap_interval, share_interval

SPEAKER = re.compile(r"^[ \t]*([^\s:][^\n:]{0,39}):", re.MULTILINE)  # what stands before the colon of a dialogue's line
ENDINGS = ".!?。"


def build_texts(rows: dict[str, dict], ids: set[str] | None) -> dict[str, list[dict]]:
    """Rows of predictions, by the kind of their answers: the first reference of a sample, that of the next sample by id
    which has another, the reference with its two speakers swapped, and the first half of it.

    What cannot be made of a sample is left out. The judge is shown the references that it is not asked about, if any.

    Args:
        rows: Of predictions, by id.
        ids: Of the samples to take; None means all.

    Raises:
        InputError: None of them has a reference.
    """
    samples = [row for _, row in sorted(rows.items()) if "".join(row["references"][:1]).strip()]
    texts: dict[str, list[dict]] = {kind: [] for kind in ("reference", "other", "swapped", "half")}
    for place, sample in enumerate(samples):
        if ids is not None and sample["id"] not in ids:
            continue
        true, *others = dict.fromkeys(sample["references"])
        following = (samples[(place + step) % len(samples)]["references"][0] for step in range(1, len(samples)))
        made = {
            "reference": true,
            "other": next((text for text in following if text not in sample["references"]), None),
            "swapped": _swap_speakers(true, "\n".join(message["content"] for message in sample["messages"])),
            "half": _halve(true),
        }
        for kind, text in made.items():
            if text is not None and text not in others:
                texts[kind].append({**sample, "references": others or [true], "prediction": text})
    if not texts["reference"]:
        raise InputError("audit: no sample has a reference; let step 3 answer samples with references")
    return texts


def _swap_speakers(text: str, dialogue: str) -> str | None:
    """The text with two speakers of a dialogue in each other's place; None where that need not make it untrue."""
    names = sorted(set(SPEAKER.findall(dialogue)), key=len, reverse=True)
    name = rf"(?a:(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w))"  # ASCII, in which no particle is a part of it
    found = sorted(set(re.findall(name, text)))
    if len(found) != 2 or not re.search(name, re.sub(rf"{name}\s*(?:and|와|과|,)\s*{name}", "", text)):
        return None
    return re.sub(name, lambda match: found[match[0] == found[0]], text)


def _halve(text: str) -> str | None:
    """The first half of the words, with the end that the text has; None where there are too few."""
    words = list(re.finditer(r"\S+", text := text.strip()))
    if len(words) < 4:
        return None
    return text[: words[len(words) // 2 - 1].end()].rstrip(ENDINGS + ",;:") + (text[-1] if text[-1] in ENDINGS else "")


def measure_preferences(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """How often the reference has the higher score, a tie counting one half, with the 95 % interval of that share.

    Args:
        scores: By the kind of the text and the id of the sample.
    """
    found = {}
    for kind, its in scores.items():
        # expected scores are floats: those nearer than this are equal
        gaps = [round(true - its[sample], 6) for sample, true in scores["reference"].items() if sample in its]
        values = (1 + np.sign(gaps)) / 2
        if kind != "reference" and gaps:
            # Wilson's interval is of ones and zeros, and nothing can be drawn again from a single tie
            by_drawing = bootstrap_interval(values) if len(values) > 1 else (0.0, 1.0)
            low, high = by_drawing if 0.5 in values else share_interval(values)
            found[kind] = {"value": float(values.mean()), "low": low, "high": high, "num_samples": len(gaps)}
    return found
