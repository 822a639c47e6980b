"""
Which model to use. Imports without torch.

The rule (docs/scoring.md has its reasons): a baseline stays unless another model is shown to be better than it. Among
the models that are shown to be (among all, without a baseline), the one with the highest mean is used, or one of the
same run with less training that is within a standard error of it (Breiman et al. 1984). Where the scores cannot tell
it from a model that the judge prefers side by side, that one is. With a hold-out the choice was made before, so it
only stands or falls.
"""

from dataclasses import dataclass, field

import pandas as pd

from finetuning.report.comparison import Comparison
from finetuning.report.opinions import PairResult
from finetuning.report.verdict import Verdict
from finetuning.runs import checkpoint_step


@dataclass
class Headline:
    """Which model to use, and what a reader must know with it.

    Args:
        use: None where nothing is ranked.
        key: Of the sentence that says why.
        top: The model that would be used if its mean alone counted.
        stop_rate: Share of the answers of `use` that ended by themselves.
        decided_by: The comparison side by side that decided for `use`.
        against: Those in which another model is preferred to `use`.
    """

    verdict: Verdict
    use: str | None
    key: str
    top: str | None = None
    stop_rate: float = 1.0
    decided_by: PairResult | None = None
    against: list[PairResult] = field(default_factory=list)


def training_step(name: str) -> int:
    """Training step of a model, whose name may have the run's in front."""
    return checkpoint_step(name.rpartition("/")[2])


def build_headline(verdict: Verdict, summary: pd.DataFrame, pairs: list[PairResult]) -> Headline:
    """Name the model to use.

    Args:
        summary: As tables.summarize gives it.
        pairs: What opinions.load_opinions found of comparisons side by side.
    """
    if verdict.best is None:
        return Headline(verdict, None, "none")
    clear, decided_by = [pair for pair in pairs if pair.is_clear], None
    if verdict.num_chosen_on is not None:
        use, key, top = _confirm(verdict, verdict.best)
    else:
        use, key, top = _choose(verdict)
        close = [c.other for c in verdict.against(use) if not c.is_shown]
        decided_by = next((pair for pair in clear if pair.loser == use and pair.winner in close), None)
        if decided_by is not None:
            use, key, top = decided_by.winner, "side by side", use
    against = [pair for pair in clear if pair.loser == use]
    return Headline(verdict, use, key, top, float(summary.loc[use, "stopped"]), decided_by, against)


def _choose(verdict: Verdict) -> tuple[str, str, str | None]:
    """The model to use where all samples had a part in choosing: its name, why, and the highest mean."""
    means, baseline = verdict.means, verdict.baseline
    candidates = list(means)
    if len(means) == 1:
        return candidates[0], "alone", None
    if baseline is not None:
        against = verdict.against(baseline)
        candidates = [c.other for c in against if c.turned().is_clear]
        if not candidates:
            return baseline, "keep all worse" if all(c.is_clear for c in against) else "keep", None
    top = max(reversed(candidates), key=means.__getitem__)  # the last one of those with the same mean
    against = verdict.against(top)
    close = [c.other for c in against if c.other in candidates and _is_within_standard_error(c)]
    use = min([top, *(name for name in close if _had_less_training(name, top))], key=training_step)
    if use != top:
        return use, "less training", top
    if all(c.is_clear for c in against):
        return top, "clear", top
    if any(means[name] > means[top] for name in means if name not in candidates):
        return top, "highest shown", top
    return top, "highest shared" if any(c.has_same_mean for c in against) else "highest", top


def _is_within_standard_error(c: Comparison) -> bool:
    """Whether the difference is no more than one standard error, which is a quarter of the width of its interval."""
    return not c.is_shown and abs(c.difference) <= (c.high - c.low) / 4


def _had_less_training(name: str, other: str) -> bool:
    """Whether a model is an earlier checkpoint of the same run."""
    return name.rpartition("/")[0] == other.rpartition("/")[0] and 0 <= training_step(name) < training_step(other)


def _confirm(verdict: Verdict, best: str) -> tuple[str, str, str | None]:
    """The model to use where the best was chosen on other samples than those that are reported."""
    baseline = verdict.baseline
    against = verdict.against(best)
    better = [c.other for c in against if c.turned().is_clear]
    if baseline is not None and baseline != best:
        better = [name for name in better if name == baseline or verdict.between(name, baseline).is_clear]
        if not verdict.between(best, baseline).is_clear and not set(better) - {baseline}:
            return baseline, "keep held out worse" if baseline in better else "keep held out", None
    if better:
        return max(better, key=verdict.means.__getitem__), "use held out", None
    if len(verdict.means) == 1:
        return best, "alone", None
    are_worse = all(c.is_clear for c in against)
    if best == baseline:
        return best, "keep all worse" if are_worse else "keep", None
    return best, "clear" if are_worse else "chosen", best
