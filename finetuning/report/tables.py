"""
Tables of models, and of comparisons between them. Imports without torch.

Every table of models has one row a model, in the order of the training steps. Means are over samples, with a 95 %
interval from the BCa bootstrap, shares with Wilson's. What has no score counts in no mean and is counted beside it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from finetuning.measures import COUNTS, JUDGED, MEASURES, criterion_column, describe_measure
from finetuning.report.comparison import Comparison
from finetuning.report.samples import criteria_of
from finetuning.report.verdict import COVERAGE_NEEDED, Verdict
from finetuning.resampling import bootstrap_interval, share_interval
from finetuning.wording import say_number, say_p, say_share


def measures_of(samples: pd.DataFrame) -> list[str]:
    """The columns of samples that were measured: the judge's first, then what step 3 measures."""
    criteria = criteria_of(samples) if "evaluation" in samples else []
    return [
        m for m in (*JUDGED, *map(criterion_column, criteria), *MEASURES) if m in samples and samples[m].notna().any()
    ]


def summarize(samples: pd.DataFrame) -> pd.DataFrame:
    """Means with intervals.

    Returns:
        Indexed by model, in the order of steps: run, step, samples, errors (no answer), judged, failed (no score though
        it was asked for), coverage (judged share of the answers), cost (US dollars), seconds, and for each measure that
        was taken `<measure>`, `<measure>_low`, `<measure>_high`.
    """
    wanted = measures_of(samples)
    rows = {}
    for name, group in samples.groupby("model", sort=False):
        row = {
            "run": group["run"].iloc[0],
            "step": group["step"].iloc[0],
            "samples": len(group),
            "errors": int((group["finish_reason"] == "error").sum()),
        }
        if "status" in group:
            row["judged"] = int((group["status"] == "ok").sum())
            row["failed"] = int((group["status"].notna() & (group["status"] != "ok")).sum())
            num_answers = row["samples"] - row["errors"]
            row["coverage"] = row["judged"] / num_answers if num_answers else math.nan
            row["cost"] = group["cost"].sum(min_count=1)
        row["seconds"] = group["seconds"].iloc[0]
        for measure in wanted:
            row[measure] = group[measure].mean()
            interval = share_interval if measure == "stopped" else bootstrap_interval
            row[f"{measure}_low"], row[f"{measure}_high"] = interval(group[measure])
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def measures_in(summary: pd.DataFrame) -> list[str]:
    return [column for column in summary if f"{column}_low" in summary]


class Cell(NamedTuple):
    """A number in a table: as text, what it sorts by (None where there is no number), and the ends of its interval."""

    text: str
    number: float | None = None
    low: str = ""
    high: str = ""

    def __str__(self) -> str:
        return f"{self.text} [{self.low}, {self.high}]" if self.low else self.text


def build_cell(value: float, decimals: int, low: float = math.nan, high: float = math.nan, sign: str = "") -> Cell:
    """The cell of a number with its interval, if it has one."""
    if math.isnan(value):
        return Cell("-")
    ends = () if math.isnan(low) else (f"{low:{sign}z.{decimals}f}", f"{high:{sign}z.{decimals}f}")
    return Cell(say_number(value, decimals, sign), float(value), *ends)


def build_p_cell(p: float) -> Cell:
    return Cell("-") if math.isnan(p) else Cell(say_p(p, 4).removeprefix("= "), float(p))


def build_cells(summary: pd.DataFrame) -> dict[str, list[Cell]]:
    """The columns of the summary that are shown, each with the cells of its models."""
    columns = {}
    for count in ["samples"] + [c for c in ("errors", "judged", "failed") if c in summary and summary[c].any()]:
        columns[count] = [Cell(str(number), float(number)) for number in summary[count]]
    if "coverage" in summary and summary["judged"].any():
        columns["coverage"] = [_format_known(share, _say_coverage) for share in summary["coverage"]]
    for measure in measures_in(summary):
        form = f"{{:.{describe_measure(measure)[1]}f}}".format
        ends = zip(summary[f"{measure}_low"], summary[f"{measure}_high"], strict=True)
        columns[measure] = [
            _format_known(mean, form) if math.isnan(low) else Cell(form(mean), mean, form(low), form(high))
            for mean, (low, high) in zip(summary[measure], ends, strict=True)
        ]
    columns["seconds"] = [_format_known(seconds, "{:.1f}".format) for seconds in summary["seconds"]]
    if "cost" in summary and summary["cost"].notna().any():
        columns["cost"] = [_format_known(cost, "${:.4g}".format) for cost in summary["cost"]]
    return columns


def _format_known(value: float, form: Callable[[float], str]) -> Cell:
    return Cell("-") if math.isnan(value) else Cell(form(value), float(value))


def _say_coverage(share: float) -> str:
    return say_share(share, COVERAGE_NEEDED) + (" (not ranked)" if share < COVERAGE_NEEDED else "")


def title_of(column: str) -> str:
    """The title of a column of the summary."""
    return column if column in COUNTS else describe_measure(column)[0]


def format_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as text, `0.712 [0.680, 0.741]`, under readable titles."""
    cells = {title_of(column): list(map(str, its)) for column, its in build_cells(summary).items()}
    return pd.DataFrame(cells, index=summary.index)


def compare_cells(c: Comparison, measure: str) -> dict[str, Cell | str]:
    """The cells of a comparison of two models, by their titles."""
    decimals = describe_measure(measure)[1]
    counts = {"better": c.wins, "equal": c.ties, "worse": c.losses}
    return {
        "model": c.better,
        "minus": c.other,
        "difference": build_cell(c.difference, decimals, c.low, c.high, "+"),
        "p (Holm)": build_p_cell(c.p),
        **{title: build_cell(num, 0) for title, num in counts.items()},
        "detectable": build_cell(c.detectable, decimals),
    }


def format_comparisons(verdict: Verdict) -> pd.DataFrame:
    """Readable table of all pairs of models."""
    found = [c if c.difference >= 0 else c.turned() for c in verdict.comparisons]
    table = pd.DataFrame([compare_cells(c, verdict.measure) for c in found]).map(str)
    return table.assign(shown=["yes" if c.is_clear else "no" for c in found])
