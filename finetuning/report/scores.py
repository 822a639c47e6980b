"""
The tables of step 5 as files: CSV and JSON, for other tools. Imports without torch.
"""

import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from finetuning.errors import make_folder
from finetuning.report.headline import Headline
from finetuning.report.opinion_sentences import say_opinions
from finetuning.report.opinions import Opinions
from finetuning.report.samples import criteria_of
from finetuning.report.sentences import say_headline, say_verdict
from finetuning.runs import write_json, write_whole

SCORES = "scores"


def choose_report_dir(runs: list[Path], report_dir: str | None = None) -> Path:
    """Where the page and the tables of runs go."""
    if report_dir is not None:
        return Path(report_dir)
    if len(runs) == 1:
        return runs[0]
    return Path(os.path.commonpath([run.resolve().parent for run in runs]))


def write_scores(
    folder: Path, samples: pd.DataFrame, summary: pd.DataFrame, headline: Headline, opinions: Opinions
) -> Path:
    """Write the tables for other tools, as CSV and JSON."""
    verdict = headline.verdict
    folder = folder / SCORES
    make_folder(folder)
    _write_csv(folder / "summary.csv", summary.reset_index())
    _write_csv(folder / "comparisons.csv", pd.DataFrame([asdict(c) for c in verdict.comparisons]))
    no_measures = ("messages", "references", "prediction", "evaluation", "removed_tokens", "kept")
    measured = [c for c in samples if c not in no_measures]
    _write_csv(folder / "samples.csv", samples[measured])
    tables = opinions.tables()
    for name in ("pairs", "jury", "people"):
        if name in tables:
            _write_csv(folder / f"{name}.csv", tables[name])
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    content = {
        "use": headline.use,
        "headline": say_headline(headline, "en"),
        "headline_ko": say_headline(headline, "ko"),
        "best": verdict.best,
        "measure": verdict.measure,
        "baseline": verdict.baseline,
        "criteria": criteria_of(samples),
        "num_samples": verdict.num_samples,
        "means": verdict.means,
        "unranked": verdict.unranked,
        "sentences": say_verdict(verdict, "en"),
        "sentences_ko": say_verdict(verdict, "ko"),
        "judges_and_people": say_opinions(opinions, verdict, "en"),
        "judges_and_people_ko": say_opinions(opinions, verdict, "ko"),
    }
    write_json(folder / "verdict.json", content)
    return folder


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table, with `'` in front of a text that a spreadsheet would take for a formula, and run."""
    texts = table.select_dtypes(exclude="number").columns
    table = table.assign(**{column: table[column].map(_without_formula) for column in texts})
    write_whole(path, table.to_csv(index=False))


def _without_formula(cell):
    if not isinstance(cell, str):
        return cell
    # a bare \r ends a row for a spreadsheet, and Python's csv does not quote it
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\n")) else cell
