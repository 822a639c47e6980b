"""
Data rows and how a row is phrased: the one place where training, testing and judging get prompts and answers from.
"""

import hashlib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from datasets import Dataset, Features, Value, load_dataset
from datasets.fingerprint import Hasher

from finetuning.cleaning import PII_TOKENS, clean_jamo, mask_pii
from finetuning.configs import ScriptArguments
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


def check_text(path: Path) -> None:
    """Refuse a json or csv file that its reader would misread, or crash on: it does both to what is not UTF-8 or JSON."""
    is_json = READERS[path.suffix] == "json"
    with path.open("rb") as file:
        head = file.read(1024)
        if head.startswith(COMPRESSED):
            raise InputError(f"{path}: is compressed; unpack it, and name the file that was in it")
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "cp949"
                convert = f"iconv -f {encoding} -t utf-8 {path.name} > utf8_{path.name}"
                raise InputError(f"{path}, line {number}: not UTF-8; convert it, as in `{convert}`") from None
            escapes = ESCAPES.findall(text) if is_json and HALF.search(text) else []
            if any(HALF.search(PAIR.sub("", run)) for run in escapes):
                raise InputError(f"{path}, line {number}: holds half of a character, such as \\ud800 alone; delete it")
    start = head.decode(errors="ignore").removeprefix("\ufeff").lstrip()
    if not start and len(head) < 1024:
        raise InputError(f"{path}: the file is empty")
    if is_json and not re.match(r"\{|\[\s*([{\]]|$)", start):  # pyarrow dies of a bare `null`
        begin = start.split("\n")[0][:20]
        raise InputError(
            f'{path}: holds no rows of JSON, it begins with `{begin}`; write {{"column": text, ...}} for each row'
        )


def reader_options(files: list[Path]) -> dict:
    """Settings of the reader of these files. Cells of csv are the texts that stand there: `007`, `1.10`, `None`."""
    kind = READERS[files[0].suffix]
    if kind == "parquet":
        return {}
    for file in files:
        check_text(file)
    if kind == "json":
        return {"parse_agent_traces": False}  # which any rows with `id`, `source`, `model` and `messages` would be
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


