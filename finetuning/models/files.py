"""
The files of a model's folder: whether they are whole, before a library trips over one, and which model they hold.
Imports without torch.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetuning.errors import InputError
from finetuning.runs import ADAPTER_CONFIG, HUB_ID

POINTER = b"version https://git-lfs"
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether a folder holds an adapter, which needs the base model that it names."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def list_weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights, of a model or an adapter."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*model*.bin")])


def check_model_files(name_or_path: str) -> None:
    """Look at every JSON and weight file of a model's folder; a Hub id is left to the library that downloads it.

    Raises:
        InputError: A file is cut off, empty or missing, or is a pointer or a page in the file's place; names it.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return
    for pattern in ("*.safetensors", "*model*.bin", "tokenizer.model", "*.json"):
        for path in sorted(folder.glob(pattern)):
            state = path.stat()
            problem = _find_problem(path, state.st_size, state.st_mtime_ns)
            if problem is not None:
                raise InputError(f"{path} {problem}")
    for path in sorted(folder.glob("*.index.json")):
        shards = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()
        missing = sorted(shard for shard in set(shards) if not (folder / shard).is_file())
        if missing:
            raise InputError(
                f"{folder} lacks {', '.join(missing[:3])}, which {path.name} names; copy or download it again"
            )


@functools.lru_cache(maxsize=1024)  # a step looks at a model's files several times, and a tokenizer's take long to read
def _find_problem(path: Path, size: int, changed: int) -> str | None:
    with path.open("rb") as file:
        start = file.read(64)
    if size == 0:
        return "is empty; copy or download it again"
    if start.startswith(POINTER):
        return "is a pointer of git-lfs and not the file itself; fetch it with `git lfs pull`"
    try:
        if path.suffix == ".safetensors":
            header_size, tensors = read_header(path)
            expected = 8 + header_size + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            if size != expected:
                return f"is cut off, or damaged: {size:,} of {expected:,} bytes; copy or download it again"
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        if path.suffix == ".safetensors":
            return "holds no weights in the format safetensors, or is cut off; copy or download it again"
        begin = start.decode("utf-8", "replace").strip().split("\n")[0][:20]
        return f"is no JSON, or is cut off (it begins with `{begin}`); copy or download it again"
    return None


def read_header(path: Path) -> tuple[int, dict[str, dict]]:
    """Size in bytes of the header of a safetensors file, and dtype, shape and data_offsets of each tensor by its name.

    Raises:
        ValueError: It has none.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"{path}: a header of {size} bytes")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is no object")
    header.pop("__metadata__", None)
    return size, header


def _read_pieces(path: Path, begin: int, end: int, number: int, size: int) -> Iterator[bytes]:
    """Evenly spaced pieces of up to `size` bytes of a part of a file."""
    with path.open("rb") as file:
        for piece in range(number):
            place = begin + (end - begin) * piece // number
            file.seek(place)
            yield file.read(min(size, end - place))


def find_tensors(name_or_path: str, revision: str | None = None) -> dict[str, tuple[Path, int, dict]]:
    """File, offset and header of each tensor of a model; none without safetensors, or if it is not on this machine."""
    folder = Path(name_or_path)
    if not folder.is_dir() and HUB_ID.fullmatch(name_or_path):  # all that was downloaded of it stands in one folder
        config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
        folder = Path(config).parent if isinstance(config, str) else folder
    tensors: dict[str, tuple[Path, int, dict]] = {}
    for path in folder.glob("model*.safetensors"):
        header_size, in_file = read_header(path)
        tensors |= {name: (path, 8 + header_size, tensor) for name, tensor in in_file.items()}
    return tensors


def fingerprint_weights(name_or_path: str) -> str | None:
    """Hash of a model's weights, however they are spread over files: of each tensor name, form and four pieces.

    None for a Hub id, whose revision says which weights these are, and for a folder without safetensors.
    """
    tensors = find_tensors(name_or_path) if Path(name_or_path).is_dir() else {}
    digest = hashlib.sha256()
    for name, (path, start, tensor) in sorted(tensors.items()):
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
        begin, end = tensor["data_offsets"]
        for piece in _read_pieces(path, start + begin, start + end, number=4, size=4096):
            digest.update(piece)
    return digest.hexdigest()[:16] if tensors else None


def fingerprint_model(name_or_path: str) -> str:
    """Hash of what a model's folder holds: its configs in full, and of each weight file the size and 64 pieces.

    A Hub id stands for itself.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*config.json")):
        digest.update(path.read_bytes())
    for path in list_weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        for piece in _read_pieces(path, 0, size, number=64, size=16_384):
            digest.update(piece)
    return digest.hexdigest()[:16]
