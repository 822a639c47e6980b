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

from finetuning.report.headline import Headline
from finetuning.report.opinions import Opinions
from finetuning.report.plots import (
    plot_criteria,
    plot_differences,
    plot_gains,
    plot_lengths,
    plot_means,
    plot_measures,
    plot_training,
)
from finetuning.report.tables import (
    COUNTS,
    criteria_of,
    criterion_column,
    describe_measure,
    format_cells,
    load_training_logs,
    name_runs,
)
from finetuning.report.verdict import DECIMALS, Verdict
from finetuning.runs import EDA, PREFLIGHT_FILE, is_there, read_json, read_run, to_json, write_whole
from finetuning.schemas import FULL_RUN_RECORD, PREFLIGHT
from finetuning.wording import plural, say_number, say_p

HERE = Path(__file__).parent


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
    return read_json(file, PREFLIGHT) if is_there(file) else None


def build_rows(summary: pd.DataFrame) -> tuple[list[str], list[dict]]:
    """Titles and rows of the table of models, each cell with its text, its interval and the number that it sorts by."""
    text = format_cells(summary)
    rows = []
    for name, cells in text.iterrows():
        found = []
        for column, cell in cells.items():
            mean, _, interval = cell.partition(" [")
            value = summary.loc[name, column]
            number = None if pd.isna(value) else float(value)
            found.append({"text": mean, "interval": interval.rstrip("]").replace(", ", " – "), "number": number})
        rows.append({"name": name, "cells": found})
    return [column if column in COUNTS else describe_measure(column)[0] for column in text], rows


def build_comparisons(verdict: Verdict) -> list[list]:
    """Rows of the table of comparisons: the best model against each other one, and each against the baseline."""
    pairs = [(verdict.best, c.other) for c in verdict.against(verdict.best)] if verdict.best is not None else []
    if verdict.baseline is not None:
        pairs += [(c.other, verdict.baseline) for c in verdict.against(verdict.baseline)]
    found, decimals = [], DECIMALS[verdict.measure]
    for first, second in dict.fromkeys(pairs):
        c = next(c for c in verdict.against(first) if c.other == second)
        cells = [first, second, _cell(c.difference, decimals, c.low, c.high, "+"), _p_cell(c.p)]
        cells += [_cell(c.wins, 0), _cell(c.ties, 0), _cell(c.losses, 0), _cell(c.detectable, decimals)]
        found.append({"kind": "" if c.is_shown else "unclear", "cells": cells})
    return found


def build_opinions(opinions: Opinions) -> list[dict]:
    """The tables of what there is besides scores, each with its titles and rows."""
    tables = opinions.tables()
    found = []
    if "pairs" in tables:
        titles = [
            "model",
            "against",
            "judge",
            "preferred",
            "tie",
            "not preferred",
            "share",
            "p (Holm)",
            "flips",
            "first place",
        ]
        found.append((titles, [
            [
                row["first"], row["second"], row["judge"], _cell(row["wins"], 0), _cell(row["ties"], 0), _cell(row["losses"], 0),
                _cell(row["share"], 2, row["share_low"], row["share_high"]), _p_cell(row["p"]), _cell(row["flips"], 0),
                _cell(row["first_place"], 2),
            ]
            for _, row in tables["pairs"].iterrows()
        ]))  # fmt: skip
    if "jury" in tables:
        found.append((["model", "judge", "answers", "mean", "spread of the judges", "alpha"], [
            [
                row["model"], row["judge"], _cell(row["answers"], 0), _cell(row["mean"], 2, row["mean_low"], row["mean_high"]),
                _cell(row["disagreement"], 2), _cell(row["alpha"], 2),
            ]
            for _, row in tables["jury"].iterrows()
        ]))  # fmt: skip
    if "people" in tables:
        found.append((["model", "measure", "scores", "mean of people", "mean of the judge", "Spearman", "kappa"], [
            [
                row["model"], row["measure"].replace("_", " "), _cell(row["scores"], 0),
                _cell(row["mean"], 2, row["mean_low"], row["mean_high"]), _cell(row["judge_mean"], 2),
                *(_cell(row[name], 2, row[f"{name}_low"], row[f"{name}_high"]) for name in ("spearman", "kappa")),
            ]
            for _, row in tables["people"].iterrows()
        ]))  # fmt: skip
    return [
        {"id": f"{name}-table", "titles": titles, "rows": [{"kind": "", "cells": cells} for cells in rows]}
        for name, (titles, rows) in zip(tables, found, strict=True)
    ]


