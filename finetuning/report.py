"""
The page of step 5: one file that needs no server and no network. Imports without torch.

Everything that a model, a judge or a dataset wrote is data in it: escaped by the template, or JSON that the page's script
puts into the document as text. A content security policy with the hash of that script keeps anything else from running
and any request from leaving.
"""

import base64
import hashlib
import io
import math
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from finetuning.plots import plot_criteria, plot_differences, plot_lengths, plot_measures, plot_training
from finetuning.runs import EDA, PREFLIGHT_FILE, read_json, read_run, to_json
from finetuning.schemas import FULL_RUN_RECORD, PREFLIGHT
from finetuning.tables import (
    criteria_of,
    describe_measure,
    format_table,
    load_training_logs,
    measures_in,
    name_runs,
)
from finetuning.verdict import Verdict

HERE = Path(__file__).parent
COUNTS = ("samples", "errors", "judged", "failed", "coverage", "seconds", "cost")


def _to_svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_data_uri(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def read_preflight(run: Path) -> dict | None:
    """What step 1 found before training; None where it was not asked, or the run was made elsewhere."""
    file = run / PREFLIGHT_FILE
    return read_json(file, PREFLIGHT) if file.is_file() else None


def build_rows(summary: pd.DataFrame) -> tuple[list[str], list[dict]]:
    """Titles and rows of the table of models, each cell with its text, its interval and the number that it sorts by."""
    text = format_table(summary)
    by_title = {describe_measure(measure)[0]: measure for measure in measures_in(summary)}
    by_title |= {name: name for name in COUNTS}
    rows = []
    for name, cells in text.iterrows():
        found = []
        for title, cell in cells.items():
            mean, _, interval = cell.partition(" [")
            value = summary.loc[name, by_title[title]]
            number = None if pd.isna(value) else float(value)
            found.append({"text": mean, "interval": interval.rstrip("]").replace(", ", " – "), "number": number})
        rows.append({"name": name, "cells": found})
    return list(text.columns), rows


def build_samples(samples: pd.DataFrame, models: list[str], criteria: list[str]) -> list[dict]:
    """The samples as the page's script reads them, with short keys, since there may be thousands of answers.

    Returns:
        For each sample id, m (messages as [role, content]), r (references) and a, the answers in the order of
        `models`: null where there is none, else p (prediction), f (finish reason), e (error), n (tokens), g (ROUGE-1),
        q (seq-rep-4), s (status of the judgement), o (overall score) and v ([score, explanation] of each criterion).
    """
    place = {name: i for i, name in enumerate(models)}
    found: dict[str, dict] = {}
    columns = ["id", "model", "messages", "references", "prediction", "finish_reason", "error", "num_new_tokens", "rouge1",
               "seq_rep_4", "status", "overall", "evaluation"]  # fmt: skip
    for row in samples[columns].itertuples(index=False):
        sample = found.get(row.id)
        if sample is None:
            messages = [[message["role"], message["content"]] for message in row.messages]
            sample = found[row.id] = {"id": row.id, "m": messages, "r": row.references, "a": [None] * len(models)}
        answer = {
            "p": row.prediction, "f": row.finish_reason, "e": row.error, "n": _rounded(row.num_new_tokens, 0),
            "g": _rounded(row.rouge1, 3), "q": _rounded(row.seq_rep_4, 3),
            "s": row.status, "o": _rounded(row.overall, 2),
        }  # fmt: skip
        if row.status == "ok":
            answer["v"] = [[row.evaluation[c]["score"], row.evaluation[c]["explanation"]] for c in criteria]
        sample["a"][place[row.model]] = {key: value for key, value in answer.items() if value is not None}
    return list(found.values())


def _rounded(value: float, decimals: int) -> float | int | None:
    if value is None or math.isnan(value):
        return None
    return round(float(value), decimals) if decimals else int(value)


def to_script_data(content) -> str:
    """JSON that can stand in a <script> element: no text in it can close the element."""
    return to_json(content, separators=(",", ":")).replace("<", "\\u003c")


def write_report(
    folder: Path, runs: list[Path], samples: pd.DataFrame, summary: pd.DataFrame, verdict: Verdict
) -> Path:
    """Write `report.html`: verdict, tables, plots, and the samples of all models side by side.

    Args:
        folder: Where to write it.
        samples, summary, verdict: As load_runs, summarize and decide give them.
    """
    named = name_runs(runs)
    models, criteria = [str(name) for name in summary.index], criteria_of(samples)
    plots = [
        plot_measures(summary), plot_differences(samples, verdict), plot_criteria(summary), plot_lengths(samples),
        plot_training(load_training_logs(runs)),
    ]  # fmt: skip
    titles, rows = build_rows(summary)
    script = (HERE / "report.js").read_text(encoding="utf-8")
    steps = summary["step"].tolist()
    data = {
        "models": models,
        "criteria": [describe_measure(criterion)[0] for criterion in criteria],
        "judged": verdict.measure == "overall",
        # a checkpoint and the one before it, of the same run, between which answers can get worse
        "successors": [
            [i - 1, i]
            for i in range(1, len(models))
            if summary["run"].iloc[i] == summary["run"].iloc[i - 1] and 0 <= steps[i - 1] < steps[i]
        ],
        "samples": build_samples(samples, models, criteria),
    }
    comparisons = list(dict.fromkeys(
        [(c.better, c.other) for c in (verdict.against(verdict.best) if verdict.best is not None else [])]
        + [(c.other, c.better) for c in (verdict.against(verdict.baseline) if verdict.baseline is not None else [])]
    ))  # fmt: skip
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        title=" · ".join(named),
        records={name: read_run(run, FULL_RUN_RECORD) for name, run in named.items()},
        num_samples=len(data["samples"]),
        verdict=verdict,
        titles=titles,
        rows=rows,
        comparisons=[next(c for c in verdict.against(first) if c.other == second) for first, second in comparisons],
        plots=[_to_svg(plot) for plot in plots if plot is not None],
        preflights={name: found for name, run in named.items() if (found := read_preflight(run)) is not None},
        lengths=[_to_data_uri(plot) for run in runs for plot in sorted((run / EDA).glob("*.png"))],
        data=to_script_data(data),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    # a text of a model may hold half a character
    path.write_text(page, encoding="utf-8", errors="replace")
    return path
