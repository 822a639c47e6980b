"""
What is said to data that is broken: an InputError that names the file and the rows, never another exception, no row
read wrongly in silence; through step 1 status 2, no traceback and no run. Right data of the same form must load.
"""

import contextlib
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import datasets
import pandas as pd
import pytest
from conftest import CONFIG, TRAIN, command, run, run_step
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.config.arguments import ScriptArguments
from finetuning.data.checks import check_rows
from finetuning.data.conversations import ROLES
from finetuning.data.files import load_split
from finetuning.data.row_format import find_row_format
from finetuning.data.rows import to_sample
from finetuning.data.samples import load_test_samples
from finetuning.data.training_rows import load_training_rows
from finetuning.errors import InputError

generated = settings(derandomize=True, deadline=None, max_examples=25, database=None)
RIGHT = [{"prompt": f"질문 {i}", "completion": f"answer {i}"} for i in range(4)]
USER, ANSWER, SYSTEM = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
CONVERSATION = {"messages": [USER, ANSWER]}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
COLUMNS = "prompt,completion\n"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Broken rows stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def lines(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(*rows: dict) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, **arguments) -> list[tuple]:
    """Questions and answers as training gets them, which must be those that testing gets."""
    train, _, _ = load_training_rows(ScriptArguments(dataset_name=str(path), **arguments))
    rows = [(row["prompt"], row["completion"][0]["content"]) for row in train]
    samples = load_test_samples({"dataset_name": str(path), "dataset_test_split": "train", **arguments})
    assert {json.dumps(sample["prompt"]) for sample in samples} == {json.dumps(prompt) for prompt, _ in rows}
    return rows


def refuse(path: Path, **arguments) -> str:
    """The message, which is the same in training and testing."""
    with contextlib.redirect_stderr(io.StringIO()):
        with pytest.raises(InputError) as training:
            load_training_rows(ScriptArguments(dataset_name=str(path), **arguments))
        with pytest.raises(InputError) as testing:
            load_test_samples({"dataset_name": str(path), "dataset_test_split": "train", **arguments})
    assert str(training.value) == str(testing.value) and str(path.parent) in str(training.value)
    return str(training.value)


# By hand: the file, its content, a part of the message

