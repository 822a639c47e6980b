"""
Data files and datasets of the Hub: what of a split is read, and refused where a reader would misread it or crash.

Cells are read as they are written. Readers of JSON that give each column one type would change them: `1` beside `2.5` to
1.0, a large integer to the nearest float, and `2024-01-01` to a point in time. Imports without torch.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, Features, NamedSplit, Value, load_dataset
from datasets.packaged_modules.generator.generator import Generator

from finetuning.data.fingerprints import fingerprint_of_result
from finetuning.errors import InputError

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bz2, xz, zstd
# a character in JSON may be two halves, `\ud83d\ude00`; one alone is none
HALF, PAIR = re.compile(r"\\u[dD][89a-fA-F]"), re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")
ESCAPES = re.compile(r"(?<!\\)(?:\\\\)*((?:\\u[0-9a-fA-F]{4})+)")


def find_split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in a folder: `split.jsonl`, `split_dataset.json`, `split/*`, or `split-00000-of-00002.parquet` and on."""
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


def likely_encodings(text: bytes) -> list[str]:
    """The encodings among cp949 and cp1252 in which this text can be read, the likelier first.

    Most bytes of either are valid in the other. But read as cp949, Western letters become Chinese characters or rare
    syllables, and Korean text is made of the 2,350 syllables of KS X 1001.
    """
    readable = []
    for encoding in ("cp949", "cp1252"):
        try:
            decoded = text.decode(encoding)
        except UnicodeDecodeError:
            continue
        readable.append(encoding)
        if encoding == "cp949":
            letters = [character for character in decoded if not character.isascii()]
            korean = [c for c in letters if "가" <= c <= "힣" and len(c.encode("euc_kr")) == 2]
            is_korean = 2 * len(korean) >= len(letters)
    return readable[::-1] if len(readable) == 2 and not is_korean else readable


def describe_encoding(path: Path, head: bytes, text: bytes) -> str:
    """What to do with a file that is not UTF-8, of which these are the first bytes and some lines that are not."""
    encodings = ["utf-16"] if head.startswith((b"\xff\xfe", b"\xfe\xff")) else likely_encodings(text)
    if not encodings:
        return "not UTF-8, nor cp949 or cp1252; find out how it was written, and convert it with iconv"
    convert = f"not UTF-8; convert it, as in `iconv -f {encodings[0]} -t utf-8 {path.name} > utf8_{path.name}`"
    return convert + (f"; if that reads wrong, from {encodings[1]}" if encodings[1:] else "")


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_text(path: Path) -> None:
    """Refuse a json or csv file that holds no text in UTF-8, or no rows."""
    is_json = READERS[path.suffix] == "json"
    with path.open("rb") as file:
        head = file.read(1024)
        if head.startswith(COMPRESSED):
            raise InputError(f"{path}: is compressed; unpack it, and name the file that was in it")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not is_utf8(line):
                rest = b"".join(line for line in islice(file, 10_000) if not is_utf8(line))
                raise InputError(f"{path}, line {number}: {describe_encoding(path, head, line + rest)}")
            text = line.decode()
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
        check_text(file)
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


class Decimal(float):
    """A number with a point or an exponent, and the text that it was written as."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number


def _to_object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"`{next(key for key in keys if keys.count(key) > 1)}` stands twice in one object")
    return found


JSON = json.JSONDecoder(
    object_pairs_hook=_to_object,
    parse_float=Decimal,
    parse_constant=lambda name: None if name == "NaN" else name,  # as in csv, NaN is a missing cell
)


def read_json(path: Path) -> Iterator[dict]:
    """The rows of a file of JSON lines, of an array of rows, or of one row.

    Raises:
        InputError: Something is no row; says in which line.
    """

    def decode(text: str, number: int | None = None):
        where = "" if number is None else f", line {number}"
        try:
            return JSON.decode(text)
        except RecursionError:
            raise InputError(f"{path}{where}: brackets within brackets, too deep to read") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number or error.lineno} is not JSON: {error.msg}") from None
        except ValueError as error:  # of _to_object, or a number of thousands of digits
            raise InputError(f"{path}{where}: {error}") from None

    with path.open(encoding="utf-8-sig", newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            rows = decode(file.read())
            for index, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise InputError(f"{path}, row {index} is no {{...}}")
            yield from rows
            return
        try:
            JSON.decode(first)
        except ValueError:  # one row over several lines, or a fault in the first of many
            try:
                yield JSON.decode(file.read())
                return
            except (ValueError, RecursionError):
                file.seek(0)
        except RecursionError:
            pass
        for number, line in enumerate(file, 1):
            if line.strip():
                row = decode(line, number)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number} is no row {{...}}")
                yield row


def find_columns(files: list[Path]) -> dict[str, bool]:
    """The columns of files of JSON, and whether a cell of each is a list or an object."""
    columns: dict[str, bool] = {}
    for file in files:
        check_text(file)
        for row in read_json(file):
            for column, cell in row.items():
                columns[column] = columns.get(column, False) or isinstance(cell, (dict, list))
    return columns


def _to_text(cell) -> str | None:
    """A cell that is no list and no object, as it is written in the file."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return str(cell).lower()
    return cell.text if isinstance(cell, Decimal) else str(cell)