def find_bad_json(file: Path) -> str | None:
    """The first line that is no row, of a file that the reader refused; None where each is one."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except RecursionError:
        return "brackets within brackets, too deep to read"
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            return f"line {error.lineno} is not JSON: {error.msg}"
    else:
        rows = rows if isinstance(rows, list) else [rows]
        return next((f"row {i} is no {{...}}" for i, row in enumerate(rows) if not isinstance(row, dict)), None)
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON: {error.msg}"
        if not isinstance(row, dict):
            return f"line {number} is no row {{...}}"
    return None


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
        source = {"path": READERS[files[0].suffix], "data_files": {split_name: [str(f) for f in files]}}
    elif name.startswith((".", "/", "~")) or path.suffix in READERS:
        raise InputError(f"{name}: no such file or folder")
    else:
        source = {"path": name, "name": config}
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it raises what it logs
    try:
        dataset = load_dataset(**source, **(reader_options(files) if exists else {}), split=split)
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds, from the network, the reader and the split's name
        cause = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        if "corresponds to no data" in cause:
            raise InputError(f"{name}: the split `{split}` has no rows") from None
        if exists and source["path"] == "json" and not isinstance(error, OSError):
            cause = next((f"{f.name}, {fault}" for f in files if (fault := find_bad_json(f))), cause)
        hint = "" if exists else " (neither a local path nor a dataset that could be fetched from the Hub)"
        raise InputError(f"{name}: could not load the split `{split}`{hint}: {cause}") from error
    if len(dataset) == 0:
        raise InputError(f"{name}: the split `{split}` has no rows")
    return dataset


@dataclass(frozen=True)
class RowFormat:
    """Which columns hold what, and how their text is prepared. `kind` is messages, prompt, instruction or columns."""

    kind: str
    question_key: str | None
    reference_keys: tuple[str, ...]
    system_prompt: str | None = None
    clean_jamo: bool = False
    mask_pii: bool = False

    def describe(self) -> str:
        question = "messages" if self.kind == "messages" else self.question_key
        references = "" if self.kind == "messages" else f" -> {', '.join(self.reference_keys)}"
        added = [
            text
            for text, given in (
                ("with a system prompt", self.system_prompt),
                ("without bare jamo", self.clean_jamo),
                ("with personal data masked", self.mask_pii),
            )
            if given
        ]
        return " ".join([f"{question}{references}", ", ".join(added)]).strip()

    def prepare(self, text: str) -> str:
        """The text as training and testing see it."""
        text = clean_jamo(text) if self.clean_jamo else text
        return mask_pii(text) if self.mask_pii else text


FORMAT_KEYS = ("question_key", "answer_key", "system_prompt", "clean_jamo", "mask_pii")


def tokens_to_add(args: ScriptArguments) -> list[str]:
    """Tokens that the vocabulary needs for these rows: `special_tokens`, and those that stand for personal data."""
    return list(dict.fromkeys([*(args.special_tokens or []), *(PII_TOKENS.values() if args.mask_pii else [])]))


def find_row_format(
    column_names: list[str],
    question_key: str | None = None,
    answer_key: str | None = None,
    system_prompt: str | None = None,
    clean_jamo: bool = False,
    mask_pii: bool = False,
) -> RowFormat:
    """Decide how rows with these columns are read.

    >>> find_row_format(["dialogue", "summary1", "summary2"], "dialogue", "summary").reference_keys
    ('summary1', 'summary2')
    """
    columns = set(column_names)
    if question_key is not None:
        numbered = [c for c in column_names if re.fullmatch(rf"{re.escape(answer_key)}\d+", c)]
        references = (
            [answer_key] if answer_key in columns else sorted(numbered, key=lambda c: int(c[len(answer_key) :]))
        )
        missing = [
            key for key, found in ((question_key, question_key in columns), (answer_key, references)) if not found
        ]
        if missing:
            raise InputError(f"no column `{missing[0]}`; the columns are {', '.join(column_names)}")
        return RowFormat("columns", question_key, tuple(references), system_prompt, clean_jamo, mask_pii)
    for kind, question, answer in (
        ("messages", "messages", "messages"),
        ("prompt", "prompt", "completion"),
        ("instruction", "instruction", "output"),
    ):
        if {question, answer} <= columns:
            return RowFormat(kind, question, (answer,), system_prompt, clean_jamo, mask_pii)
    raise InputError(
        f"the columns {', '.join(column_names)} are neither messages, nor prompt and completion, nor instruction and "
        "output; set question_key and answer_key to the columns with the question and its answer"
    )


def _text(row: dict, key: str) -> str:
    value = row[key]
    if value is None or value != value:  # NaN
        raise InputError(f"`{key}` is empty")
    if isinstance(value, (dict, list, bytes)):
        raise InputError(f"`{key}` must be text, not {type(value).__name__}")
    return str(value)


ROLES = ("system", "user", "assistant", "tool")


def _messages(row: dict, key: str) -> list[dict]:
    """A list of messages, checked."""
    if not isinstance(row[key], list) or not all(isinstance(m, dict) for m in row[key]):
        raise InputError(f"`{key}` must be a list of messages, each with role and content")
    for message in row[key]:
        if {"role", "content"} - message.keys():
            raise InputError(f"a message of `{key}` has {', '.join(message) or 'nothing'}, and needs role and content")
        if message["role"] not in ROLES:
            raise InputError(
                f"a message of `{key}` has the role {message['role']!r}, which is none of {', '.join(ROLES)}"
            )
    return [{"role": m["role"], "content": _text(m, "content")} for m in row[key]]


def to_sample(row: dict, row_format: RowFormat) -> dict:
    """Phrase one data row.

    Returns:
        {"prompt": [{"role", "content"}, ...], "references": [str, ...]}. The prompt ends with the user's message; of
        several turns the last answer is the reference and the earlier ones are part of the prompt.

    Raises:
        InputError: The row has no question or no answer.
    """
    kind = row_format.kind
    if kind == "messages" or (kind == "prompt" and isinstance(row["prompt"], list)):
        keys, messages = "`messages`", _messages(row, "messages" if kind == "messages" else "prompt")
        if kind == "prompt":
            keys, completion = "`prompt` with `completion`", row["completion"]
            if not isinstance(completion, list):
                completion = [{"role": "assistant", "content": _text(row, "completion")}]
            messages += _messages({"completion": completion}, "completion")
        if [message["role"] for message in messages[-2:]] not in (["user", "assistant"], ["tool", "assistant"]):
            raise InputError(f"{keys} must end with an assistant's message that answers a user's")
        prompt, references = messages[:-1], [messages[-1]["content"]]
    else:
        question = _text(row, row_format.question_key)
        if kind == "instruction" and row.get("input"):
            question = f"{question}\n\n{_text(row, 'input')}"
        prompt = [{"role": "user", "content": question}]
        references = [_text(row, key) for key in row_format.reference_keys]
    prompt = [m if m["role"] == "system" else {**m, "content": row_format.prepare(m["content"])} for m in prompt]
    references = [row_format.prepare(reference) for reference in references]
    if row_format.system_prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": row_format.system_prompt}, *prompt]
    return {"prompt": prompt, "references": references}


def to_prompt_completion(row: dict, row_format: RowFormat) -> dict:
    """One data row as SFTTrainer takes it; the loss is on the completion."""
    sample = to_sample(row, row_format)
    return {"prompt": sample["prompt"], "completion": [{"role": "assistant", "content": sample["references"][0]}]}


def _format_of(dataset: Dataset, where: str, given: dict) -> RowFormat:
    try:
        return find_row_format(dataset.column_names, **given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _load_prompts_and_completions(args: ScriptArguments, split: str) -> tuple[Dataset, RowFormat]:
    """Load a split as prompts and completions, with the format in which its rows were read.

    The result is cached on disk by `datasets` under what it depends on, the text of this module included: `map` alone
    would know an imported function by its name only, and give yesterday's rows after an edit.
    """
    dataset = load_split(args.dataset_name, split, args.dataset_config)
    given = {key: getattr(args, key) for key in FORMAT_KEYS}
    row_format = _format_of(dataset, f"{args.dataset_name} ({split})", given)
    source = [inspect.getsource(sys.modules[module]) for module in (__name__, clean_jamo.__module__)]
    try:
        rows = dataset.map(
            to_prompt_completion,
            fn_kwargs={"row_format": row_format},
            remove_columns=dataset.column_names,
            new_fingerprint=Hasher.hash([dataset._fingerprint, source, row_format]),
            desc=f"Reading {split}",
        )
    except InputError:
        raise InputError(describe_bad_rows(dataset, row_format, f"{args.dataset_name} ({split})")) from None
    return rows, row_format


def describe_bad_rows(dataset: Dataset, row_format: RowFormat, where: str) -> str:
    """Every row that cannot be read, by what is wrong with it."""
    bad: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        try:
            to_sample(row, row_format)
        except InputError as error:
            bad.setdefault(str(error), []).append(index)
    faults = []
    for fault, rows in bad.items():
        shown = ", ".join(str(row) for row in rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        faults.append(f"row{'s' if len(rows) > 1 else ''} {shown}: {fault}")
    return f"{where}, {'; '.join(faults)}. Correct or delete them (the first row is 0)"


def load_training_rows(args: ScriptArguments) -> tuple[Dataset, Dataset | None, RowFormat]:
    """Load the training split, and the validation split if there is one, as prompts and completions."""
    train_rows, row_format = _load_prompts_and_completions(args, args.dataset_train_split)
    eval_rows = None
    if args.dataset_eval_split is not None:
        eval_rows, _ = _load_prompts_and_completions(args, args.dataset_eval_split)
    return train_rows, eval_rows, row_format


def fingerprint_rows(rows: Dataset) -> str:
    """Hash of the content of `rows`, in their order; the same on every machine."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()[:16]


