"""
From predictions and evaluations to a verdict per checkpoint, with its uncertainty. Imports without torch.

    python -m finetuning.scores --output_dir outputs/demo     # the tables in the terminal, and report.html

Every table has one row a model, in the order of the training steps. Means are over samples, with a 95 % interval from
the BCa bootstrap (Efron 1987), shares with Wilson's. What has no score counts in no mean and is counted beside it.
"""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

from finetuning.configs import RunArguments, run_step
from finetuning.errors import InputError
from finetuning.judge import prediction_hash
from finetuning.results import iterate_rows, read_info, read_rows
from finetuning.runs import (
    BASE,
    EDA,
    EVALUATIONS,
    PREDICTIONS,
    PREFLIGHT_FILE,
    checkpoint_step,
    find_run,
    list_checkpoints,
    names_of_files,
    read_json,
    read_run,
)

ROUGE_COLUMNS = ["rouge1", "rouge2", "rougeL"]
JUDGED = {"overall": ("judge overall", 2), "expected_overall": ("judge expected", 2)}
MEASURES = {  # column: (title, decimals); the criteria of a judge come from its evaluations
    "rouge1": ("ROUGE-1", 3),
    "rouge2": ("ROUGE-2", 3),
    "rougeL": ("ROUGE-L", 3),
    "chrf": ("chrF", 3),
    "stopped": ("stopped", 2),
    "seq_rep_4": ("seq-rep-4", 3),
    "length_ratio": ("length ratio", 2),
    "num_new_tokens": ("tokens", 1),
}
METRICS = {  # what step 3 measures of a whole model, under finetuning/metrics.py's names
    **{measure: MEASURES[measure] for measure in (*ROUGE_COLUMNS, "chrf")},
    "stop_rate": MEASURES["stopped"],
    "empty_rate": ("empty", 2),
    "seq_rep_4": MEASURES["seq_rep_4"],
    "distinct_2": ("distinct-2", 3),
    "length_ratio": MEASURES["length_ratio"],
    "mean_new_tokens": MEASURES["num_new_tokens"],
}
RANKING = {"overall": ("the judge's overall score", 2), "rouge1": MEASURES["rouge1"]}  # what models are ranked by
COVERAGE_NEEDED = 0.95  # of its answers a model must have a judgement of, to be ranked by the judge
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]  # Okabe and Ito 2008
NUM_RESAMPLES = 2000


