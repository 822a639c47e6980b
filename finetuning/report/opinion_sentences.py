"""
What step 5 says of answers side by side, of the judges of a jury, and of people. Imports without torch.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from finetuning.report.opinions import ALL_MODELS, Opinions, PairResult
from finetuning.report.verdict import CHANCE, Verdict
from finetuning.report.words import Words
from finetuning.wording import say_number, say_p, say_share


def say_opinions(opinions: Opinions, verdict: Verdict, language: str = "en") -> list[str]:
    """All of it in sentences, in English (en) or Korean (ko)."""
    words = Words("opinions", language)
    found = []
    for pair in opinions.pairs:
        found.append(say_pair(pair, verdict, language))
        counts = pair.counts
        if not math.isnan(counts.first_place):  # something was preferred
            first_place = say_share(counts.first_place)
            found.append(words("order", flips=counts.flips, num=counts.num_pairs, first_place=first_place))
    found += [_say_audit(judge, shares, words) for judge, shares in opinions.audits.items()]
    if len(opinions.jury):
        found += _say_jury(opinions.jury, words)
    found += [words("people again", file=str(file)) for file in opinions.lacking]
    if len(opinions.people):
        found += _say_people(opinions, words)
    if opinions.num_changed:
        found.append(words("people changed", num=opinions.num_changed))
    return found


def say_pair(pair: PairResult, verdict: Verdict, language: str) -> str:
    """What a judge says of two models side by side, and whether the scores say the same."""
    words, counts = Words("opinions", language), pair.counts
    if counts.num_pairs == 0:
        return words("no pair", first=pair.first, second=pair.second)
    num_decided = counts.wins + counts.losses
    if pair.is_clear:
        share, low, high = pair.share, pair.low, pair.high
        if pair.winner == pair.second:
            share, low, high = 1 - share, 1 - high, 1 - low
        figures = words("share", share=say_share(share), low=say_share(low), high=say_share(high), p=say_p(pair.p))
        text = words(
            "pair", judge=pair.judge, first=pair.winner, second=pair.loser, wins=max(counts.wins, counts.losses),
            decided=num_decided, share=figures,
        )  # fmt: skip
    else:
        text = words(
            "pair unclear", judge=pair.judge, first=pair.first, second=pair.second, wins=counts.wins,
            losses=counts.losses, ties=counts.ties, p=words("p", p=say_p(pair.p)) if num_decided else "",
        )  # fmt: skip
    scores = next((c for c in verdict.against(pair.winner) if c.other == pair.loser), None)
    if scores is None:
        return text + words("not scored")
    better = pair.winner if scores.difference > 0 else pair.loser
    if not scores.is_shown:
        return text + words("beyond the scores" if pair.is_clear else "neither the scores")
    if pair.is_clear:
        return text + words("as the scores" if better == pair.winner else "unlike the scores", second=pair.loser)
    return text + words("but the scores", better=better)


def _say_audit(judge: str, shares: dict[str, dict], words: Words) -> str:
    if "other" not in shares:
        return words("audit unknown", judge=judge)
    kinds = ", ".join(words(f"audit {kind}", **share) for kind, share in shares.items())
    return words("audit passed" if shares["other"]["low"] > CHANCE else "audit failed", judge=judge, kinds=kinds)


def _say_jury(jury: pd.DataFrame, words: Words) -> Iterator[str]:
    alphas = jury["alpha"].dropna()
    alpha = words("jury unknown")
    if len(alphas):
        alpha = " – ".join(dict.fromkeys((say_number(alphas.min(), 2), say_number(alphas.max(), 2))))
    yield words("jury", judges=", ".join(jury["judge"].unique()), alpha=alpha)
    if jury["model"].nunique() > 1:
        choices = [
            words("jury choice", judge=judge, model=_highest(its.set_index("model")["mean"]))
            for judge, its in jury.groupby("judge", sort=False)
        ]
        yield words("jury alone", choices=", ".join(choices))


def _say_people(opinions: Opinions, words: Words) -> Iterator[str]:
    models = list(opinions.scores["model"].unique())
    yield words("people", num=len(opinions.scores), models=", ".join(models))
    overall = opinions.people[opinions.people["measure"] == "overall"].set_index("model")
    if overall.empty:
        return
    whole = overall.loc[ALL_MODELS]
    if math.isnan(whole["spearman"]):
        yield words("people few", num=int(whole["judged"]))
    else:
        estimates = {name: _say_estimate(whole, name, words) for name in ("spearman", "kappa")}
        yield words("people agree", num=int(whole["within_models"]), **estimates)
    if len(models) > 1:
        yield words("people best", model=_highest(overall.drop(ALL_MODELS)["mean"]))


def _say_estimate(row: pd.Series, name: str, words: Words) -> str:
    value, low, high = (say_number(row[column], 2) for column in (name, f"{name}_low", f"{name}_high"))
    return words("estimate", value=value, low=low, high=high)


def _highest(means: pd.Series) -> str:
    """The model with the highest mean, or all that have it."""
    return ", ".join(means.index[np.isclose(means, means.max(), rtol=0, atol=1e-9)])