def _cell(value: float, decimals: int, low: float = math.nan, high: float = math.nan, sign: str = "") -> dict:
    """A cell of a table: its text, its interval, and the number that it sorts by."""
    if math.isnan(value):
        return {"text": "-", "interval": "", "number": None}
    interval = "" if math.isnan(low) else f"{low:{sign}z.{decimals}f} – {high:{sign}z.{decimals}f}"
    return {"text": say_number(value, decimals, sign), "interval": interval, "number": float(value)}


def _p_cell(p: float) -> dict:
    return {**_cell(p, 4), "text": "-" if math.isnan(p) else say_p(p, 4).removeprefix("= ")}


def build_samples(samples: pd.DataFrame, models: list[str], criteria: list[str], opinions: Opinions) -> list[dict]:
    """The samples as the page's script reads them, with short keys, since there may be thousands of answers.

    Returns:
        For each sample id, m (messages as [role, content]), r (references), a, the answers in the order of `models`: null
        where there is none, else p (prediction), f (finish reason), e (error), n (tokens), g (ROUGE-1), q (seq-rep-4), s
        (status of the judgement), o (overall score), v ([score, explanation] of each criterion) and h ([measure, score]
        of people); and w, what is said of it side by side: [number of the pair, outcome, [preferred, explanation] of
        either order].
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
    for row in opinions.scores.itertuples(index=False):
        answer = found[row.id]["a"][place[row.model]]
        answer.setdefault("h", []).append([row.measure.replace("_", " "), row.score])
    for number, pair in enumerate(opinions.pairs):
        for sample_id, replies in pair.replies.items():
            found[sample_id].setdefault("w", []).append([number, pair.outcome(sample_id), replies])
    return list(found.values())


def _rounded(value: float, decimals: int) -> float | int | None:
    if value is None or math.isnan(value):
        return None
    return round(float(value), decimals) if decimals else int(value)


def to_script_data(content) -> str:
    """JSON that can stand in a <script> element: no text in it can close the element."""
    return to_json(content, separators=(",", ":")).replace("<", "\\u003c")


def write_report(
    folder: Path, runs: list[Path], samples: pd.DataFrame, summary: pd.DataFrame, headline: Headline, opinions: Opinions
) -> Path:
    """Write `report.html`: which model to use, tables, plots, and the samples of all models side by side.

    Args:
        folder: Where to write it.
        samples, summary, headline, opinions: As load_runs, summarize, build_headline and load_opinions give them.
    """
    named, verdict = name_runs(runs), headline.verdict
    models, criteria = [str(name) for name in summary.index], criteria_of(samples)
    first_plots = {
        language: [plot_means(verdict, headline, language), plot_gains(verdict, headline, language)]
        for language in ("en", "ko")
    }
    plots = [
        plot_measures(summary), plot_differences(samples, verdict), plot_criteria(summary), plot_lengths(samples, headline),
        plot_training(load_training_logs(runs)),
    ]  # fmt: skip
    titles, rows = build_rows(summary)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    steps = summary["step"].tolist()
    place = {name: i for i, name in enumerate(models)}
    data = {
        "models": models,
        "criteria": [describe_measure(criterion_column(criterion))[0] for criterion in criteria],
        "judged": verdict.measure == "overall",
        # a checkpoint and the one before it, of the same run, between which answers can get worse
        "successors": [
            [i - 1, i]
            for i in range(1, len(models))
            if summary["run"].iloc[i] == summary["run"].iloc[i - 1] and 0 <= steps[i - 1] < steps[i]
        ],
        "pairs": [[place.get(pair.first), place.get(pair.second), pair.judge] for pair in opinions.pairs],
        "samples": build_samples(samples, models, criteria, opinions),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["plural"] = plural
    template = environment.from_string((HERE / "page.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        title=" · ".join(named),
        records={name: read_run(run, FULL_RUN_RECORD) for name, run in named.items()},
        counts=samples.groupby("run")[["id", "model"]].nunique().to_dict("index"),
        headline=headline,
        verdict=verdict,
        opinions=opinions,
        say_opinions=lambda language: opinions.say(language, verdict),
        titles=["model", *titles],
        rows=[
            {"kind": "best" if row["name"] == headline.use else "", "cells": [row["name"], *row["cells"]]}
            for row in rows
        ],
        comparisons=build_comparisons(verdict),
        opinion_tables=build_opinions(opinions),
        first_plots={
            language: [_to_svg(plot) for plot in both if plot is not None] for language, both in first_plots.items()
        },
        plots=[_to_svg(plot) for plot in plots if plot is not None],
        preflights={name: found for name, run in named.items() if (found := read_preflight(run)) is not None},
        lengths=[_to_data_uri(plot) for run in runs for plot in sorted((run / EDA).glob("*.png")) if is_there(plot)],
        data=to_script_data(data),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path
