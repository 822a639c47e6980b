"""
Rows of predictions and evaluations: JSON lines that are appended as they are finished and joined on `id`.

What a row holds is in schemas.py. Beside `<name>.jsonl` stands `<name>.json`, which says under what identity its rows
were made. Imports without torch.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from finetuning.errors import InputError, naming
from finetuning.runs import is_there, read_json, to_json, write_json
from finetuning.schemas import ANY_OBJECT, INFO, PREDICTION, ROW, check
from finetuning.wording import describe_differences

REMEDY = "delete that line, and start the step that wrote it again to make it anew"


def iterate_rows(path: Path, schema: TypeAdapter = ANY_OBJECT) -> Iterator[dict]:
    """The finished rows, one by one; a last line that a kill has torn is left out.

    Raises:
        InputError: A line is no JSON, or does not fit the schema; or a sample has two predictions.
    """
    if not is_there(path):
        return
    lines_of: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{path}:{number} is no JSON; {REMEDY}") from None
            row = check(row, schema, f"{path}:{number}", REMEDY)
            if schema is PREDICTION and lines_of.setdefault(row["id"], number) != number:
                earlier = f"sample {row['id']}, after line {lines_of[row['id']]}"
                raise InputError(f"{path}:{number} is the second row of {earlier}; delete one of them")
            yield row


def read_rows(path: Path) -> list[dict]:
    """The finished rows, all at once."""
    return list(iterate_rows(path))


def has_rows(path: Path) -> bool:
    """Whether there is a finished row."""
    return next(iterate_rows(path), None) is not None


def read_info(path: Path, schema: TypeAdapter = INFO) -> dict:
    """What stands beside rows: their identity, and what is known of all of them.

    Raises:
        InputError: Nothing does, as a copy or a kill may leave it; or it does not fit the schema.
    """
    info_path = path.with_suffix(".json")
    if not is_there(info_path):
        raise InputError(f"{path} has no {info_path.name} beside it, which says how it was made; make it again")
    return read_json(info_path, schema, "make it and its rows again with --overwrite true")


def check_identity(path: Path, identity: dict, why: str = "") -> None:
    """Refuse to go on with rows that were made under another identity.

    Args:
        why: What the rows are for, if they are not to be added to.

    Raises:
        InputError: There are such rows; says which field differs.
    """
    if not has_rows(path):
        return
    old, new = read_info(path)["identity"], json.loads(json.dumps(identity))
    differences = describe_differences(old, new)
    if differences:
        start = f"{why}; start" if why else "Start"
        raise InputError(f"{path} was made under other conditions: {differences}. {start} over with --overwrite true")


def prediction_hash(row: dict) -> str:
    """Hash of what is judged, so that an evaluation is never taken for one of another answer."""
    return hashlib.sha256(json.dumps([row["id"], row["prediction"]], ensure_ascii=False).encode()).hexdigest()[:12]


def pair_hash(first: str, second: str) -> str:
    """Hash of two answers that are compared, from theirs."""
    return hashlib.sha256((first + second).encode()).hexdigest()[:12]


def item_key(row: dict) -> str:
    """What an evaluation row is the only one of in its file."""
    return f"{row['id']} {row['order']}" if "order" in row else row["id"]


class RowFile:
    """The rows of one model, opened to be appended to. They are in the file only, however many there are.

    It is a context manager, which closes the file at its end. Other ranks write files of their own,
    `parts/<name>.<rank>.jsonl` in the same folder, which `absorb` takes over.

    With `overwrite`, existing rows stand aside, as `<name>.jsonl.previous`, until the first new one is written:

        m.jsonl            (moved)            m.jsonl  first new row     m.jsonl
        m.json       ->    m.jsonl.previous             ->
                           m.json.previous                               (deleted)

    A step that ends without a new row puts them back; after a kill, the next one that opens the file does.

    Args:
        path: The JSON lines file; it is made, with its folder, if it is missing.
        identity: What makes rows comparable (model, settings). It is written to the JSON file beside `path`.
        overwrite: Replace existing rows.

    Raises:
        InputError: There are rows that were made under another identity; says which field differs. Or another process
            has them open.
    """

    def __init__(self, path: Path, identity: dict, overwrite: bool = False):
        self.path = path
        self.info_path = path.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        # a file of its own, as `path` is replaced while it is locked; the lock ends with the process, however that ends
        self._lock = FileLock(_lock_of(path))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"{path} is being written by another process; wait for it, or stop it") from None
        try:
            self._open(identity, overwrite)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, identity: dict, overwrite: bool) -> None:
        self._end_overwriting()  # of a start that was killed
        self._overwriting = overwrite
        if overwrite:
            # rows before their info: a kill in between leaves rows aside with an info that fits them
            for path in (self.path, self.info_path, *self.parts()):
                if path.exists():
                    os.replace(path, _aside(path))
        self.info = {}
        if has_rows(self.path):
            check_identity(self.path, identity)
            self.info = read_info(self.path)
        self._open_rows()
        self.write_info(identity=identity)
        self._cut_torn_line()

    def _open_rows(self) -> None:  # a server may send half a character, which stands in the file as "?"
        self._file = self.path.open("a", encoding="utf-8", errors="replace")

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def parts(self, suffix: str = ".jsonl") -> list[Path]:
        """Files with rows of other ranks."""
        name = re.compile(rf"{re.escape(self.path.stem)}\.\d+{re.escape(suffix)}")
        return sorted(f for f in (self.path.parent / "parts").glob(f"*{suffix}") if name.fullmatch(f.name))

    def _end_overwriting(self) -> None:
        """Delete the rows that stand aside if there are new ones, and put them back if there are none."""
        self._overwriting = False
        aside = [_aside(self.path), _aside(self.info_path), *self.parts(".jsonl.previous")]
        aside = [path for path in aside if path.exists()]
        has_new_rows = bool(aside) and has_rows(self.path)
        for path in aside:
            path.unlink() if has_new_rows else os.replace(path, path.with_suffix(""))

    def _cut_torn_line(self) -> None:
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:  # backwards, as the file may be large and its last line is not
                start = max(0, end - 65_536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)

    def append(self, row: dict) -> None:
        """Add one finished row; it is in the file when this returns, whatever happens to the process next."""
        with naming(self.path):
            self._file.write(to_json(row) + "\n")
            self._file.flush()
        if self._overwriting:
            self._end_overwriting()

    def absorb(self) -> None:
        """Take over rows that other ranks have written under the same identity, and delete their files.

        Rows whose id is here already, after a kill in the middle of this, are not taken twice.
        """
        known = {row["id"] for row in iterate_rows(self.path)}
        for part in self.parts():
            info_path = part.with_suffix(".json")
            info = read_json(info_path) if is_there(info_path) else {}
            if info.get("identity") == json.loads(json.dumps(self.info["identity"])):
                for row in iterate_rows(part, ROW):
                    if row["id"] not in known:
                        self.append(row)
                        known.add(row["id"])
            else:
                lost = f"its {sum(1 for _ in iterate_rows(part))} rows"
                print(f"{part}: {lost} were made under other conditions than {self.path.name}, and are deleted")
            part.unlink()
            info_path.unlink(missing_ok=True)
            _lock_of(part).unlink(missing_ok=True)

    def drop(self, unwanted: Callable[[dict], bool]) -> None:
        """Remove rows, so that they are made again; a kill leaves all of them or none."""
        if any(map(unwanted, iterate_rows(self.path))):
            self._rewrite(row for row in iterate_rows(self.path) if not unwanted(row))

    def keep_latest(self, key: Callable[[dict], str]) -> None:
        """Of rows with the same key, remove all but the one appended last; a kill leaves all of them or none."""
        keys = [key(row) for row in iterate_rows(self.path)]
        latest = {row_key: place for place, row_key in enumerate(keys)}
        if len(latest) < len(keys):
            self._rewrite(row for place, row in enumerate(iterate_rows(self.path)) if latest[keys[place]] == place)

    def _rewrite(self, rows: Iterable[dict]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        with naming(partial), partial.open("w", encoding="utf-8", errors="replace") as file:
            for row in rows:
                file.write(to_json(row) + "\n")
        self._file.close()
        os.replace(partial, self.path)
        self._open_rows()

    def write_info(self, **info) -> None:
        """Record what is known of all rows (metrics, usage) beside their identity."""
        self.info.update(info)
        write_json(self.info_path, self.info)

    def close(self) -> None:
        """Hand the rows to whoever reads them next, on a shared file system too."""
        if self._file.closed:
            return
        try:
            with naming(self.path), self._file:  # it is closed whatever happens
                os.fsync(self._file)
            if self._overwriting:
                self._end_overwriting()
        finally:
            self._lock.release()


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")