FILES = [
    ("train.jsonl", b"", "the file is empty"),
    ("train.json", b"\n \n", "the file is empty"),
    ("train.csv", b"", "the file is empty"),
    ("train.parquet", b"", "Parquet file size is 0 bytes"),
    ("train.json", b"[]", "the split `train` has no rows"),
    ("train.jsonl", b"{}\n{}\n", "the split `train` has no rows"),
    ("train.csv", COLUMNS, "the split `train` has no rows"),
    ("train.json", json.dumps(RIGHT)[:-9], "line 1 is not JSON: Unterminated string"),
    ("train.json", json.dumps(RIGHT, indent=1)[:-9], "line 16 is not JSON"),
    ("train.jsonl", lines(*RIGHT)[:-9], "line 4 is not JSON: Unterminated string"),
    ("train.jsonl", lines(*RIGHT[:2]) + b"{oops}\n" + lines(*RIGHT), "line 3 is not JSON: Expecting property name"),
    ("train.jsonl", b'{"prompt": "a" "completion": "b"}\n', "line 1 is not JSON: Expecting ',' delimiter"),
    ("train.jsonl", lines(*RIGHT) + b"3\n", "line 5 is no row {...}"),
    ("train.json", b'[{"prompt": "a", "completion": "b"},]', "line 1 is not JSON: "),
    ("train.json", b"[{'prompt': 'a', 'completion': 'b'}]", "Expecting property name enclosed in double quotes"),
    ("train.json", b'[{"prompt": "a", "completion": "b"}, 3]', "row 1 is no {...}"),
    ("train.json", json.dumps({"data": RIGHT}), "the columns data are neither messages, nor prompt and completion"),
    ("train.json", b'["a", "b"]', 'holds no rows of JSON, it begins with `["a", "b"]`'),
    ("train.json", b"[1, 2]", "holds no rows of JSON"),
    ("train.json", b'[["a", "b"], ["c", "d"]]', "holds no rows of JSON"),
    ("train.json", b"3", "holds no rows of JSON, it begins with `3`"),
    ("train.json", b"null", "holds no rows of JSON, it begins with `null`"),  # of which pyarrow dies
    ("train.jsonl", b"null\n" + lines(*RIGHT), "holds no rows of JSON, it begins with `null`"),
    ("train.json", b"[null, null]", "holds no rows of JSON"),
    ("train.json", b'// a comment\n[{"prompt": "a", "completion": "b"}]', "begins with `// a comment`"),
    ("train.json", COLUMNS + "a,b\n", "begins with `prompt,completion`"),
    ("train.json", b"<html></html>", "begins with `<html></html>`"),
    ("train.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "begins with `version https://git-`"),
    ("train.jsonl", lines(*RIGHT).decode().encode("euc-kr"), "line 1: not UTF-8; convert it, as in `iconv -f cp949"),
    ("train.json", json.dumps(RIGHT, ensure_ascii=False).encode("cp949"), "line 1: not UTF-8"),
    ("train.csv", f"{COLUMNS}a,b\n안녕,네\n".encode("cp949"), "line 3: not UTF-8; convert it, as in `iconv -f cp949"),
    ("train.csv", f"{COLUMNS}où est le café ?,à côté\n".encode("cp1252"), "line 2: not UTF-8; convert it, as in `iconv -f cp1252"),
    ("train.csv", f"{COLUMNS}it’s “fine”,a – b\n".encode("cp1252"), "line 2: not UTF-8; convert it, as in `iconv -f cp1252"),
    ("train.csv", f"{COLUMNS}informação,ação\n".encode("cp1252"), "iconv -f cp1252 -t utf-8 train.csv > utf8_train.csv`; if that reads wrong, from cp949"),
    ("train.jsonl", lines({"prompt": "큐떱 뷁 어디야?", "completion": "집"}).decode().encode("cp949"), "as in `iconv -f cp949"),
    ("train.csv", COLUMNS.encode() + b"a,\x81\x20\n", "line 2: not UTF-8, nor cp949 or cp1252; find out how it was written"),
    ("train.csv", f"{COLUMNS}안녕,네\n".encode("utf-16"), "line 1: not UTF-8; convert it, as in `iconv -f utf-16"),
    ("train.jsonl", lines(*RIGHT).decode().encode("utf-16"), "line 1: not UTF-8; convert it, as in `iconv -f utf-16"),
    ("train.jsonl", lines(RIGHT[0]) + b'{"prompt": "\xed\xa0\x80", "completion": "b"}\n', "line 2: not UTF-8"),
    ("train.jsonl", lines(RIGHT[0]) + b'{"prompt": "\\ud800", "completion": "b"}\n', "line 2: holds half of a character"),
    ("train.json", b'[{"prompt": "a",\n"completion": "\\uD83D b"}]', "line 2: holds half of a character"),
    ("train.json", b'[{"prompt": "a", "completion": "\\\\\\\\\\udc00"}]', "line 1: holds half of a character"),
    ("train.jsonl", b'{"prompt": "a\x00b", "completion": "c"}\n', "line 1 is not JSON: Invalid control character"),
    ("train.parquet", b"this is no parquet", "Parquet magic bytes not found"),
    ("train.parquet", parquet(*RIGHT)[:-20], "Parquet magic bytes not found"),
    ("train.parquet", lines(*RIGHT), "Parquet magic bytes not found"),
    ("train.json", gzip.compress(lines(*RIGHT)), "is compressed; unpack it"),
    ("train.csv", gzip.compress(f"{COLUMNS}a,b\n".encode()), "is compressed; unpack it"),
    ("train.jsonl", b"PK\x03\x04" + bytes(30), "is compressed; unpack it"),
    ("train.json", parquet(*RIGHT), "not UTF-8"),
    ("train.csv", f'{COLUMNS}a,b\nc,"d\ne,f\n', "EOF inside string starting at row 2"),
    ("train.csv", f"{COLUMNS}a,b\nc,d,e\n", "Expected 2 fields in line 3, saw 3"),
    ("train.csv", f"{COLUMNS}a,b,c\nd,e,f\n", "Expected 2 fields in line 2, saw 3"),
    ("train.csv", f"{COLUMNS}a,b\nc\n", "row 1: `completion` is empty"),
    ("train.csv", "prompt;completion\na;b\n", "has one column, `prompt;completion`; separate columns by commas"),
    ("train.csv", "prompt,completion,prompt\na,b,c\n", "the column `prompt` stands twice"),
    ("train.jsonl", b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "line 1: `prompt` stands twice in one object"),
    ("train.csv", lines(*RIGHT), "are neither messages, nor prompt and completion"),
    ("train.csv", ",\na,b\n", "are neither messages, nor prompt and completion"),
    ("train.csv", "질문,답\na,b\n", "the columns 질문, 답 are neither"),
    ("train.txt", "a", "cannot read .txt files; use json, jsonl, csv or parquet"),
    ("train", "a", "cannot read this files"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, message", FILES, ids=[f"{c[0]}-{c[2][:40]}" for c in FILES])
def test_a_file_that_holds_no_rows_is_refused(tmp_path, name, content, message):
    said = refuse(write(tmp_path / name, content))
    assert message in said and str(tmp_path / name) in said and "\n" not in said


ROWS = [
    ([RIGHT[0], {"prompt": "a", "completion": None}], "row 1: `completion` is empty"),
    ([RIGHT[0], {"prompt": "a"}], "row 1: `completion` is empty"),
    ([*RIGHT, {"completion": "a"}, RIGHT[0], {"prompt": None, "completion": "a"}], "rows 4, 6: `prompt` is empty"),
    ([RIGHT[0], {"prompt": {"x": 1}, "completion": "a"}], "row 1: `prompt` must be text, not dict"),
    ([{"prompt": {"x": 1}, "completion": "a"}], "row 0: `prompt` must be text, not dict"),
    ([{"prompt": ["a"], "completion": "a"}], "row 0: `prompt` must be a list of messages"),
    ([{"prompt": "a", "completion": ["b"]}], "row 0: `completion` must be text, not list"),
    ([{"prompt": "a", "completion": [ANSWER]}], "row 0: `completion` must be text, not list"),
    ([{"prompt": [USER], "completion": []}], "must end with an assistant's message that answers a user's"),
    ([{"prompt": [], "completion": "a"}], "must end with an assistant's message that answers a user's"),
    ([{"prompt": [USER], "completion": [USER]}], "must end with an assistant's message that answers a user's"),
    ([{"prompt": [USER, ANSWER], "completion": "a"}], "must end with an assistant's message that answers a user's"),
    ([{"prompt": [SYSTEM], "completion": "a"}], "must end with an assistant's message that answers a user's"),
    ([{"prompt": [USER], "completion": "a"}, {"prompt": None, "completion": "a"}], "row 1: `prompt` is empty"),
    ([{"instruction": "a", "output": None}], "row 0: `output` is empty"),
    ([{"instruction": "a", "input": {"x": 1}, "output": "b"}], "row 0: `input` must be text, not dict"),
    ([{"messages": "hi"}], "row 0: `messages` must be a list of messages"),
    ([{"messages": ["hi", "ho"]}], "row 0: `messages` must be a list of messages"),
    ([{"messages": USER}], "row 0: `messages` must be a list of messages"),
    ([{"messages": None}], "row 0: `messages` must be a list of messages"),
    ([{"messages": [USER, None, ANSWER]}], "row 0: `messages` must be a list of messages"),
    ([CONVERSATION, {"messages": []}], "row 1: `messages` must end with an assistant's message"),
    ([CONVERSATION, {"messages": [USER, ANSWER, USER]}], "row 1: `messages` must end with an assistant's message"),
    ([CONVERSATION, {"messages": [ANSWER]}], "row 1: `messages` must end with an assistant's message"),
    ([CONVERSATION, {"messages": [SYSTEM, ANSWER]}], "row 1: `messages` must end with an assistant's message"),
    ([CONVERSATION, {"messages": [USER, ANSWER, ANSWER]}], "row 1: `messages` must end with an assistant's message"),
    ([CONVERSATION, {"messages": [{"content": "q"}, ANSWER]}], "row 1: a message of `messages` has content, and needs role"),
    ([{"messages": [{"role": "user"}, {"role": "assistant"}]}], "a message of `messages` has role, and needs role and content"),
    ([SHAREGPT, {"conversations": [{"from": "human", "value": "q"}]}], "row 1: `conversations` must end with an assistant's message"),
    ([{"conversations": [{"from": "me", "value": "q"}]}], "a message of `conversations` is from 'me', which is none of system, human"),
    ([{"conversations": [{"from": "function_call", "value": "f()"}]}], "a function_call of `conversations` must be JSON with name"),
    ([{"messages": [USER, {**ANSWER, "weight": 0.5}]}], "a message of `messages` has the weight 0.5, and can have 0 or 1"),
    ([{"messages": [USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]}], "a tool call of `messages` needs a function with name"),
    ([{"messages": [USER, {**ANSWER, "tool_calls": "f"}]}], "row 0: `tool_calls` must be a list, not str"),
    ([{"messages": [USER, {**ANSWER, "content": 1.50}]}], "row 0: `content` must be text, not float"),
    ([{**CONVERSATION, "tools": "none"}], "row 0: `tools` must be a list, not str"),
    ([{"messages": [{**USER, "role": "human"}, {**ANSWER, "role": "gpt"}]}], "has the role 'human', which is none of system, user"),
    ([{"messages": [{**USER, "role": None}, ANSWER]}], "has the role None, which is none of"),
    ([{"messages": [{**USER, "role": 1}, {**ANSWER, "role": 2}]}], "has the role 1, which is none of"),
    ([{"messages": [USER, {**ANSWER, "content": None}]}], "row 0: `content` is empty"),
    ([{"messages": [{**USER, "content": [{"type": "text", "text": "q"}]}, ANSWER]}], "row 0: `content` must be text, not list"),
    ([{"turns": [USER, ANSWER]}], "the columns turns are neither"),
    ([{"text": "a"}], "set question_key and answer_key to the columns with the question and its answer"),
]  # fmt: skip


@pytest.mark.parametrize("rows, message", ROWS, ids=[f"{json.dumps(c[0][-1])[:45]}-{c[1][:20]}" for c in ROWS])
def test_rows_that_cannot_be_read_are_named(tmp_path, rows, message):
    assert message in refuse(write(tmp_path / "train.jsonl", lines(*rows)))
    array = write(tmp_path / "array.json", json.dumps(rows))
    assert message in refuse(array)


def test_of_many_bad_rows_ten_are_named_and_each_fault_once(tmp_path):
    bad = [{"prompt": "a", "completion": None}] * 12 + [{"prompt": None, "completion": "a"}]
    said = refuse(write(tmp_path / "train.jsonl", lines(*RIGHT, *bad)))
    assert "rows 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 2 more: `completion` is empty; row 16: `prompt` is empty" in said


@pytest.mark.parametrize("cell", ["", "NaN", "nan"])
def test_a_missing_cell_of_a_csv_is_not_read_as_text(tmp_path, cell):
    assert "row 1: `prompt` is empty" in refuse(write(tmp_path / "train.csv", f"{COLUMNS}a,b\n{cell},c\n"))


def test_missing_and_binary_cells_of_a_parquet_are_not_read_as_text(tmp_path):
    rows = {"prompt": ["a", "b"], "completion": [1.0, float("nan")]}
    assert "row 1: `completion` is empty" in refuse(write(tmp_path / "train.parquet", parquet(*pd.DataFrame(rows).to_dict("records"))))  # fmt: skip
    content = parquet({"prompt": "a", "completion": b"b"})
    assert "row 0: `completion` must be text, not bytes" in refuse(write(tmp_path / "train.parquet", content))


def test_a_training_split_without_answers_is_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", lines(*RIGHT))
    with pytest.raises(InputError, match="no column `answer`; the columns are prompt, completion"):
        load_training_rows(ScriptArguments(dataset_name=str(path), question_key="prompt", answer_key="answer"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"question_key": "promt", "answer_key": "completion"},
            "no column `promt`; the columns are prompt, completion",
        ),
    ],
)
def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path, arguments, message):
    assert message in refuse(write(tmp_path / "train.jsonl", lines(*RIGHT)), **arguments)


