"""
Plots of step 5, for the notebook and the page. Imports without torch.

Colours are told apart in colour blindness (Okabe and Ito 2008), lines and points in print by their markers as well.
Importing this registers a font with Korean glyphs, as a figure is drawn long after it was made.
"""

import math
from importlib.metadata import distribution

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetuning.measures import JUDGED, MEASURES, ROUGE_COLUMNS, describe_measure
from finetuning.report.headline import Headline
from finetuning.report.tables import measures_in
from finetuning.report.verdict import Verdict
from finetuning.report.words import Words

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++", "oo"]
MAX_POINTS = 3000  # of a scatter plot, which would only be darker with more
MAX_COLORS = len(COLORS)  # models that can be told apart in one picture
MAX_NAME = 32  # letters of a model's name beside an axis
# the file is taken without importing the package, which would change the fonts of all figures
KOREAN_FONT = distribution("koreanize-matplotlib").locate_file("koreanize_matplotlib/fonts/NanumGothic.ttf")

font_manager.fontManager.addfont(str(KOREAN_FONT))
matplotlib.rcParams["font.family"] = ["DejaVu Sans", "NanumGothic"]  # the second where the first lacks a glyph
matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name is one


def _style(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _axes_in_a_row(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * number, 3.2), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, number)))


def _one_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _errors(table: pd.DataFrame, measure: str) -> np.ndarray:
    """Lengths of error bars below and above the means; 0 where there is no interval."""
    mean = table[measure].to_numpy(dtype=float)
    bounds = [mean - table[f"{measure}_low"].to_numpy(float), table[f"{measure}_high"].to_numpy(float) - mean]
    return np.nan_to_num(np.clip(bounds, 0, None))


