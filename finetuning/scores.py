"""
Step 5 without a notebook: from predictions and evaluations to a verdict per checkpoint, with its uncertainty.

    python -m finetuning.scores --output_dir outputs/demo                    # tables in the terminal, and report.html
    python -m finetuning.scores --output_dir outputs/full outputs/lora       # the arms of an experiment side by side
    python -m finetuning.scores --holdout 0.5                                # choose on one half, report the other

Writes <report_dir>/report.html              the page
       <report_dir>/scores/summary.csv       one row a model: means with their intervals, coverage, seconds, cost
       <report_dir>/scores/comparisons.csv   one row a pair of models, with adjusted p-values
       <report_dir>/scores/samples.csv       one row a model and sample, without texts
       <report_dir>/scores/verdict.json      which model to use, and why
       <report_dir>/scores/pairs.csv, jury.csv, people.csv    answers side by side, each judge of a jury, people; if there are any

Imports without torch.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from finetuning.configs import Checked, run_step
from finetuning.errors import InputError, naming
from finetuning.headline import Headline, build_headline
from finetuning.judges_and_people import Opinions, load_opinions
from finetuning.report import write_report
from finetuning.runs import find_run, write_json, write_whole
from finetuning.tables import criteria_of, format_table, load_runs, print_table, summarize
from finetuning.verdict import decide

SCORES = "scores"


@dataclass
class ScoreArguments(Checked):
    """Arguments of step 5 on the command line."""

    output_dir: list[str] | None = field(
        default=None, metadata={"help": "Folders of runs, one or several. Unset: the newest run under outputs/."}
    )
    baseline: str = field(default="base", metadata={"help": "The model that all others are compared with."})
    holdout: float = field(
        default=0.0,
        metadata={"help": "Share of the samples that have no part in choosing the best model, and are reported on."},
    )
    report_dir: str | None = field(
        default=None, metadata={"help": "Where to write. Unset: the run, or the folder above several runs."}
    )


def find_runs(output_dirs: str | Sequence[str] | None) -> list[Path]:
    """The folders of one or several runs; None is the newest one."""
    if output_dirs is None or isinstance(output_dirs, str):
        return [find_run(output_dirs)]
    if not output_dirs:
        raise InputError("output_dirs is empty; name a run, or None for the newest one")
    return [find_run(output_dir) for output_dir in output_dirs]


def choose_report_dir(runs: list[Path], report_dir: str | None = None) -> Path:
    """Where the page and the tables of runs go."""
    if report_dir is not None:
        return Path(report_dir)
    if len(runs) == 1:
        return runs[0]
    return Path(os.path.commonpath([run.resolve().parent for run in runs]))


def find_baseline(samples: pd.DataFrame, baseline: str) -> str:
    """The baseline's name in a table of several runs, whose models have the run's name in front: the first that fits.

    Raises:
        InputError: There is no such model, and it is not the default one.
    """
    models = list(samples["model"].unique())
    found = [name for name in models if name == baseline or name.endswith(f"/{baseline}")]
    if not found and baseline != "base":
        raise InputError(f"baseline: no answers of `{baseline}`; there are those of {', '.join(models)}")
    return found[0] if found else baseline


def write_scores(
    folder: Path, samples: pd.DataFrame, summary: pd.DataFrame, headline: Headline, opinions: Opinions
) -> Path:
    """Write the tables for other tools, as CSV and JSON."""
    verdict = headline.verdict
    folder = folder / SCORES
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "summary.csv", summary.reset_index())
    _write_csv(folder / "comparisons.csv", pd.DataFrame([asdict(c) for c in verdict.comparisons]))
    measured = [c for c in samples if c not in ("messages", "references", "prediction", "evaluation", "removed_tokens")]
    _write_csv(folder / "samples.csv", samples[measured])
    tables = opinions.tables()
    for name in ("pairs", "jury", "people"):
        if name in tables:
            _write_csv(folder / f"{name}.csv", tables[name])
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    content = {
        "use": headline.use,
        "headline": headline.say("en"),
        "headline_ko": headline.say("ko"),
        "best": verdict.best,
        "measure": verdict.measure,
        "baseline": verdict.baseline,
        "criteria": criteria_of(samples),
        "num_samples": verdict.num_samples,
        "means": verdict.means,
        "unranked": verdict.unranked,
        "sentences": verdict.say("en"),
        "sentences_ko": verdict.say("ko"),
        "judges_and_people": opinions.say("en", verdict),
        "judges_and_people_ko": opinions.say("ko", verdict),
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


def main(args: ScoreArguments) -> None:
    runs = find_runs(args.output_dir)
    samples = load_runs(runs)
    summary = summarize(samples)
    verdict = decide(samples, find_baseline(samples, args.baseline), args.holdout)
    opinions = load_opinions(runs, samples)
    headline = build_headline(verdict, summary, opinions.pairs)
    print("\n".join(headline.say("en")))
    print_table(format_table(summary))
    print("\n".join([*verdict.sentences, *opinions.say("en", verdict)]))
    folder = choose_report_dir(runs, args.report_dir)
    with naming(folder):
        print(f"\nThe tables are in {write_scores(folder, samples, summary, headline, opinions)}")
        print(f"The report is at {write_report(folder, runs, samples, summary, headline, opinions)}")


if __name__ == "__main__":
    run_step(main, ScoreArguments)