@pytest.mark.parametrize(
    "split, message",
    [
        ("train[:0]", "the split `train[:0]` has no rows"),
        ("train[9:]", "the split `train[9:]` has no rows"),
        ("train[:200%]", "Percent slice boundaries"),
        ("train[", "could not load the split `train[`"),
        ("valid", "is one file, and all of it is the split `train`"),
        ("", "is one file, and all of it is the split `train`"),
    ],
)
def test_a_split_without_rows_is_said(tmp_path, split, message):
    path = write(tmp_path / "train.jsonl", lines(*RIGHT))
    with pytest.raises(InputError) as error:
        load_split(str(path), split)
    assert message in str(error.value)
    assert len(load_split(str(path), "train[:50%]")) == 2


def test_folders_and_links_that_lead_nowhere_are_said(tmp_path):
    write(tmp_path / "train.jsonl", lines(*RIGHT))
    assert len(load(tmp_path)) == 4
    write(tmp_path / "train.csv", f"{COLUMNS}a,b\n")
    assert "several files could be the split `train`: train.csv, train.jsonl" in refuse(tmp_path)
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).unlink()
    assert "no file for the split `train` (json, jsonl, csv or parquet); it holds nothing" in refuse(tmp_path)
    (tmp_path / "train.json").symlink_to("gone.json")
    assert "train.json: no such file or folder" in refuse(tmp_path / "train.json")
    assert "No such file or directory" in refuse(tmp_path)
    (tmp_path / "loop.json").symlink_to("loop.json")
    assert "loop.json: no such file or folder" in refuse(tmp_path / "loop.json")
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.json").mkdir()
    assert "Is a directory" in refuse(tmp_path)
    (tmp_path / "train.json").rmdir()
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "a.json", json.dumps(RIGHT))
    assert len(load(tmp_path)) == 4
    write(tmp_path / "train" / "b.csv", f"{COLUMNS}a,b\n")
    assert "several kinds of files for the split `train`" in refuse(tmp_path)
    assert "no such file or folder" in refuse(tmp_path / ("x" * 5000 + ".json"))


