"""
Which models are ranked, by which measure, and which is the best of them. Imports without torch.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from finetuning.agreement import Estimate, correlation_within_models
from finetuning.report.comparison import Comparison, compare_all
from finetuning.resampling import bootstrap_interval
from finetuning.wording import say_share

COVERAGE_NEEDED = 0.95  # of its answers a model must have a score of, to be ranked
SAMPLES_NEEDED = 0.8  # of the samples that are compared a model must have a score of, to be ranked
STOPPING_NEEDED = 0.95
CHANCE = 0.5  # the share of pairs in which a judge that sees nothing prefers the reference to another sample's


@dataclass
class Verdict:
    """Which model to use, by which measure, and how sure that is.

    Args:
        best: None where no model has an answer.
        comparisons: Of all pairs of the models that are ranked, on the samples that are reported.
        means: Of the models that are ranked, on the same samples.
        intervals: 95 % intervals of these means.
        unranked: The models that are shown and not ranked: the share of their answers that have a judgement, or of the
            samples that are compared that have a score.
        lacking: Those of them that lack samples, and not judgements.
        num_left_out: Samples that not every ranked model has a score of.
        num_undefined: Samples that were answered, of which the measure is undefined for every model.
        num_chosen_on: Samples that the best was chosen on, if they are not those that are reported.
        holdout: The share that was asked for; 0 if there is none.
        kept: The share of what each model has learned that rounding to nearest keeps, by dtype, where it is known.
        agreement: Rank correlation of ROUGE-1 and the judge's overall score within models, with its 95 % interval.
    """

    best: str | None
    measure: str
    reason: tuple[str, dict]
    baseline: str | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unranked: dict[str, float] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)
    num_samples: int = 0
    num_left_out: int = 0
    num_undefined: int = 0
    num_chosen_on: int | None = None
    holdout: float = 0.0
    stop_rate: float = math.nan
    kept: dict[str, dict[str, float]] = field(default_factory=dict)
    agreement: Estimate = field(default_factory=Estimate)

    def against(self, model: str) -> list[Comparison]:
        """A model against each other ranked one, in their order; nothing where it is not ranked."""
        found = {c.other: c for c in self.comparisons if c.better == model}
        found |= {c.better: c.turned() for c in self.comparisons if c.other == model}
        return [found[name] for name in self.means if name in found]

    def between(self, first: str, second: str) -> Comparison:
        """One ranked model against another one."""
        return next(c for c in self.against(first) if c.other == second)


def choose_measure(samples: pd.DataFrame, audits: Mapping = {}) -> tuple[str, tuple[str, dict], dict[str, float]]:
    """The measure that models are ranked by, and why; and the coverage of the models that it leaves out.

    The judge's overall score, if nearly all answers of at least two models (or of the only one) have one, and
    no audit says that it means nothing. Else ROUGE-1, or chrF where no reference has the words that ROUGE counts.
    """
    answered = samples[samples["finish_reason"] != "error"]
    coverage = answered.groupby("model", sort=False)["overall"].apply(lambda scores: scores.notna().mean())
    failed = [judge for judge, shares in audits.items() if "other" in shares and shares["other"]["low"] <= CHANCE]
    covered = coverage[coverage >= (math.inf if failed else COVERAGE_NEEDED)]
    if len(covered) and len(covered) == len(coverage):
        return "overall", ("judged", {}), {}
    if len(covered) >= 2:
        return "overall", ("some judged", {}), coverage.drop(covered.index).to_dict()
    measure = "chrf" if answered["rouge1"].isna().all() and answered["chrf"].notna().any() else "rouge1"
    if answered["overall"].isna().all():
        return measure, ("not judged" if answered["status"].isna().all() else "none judged", {}), {}
    if failed:
        return measure, ("audit failed", {"judge": failed[0], **audits[failed[0]]["other"]}), {}
    worst = coverage.idxmin()
    figures = {"coverage": say_share(coverage[worst], COVERAGE_NEEDED), "model": worst}
    return measure, ("few judged", figures), {}


def find_lacking(scores: pd.DataFrame) -> dict[str, float]:
    """The models that would shrink the comparison of the others too much: their share of the samples that are compared.

    That many samples are compared for which the number of models that have so many, without the one that they are
    compared with, times the samples is the largest: of three models with 50 samples and one with 2 it is 50, of two
    with 20 and two with 10 it is 10.

    Args:
        scores: One row a sample, one column a model; NaN where there is no score.
    """
    counts = scores.notna().sum()
    candidates = sorted(counts[counts > 0])
    compared = max(candidates, key=lambda number: ((counts >= number).sum() - 1) * number, default=0)
    return {name: float(count / compared) for name, count in counts.items() if count < SAMPLES_NEEDED * compared}


def is_held_out(sample_id: str, holdout: float) -> bool:
    """Whether a sample is reported on rather than chosen on: a share of all, the same whatever else there is."""
    return int(hashlib.sha256(sample_id.encode()).hexdigest()[:8], 16) < holdout * 2**32


def decide(samples: pd.DataFrame, baseline: str = "base", holdout: float = 0.0, audits: Mapping = {}) -> Verdict:
    """Name the best model and say what the samples can and cannot show.

    Args:
        samples: As samples.load_samples gives them.
        baseline: The model that all are compared with, if it is there.
        holdout: Share of the samples that have no part in choosing the best, and are reported on. 0 chooses and
            reports on all of them.
        audits: Of the judges, as opinions.load_opinions gives them.
    """
    measure, reason, unranked = choose_measure(samples, audits)
    tables = {name: samples.pivot(index="id", columns="model", values=name) for name in ("overall", "rouge1", "chrf")}
    table = tables[measure][[name for name in samples["model"].unique() if name not in unranked]]
    lacking = find_lacking(table)
    known = table.drop(columns=list(lacking)).dropna(how="all")
    table = known.dropna()
    verdict = Verdict(
        None, measure, reason, unranked={**unranked, **lacking}, lacking=set(lacking), holdout=holdout,
        num_left_out=len(known) - len(table),
    )  # fmt: skip
    if measure != "overall":
        answered = samples[samples["finish_reason"] != "error"]
        verdict.num_undefined = answered["id"].nunique() - answered[answered[measure].notna()]["id"].nunique()
    if table.empty:
        return verdict
    reported, chosen_on = table, table
    if holdout > 0:
        held_out = [is_held_out(sample_id, holdout) for sample_id in table.index]
        reported, chosen_on = table[held_out], table[[not held for held in held_out]]
        if reported.empty or chosen_on.empty:
            reported = chosen_on = table  # too few samples to split
        else:
            verdict.num_chosen_on = len(chosen_on)
    verdict.best = str(chosen_on.mean().idxmax())
    verdict.num_samples = len(reported)
    verdict.baseline = baseline if baseline in reported.columns else None
    verdict.means = {str(name): float(mean) for name, mean in reported.mean().items()}
    verdict.intervals = {name: bootstrap_interval(reported[name]) for name in verdict.means}
    verdict.comparisons = compare_all(reported)
    stopped = samples[(samples["model"] == verdict.best) & samples["id"].isin(reported.index)]["stopped"]
    verdict.stop_rate = float(stopped.mean())
    verdict.kept = dict(zip(samples["model"], samples.get("kept", []), strict=False))
    verdict.agreement = correlation_within_models(
        *(tables[name][list(verdict.means)] for name in ("rouge1", "overall"))
    )
    return verdict
