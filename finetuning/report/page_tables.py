"""
The tables of the page: their titles, and their cells with what they sort by. Imports without torch.
"""

from typing import NamedTuple

import pandas as pd

from finetuning.report.opinions import Opinions
from finetuning.report.tables import Cell, build_cell, build_cells, build_p_cell, compare_cells, title_of
from finetuning.report.verdict import Verdict


class Row(NamedTuple):
    """Cells from left to right, a text for a name; `kind` is the row's class in the style sheet."""

    cells: list[Cell | str]
    kind: str = ""


class Table(NamedTuple):
    id: str
    titles: list[str]
    rows: list[Row]


def build_models(summary: pd.DataFrame, use: str | None) -> Table:
    """One row a model, the one to use marked."""
    columns = build_cells(summary)
    rows = zip(map(str, summary.index), zip(*columns.values(), strict=True), strict=True)
    return Table(
        "models-table",
        ["model", *map(title_of, columns)],
        [Row([name, *cells], "best" if name == use else "") for name, cells in rows],
    )


def build_comparisons(verdict: Verdict) -> Table:
    """The best model against each other one, and each against the baseline."""
    pairs = [] if verdict.best is None else [(verdict.best, c.other) for c in verdict.against(verdict.best)]
    if verdict.baseline is not None:
        pairs += [(c.other, verdict.baseline) for c in verdict.against(verdict.baseline)]
    found = [verdict.between(*pair) for pair in dict.fromkeys(pairs)]
    cells = [compare_cells(c, verdict.measure) for c in found]
    kinds = ["" if c.is_shown else "unclear" for c in found]
    rows = [Row(list(its.values()), kind) for its, kind in zip(cells, kinds, strict=True)]
    return Table("comparisons-table", list(cells[0]) if cells else [], rows)


# Of each table of opinions, the titles and the columns under them. An interval is in the columns `_low` and `_high`.
OPINION_COLUMNS = {
    "pairs": {
        "model": "first", "against": "second", "judge": "judge", "preferred": "wins", "tie": "ties",
        "not preferred": "losses", "share": "share", "p (Holm)": "p", "flips": "flips", "first place": "first_place",
    },
    "jury": {
        "model": "model", "judge": "judge", "answers": "answers", "mean": "mean",
        "spread of the judges": "disagreement", "alpha": "alpha",
    },
    "people": {
        "model": "model", "measure": "measure", "scores": "scores", "mean of people": "mean",
        "mean of the judge": "judge_mean", "Spearman": "spearman", "kappa": "kappa",
    },
}  # fmt: skip


def build_opinions(opinions: Opinions) -> list[Table]:
    """The tables of what there is besides scores."""
    found = []
    for name, table in opinions.tables().items():
        columns = OPINION_COLUMNS[name]
        rows = [Row([_opinion_cell(row, column) for column in columns.values()]) for row in table.to_dict("records")]
        found.append(Table(f"{name}-table", list(columns), rows))
    return found


def _opinion_cell(row: dict, column: str) -> Cell | str:
    value = row[column]
    if isinstance(value, str):
        return value.replace("_", " ") if column == "measure" else value
    if column == "p":
        return build_p_cell(value)
    if isinstance(value, int):
        return build_cell(value, 0)
    return build_cell(value, 2, *(row[f"{column}_{end}"] for end in ("low", "high") if f"{column}_low" in row))