def test_a_fault_in_one_of_several_files_names_it(tmp_path):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "a.jsonl", lines(*RIGHT))
    write(tmp_path / "train" / "b.jsonl", lines(*RIGHT) + b"{")
    assert "b.jsonl, line 5 is not JSON" in refuse(tmp_path)
    write(tmp_path / "train" / "b.jsonl", lines(*RIGHT))
    assert len(load(tmp_path)) == 8


def test_what_may_not_be_read_is_said():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users altogether
        data = Path(name) / "data"
        data.mkdir()
        path = write(data / "train.jsonl", lines(*RIGHT))
        Path(name).chmod(0o755)
        user = os.geteuid()
        for closed in (data, path):
            closed.chmod(0)
            if user == 0:  # root reads everything
                os.seteuid(65534)
            try:
                for source in (data, path):
                    with pytest.raises(InputError, match="Permission denied|no such file or folder"):
                        load_split(str(source), "train")
            finally:
                os.seteuid(user)
            closed.chmod(0o755)


def test_a_file_that_was_compressed_and_is_replaced_is_read_anew(tmp_path):
    """The library keeps what it unpacked under the path alone."""
    path = write(tmp_path / "train.json", gzip.compress(lines(*RIGHT)))
    refuse(path)
    assert len(load(write(path, lines(*RIGHT[:2])))) == 2