def load_predictions(run: Path, names: list[str] | None = None) -> pd.DataFrame:
    """Every prediction of a run.

    Returns:
        One row a model and sample: model, step, id, messages, references, prediction, finish_reason, error, num_new_tokens,
        stopped (1 or 0), rouge1, rouge2, rougeL, chrf, seq_rep_4, length_ratio, seconds (of the whole model). NaN where there is no answer or
        nothing defines it.

    Raises:
        InputError: There are no predictions, or a model's answers were not scored because step 3 was stopped.
    """
    names = names_of_files(run / PREDICTIONS, "all") if names is None else names
    records, tokenizers = [], set()
    for name in names:
        rows = read_rows(run / PREDICTIONS / f"{name}.jsonl")
        info = read_info(run / PREDICTIONS / f"{name}.jsonl")
        columns = dict((info.get("metrics") or {}).get("per_sample", {"id": []}))
        ids = columns.pop("id")
        per_sample = {sample_id: {c: columns[c][i] for c in columns} for i, sample_id in enumerate(ids)}
        answered = {row["id"] for row in rows if row["finish_reason"] != "error"}
        if answered != per_sample.keys():
            raise InputError(f"{run / PREDICTIONS / name}: step 3 has not finished; start it again and it goes on")
        tokenizers.add((info.get("metrics") or {}).get("rouge_tokenizer"))
        if len(tokenizers) > 1:
            raise InputError(
                f"{run / PREDICTIONS}: ROUGE was measured in {' and '.join(map(str, sorted(tokenizers, key=str)))}, which cannot be "
                "compared; 3_test.py --rescore true measures all in one way"
            )
        for row in rows:
            measured = per_sample.get(row["id"], {})
            records.append(
                {
                    "model": name,
                    "step": checkpoint_step(name),
                    **row,
                    **{column: _number(measured.get(column)) for column in columns},
                    "stopped": float(row["finish_reason"] == "stop") if measured else math.nan,
                    "num_new_tokens": row["num_new_tokens"] if measured else math.nan,
                    "prediction_hash": prediction_hash(row),
                    "seconds": info["seconds"],
                }
            )
    if not records:
        raise InputError(f"no predictions in {run / PREDICTIONS}; run 3_test.py first")
    return pd.DataFrame(records).sort_values(["step", "model", "id"], ignore_index=True)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def load_samples(run: Path) -> pd.DataFrame:
    """Every prediction of a run with its evaluation, if it has one.

    Returns:
        The columns of `load_predictions`, and status (ok, or why there is no score; None where it was not judged), the
        score of each criterion of the rubric, overall (their mean), expected_overall (that of the expected scores, if
        they were asked for), evaluation (the scores with their explanations).

    Raises:
        InputError: Models were judged by different rubrics.
    """
    samples = load_predictions(run)
    names = names_of_files(run / EVALUATIONS, "all")
    paths = {name: run / EVALUATIONS / f"{name}.jsonl" for name in names}
    rubrics = {name: read_info(path)["identity"]["criteria"] for name, path in paths.items()}
    criteria = next(iter(rubrics.values()), [])
    for name, its_criteria in rubrics.items():
        if its_criteria != criteria:
            raise InputError(
                f"{paths[name]} was judged by {', '.join(its_criteria)}, and {names[0]} by {', '.join(criteria)}; judge all "
                "with the same rubric (4_openai_test.py --overwrite true)"
            )
    evaluations = {(name, row["prediction_hash"]): row for name, path in paths.items() for row in iterate_rows(path)}
    found = [evaluations.get(key, {}) for key in zip(samples["model"], samples["prediction_hash"], strict=True)]
    samples["status"] = [row.get("status") for row in found]
    samples["evaluation"] = [row.get("evaluation") for row in found]
    for criterion in criteria:
        samples[criterion] = [
            row["evaluation"][criterion]["score"] if row.get("status") == "ok" else math.nan for row in found
        ]
    samples["overall"] = samples[criteria].mean(axis=1, skipna=False) if criteria else math.nan
    if any(row.get("expected") for row in found):
        expected = pd.DataFrame([row.get("expected") or {} for row in found], columns=criteria)
        samples["expected_overall"] = expected.mean(axis=1, skipna=False).to_numpy(dtype=float)
    return samples


def criteria_of(samples: pd.DataFrame) -> list[str]:
    """The criteria that samples were judged by; none where nothing has a score."""
    return next((list(evaluation) for evaluation in samples["evaluation"] if isinstance(evaluation, dict)), [])


def measures_of(samples: pd.DataFrame) -> list[str]:
    """The columns of samples that were measured: the judge's first, then what step 3 measures."""
    criteria = criteria_of(samples) if "evaluation" in samples else []
    return [m for m in (*JUDGED, *criteria, *MEASURES) if m in samples and samples[m].notna().any()]


def describe_measure(measure: str) -> tuple[str, int]:
    """Title and decimals of a measure; what has no entry is a criterion of a judge."""
    return {**JUDGED, **MEASURES}.get(measure, (measure.replace("_", " "), 2))


def bootstrap_interval(values) -> tuple[float, float]:
    """95 % interval of the mean: BCa bootstrap over samples, the same on every call.

    (nan, nan) for fewer than two values; the value itself where all are equal. Values that no resample can vary enough
    for BCa (one outlier among equals) get the percentile interval.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"):
            result = scipy.stats.bootstrap(
                (values,), np.mean, n_resamples=NUM_RESAMPLES, method=method, rng=np.random.default_rng(0)
            )
        low, high = result.confidence_interval
        if not math.isnan(low):
            break
    return float(low), float(high)


def share_interval(values) -> tuple[float, float]:
    """95 % interval of a share of ones among ones and zeros (Wilson 1927), which is no point where all are equal."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    interval = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarize(samples: pd.DataFrame) -> pd.DataFrame:
    """Means with intervals.

    Returns:
        Indexed by model, in the order of steps: samples, errors (no answer), judged, failed (no score though it was
        asked for), and for each measure that was taken `<measure>`, `<measure>_low`, `<measure>_high`.
    """
    wanted = measures_of(samples)
    rows = {}
    for name, group in samples.groupby("model", sort=False):
        row = {
            "step": group["step"].iloc[0],
            "samples": len(group),
            "errors": int((group["finish_reason"] == "error").sum()),
        }
        if "status" in group:
            row["judged"] = int((group["status"] == "ok").sum())
            row["failed"] = int((group["status"].notna() & (group["status"] != "ok")).sum())
        row["seconds"] = group["seconds"].iloc[0]
        for measure in wanted:
            row[measure] = group[measure].mean()
            interval = share_interval if measure == "stopped" else bootstrap_interval
            row[f"{measure}_low"], row[f"{measure}_high"] = interval(group[measure])
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _measures_in(summary: pd.DataFrame) -> list[str]:
    return [column for column in summary if f"{column}_low" in summary]


