"""
Scores that people gave to answers, by which a judge is measured. Imports without torch.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from finetuning.errors import InputError
from finetuning.runs import HUMAN_AGREEMENT_FILE, is_there, read_json
from finetuning.schemas import HUMAN_AGREEMENT


@dataclass
class HumanScore:
    """What a person gave one answer under one criterion, or `overall`."""

    id: str
    model: str | None
    measure: str
    score: float


def read_earlier_scores(folder: Path) -> list[dict]:
    """The rows of scores of people that stand beside evaluations.

    Raises:
        InputError: Their file cannot be read.
    """
    path = folder / HUMAN_AGREEMENT_FILE
    if not is_there(path):
        return []
    return read_json(path, HUMAN_AGREEMENT, "take it from a copy, or delete it with its scores").get("scores", [])


def read_human_scores(path: Path, criteria: tuple[str, ...]) -> list[HumanScore]:
    """Scores that people gave, from 1 to 10; empty cells are none.

    Args:
        path: A csv with the columns `id`, `model` (unless only one was judged), and `score` (the overall one) or the
            names of criteria.

    Raises:
        InputError: Something in the file cannot be read; says in which line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = {"score": "overall", "overall": "overall"} | {criterion: criterion for criterion in criteria}
            present = [name for name in reader.fieldnames or [] if name in columns]
            if "id" not in (reader.fieldnames or []) or not present:
                raise InputError(
                    f"human {path}: needs the columns id and score (or {', '.join(criteria)}); it has "
                    f"{', '.join(reader.fieldnames or []) or 'none'}"
                )
            if {"score", "overall"} <= set(present):
                raise InputError(f"human {path}: score and overall mean the same; keep one of them")
            found = []
            for row in reader:
                for name in present:
                    text = (row[name] or "").strip()
                    if not text:
                        continue
                    try:
                        score = float(text)
                    except ValueError:
                        score = math.nan
                    if not 1 <= score <= 10:
                        raise InputError(
                            f"human {path}:{reader.line_num}: {name} must be a number from 1 to 10, got {text}"
                        )
                    found.append(
                        HumanScore(
                            (row["id"] or "").strip(), (row.get("model") or "").strip() or None, columns[name], score
                        )
                    )
    except OSError as error:
        raise InputError(f"human {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"human {path} is no csv in UTF-8: {error}") from error
    return found