# Right data, some of it unusual

ACCEPTED = [
    ("train.jsonl", lines(*RIGHT), "answer 0"),
    ("train.json", json.dumps(RIGHT), "answer 0"),
    ("train.json", json.dumps(RIGHT, indent=2), "answer 0"),
    ("train.json", "\n\n  " + json.dumps(RIGHT), "answer 0"),
    ("train.json", json.dumps(RIGHT[0], indent=2), "answer 0"),
    ("train.parquet", parquet(*RIGHT), "answer 0"),
    ("train.jsonl", b"\xef\xbb\xbf" + lines(*RIGHT), "answer 0"),
    ("train.json", b"\xef\xbb\xbf" + json.dumps(RIGHT).encode(), "answer 0"),
    ("train.csv", f"\ufeff{COLUMNS}질문,답\n", "답"),
    ("train.csv", f"{COLUMNS}a,b\r\nc,d\r\n", "b"),
    ("train.csv", f'{COLUMNS}"a, ""b""\n2","c\nd"\n', "c\nd"),
    ("train.csv", f"{COLUMNS}a,007\nb,1.10\n", "007"),
    ("train.csv", f"{COLUMNS}a,None\nb,NA\n", "None"),
    ("train.csv", f"{COLUMNS}a,TRUE\nb,false\n", "TRUE"),
    ("train.csv", "id,prompt,completion\n1,a,b\n", "b"),
    ("train.jsonl", lines({"prompt": 1, "completion": 2.5}), "2.5"),
    ("train.jsonl", lines({"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": "c"}), "b"),
    ("train.jsonl", lines({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c", "x": 3}), "b"),
    ("train.jsonl", b'{"prompt": "a", "completion": "\\ud83d\\ude00"}\n', "😀"),
    ("train.jsonl", b'{"prompt": "a", "completion": "\\\\ud800"}\n', "\\ud800"),
    ("train.jsonl", lines({"prompt": "a", "completion": "b\x00c"}), "b\x00c"),
    ("train.jsonl", lines({"prompt": "a", "completion": "b\ufffdc"}), "b\ufffdc"),
    ("train.jsonl", lines({"prompt": "a", "completion": "한 " * 350_000}), "한 " * 350_000),
    ("train.csv", f"{COLUMNS}a,{'x' * 1_000_000}\n", "x" * 1_000_000),
    ("train.jsonl", lines({"prompt": [USER], "completion": "b"}), "b"),
    ("train.jsonl", lines({"prompt": [USER], "completion": [ANSWER]}), "assistant"),
    ("train.jsonl", lines({"prompt": [SYSTEM, USER], "completion": [ANSWER, USER, {**ANSWER, "content": "z"}]}), "z"),
    ("train.jsonl", lines({"instruction": "a", "input": None, "output": "b"}), "b"),
    ("train.jsonl", lines({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}), "assistant"),
    ("train.jsonl", lines({"conversations": [USER, ANSWER]}), "assistant"),
    ("train.jsonl", lines({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}), "a"),
    ("train.jsonl", lines({"id": "1", "source": "s", "model": "m", "system_prompt": "s", **CONVERSATION}), "assistant"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, answer", ACCEPTED, ids=[f"{c[0]}-{c[2][:20]!r}" for c in ACCEPTED])
def test_right_data_is_read_as_it_stands(tmp_path, name, content, answer):
    assert load(write(tmp_path / name, content))[0][1] == answer


CELLS = {
    "1": ["1", "2.5"],  # what is written in a file, of which readers make numbers of one type
    "1.10": ["1.10", "-3", "1e5", "2.50E-3"],
    "large": ["9007199254740993", "0.5", str(10**20), str(10**40 + 1)],
    "truth": ["true", "false", "1"],
    "dates": ['"2024-01-01"', '"2024-01-01 10:00:00"', '"2024-01-01T10:00:00Z"'],
    "texts that look like values": ['"1.10"', '"null"', '"007"', '"{\\"a\\": 1}"', '"NaN"', "3"],
}


@pytest.mark.parametrize("written", CELLS.values(), ids=list(CELLS))
@pytest.mark.parametrize("form", ["lines", "array"])
def test_cells_of_json_are_read_as_they_are_written(tmp_path, written, form):
    rows = [f'{{"prompt": "question {i}", "completion": {cell}}}' for i, cell in enumerate(written)]
    text = "\n".join(rows) if form == "lines" else "[" + ",\n".join(rows) + "]"
    expected = [json.loads(cell) if cell.startswith('"') else cell for cell in written]
    assert [answer for _, answer in load(write(tmp_path / "train.json", text))] == expected


def test_numbers_and_times_of_a_parquet_are_read_as_they_are_stored(tmp_path):
    answers = {
        "int64": (pd.array([2**53 + 1, 3], dtype="Int64"), ["9007199254740993", "3"]),
        "float32": (pd.array([0.1, 2.5], dtype="float32"), ["0.1", "2.5"]),
        "times": (
            pd.to_datetime(["2024-01-01 10:00", "2024-01-02 00:00"]),
            ["2024-01-01 10:00:00", "2024-01-02 00:00:00"],
        ),
    }
    for name, (cells, expected) in answers.items():
        pd.DataFrame({"prompt": ["a", "b"], "completion": cells}).to_parquet(tmp_path / f"{name}.parquet")
        assert [answer for _, answer in load(tmp_path / f"{name}.parquet")] == expected
    missing = pd.DataFrame({"prompt": ["a", "b"], "completion": pd.array([1, None], dtype="Int64")})
    missing.to_parquet(tmp_path / "missing.parquet")
    assert "row 1: `completion` is empty" in refuse(tmp_path / "missing.parquet")


@pytest.mark.parametrize("missing", ["null", "NaN", None])
def test_a_missing_cell_beside_numbers_is_not_read_as_text(tmp_path, missing):
    rows = (
        '{"prompt": 1, "completion": 2}\n{"prompt": 3' + ("" if missing is None else f', "completion": {missing}') + "}"
    )
    assert "row 1: `completion` is empty" in refuse(write(tmp_path / "train.jsonl", rows))


def test_a_column_that_is_not_read_may_hold_anything(tmp_path):
    rows = [{**row, "meta": meta} for row, meta in zip(RIGHT, (1, "a", {"b": [None, 2]}, None), strict=True)]
    assert len(load(write(tmp_path / "train.jsonl", lines(*rows)))) == 4
    _, _, row_format = load_training_rows(ScriptArguments(dataset_name=str(tmp_path / "train.jsonl")))
    assert row_format.describe() == "prompt -> completion; not read: meta"


def test_a_completion_of_several_turns_loses_none_of_them(tmp_path):
    row = {"prompt": [USER], "completion": [ANSWER, USER, {**ANSWER, "content": "z"}]}
    assert load(write(tmp_path / "train.jsonl", lines(row))) == [([USER, ANSWER, USER], "z")]


@pytest.mark.parametrize(
    "prompt, completion, check, level",
    [
        ("", "a", "empty_rows", "refused"),
        ("a", " \n\t\u3000", "empty_rows", "refused"),
        ("a\ufffd", "b", "unreadable_text", "warning"),
        ("a", "b\x00", "unreadable_text", "warning"),
        ("a", "b", "rows", "ok"),
    ],
)
def test_rows_that_load_but_hold_nothing_are_found_before_training(tmp_path, prompt, completion, check, level):
    path = write(tmp_path / "train.jsonl", lines(*RIGHT, {"prompt": prompt, "completion": completion}))
    rows = load(path)
    (finding,) = check_rows([prompt[-1]["content"] for prompt, _ in rows], [answer for _, answer in rows])
    assert (finding.check, finding.level, finding.rows) == (check, level, [4] if level != "ok" else [])


# Generated


@pytest.mark.slow
@generated
@given(name=st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.parquet"]), content=st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(folder, name, content):
    assert refuse(write(folder / name, content))


@pytest.mark.slow
@generated
@given(name=st.sampled_from(["b.json", "b.jsonl", "b.csv"]), text=st.text('{}[]",:\\un0\n prompt', max_size=60))
def test_any_text_is_refused_in_words(folder, name, text):
    assert refuse(write(folder / name, text))


FORMS = {"c.jsonl": lines(*RIGHT), "c.json": json.dumps([CONVERSATION] * 3).encode(),
         "c.csv": f'{COLUMNS}a,b\n"c","d,e"\n'.encode(), "c.parquet": parquet(*RIGHT)}  # fmt: skip


@pytest.mark.slow
@generated
@given(name=st.sampled_from(sorted(FORMS)), place=st.floats(0, 1), lost=st.integers(0, 8), added=st.binary(max_size=3))
def test_any_damage_to_right_data_is_read_or_refused_in_words(folder, name, place, lost, added):
    start = int(place * len(FORMS[name]))
    path = write(folder / name, FORMS[name][:start] + added + FORMS[name][start + lost :])
    try:
        load(path)
    except InputError:
        assert refuse(path)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
any_rows = st.lists(
    st.fixed_dictionaries({}, optional={"prompt": values, "completion": values}), min_size=1, max_size=4
)


@pytest.mark.slow
@generated
@given(rows=any_rows)
def test_any_types_of_values_are_read_as_text_or_refused_in_words(folder, rows):
    path = write(folder / "d.json", json.dumps([RIGHT[0], *rows]))
    try:
        loaded = load(path)
    except InputError:
        assert refuse(path)
    else:
        assert all(isinstance(text, str) for prompt, answer in loaded for text in (prompt[-1]["content"], answer))


message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from([*ROLES, "human", None]), "content": st.none() | st.text(max_size=3)}
)


@settings(generated, max_examples=200)
@given(messages=st.lists(message, max_size=4))
def test_messages_are_read_exactly_where_they_end_with_an_answer_to_a_user(messages):
    whole = all(m.get("role") in ROLES and m.get("content") is not None for m in messages)
    ends = [m.get("role") for m in messages[-2:]] in (["user", "assistant"], ["tool", "assistant"])
    row, row_format = {"messages": messages}, find_row_format(["messages"])
    if whole and ends:
        assert to_sample(row, row_format) == {"prompt": messages[:-1], "references": [messages[-1]["content"]]}
    else:
        with pytest.raises(InputError):
            to_sample(row, row_format)


# Through step 1

LONG = [{"prompt": "a long question " * 200, "completion": "b"} for _ in range(4)]
STEP_1 = [
    ("train.csv", f"{COLUMNS}안녕,네\n".encode("cp949"), "train.csv, line 2: not UTF-8"),
    ("train.json", b"null", "holds no rows of JSON"),
    ("train.jsonl", lines(*RIGHT[:2], {"prompt": "a"}), "row 2: `completion` is empty"),
    ("train.json", json.dumps([{"messages": [{**USER, "role": "human"}, ANSWER]}]), "has the role 'human'"),
    ("train.parquet", b"this is no parquet", "Parquet magic bytes not found"),
    ("train.jsonl", lines(*RIGHT, {"prompt": "a", "completion": " "}), "1 row with an empty question or answer"),
    ("train.jsonl", lines(*LONG), "refused before the first step"),
]


def check_refusal(status: int, printed: str, said: str, run_dir: Path) -> None:
    assert status == 2, printed
    assert "Traceback" not in printed and printed.count("error: ") == 1 and said in printed.partition("error: ")[2]
    assert not (run_dir / "run.json").exists() and not list(run_dir.glob("checkpoint*"))


def arguments_of_step_1(path: Path, run_dir: Path) -> list[str]:
    budget = ["--max_steps", "1", "--max_length", "128", "--eval_strategy", "no", "--dataset_test_split", "train[:1]"]
    return ["--config", CONFIG, "--dataset_name", str(path), "--output_dir", str(run_dir), *budget]


@pytest.mark.slow
@pytest.mark.parametrize("name, content, said", STEP_1, ids=[case[2] for case in STEP_1])
def test_step_1_refuses_broken_data_before_a_run_begins(tmp_path, name, content, said):
    run_dir = tmp_path / "run"
    status, printed = run_step(
        TRAIN, tmp_path / "printed", *arguments_of_step_1(write(tmp_path / name, content), run_dir)
    )
    check_refusal(status, printed, said, run_dir)


@pytest.mark.slow
def test_step_1_refuses_broken_data_from_a_shell(tmp_path):
    path = write(tmp_path / "train.jsonl", lines(*RIGHT) + b"{oops}\n")
    result = run(command("1_train_full_fine_tuning.py", *arguments_of_step_1(path, tmp_path / "run")), check=False)
    check_refusal(result.returncode, result.stdout + result.stderr, "train.jsonl, line 5 is not JSON", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_step_1_takes_the_right_data(tmp_path):
    rows = [{"prompt": f"What is the number {i}?", "completion": f"It is {i}."} for i in range(40)]
    rows[0]["prompt"] += "<|im_end|>"  # the only row of the test split
    arguments = arguments_of_step_1(write(tmp_path / "train.jsonl", lines(*rows)), tmp_path / "run")
    arguments += ["--preflight_only", "true", "--dataset_train_split", "train[1:]"]
    status, printed = run_step(TRAIN, tmp_path / "printed", *arguments)
    assert status == 0 and "nothing is trained" in printed, printed
    assert "control_tokens: in the questions of the test split, 1 row (100.0 %) with control tokens" in printed
