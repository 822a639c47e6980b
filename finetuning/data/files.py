"""
The rows of a split, from data files or a dataset of the Hub; refused where a reader would misread them or crash.

Imports without torch.
"""

import logging
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, Features, Value, load_dataset

from finetuning.data.encodings import check_text
from finetuning.data.json_files import load_json
from finetuning.errors import InputError

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def find_split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in a folder: `split.jsonl`, `split_dataset.json`, `split/*` or `split-00000-of-00002.parquet`."""
    pattern = re.compile(rf"{re.escape(split)}(_dataset)?(-\d+-of-\d+)?")
    files = [f for f in folder.iterdir() if f.suffix in READERS and pattern.fullmatch(f.stem)]
    if not files and (folder / split).is_dir():
        files = [f for f in (folder / split).iterdir() if f.suffix in READERS]
    elif len(files) > 1 and not all(re.search(r"-\d+-of-\d+$", f.stem) for f in files):
        names = ", ".join(sorted(f.name for f in files))
        raise InputError(f"{folder}: several files could be the split `{split}`: {names}; keep one of them, or name it")
    if len({READERS[f.suffix] for f in files}) != 1:
        present = ", ".join(sorted(f.name for f in folder.iterdir())[:20]) or "nothing"
        problem = "several kinds of files" if files else "no file"
        raise InputError(
            f"{folder}: {problem} for the split `{split}` (json, jsonl, csv or parquet); it holds {present}"
        )
    return sorted(files)


def find_local_files(name: str, split_name: str) -> list[Path]:
    """The files of a split in a file or folder of this machine; none if `name` is the id of a dataset on the Hub."""
    path = Path(name)
    if not os.path.exists(path):  # Path.exists raises for a path that is too long or closed to us
        if name.startswith((".", "/", "~")) or path.suffix in READERS:
            raise InputError(f"{name}: no such file or folder")
        return []
    if path.is_file() and split_name != "train":
        raise InputError(
            f"{name} is one file, and all of it is the split `train`: name a part of it, as in `train[-50:]`, or a "
            f"folder with a file for `{split_name}`"
        )
    try:
        files = [path] if path.is_file() else find_split_files(path, split_name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    if files[0].suffix not in READERS:
        raise InputError(f"{name}: cannot read {files[0].suffix or 'this'} files; use json, jsonl, csv or parquet")
    return files


def csv_options(files: list[Path]) -> dict:
    """Settings of the reader of csv files, by which cells are the texts that stand there: `007`, `1.10`, `None`."""
    for file in files:
        check_text(file, is_json=False)
    for file in files:
        header = pd.read_csv(file, header=None, nrows=2, dtype=str, keep_default_na=False).iloc[0].tolist()
        if len(header) == 1:
            raise InputError(f"{file}: has one column, `{header[0]}`; separate columns by commas")
        twice = [column for column in header if column and header.count(column) > 1]
        if twice:
            raise InputError(f"{file}: the column `{twice[0]}` stands twice; rename one of them")
    columns = pd.read_csv(files[0], nrows=0).columns
    features = Features(dict.fromkeys(columns, Value("string")))
    return {"features": features, "keep_default_na": False, "na_values": ["", "NaN", "nan"]}


def _without_missing(value):
    if isinstance(value, dict):
        return {key: _without_missing(item) for key, item in value.items() if item is not None}
    return [_without_missing(item) for item in value] if isinstance(value, list) else value


def read_stored(batch: dict[str, list], singles: tuple[str, ...]) -> dict[str, list]:
    """A batch of typed columns as its author wrote it.

    Args:
        singles: Columns of numbers in single precision, of which Python would show digits that nobody wrote.

    Returns:
        The batch without the keys that Arrow has added to its objects, as all objects of a column have the same there.
    """
    return {
        column: [
            float(str(np.float32(cell))) if column in singles and cell is not None else _without_missing(cell)
            for cell in cells
        ]
        for column, cells in batch.items()
    }


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """Load one split of a local file, a local folder or a dataset on the Hub.

    Args:
        name: Path of a json, jsonl, csv or parquet file, of a folder of them, or id of a dataset on the Hub.
        split: Name of the split, with a slice if wanted: `train`, `train[:-50]`, `train[:10%]`.
        config: Configuration of a dataset on the Hub.

    Raises:
        InputError: Nothing can be read under that name and split; says what was looked for and what is there.
    """
    split_name = split.split("[")[0]
    files = find_local_files(name, split_name)
    kind = READERS[files[0].suffix] if files else None
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it raises what it logs
    try:
        if kind is None:
            dataset = load_dataset(name, config, split=split)
        elif kind == "json":
            dataset = load_json(files, split_name, split)
        else:
            options = csv_options(files) if kind == "csv" else {}
            dataset = load_dataset(kind, data_files={split_name: [str(f) for f in files]}, split=split, **options)
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds, from the network, the reader and the split's name
        cause = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        if "corresponds to no data" in cause:
            raise InputError(f"{name}: the split `{split}` has no rows") from None
        hint = "" if files else " (neither a local path nor a dataset that could be fetched from the Hub)"
        raise InputError(f"{name}: could not load the split `{split}`{hint}: {cause}") from error
    if len(dataset) == 0:
        raise InputError(f"{name}: the split `{split}` has no rows")
    if kind == "json":
        return dataset
    singles = tuple(name for name, column in dataset.features.items() if column == Value("float32"))
    nested = any(not isinstance(column, Value) for column in dataset.features.values())
    return dataset.with_transform(partial(read_stored, singles=singles)) if singles or nested else dataset
