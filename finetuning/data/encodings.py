"""
Whether a data file holds text that can be read, and what to do with one that does not. Imports without torch.
"""

import re
from itertools import islice
from pathlib import Path

from finetuning.errors import InputError

COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bz2, xz, zstd
# A character in JSON may be two halves, `\ud83d\ude00`; one alone is none.
HALF, PAIR = re.compile(r"\\u[dD][89a-fA-F]"), re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")
ESCAPES = re.compile(r"(?<!\\)(?:\\\\)*((?:\\u[0-9a-fA-F]{4})+)")


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
