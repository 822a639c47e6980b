"""
What is measured of answers: its title and decimals in every table, and the tables of steps 3 and 5 in print.

Imports without torch.
"""

import pandas as pd

ROUGE_COLUMNS = ["rouge1", "rouge2", "rougeL"]
JUDGED = {"overall": ("judge overall", 2), "expected_overall": ("judge expected", 2)}
MEASURES = {  # of one answer; column: (title, decimals). The criteria of a judge come from its evaluations.
    "rouge1": ("ROUGE-1", 3),
    "rouge2": ("ROUGE-2", 3),
    "rougeL": ("ROUGE-L", 3),
    "chrf": ("chrF", 3),
    "stopped": ("stopped", 2),
    "seq_rep_4": ("seq-rep-4", 3),
    "length_ratio": ("length ratio", 2),
    "num_new_tokens": ("tokens", 1),
}
METRICS = {  # of a whole model, under the names that step 3 writes
    **{measure: MEASURES[measure] for measure in (*ROUGE_COLUMNS, "chrf")},
    "stop_rate": MEASURES["stopped"],
    "empty_rate": ("empty", 2),
    "seq_rep_4": MEASURES["seq_rep_4"],
    "distinct_2": ("distinct-2", 3),
    "length_ratio": MEASURES["length_ratio"],
    "mean_new_tokens": MEASURES["num_new_tokens"],
}
# columns of models that are no measure
COUNTS = ("samples", "errors", "judged", "failed", "coverage", "seconds", "cost")


def criterion_column(criterion: str) -> str:
    """The column of a criterion, which is no other column whatever the rubric calls it: names have no brackets."""
    return f"judge[{criterion}]"


def describe_measure(measure: str) -> tuple[str, int]:
    """Title and decimals of a measure; a criterion is called as it is, unless another column is called so."""
    named = {**JUDGED, **MEASURES}
    if measure in named:
        return named[measure]
    title = measure.removeprefix("judge[").removesuffix("]").replace("_", " ")
    is_taken = title in ("model", *COUNTS, *(title for title, _ in named.values()))
    return f"{title} (criterion)" if is_taken else title, 2


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
