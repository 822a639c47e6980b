"""
Scores of answers against several references each. Imports without torch.
"""

import statistics
from collections.abc import Iterable


def mean(values: Iterable[float | None]) -> float | None:
    """Plain mean of what is defined; None where nothing is."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None


def over_references(name: str, scores: list[list[float | None]]) -> dict:
    """Mean over references, the first one and the best: each sample's, and their plain mean over samples."""
    per_sample = {
        name: [mean(sample) for sample in scores],
        f"{name}_first": [sample[0] if sample else None for sample in scores],
        f"{name}_max": [max((score for score in sample if score is not None), default=None) for sample in scores],
    }
    means = {key: mean(values) for key, values in per_sample.items()}
    return {**means, **{f"{key}_per_sample": values for key, values in per_sample.items()}}