def format_table(summary: pd.DataFrame, intervals: bool = True) -> pd.DataFrame:
    """The summary as text, `0.712 [0.680, 0.741]`, under readable titles."""
    table = pd.DataFrame(index=summary.index)
    counts = ["samples"] + [c for c in ("errors", "judged", "failed") if c in summary and summary[c].any()]
    for column in counts:
        table[column] = summary[column].astype(str)
    for measure in _measures_in(summary):
        title, decimals = describe_measure(measure)
        table[title] = [
            "-"
            if math.isnan(mean)
            else f"{mean:.{decimals}f}"
            + (f" [{low:.{decimals}f}, {high:.{decimals}f}]" if intervals and not math.isnan(low) else "")
            for mean, low, high in zip(
                summary[measure], summary[f"{measure}_low"], summary[f"{measure}_high"], strict=True
            )
        ]
    table["seconds"] = [f"{seconds:.1f}" for seconds in summary["seconds"]]
    return table


def format_metrics(infos: dict[str, dict]) -> pd.DataFrame:
    """Readable table of what step 3 measured, from the files beside the rows, by model."""
    metrics = {name: info["metrics"] for name, info in infos.items()}
    table = pd.DataFrame(index=pd.Index(metrics, name="model"))
    table["samples"] = [values["num_samples"] for values in metrics.values()]
    if any(values["num_errors"] for values in metrics.values()):
        table["errors"] = [values["num_errors"] for values in metrics.values()]
    for key, (title, decimals) in METRICS.items():
        found = [values.get(key) for values in metrics.values()]
        if key != "empty_rate" or any(found):
            table[title] = ["-" if value is None else f"{value:.{decimals}f}" for value in found]
    table["seconds"] = [f"{info.get('seconds', 0):.1f}" for info in infos.values()]
    return table


def print_table(table: pd.DataFrame) -> None:
    """Print a table in aligned columns, none of them left out."""
    print("\n" + table.reset_index().to_string(index=False) + "\n")


@dataclass
class Comparison:
    """Paired difference of two models over the samples that both have a score of."""

    better: str
    other: str
    num_samples: int
    difference: float  # mean of better - other
    low: float  # 95 % interval
    high: float
    detectable: float  # smallest difference that so many samples show with a probability of 80 %

    @property
    def is_clear(self) -> bool:
        return self.low > 0


def compare(samples: pd.DataFrame, measure: str, better: str, other: str) -> Comparison:
    """Compare two models on the same samples."""
    pivot = samples[samples["model"].isin([better, other])].pivot(index="id", columns="model", values=measure).dropna()
    differences = (pivot[better] - pivot[other]).to_numpy()
    low, high = bootstrap_interval(differences)
    spread = np.std(differences, ddof=1) if len(differences) > 1 else math.nan
    detectable = (
        (scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)) * spread / math.sqrt(max(len(differences), 1))
    )
    mean = float(differences.mean()) if len(differences) else math.nan
    return Comparison(better, other, len(differences), mean, low, high, float(detectable))


@dataclass
class Verdict:
    """Which model to use, by which measure, and how sure that is."""

    best: str | None  # None where no model has an answer
    measure: str
    comparisons: list[Comparison]  # the best against each other model
    sentences: list[str]


def choose_measure(samples: pd.DataFrame) -> tuple[str, str]:
    """The measure that models are ranked by, and why: the judge's overall score if (nearly) all answers have one."""
    answered = samples[samples["finish_reason"] != "error"]
    if answered.empty:
        return "rouge1", "nothing was answered"
    coverage = answered.groupby("model")["overall"].apply(lambda scores: scores.notna().mean())
    if coverage.min() >= COVERAGE_NEEDED:
        return "overall", "the judge has scored the answers of every model"
    if coverage.max() == 0:
        return "rouge1", "nothing was judged"
    worst = coverage.idxmin()
    return (
        "rouge1",
        f"only {coverage.min():.0%} of the answers of {worst} have a judgement, under {COVERAGE_NEEDED:.0%}",
    )


