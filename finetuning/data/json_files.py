"""
Files of JSON as rows whose cells are what is written there. Imports without torch.

Readers of JSON that give each column one type would change the cells: `1` beside `2.5` to 1.0, a large integer to the
nearest float, and `2024-01-01` to a point in time. So cells pass through Arrow as texts; lists and objects, as JSON.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, NamedSplit, Value
from datasets.packaged_modules.generator.generator import Generator

from finetuning.data.fingerprints import fingerprint_of_result
from finetuning.errors import InputError


class Decimal(float):
    """A number with a point or an exponent, and the text that it was written as."""

    text: str

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


def _decode(text: str, path: Path, number: int | None = None):
    """The content of a file, or of its line of this number."""
    where = str(path) if number is None else f"{path}, line {number}"
    try:
        return JSON.decode(text)
    except RecursionError:
        raise InputError(f"{where}: brackets within brackets, too deep to read") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number or error.lineno} is not JSON: {error.msg}") from None
    except ValueError as error:  # of _to_object, or a number of thousands of digits
        raise InputError(f"{where}: {error}") from None


def _is_json(text: str) -> bool:
    try:
        JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_json(path: Path) -> Iterator[dict]:
    """The rows of a file of JSON lines, of an array of rows, or of one row.

    Raises:
        InputError: Something is not a row; says in which line.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            for index, row in enumerate(_decode(file.read(), path)):
                if not isinstance(row, dict):
                    raise InputError(f"{path}, row {index} is no {{...}}")
                yield row
            return
        if not _is_json(first) and _is_json(text := file.read()):  # one row over several lines
            yield JSON.decode(text)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _decode(line, path, number)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number} is no row {{...}}")
                yield row


def find_columns(files: list[Path]) -> dict[str, bool]:
    """The columns of files of JSON, and whether a cell of each is a list or an object."""
    columns: dict[str, bool] = {}
    for file in files:
        for row in read_json(file):
            for column, cell in row.items():
                columns[column] = columns.get(column, False) or isinstance(cell, (dict, list))
    return columns


def _write_cell(cell, as_json: bool) -> str | None:
    """A cell as it is written in the file, or in a column with lists and objects as JSON."""
    if isinstance(cell, (dict, list)):
        return json.dumps(cell)
    if cell is None:
        return None
    text = str(cell).lower() if isinstance(cell, bool) else cell.text if isinstance(cell, Decimal) else str(cell)
    return json.dumps(text) if as_json else text


def write_cells(files: tuple[Path, ...], columns: dict[str, bool]) -> Iterator[dict[str, str | None]]:
    """The rows of files of JSON as texts."""
    for file in files:
        for row in read_json(file):
            yield {column: _write_cell(row.get(column), as_json) for column, as_json in columns.items()}


def read_cells(batch: dict[str, list], columns: tuple[str, ...]) -> dict[str, list]:
    """A batch of what write_cells gives, with the lists and objects of these columns."""
    return {
        column: [None if cell is None else json.loads(cell) for cell in cells] if column in columns else cells
        for column, cells in batch.items()
    }


def load_json(files: list[Path], split_name: str, split: str) -> Dataset:
    """Load a split of local files of JSON, by way of datasets' cache.

    Args:
        split: Name of the split, with a slice if wanted, as in `train[:-50]`.
    """
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
    structured = tuple(column for column, as_json in columns.items() if as_json)
    return dataset.with_transform(partial(read_cells, columns=structured)) if structured else dataset
