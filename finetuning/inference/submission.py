"""Answers of one model in the form that a contest takes: a CSV of ids and answers in the order of the test file."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from finetuning.data.samples import TestSamples
from finetuning.errors import InputError, make_folder, naming

ID_COLUMNS = ("id", "fname", "idx", "uid")


def check_submission(path: str, models: list[str], samples: TestSamples, num_samples: int) -> None:
    """Look before anything is answered whether the file can be written.

    Raises:
        InputError: It exists or cannot be made, several models would answer, or rows would have no answer.
    """
    if Path(path).exists():
        raise InputError(f"submission: {path} exists; delete it, or name another file")
    if len(models) > 1:
        raise InputError(f"submission has the answers of one model; name one of {', '.join(models)} with --model_name")
    if num_samples < len(samples):
        raise InputError(f"submission has an answer to every row of the test split; add --num_samples {len(samples)}")
    make_folder(Path(path).parent)
    partial = Path(f"{path}.partial")
    try:
        with naming(partial):
            partial.touch()
    except FileNotFoundError:  # in /proc
        raise InputError(f"submission: {path} cannot be made there; name a file at another place") from None
    partial.unlink()


def write_submission(path: str, rows: Iterable[dict], samples: TestSamples, answer_key: str | None) -> None:
    """Write an answer to every row of the test split; texts stand there as they are, for a program to read.

    Args:
        rows: Predictions of all samples.
        answer_key: Title of the answers, as the training data has it. None for `prediction`.
    """
    answers = {row["id"]: row["prediction"] for row in rows}
    by_row = {row: answers[sample_id] for place, sample_id in enumerate(samples.ids) for row in samples.rows_of(place)}
    dataset = samples.dataset
    id_column = next((column for column in dataset.column_names if column in ID_COLUMNS), None)
    ids = dataset[id_column] if id_column is not None else range(len(dataset))
    partial = Path(f"{path}.partial")
    with naming(partial), partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([id_column or "id", answer_key or "prediction"])
        writer.writerows([row_id, by_row[row] or ""] for row, row_id in enumerate(ids))
    os.replace(partial, path)
    missing = sum(answer is None for answer in by_row.values())
    without = f"; {missing} of them have no answer and are empty" if missing else ""
    print(f"Submission with {len(by_row)} rows (ids: {id_column or 'numbers of the rows'}) written to {path}{without}")