def decide(samples: pd.DataFrame) -> Verdict:
    """Name the best model and say what the samples can and cannot show."""
    measure, reason = choose_measure(samples)
    title, decimals = RANKING[measure]
    unit = " points of 10" if measure == "overall" else ""
    scored = samples[samples[measure].notna()]
    num_models = scored["model"].nunique()
    by_all = scored.groupby("id")["model"].transform("nunique") == num_models
    left_out = scored["id"].nunique() - scored[by_all]["id"].nunique()
    samples = scored[by_all]
    means = samples.groupby("model", sort=False)[measure].mean()
    if means.empty:
        return Verdict(
            None,
            measure,
            [],
            ["There is no sample that every model has a score of; answer the same samples with each of them."],
        )
    best = means.idxmax()
    comparisons = [compare(samples, measure, best, other) for other in means.index if other != best]
    sentences = [f"Ranked by {title}, since {reason}."]
    if left_out:
        sentences.append(
            f"Compared on the {samples['id'].nunique()} samples that every model has a score of; {left_out} others are left out."
        )
    if not comparisons:
        sentences.append(f"{best} is the only model with answers, so there is nothing to compare it with.")
        return Verdict(best, measure, comparisons, sentences)

    def figures(c: Comparison) -> str:
        return f"{c.difference:.{decimals}f}{unit} (95 % {c.low:.{decimals}f} to {c.high:.{decimals}f})"

    close = [c for c in comparisons if not c.is_clear]
    if close:
        names = ", ".join(f"{c.other} by {figures(c)}" for c in close)
        earliest = min([best, *(c.other for c in close)], key=checkpoint_step)
        sentences.append(
            f"{best} has the highest mean, but these samples do not show that it is better than {names}. "
            f"With {close[0].num_samples} samples, differences under about {max(c.detectable for c in close):.{decimals}f} "
            "cannot be seen; answer more samples to tell them apart"
            + (f", or use {earliest}, which had the least training of them." if earliest != best else ".")
        )
    clear = [c for c in comparisons if c.is_clear]
    if clear:
        sentences.append(f"{best} is better than " + "; than ".join(f"{c.other} by {figures(c)}" for c in clear) + ".")
    group = samples[samples["model"] == best]
    if len(group) and group["stopped"].mean() < COVERAGE_NEEDED:
        sentences.append(
            f"Only {group['stopped'].mean():.0%} of its answers ended by themselves: raise --max_new_tokens, or the "
            "model has not learned to stop."
        )
    if best == BASE:
        sentences.append("No checkpoint is better than the model that training started from.")
    return Verdict(best, measure, comparisons, sentences)


def load_training_log(run: Path) -> pd.DataFrame:
    """Loss, grad_norm, learning_rate, tokens_per_second and the like by step, from the last checkpoint's log."""
    states = [f / "trainer_state.json" for f in list_checkpoints(run) if (f / "trainer_state.json").is_file()]
    if not states:
        return pd.DataFrame(columns=["step", "loss"])
    log = pd.DataFrame(read_json(states[-1])["log_history"])
    return log


def _style(axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def plot_measures(summary: pd.DataFrame) -> Figure | None:
    """Each measure over the training steps, with its interval; models that are no checkpoint are left out.

    None where there is nothing to plot.
    """
    groups = [
        ("judge, mean of the criteria (1 to 10)", ["overall"]),
        ("ROUGE F1", ROUGE_COLUMNS),
        ("share of answers that stopped", ["stopped"]),
        ("repetition (seq-rep-4)", ["seq_rep_4"]),
    ]
    groups = [(title, [m for m in measures if m in summary]) for title, measures in groups]
    groups = [(title, measures) for title, measures in groups if measures]
    checkpoints = summary[summary["step"] >= 0]
    if not groups or checkpoints.empty:
        return None
    figure = Figure(figsize=(4.2 * len(groups), 3.2), layout="constrained")
    for axes, (title, measures) in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups, strict=True):
        for color, measure in zip(COLORS, measures, strict=False):
            mean = checkpoints[measure]
            errors = [mean - checkpoints[f"{measure}_low"], checkpoints[f"{measure}_high"] - mean]
            axes.errorbar(
                checkpoints["step"], mean, np.nan_to_num(np.clip(errors, 0, None)), color=color, marker="o", markersize=4,
                capsize=3, linewidth=1.3, label=describe_measure(measure)[0],
            )  # fmt: skip
        if "stopped" in measures:
            axes.set_ylim(-0.05, 1.05)
        if "seq_rep_4" in measures:
            axes.set_ylim(bottom=0)
        if len(measures) > 1:
            axes.legend(fontsize=8, frameon=False, loc="lower right")
        _style(axes, title, "training step (0 is the base model)")
    return figure


