"""
Plots of step 5, for the notebook and the page. Imports without torch.

Colours are told apart in colour blindness (Okabe and Ito 2008), and lines and points by their markers as well, in print.
Importing this registers a font with Korean glyphs, as a figure is drawn long after it was made.
"""

import importlib.util
import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetuning.tables import JUDGED, MEASURES, ROUGE_COLUMNS, describe_measure, measures_in
from finetuning.verdict import Verdict

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++", "oo"]
MOST_POINTS = 3000  # of a scatter plot, which would only be darker with more
KOREAN_FONT = (
    Path(*importlib.util.find_spec("koreanize_matplotlib").submodule_search_locations) / "fonts/NanumGothic.ttf"
)

font_manager.fontManager.addfont(KOREAN_FONT)
matplotlib.rcParams["font.family"] = ["DejaVu Sans", "NanumGothic"]  # the second where the first lacks a glyph


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


def _errors(table: pd.DataFrame, measure: str) -> np.ndarray:
    """Lengths of error bars below and above the means; 0 where there is no interval."""
    mean = table[measure].to_numpy(dtype=float)
    bounds = [mean - table[f"{measure}_low"].to_numpy(float), table[f"{measure}_high"].to_numpy(float) - mean]
    return np.nan_to_num(np.clip(bounds, 0, None))


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
    """The judge's criteria side by side for each model; None where nothing was judged."""
    criteria = [c for c in measures_in(summary) if c not in JUDGED and c not in MEASURES]
    if not criteria:
        return None
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(summary)
    for i, (name, row) in enumerate(summary.iterrows()):
        places = np.arange(len(criteria)) + (i - (len(summary) - 1) / 2) * width
        table = pd.DataFrame({"mean": row[criteria], **{
            f"mean_{end}": row[[f"{c}_{end}" for c in criteria]].to_numpy() for end in ("low", "high")
        }}).astype(float)  # fmt: skip
        axes.bar(
            places, table["mean"], width * 0.92, color=COLORS[i % len(COLORS)], hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white", linewidth=0, label=name,
        )  # fmt: skip
        axes.errorbar(places, table["mean"], _errors(table, "mean"), fmt="none", ecolor="#444444", capsize=2)
    axes.set_xticks(range(len(criteria)), [describe_measure(c)[0] for c in criteria])
    axes.set_ylim(0, 10.5)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.08))
    _style(axes, "judge, mean score of each criterion (1 to 10)", "")
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
    others = [c.other for c in verdict.against(verdict.best)] if verdict.best is not None else []
    if not others:
        return None
    table = samples.pivot(index="id", columns="model", values=verdict.measure)[[verdict.best, *others]].dropna()
    figure = Figure(figsize=(8.4, 1.2 + 0.55 * len(others)), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for i, other in enumerate(others):
        differences = (table[verdict.best] - table[other]).to_numpy(dtype=float)
        shown = differences if len(differences) <= MOST_POINTS else rng.choice(differences, MOST_POINTS, replace=False)
        axes.plot(shown, i + rng.uniform(-0.28, 0.28, len(shown)), ".", color=COLORS[0], alpha=0.35, markersize=4)
        axes.boxplot(
            differences, positions=[i], orientation="horizontal", widths=0.6, showfliers=False,
            medianprops={"color": COLORS[1], "linewidth": 2},
        )  # fmt: skip
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(others)), others)
    axes.invert_yaxis()
    title = {"overall": "judge's overall score", "rouge1": "ROUGE-1"}[verdict.measure]
    _style(axes, f"{verdict.best} minus another model, {title} of each sample", "to the right: the better answer")
    return figure


def plot_lengths(samples: pd.DataFrame) -> Figure | None:
    """Score against the length of the answer, in tokens; None without answers."""
    measure = "overall" if samples["overall"].notna().any() else "rouge1"
    known = samples[samples[measure].notna() & samples["num_new_tokens"].notna()]
    if known.empty:
        return None
    if len(known) > MOST_POINTS:
        known = known.sample(MOST_POINTS, random_state=0)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, group) in enumerate(known.groupby("model", sort=False)):
        axes.plot(
            group["num_new_tokens"], group[measure], MARKERS[i % len(MARKERS)], color=COLORS[i % len(COLORS)],
            alpha=0.55, markersize=4, markeredgewidth=0, label=name,
        )  # fmt: skip
    if known["num_new_tokens"].max() > 20 * max(1.0, known["num_new_tokens"].median()):
        axes.set_xscale("log")
    columns = math.ceil(known["model"].nunique() / 12)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)
    title = "judge's overall score (1 to 10)" if measure == "overall" else "ROUGE-1"
    _style(axes, "score against length", "tokens of the answer", title)
    return figure
