"""
Step 5 without a notebook: from predictions and evaluations to a verdict per checkpoint, with its uncertainty.

    python -m finetuning.report --output_dir outputs/demo                    # tables in the terminal, and report.html
    python -m finetuning.report --output_dir outputs/full outputs/lora       # the arms of an experiment side by side
    python -m finetuning.report --holdout 0.5                                # choose on one half, report the other

Writes <report_dir>/report.html              the page
       <report_dir>/scores/summary.csv       one row a model: means with their intervals, coverage, seconds, cost
       <report_dir>/scores/comparisons.csv   one row a pair of models, with adjusted p-values
       <report_dir>/scores/samples.csv       one row a model and sample, without texts
       <report_dir>/scores/verdict.json      which model to use, and why
       <report_dir>/scores/pairs.csv, jury.csv, people.csv    side by side, each judge of a jury, people, if any

Imports without torch.
"""

from dataclasses import dataclass, field

from finetuning.config.checks import Checked, argument
from finetuning.config.run_step import run_step
from finetuning.errors import naming
from finetuning.measures import print_table
from finetuning.report.headline import build_headline
from finetuning.report.opinion_sentences import say_opinions
from finetuning.report.opinions import load_opinions
from finetuning.report.page import write_report
from finetuning.report.samples import find_baseline, find_runs, load_runs
from finetuning.report.scores import choose_report_dir, write_scores
from finetuning.report.sentences import say_headline, say_verdict
from finetuning.report.tables import format_table, summarize
from finetuning.report.verdict import decide


@dataclass
class ScoreArguments(Checked):
    """Arguments of step 5 on the command line."""

    output_dir: list[str] | None = field(
        default=None, metadata={"help": "Folders of runs, one or several. Unset: the newest run under outputs/."}
    )
    baseline: str = field(default="base", metadata={"help": "The model that all others are compared with."})
    holdout: float = argument(
        0.0,
        "Share of the samples that have no part in choosing the best model, and are reported on.",
        at_least=0,
        at_most=0.9,
    )
    report_dir: str | None = field(
        default=None, metadata={"help": "Where to write. Unset: the run, or the folder above several runs."}
    )


def main(args: ScoreArguments) -> None:
    runs = find_runs(args.output_dir)
    samples = load_runs(runs)
    summary = summarize(samples)
    opinions = load_opinions(runs, samples)
    verdict = decide(samples, find_baseline(samples, args.baseline), args.holdout, opinions.audits)
    headline = build_headline(verdict, summary, opinions.pairs)
    print("\n".join(say_headline(headline)))
    print_table(format_table(summary))
    print("\n".join([*say_verdict(verdict), *say_opinions(opinions, verdict)]))
    folder = choose_report_dir(runs, args.report_dir)
    with naming(folder):
        print(f"\nThe tables are in {write_scores(folder, samples, summary, headline, opinions)}")
        print(f"The report is at {write_report(folder, runs, samples, summary, headline, opinions)}")


if __name__ == "__main__":
    run_step(main, ScoreArguments)