def plot_criteria(summary: pd.DataFrame) -> Figure | None:
    """The judge's criteria side by side for each model; None where nothing was judged."""
    criteria = [c for c in _measures_in(summary) if c not in JUDGED and c not in MEASURES]
    if not criteria:
        return None
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(summary)
    for i, (name, row) in enumerate(summary.iterrows()):
        places = np.arange(len(criteria)) + (i - (len(summary) - 1) / 2) * width
        means = np.array([row[c] for c in criteria])
        errors = [means - [row[f"{c}_low"] for c in criteria], [row[f"{c}_high"] for c in criteria] - means]
        axes.bar(places, means, width * 0.92, color=COLORS[i % len(COLORS)], label=name)
        axes.errorbar(places, means, np.nan_to_num(np.clip(errors, 0, None)), fmt="none", ecolor="#444444", capsize=2)
    axes.set_xticks(range(len(criteria)), [c.replace("_", " ") for c in criteria])
    axes.set_ylim(0, 10.5)
    axes.legend(fontsize=8, frameon=False, ncols=len(summary), loc="lower left", bbox_to_anchor=(0, 1.08))
    _style(axes, "judge, mean score of each criterion (1 to 10)", "")
    return figure


def plot_training(log: pd.DataFrame) -> Figure | None:
    """Loss and gradient norm over the training steps; None without a log."""
    columns = [c for c in ("loss", "grad_norm") if c in log and log[c].notna().any()]
    if not columns:
        return None
    figure = Figure(figsize=(4.2 * len(columns), 3.2), layout="constrained")
    for axes, column in zip(np.atleast_1d(figure.subplots(1, len(columns))), columns, strict=True):
        known = log[log[column].notna()]
        axes.plot(known["step"], known[column], color=COLORS[0], linewidth=1.3, label="training")
        if column == "loss" and "eval_loss" in log:
            known = log[log["eval_loss"].notna()]
            axes.plot(known["step"], known["eval_loss"], color=COLORS[1], marker="o", markersize=4, label="validation")
            axes.legend(fontsize=8, frameon=False)
        _style(axes, {"loss": "loss", "grad_norm": "gradient norm"}[column], "training step")
    return figure


def _to_svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_preflight(run: Path) -> dict | None:
    """What step 1 found before training; None where it was not asked, or the run was made elsewhere."""
    file = run / PREFLIGHT_FILE
    return read_json(file) if file.is_file() else None


def _to_data_uri(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def write_report(run: Path, samples: pd.DataFrame) -> Path:
    """Write `report.html`: verdict, tables, plots, and the samples of all models side by side, in one file."""
    record = read_run(run)
    summary = summarize(samples)
    plots = [plot_measures(summary), plot_criteria(summary), plot_training(load_training_log(run))]
    models = list(summary.index)
    cards = []
    for sample_id, group in samples.groupby("id", sort=False):
        by_model = group.set_index("model")
        first = group.iloc[0]
        cards.append(
            {
                "id": sample_id,
                "messages": first["messages"],
                "references": first["references"],
                "answers": [
                    {"model": name, **(by_model.loc[name].to_dict() if name in by_model.index else {"missing": True})}
                    for name in models
                ],
            }
        )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["number"] = lambda value: isinstance(value, (int, float)) and not math.isnan(value)
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    verdict = decide(samples)
    page = template.render(
        run=run.name,
        record=record,
        verdict=verdict,
        table=format_table(summary),
        plots=[_to_svg(plot) for plot in plots if plot is not None],
        cards=cards,
        models=models,
        criteria=criteria_of(samples),
        preflight=read_preflight(run),
        lengths=[_to_data_uri(plot) for plot in sorted((run / EDA).glob("*.png"))],
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main(args: RunArguments) -> None:
    run = find_run(args.output_dir)
    samples = load_samples(run)
    print_table(format_table(summarize(samples)))
    print("\n".join(decide(samples).sentences))
    print(f"\nThe report is at {write_report(run, samples)}")


if __name__ == "__main__":
    run_step(main, RunArguments)