def write_cells(files: tuple[Path, ...], columns: dict[str, bool]) -> Iterator[dict]:
    """The rows of files of JSON as text: the cells of a column with lists or objects as JSON, all others as written."""
    for file in files:
        for row in read_json(file):
            cells = {}
            for column, has_structure in columns.items():
                cell = row.get(column)
                if has_structure and cell is not None:
                    cells[column] = json.dumps(cell if isinstance(cell, (dict, list)) else _to_text(cell))
                else:
                    cells[column] = _to_text(cell)
            yield cells


def read_cells(batch: dict[str, list], columns: tuple[str, ...]) -> dict[str, list]:
    """A batch of what write_cells gives, with the lists and objects of these columns."""
    decoded = {
        column: [None if cell is None else json.loads(cell) for cell in batch[column]]
        for column in columns
        if column in batch
    }
    return {**batch, **decoded}


def load_json(files: list[Path], split_name: str, split: str) -> Dataset:
    """Load a split of local files of JSON, by way of datasets' cache."""
    columns = find_columns(files)
    if not columns:
        raise InputError(f"{', '.join(str(file) for file in files)}: the split `{split}` has no rows")
    contents = []
    for file in files:
        with file.open("rb") as stream:
            contents.append(hashlib.file_digest(stream, "sha256").digest())
    builder = Generator(
        dataset_name="json",
        config_id=f"default-fingerprint={fingerprint_of_result(split_name, contents)}",
        generator=write_cells,
        gen_kwargs={"files": tuple(files), "columns": columns},
        features=Features(dict.fromkeys(columns, Value("string"))),
        split=NamedSplit(split_name),
    )
    builder.download_and_prepare()
    dataset = builder.as_dataset(split=split)
    structured = tuple(column for column, has_structure in columns.items() if has_structure)
    return dataset.with_transform(partial(read_cells, columns=structured)) if structured else dataset


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
    path = Path(name)
    split_name = split.split("[")[0]
    exists = os.path.exists(path)  # Path.exists raises for a path that is too long or closed to us
    if exists:
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
        kind = READERS[files[0].suffix]
        source = {"path": kind, "data_files": {split_name: [str(f) for f in files]}}
    elif name.startswith((".", "/", "~")) or path.suffix in READERS:
        raise InputError(f"{name}: no such file or folder")
    else:
        source = {"path": name, "name": config}
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it raises what it logs
    try:
        if exists and kind == "json":
            dataset = load_json(files, split_name, split)
        else:
            dataset = load_dataset(**source, **(csv_options(files) if exists and kind == "csv" else {}), split=split)
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds, from the network, the reader and the split's name
        cause = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        if "corresponds to no data" in cause:
            raise InputError(f"{name}: the split `{split}` has no rows") from None
        hint = "" if exists else " (neither a local path nor a dataset that could be fetched from the Hub)"
        raise InputError(f"{name}: could not load the split `{split}`{hint}: {cause}") from error
    if len(dataset) == 0:
        raise InputError(f"{name}: the split `{split}` has no rows")
    if exists and kind == "json":
        return dataset
    singles = tuple(name for name, column in dataset.features.items() if column == Value("float32"))
    nested = any(not isinstance(column, Value) for column in dataset.features.values())
    return dataset.with_transform(partial(read_stored, singles=singles)) if singles or nested else dataset