class TestSamples(Sequence):
    """Samples of a test split, {"id", "prompt", "references"}, ordered by `id` and read from the data when asked for."""

    __test__ = False  # no test of pytest's

    def __init__(self, dataset: Dataset, row_format: RowFormat, rows: list[tuple[str, list[int]]]):
        self.dataset, self.row_format = dataset, row_format
        self._rows = rows  # id, and the rows that ask the same
        self._places = {sample_id: place for place, (sample_id, _) in enumerate(rows)}

    @property
    def ids(self) -> list[str]:
        return [sample_id for sample_id, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return TestSamples(self.dataset, self.row_format, self._rows[place])
        sample_id, rows = self._rows[place]
        return {"id": sample_id, **_join_rows(self.dataset, self.row_format, rows)}

    def by_id(self, sample_id: str) -> dict:
        return self[self._places[sample_id]]


def _join_rows(dataset: Dataset, row_format: RowFormat, rows: list[int]) -> dict:
    """Rows that ask the same, as one sample."""
    samples = [to_sample(dataset[row], row_format) for row in rows]
    references = dict.fromkeys(reference for sample in samples for reference in sample["references"])
    return {"prompt": samples[0]["prompt"], "references": list(references)}


def load_test_samples(config: dict) -> TestSamples:
    """Load the test split as samples, ordered by `id`.

    Rows that ask the same are one sample with several references, as in DialogSum's test split on the Hub. An id is a
    hash of the sample's content, so it stays the same wherever the sample stands in the file, and the first N samples
    are a random choice that contains the first N - 1.

    Args:
        config: The keys of ScriptArguments, as `run.json` has them.
    """
    name, split = config["dataset_name"], config["dataset_test_split"]
    dataset = load_split(name, split, config.get("dataset_config"))
    given = {key: config[key] for key in FORMAT_KEYS if config.get(key) is not None}
    row_format = _format_of(dataset, f"{name} ({split})", given)
    by_prompt: dict[bytes, list[int]] = {}
    for index, row in enumerate(dataset):
        try:
            prompt = to_sample(row, row_format)["prompt"]
        except InputError:
            raise InputError(describe_bad_rows(dataset, row_format, f"{name} ({split})")) from None
        by_prompt.setdefault(hashlib.sha256(json.dumps(prompt).encode()).digest(), []).append(index)
    samples = []
    for rows in by_prompt.values():
        sample = _join_rows(dataset, row_format, rows)
        content = json.dumps([sample["prompt"], sorted(sample["references"])], ensure_ascii=False)
        samples.append((hashlib.sha256(content.encode()).hexdigest()[:12], rows))
    return TestSamples(dataset, row_format, sorted(samples))