def _shorten(name: str) -> str:
    """A name that leaves room for the picture; its end is what tells checkpoints of a run apart."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 3]}…{name[-2 * MAX_NAME // 3 :]}"


def _rows_of_models(names: list[str], title: str, x_label: str, use: str | None) -> tuple[Figure, Axes]:
    """An empty picture with one row a model from top to bottom, the one to use in a colour of its own."""
    height = 0.26 if len(names) < 15 else 0.2
    figure, axes = _one_axes(5.2, 0.9 + height * max(3, len(names)))
    axes.set_yticks(range(len(names)), [_shorten(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    _style(axes, "", x_label)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")  # over the names, too, which may be long
    axes.grid(axis="y", visible=False)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(COLORS[1] if name == use else "black")
    return figure, axes


def _draw_interval(
    axes: Axes, row: int, value: float, interval: tuple[float, float], is_used: bool, is_hollow: bool = False
) -> None:
    color = COLORS[1] if is_used else COLORS[0]
    axes.plot(interval, [row, row], color=color, linewidth=1.6)
    axes.plot(
        value, row, "D" if is_used else "o", color=color, markersize=5, markerfacecolor="white" if is_hollow else color
    )


def plot_means(verdict: Verdict, headline: Headline, language: str = "en") -> Figure | None:
    """The mean of each model with its interval, by training step; None where nothing is ranked."""
    if not verdict.means:
        return None
    names = [*verdict.means, *verdict.unranked]
    words = Words("plots", language)
    title = words("means", measure=words(verdict.measure), samples=words.samples(verdict.num_samples))
    figure, axes = _rows_of_models(names, title, "", headline.use)
    for i in range(len(verdict.means), len(names)):
        axes.text(
            0.01, i, words("not ranked"), transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#57616b"
        )
    for i, (name, mean) in enumerate(verdict.means.items()):
        _draw_interval(axes, i, mean, verdict.intervals[name], name == headline.use)
    return figure


def plot_gains(verdict: Verdict, headline: Headline, language: str = "en") -> Figure | None:
    """Difference of each ranked model to the baseline, or to the one to use where there is none; None without others.

    Differences that the samples do not show have hollow points.
    """
    against = verdict.baseline or headline.use
    if against is None or len(verdict.means) < 2:
        return None
    words = Words("plots", language)
    title = words("gains", against=_shorten(against))
    figure, axes = _rows_of_models(list(verdict.means), title, words("better"), headline.use)
    axes.axvline(0, color="#444444", linewidth=1)
    for i, name in enumerate(verdict.means):
        if name != against:
            c = verdict.between(name, against)
            _draw_interval(axes, i, c.difference, (c.low, c.high), name == headline.use, is_hollow=not c.is_shown)
    return figure


def plot_measures(summary: pd.DataFrame) -> Figure | None:
    """Each measure over the training steps, with its interval; models that are no checkpoint are left out.

    Several runs are lines of their own, with ROUGE-1 only. None where there is nothing to plot.
    """
    checkpoints = summary[summary["step"] >= 0]
    runs = list(dict.fromkeys(checkpoints["run"]))
    groups = [
        ("judge, mean of the criteria (1 to 10)", ["overall"]),
        ("ROUGE F1" if len(runs) < 2 else "ROUGE-1", ROUGE_COLUMNS if len(runs) < 2 else ROUGE_COLUMNS[:1]),
        ("share of answers that stopped", ["stopped"]),
        ("repetition (seq-rep-4)", ["seq_rep_4"]),
    ]
    groups = [(title, [m for m in measures if m in summary]) for title, measures in groups]
    groups = [(title, measures) for title, measures in groups if measures]
    if not groups or checkpoints.empty:
        return None
    figure, row = _axes_in_a_row(len(groups))
    for axes, (title, measures) in zip(row, groups, strict=True):
        lines = [(measure, run) for measure in measures for run in runs]
        for i, (measure, run) in enumerate(lines):
            table = checkpoints[checkpoints["run"] == run]
            axes.errorbar(
                table["step"], table[measure], _errors(table, measure), color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)], markersize=4, capsize=3, linewidth=1.3,
                label=run if len(runs) > 1 else describe_measure(measure)[0],
            )  # fmt: skip
        if "stopped" in measures:
            axes.set_ylim(-0.05, 1.05)
        if "seq_rep_4" in measures:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
        _style(axes, title, "training step (0 is the base model)")
    return figure


def plot_criteria(summary: pd.DataFrame) -> Figure | None:
    """The judge's criteria side by side for each model, of many models as a table of colours; None without a judge."""
    criteria = [c for c in measures_in(summary) if c not in JUDGED and c not in MEASURES]
    if not criteria:
        return None
    title, titles = "judge, mean score of each criterion (1 to 10)", [describe_measure(c)[0] for c in criteria]
    if len(summary) > MAX_COLORS:
        return _plot_criteria_as_table(summary, criteria, title, titles)
    figure, axes = _one_axes(10, 3.2)
    width = 0.8 / len(summary)
    for i, (name, row) in enumerate(summary.iterrows()):
        places = np.arange(len(criteria)) + (i - (len(summary) - 1) / 2) * width
        table = pd.DataFrame({"mean": row[criteria], **{
            f"mean_{end}": row[[f"{c}_{end}" for c in criteria]].to_numpy() for end in ("low", "high")
        }}).astype(float)  # fmt: skip
        axes.bar(
            places, table["mean"], width * 0.92, color=COLORS[i % len(COLORS)], hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white", linewidth=0, label=_shorten(name),
        )  # fmt: skip
        axes.errorbar(places, table["mean"], _errors(table, "mean"), fmt="none", ecolor="#444444", capsize=2)
    axes.set_xticks(range(len(criteria)), titles)
    axes.set_ylim(0, 10.5)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.08))
    _style(axes, title, "")
    return figure


