"""
What preflight found: as preflight.json, as one screen, and as plots of the lengths (eda/).
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from finetuning.data.checks import Finding
from finetuning.data.tokens import IGNORED
from finetuning.errors import make_folder, to_line, to_plain
from finetuning.runs import PREFLIGHT_FILE, write_json
from finetuning.training.lengths import PERCENTILES

LEVELS = {"refused": "1;31", "allowed": "33", "warning": "33", "note": "36", "ok": "32"}  # in the order of the screen
MAX_PREVIEW = 160  # tokens of a row that are shown
# Okabe and Ito's colours, which the colour-blind can tell apart, and hatches, which tell bars apart in black and white
STYLES = (("#0072B2", ""), ("#E69F00", "//"), ("#009E73", "xx"))


@dataclass
class Report:
    """Everything that preflight found."""

    findings: list[Finding] = field(default_factory=list)
    lengths: dict = field(default_factory=dict)
    plan: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    preview: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def refused(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "refused"]

    def allow(self, names: list[str]) -> None:
        for finding in self.findings:
            if finding.level == "refused" and finding.check in names:
                finding.level = "allowed"

    def save(self, run: Path) -> None:
        make_folder(run)
        content = asdict(self)
        for finding in content["findings"]:
            finding["rows"] = finding["rows"][:100]
        write_json(run / PREFLIGHT_FILE, content)


def preview_row(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> dict:
    """The tokens of a row, and which of them are learned. A long row is shown without its middle.

    Returns:
        {"tokens": [[text, learned, special], ...], "left_out": number of tokens, "gap": place at which they were, or
        None}. Tokens that make up one character together are one.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens: list[list] = []
    pending: list[int] = []
    for place, (token_id, label) in enumerate(zip(ids, labels, strict=True)):
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(pending) < 4 and place + 1 < len(ids):
            continue
        tokens.append([text, label != IGNORED, token_id in special])
        pending = []
    left_out, head = max(0, len(tokens) - MAX_PREVIEW), MAX_PREVIEW // 4
    if left_out:
        tokens = [*tokens[:head], *tokens[head + left_out :]]
    return {"tokens": tokens, "left_out": left_out, "gap": head if left_out else None}


def render_preview(preview: dict, colour: bool) -> str:
    """The row for a terminal: | stands between tokens; learned ones are green, or between ⟦ and ⟧ without colour."""
    pieces = []
    inside = False
    for place, (text, learned, special) in enumerate(preview["tokens"]):
        if place == preview["gap"]:
            pieces.append(f" … {preview['left_out']} tokens … ")
        # coloured text does not pass through PlainOutput, which makes other text plain
        shown = to_plain(text).replace("\n", "⏎\n")
        if colour:
            style = ("1;" if special else "") + ("30;42" if learned else "2")
            pieces.append(f"\033[{style}m{shown}\033[0m")
        elif learned == inside:
            pieces.append(("|" if place else "") + shown)
        else:
            pieces.append(("⟦" if learned else "⟧") + shown)
        inside = learned
    return ("\033[2m|\033[0m" if colour else "").join(pieces) + ("⟧" if inside and not colour else "")


def use_colour() -> bool:
    """Colours for a terminal, unless NO_COLOR is set (no-color.org)."""
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def render(report: Report, colour: bool) -> str:
    """The report as one screen."""
    lines = []
    where = "in green" if colour else "between ⟦ and ⟧"
    for preview in report.preview:
        lines += [f"row {preview['row']}, what is learned {where}:", render_preview(preview, colour), ""]
    lines.append("lengths in tokens     " + "".join(f"{f'p{p}':>7}" for p in PERCENTILES))
    for name in ("question", "answer", "row"):
        values = report.lengths[f"{name} tokens"]
        lines.append(f"  {name:<20}" + "".join(f"{values[f'p{p}']:>7}" for p in PERCENTILES))
    lines.append("checks")
    for finding in sorted(report.findings, key=lambda finding: list(LEVELS).index(finding.level)):
        rows = ", ".join(str(row) for row in finding.rows[:8]) + (", ..." if len(finding.rows) > 8 else "")
        level = f"\033[{LEVELS[finding.level]}m{finding.level:<8}\033[0m" if colour else f"{finding.level:<8}"
        lines.append(f"  {level} {finding.check}: {to_line(finding.text)}" + (f" (rows {rows})" if rows else ""))
    plan = report.plan
    packing = f", sequences {plan['packing_efficiency']:.0%} full" if plan["packing_efficiency"] else ""
    lines.append(
        f"plan: {plan['steps']} steps ({plan['epochs']} epochs) of {plan['rows_per_step']:g} rows in "
        f"{plan['sequences_per_step']} sequences{packing}; {plan['tokens']:,} tokens; {plan['checkpoints']} checkpoints"
    )
    return "\n".join(lines)


def plot_lengths(per_row: dict[str, np.ndarray], max_length: int | None, folder: Path) -> None:
    """Histograms of questions, answers and rows, in tokens (with the line of max_length) and in characters.

    Args:
        per_row: Lengths by `question tokens`, `answer characters` and so on, one number a row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for unit, names in (("tokens", ("question", "answer", "row")), ("characters", ("question", "answer"))):
        figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
        axes = figure.subplots(1, len(names))
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
