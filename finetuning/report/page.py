"""
The page of step 5: one file that needs no server and no network. Imports without torch.

Everything that a model, a judge or a dataset wrote is data in it: escaped by the template, or JSON that the page's
script puts into the document as text. A content security policy with the hash of that script keeps anything else from
running and any request from leaving.
"""

import base64
import hashlib
import io
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from finetuning.report.headline import Headline
from finetuning.report.opinion_sentences import say_opinions
from finetuning.report.opinions import Opinions
from finetuning.report.page_data import build_page_data, to_script_data
from finetuning.report.page_tables import build_comparisons, build_models, build_opinions
from finetuning.report.plots import (
    plot_criteria,
    plot_differences,
    plot_gains,
    plot_lengths,
    plot_means,
    plot_measures,
    plot_training,
)
from finetuning.report.samples import load_training_logs, name_runs
from finetuning.report.sentences import say_headline, say_verdict
from finetuning.report.words import LANGUAGES, read_words
from finetuning.runs import EDA, PREFLIGHT_FILE, is_there, read_json, read_run, write_whole
from finetuning.schemas import PREFLIGHT
from finetuning.wording import plural

HERE = Path(__file__).parent


def _to_svgs(figures: list[Figure | None]) -> list[str]:
    """Those figures that there are, as addresses that hold them."""
    found = []
    for figure in figures:
        if figure is not None:
            buffer = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": "report"}):
                figure.savefig(buffer, format="svg", metadata={"Date": None})
            found.append("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


def _to_data_uri(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def read_preflight(run: Path) -> dict | None:
    """What step 1 found before training; None where it was not asked, or the run was made elsewhere."""
    file = run / PREFLIGHT_FILE
    return read_json(file, PREFLIGHT) if is_there(file) else None


def write_report(
    folder: Path, runs: list[Path], samples: pd.DataFrame, summary: pd.DataFrame, headline: Headline, opinions: Opinions
) -> Path:
    """Write `report.html`: which model to use, tables, plots, and the samples of all models side by side.

    Args:
        folder: Where to write it.
        samples, summary, headline, opinions: As load_runs, summarize, build_headline and load_opinions give them.
    """
    named, verdict = name_runs(runs), headline.verdict
    plots = [
        plot_measures(summary), plot_differences(samples, verdict), plot_criteria(summary),
        plot_lengths(samples, headline), plot_training(load_training_logs(runs)),
    ]  # fmt: skip
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"plural": plural, "words": read_words("page", "en")}
    page = environment.from_string((HERE / "page.html.jinja").read_text(encoding="utf-8")).render(
        title=" · ".join(named),
        records={name: read_run(run) for name, run in named.items()},
        counts=samples.groupby("run")[["id", "model"]].nunique().to_dict("index"),
        said={
            language: {
                "headline": say_headline(headline, language),
                "plots": _to_svgs([plot_means(verdict, headline, language), plot_gains(verdict, headline, language)]),
                "verdict": say_verdict(verdict, language),
                "opinions": say_opinions(opinions, verdict, language),
            }
            for language in LANGUAGES
        },
        models=build_models(summary, headline.use),
        comparisons=build_comparisons(verdict),
        opinion_tables=build_opinions(opinions),
        has_pairs=bool(opinions.pairs),
        has_opinions=bool(say_opinions(opinions, verdict)),
        plots=_to_svgs(plots),
        preflights={name: found for name, run in named.items() if (found := read_preflight(run)) is not None},
        lengths=[_to_data_uri(plot) for run in runs for plot in sorted((run / EDA).glob("*.png")) if is_there(plot)],
        data=to_script_data(build_page_data(samples, summary, verdict, opinions)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path