def _plot_criteria_as_table(summary: pd.DataFrame, criteria: list[str], title: str, titles: list[str]) -> Figure:
    figure, axes = _one_axes(2.4 + 1.1 * len(criteria), 1 + 0.26 * len(summary))
    means = summary[criteria].to_numpy(dtype=float)
    axes.imshow(means, cmap="Blues", vmin=1, vmax=16, aspect="auto")  # light enough for black figures
    for (i, j), mean in np.ndenumerate(means):
        if not math.isnan(mean):
            axes.text(j, i, f"{mean:.1f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(criteria)), titles, rotation=20, ha="right")
    axes.set_yticks(range(len(summary)), [_shorten(name) for name in summary.index])
    _style(axes, title, "")
    axes.grid(visible=False)
    return figure


def plot_training(logs: dict[str, pd.DataFrame]) -> Figure | None:
    """Loss and gradient norm of each run over its training steps; None without a log."""
    columns = [c for c in ("loss", "grad_norm") if any(c in log and log[c].notna().any() for log in logs.values())]
    if not columns:
        return None
    figure, row = _axes_in_a_row(len(columns))
    for axes, column in zip(row, columns, strict=True):
        for i, (run, log) in enumerate(logs.items()):
            name = f"{run}, " if len(logs) > 1 else ""
            color = COLORS[i % len(COLORS)]
            if column in log:
                known = log[log[column].notna()]
                axes.plot(known["step"], known[column], color=color, linewidth=1.3, label=f"{name}training")
            if column == "loss" and "eval_loss" in log:
                known = log[log["eval_loss"].notna()]
                axes.plot(
                    known["step"], known["eval_loss"], color=COLORS[1] if len(logs) == 1 else color, linestyle="--",
                    marker=MARKERS[i % len(MARKERS)], markersize=4, label=f"{name}validation",
                )  # fmt: skip
        if column == "loss":
            axes.legend(fontsize=8, frameon=False)
        _style(axes, {"loss": "loss", "grad_norm": "gradient norm"}[column], "training step")
    return figure


def plot_differences(samples: pd.DataFrame, verdict: Verdict) -> Figure | None:
    """Differences of the best model to each other one, sample by sample; None where there is nothing to compare."""
    best = verdict.best
    if best is None or not verdict.comparisons:
        return None
    others = [c.other for c in verdict.against(best)]
    table = samples.pivot(index="id", columns="model", values=verdict.measure)[[best, *others]].dropna()
    figure, axes = _one_axes(8.4, 1.2 + (0.55 if len(others) < MAX_COLORS else 0.3) * len(others))
    rng = np.random.default_rng(0)
    for i, other in enumerate(others):
        differences = (table[best] - table[other]).to_numpy(dtype=float)
        shown = differences if len(differences) <= MAX_POINTS else rng.choice(differences, MAX_POINTS, replace=False)
        axes.plot(shown, i + rng.uniform(-0.28, 0.28, len(shown)), ".", color=COLORS[0], alpha=0.35, markersize=4)
        axes.boxplot(
            differences, positions=[i], orientation="horizontal", widths=0.6, showfliers=False,
            medianprops={"color": COLORS[1], "linewidth": 2},
        )  # fmt: skip
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(others)), [_shorten(name) for name in others])
    axes.invert_yaxis()
    title = f"{_shorten(best)} minus another model, {describe_measure(verdict.measure)[0]} of each sample"
    _style(axes, title, "to the right: the better answer")
    return figure


def plot_lengths(samples: pd.DataFrame, headline: Headline) -> Figure | None:
    """Score against the length of the answer, in tokens; None without answers.

    Of many models only the one to use and the baseline have a colour.
    """
    measure = headline.verdict.measure
    known = samples[samples[measure].notna() & samples["num_new_tokens"].notna()]
    if known.empty:
        return None
    named = list(known["model"].unique())
    if len(named) > MAX_COLORS:
        named = [name for name in named if name in (headline.use, headline.verdict.baseline)]
    if len(known) > MAX_POINTS:
        known = known.sample(MAX_POINTS, random_state=0)
    figure, axes = _one_axes(8.4, 3.4)
    others = known[~known["model"].isin(named)]
    if len(others):
        axes.plot(
            others["num_new_tokens"], others[measure], ".", color="#b0b7bd", markersize=4, markeredgewidth=0,
            label=f"other models: {others['model'].nunique()}",
        )  # fmt: skip
    for i, name in enumerate(named):
        group = known[known["model"] == name]
        axes.plot(
            group["num_new_tokens"], group[measure], MARKERS[i], color=COLORS[i], alpha=0.55, markersize=4,
            markeredgewidth=0, label=_shorten(name),
        )  # fmt: skip
    if known["num_new_tokens"].max() > 20 * max(1.0, known["num_new_tokens"].median()):
        axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _style(axes, "score against length", "tokens of the answer", describe_measure(measure)[0])
    return figure
