"""
Hashes of rows: the one under which `datasets` keeps what was made of them, and the one of their content.

Imports without torch.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from datasets.fingerprint import Hasher

# The code that makes rows, and the words and templates beside it
SOURCES = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("[!.]*")) if path.is_file()]


def fingerprint_of_result(*inputs: object) -> str:
    """Hash of what rows are made from, and of the code of this room, which makes them.

    `Dataset.map` alone knows an imported function by its name only, and would give yesterday's rows after an edit.
    """
    return Hasher.hash([SOURCES, *inputs])


def fingerprint_rows(rows: Iterable[dict]) -> str:
    """Hash of the content of rows, in their order; the same on every machine."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()[:16]
