"""
Plots of what a training set is made of: `eda/tokens.png` and `eda/characters.png`.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's colours, which stay apart in colour blindness; hatches, in print
STYLES = (("#0072B2", ""), ("#E69F00", "//"), ("#009E73", "xx"))


def plot_lengths(per_row: dict[str, np.ndarray], max_length: int | None, folder: Path) -> None:
    """Histograms of questions, answers and rows, in tokens (with the line of max_length) and in characters.

    Args:
        per_row: Lengths by `question tokens`, `answer characters` and so on, one number a row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for unit, names in (("tokens", ("question", "answer", "row")), ("characters", ("question", "answer"))):
        figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), layout="constrained")
        for axis, name, (colour, hatch) in zip(axes, names, STYLES, strict=False):
            values = per_row[f"{name} {unit}"]
            num_bins, high = min(40, int(np.ptp(values)) + 1), np.percentile(values, 99)
            axis.hist(values, bins=num_bins, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            axis.axvline(high, color="black", linestyle=":", label=f"99 %: {high:.0f}")
            if max_length is not None and name == "row":
                axis.axvline(max_length, color="#D55E00", linewidth=2, label=f"max_length: {max_length}")
            axis.set_title(f"{name} ({len(values):,} rows)")
            axis.set_xlabel(unit)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(framealpha=0.9, edgecolor="none", fontsize=8)
        axes[0].set_ylabel("rows")
        figure.savefig(folder / f"{unit}.png", dpi=110)
        plt.close(figure)
