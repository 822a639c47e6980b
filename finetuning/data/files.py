"""
The rows of a split, from data files or a dataset of the Hub; refused where a reader would misread them or crash.

Imports without torch.
"""

import logging
import os
import re
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, Features, Value, load_dataset

from finetuning.data.json_files import load_json
from finetuning.errors import InputError

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bz2, xz, zstd
# A character in JSON may be two halves, `\ud83d\ude00`; one alone is none.
HALF, PAIR = re.compile(r"\\u[dD][89a-fA-F]"), re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")
ESCAPES = re.compile(r"(?<!\\)(?:\\\\)*((?:\\u[0-9a-fA-F]{4})+)")


def find_split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in a folder: `split.jsonl`, `split_dataset.json`, `split/*`, `split-00000-of-00002.parquet`."""
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


def _decode(text: bytes, encoding: str = "utf-8") -> str | None:
    """The text, or None if it is not in this encoding."""
    try:
        return text.decode(encoding)
    except UnicodeDecodeError:
        return None


def likely_encodings(text: bytes) -> list[str]:
    """The encodings among cp949 and cp1252 in which this text can be read, the likelier first.

    Most bytes of either are valid in the other. But read as cp949, Western letters become Chinese characters or rare
    syllables, and Korean text is made of the 2,350 syllables of KS X 1001.
    """
    as_korean, as_western = _decode(text, "cp949"), _decode(text, "cp1252")
    readable = [name for name, decoded in (("cp949", as_korean), ("cp1252", as_western)) if decoded is not None]
    letters = [character for character in as_korean or "" if not character.isascii()]
    korean = [c for c in letters if "가" <= c <= "힣" and len(c.encode("euc_kr")) == 2]
    is_korean = 2 * len(korean) >= len(letters)
    return readable if is_korean else readable[::-1]


def describe_encoding(path: Path, head: bytes, text: bytes) -> str:
    """What to do with a file that is not UTF-8, of which these are the first bytes and some lines that are not."""
    encodings = ["utf-16"] if head.startswith((b"\xff\xfe", b"\xfe\xff")) else likely_encodings(text)
    if not encodings:
        return "not UTF-8, nor cp949 or cp1252; find out how it was written, and convert it with iconv"
    convert = f"not UTF-8; convert it, as in `iconv -f {encodings[0]} -t utf-8 {path.name} > utf8_{path.name}`"
    return convert + (f"; if that reads wrong, from {encodings[1]}" if encodings[1:] else "")


def check_text(path: Path, is_json: bool) -> None:
    """Refuse a file of json or csv that holds no text in UTF-8, or no rows."""
    with path.open("rb") as file:
        head = file.read(1024)
        if head.startswith(COMPRESSED):
            raise InputError(f"{path}: is compressed; unpack it, and name the file that was in it")
        file.seek(0)
        for number, line in enumerate(file, 1):
            text = _decode(line)
            if text is None:
                rest = b"".join(line for line in islice(file, 10_000) if _decode(line) is None)
                raise InputError(f"{path}, line {number}: {describe_encoding(path, head, line + rest)}")
            escapes = ESCAPES.findall(text) if is_json and HALF.search(text) else []
            if any(HALF.search(PAIR.sub("", run)) for run in escapes):
                raise InputError(f"{path}, line {number}: holds half of a character, such as \\ud800 alone; delete it")
    start = head.decode(errors="ignore").removeprefix("\ufeff").lstrip()
    if not start and len(head) < 1024:
        raise InputError(f"{path}: the file is empty")
    if is_json and not re.match(r"\{|\[\s*([{\]]|$)", start):
        begin = start.split("\n")[0][:20]
        raise InputError(
            f'{path}: holds no rows of JSON, it begins with `{begin}`; write {{"column": text, ...}} for each row'
        )


def csv_options(files: list[Path]) -> dict:
    """Settings of the reader of csv files, by which cells are the texts that stand there: `007`, `1.10`, `None`."""
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
        for file in files if kind in ("json", "csv") else ():
            check_text(file, kind == "json")
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
