import json

import pandas as pd
import pytest
from datasets import load_dataset

from finetuning.config.arguments import ScriptArguments
from finetuning.data.files import load_split
from finetuning.data.row_format import find_row_format, format_of
from finetuning.data.rows import to_sample, to_training_row
from finetuning.data.samples import load_test_samples
from finetuning.data.training_rows import load_training_rows
from finetuning.errors import InputError

ROWS = [{"dialogue": f"#Person1#: 안녕 {i}", "summary": f"요약 {i}"} for i in range(10)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train_dataset.json", "train.csv", "train-00000-of-00001.parquet"])
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_local_data_is_read_in_every_form(tmp_path, name, as_folder):
    path = write(tmp_path / name, ROWS)
    source = tmp_path if as_folder else path
    assert list(load_split(str(source), "train")) == ROWS
    assert list(load_split(str(source), "train[-3:]")) == ROWS[-3:]
    with pytest.raises(
        InputError, match="no file for the split `test`" if as_folder else "all of it is the split `train`"
    ):
        load_split(str(source), "test")


def test_files_that_merely_look_like_the_split_are_not_read(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train_old.json", ROWS)
    write(tmp_path / "train-small.csv", ROWS)
    assert len(load_split(str(tmp_path), "train")) == len(ROWS)
    write(tmp_path / "train_dataset.json", ROWS)
    with pytest.raises(InputError, match="several files could be the split `train`: train.jsonl, train_dataset.json"):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize(
    "row, prompt, references",
    [
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            [{"role": "user", "content": "Q"}],
            ["A"],
        ),
        ({"prompt": "Q", "completion": "A"}, [{"role": "user", "content": "Q"}], ["A"]),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
            [{"role": "user", "content": "Q"}],
            ["A"],
        ),
        ({"instruction": "I", "input": "X", "output": "A"}, [{"role": "user", "content": "I\n\nX"}], ["A"]),
        ({"instruction": "I", "input": "", "output": "A"}, [{"role": "user", "content": "I"}], ["A"]),
        ({"instruction": "I", "output": 42}, [{"role": "user", "content": "I"}], ["42"]),
    ],
)
def test_rows_are_recognised_by_their_columns(row, prompt, references):
    assert to_sample(row, find_row_format(list(row))) == {"prompt": prompt, "references": references}


def test_two_columns_can_be_named_and_numbered_ones_are_several_references():
    row = {"dialogue": "D", "summary1": "A", "summary2": "B", "summary10": "C", "topic1": "T"}
    row_format = find_row_format(list(row), "dialogue", "summary")
    assert row_format.reference_keys == ("summary1", "summary2", "summary10")
    assert to_sample(row, row_format)["references"] == ["A", "B", "C"]


def test_system_prompt_goes_in_front_of_rows_that_have_none():
    own = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}
    none = {"messages": own["messages"][1:]}
    row_format = find_row_format(["messages"], system_prompt="Be brief.")
    assert to_sample(own, row_format)["prompt"][0]["content"] == "system"
    assert to_sample(none, row_format)["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_earlier_turns_belong_to_the_prompt():
    row = {
        "messages": [{"role": r, "content": str(i)} for i, r in enumerate(["user", "assistant", "user", "assistant"])]
    }
    sample = to_sample(row, find_row_format(["messages"]))
    assert [m["content"] for m in sample["prompt"]] == ["0", "1", "2"] and sample["references"] == ["3"]


@pytest.mark.parametrize(
    "rows, arguments, message",
    [
        (ROWS, {}, "set question_key and answer_key"),
        (ROWS, {"question_key": "dialog", "answer_key": "summary"}, "no column `dialog`; the columns are dialogue, summary"),
        ([*ROWS, {"dialogue": None, "summary": "x"}], {"question_key": "dialogue", "answer_key": "summary"}, "row 10: `dialogue` is empty"),
        ([{"messages": [{"role": "user", "content": "Q"}]}], {}, "row 0: `messages` must end with an assistant's"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, rows, arguments, message):
    path = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        load_training_rows(ScriptArguments(dataset_name=str(path), **arguments))


@pytest.mark.parametrize(
    "rows, arguments",
    [
        ([{"fname": "a", "dialogue": "Q"}], {"question_key": "dialogue", "answer_key": "summary"}),
        ([{"messages": [{"role": "user", "content": "Q"}]}], {}),
        ([{"conversations": [{"from": "human", "value": "Q"}]}], {}),
        ([{"prompt": "Q"}], {}),
        ([{"prompt": [{"role": "user", "content": "Q"}]}], {}),
        ([{"instruction": "Q"}], {}),
    ],
)
def test_a_test_split_may_have_no_answers(tmp_path, rows, arguments):
    path = write(tmp_path / "test.jsonl", rows)
    samples = load_test_samples({"dataset_name": str(path), "dataset_test_split": "train", **arguments})
    assert not samples.have_references
    assert (samples[0]["prompt"], samples[0]["references"]) == ([{"role": "user", "content": "Q"}], [])


def test_conversations_of_a_test_split_all_end_alike(tmp_path):
    asked, answered = (
        {"messages": [{"role": role, "content": "x"} for role in roles]} for roles in (["user"], ["user", "assistant"])
    )
    path = write(tmp_path / "test.jsonl", [asked, answered])
    with pytest.raises(InputError, match="row 1: `messages` must end with a user's message, as in the first row"):
        load_test_samples({"dataset_name": str(path), "dataset_test_split": "train"})


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("{}/none.json", "train", "no such file"),
        ("{}", "valid", "no file for the split `valid`.*it holds notes.txt, train.jsonl"),
        ("{}/notes.txt", "train", "cannot read .txt files"),
        ("{}/train.jsonl", "train[oops]", "could not load the split"),
        ("someone/some-dataset", "train", "neither a local path nor a dataset that could be fetched"),
    ],
)
def test_missing_data_says_what_was_looked_for(tmp_path, name, split, message):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(InputError, match=message):
        load_split(name.format(tmp_path), split)


def test_ids_of_samples_do_not_depend_on_their_order_and_duplicates_count_once(tmp_path):
    config = {
        "dataset_name": str(tmp_path),
        "dataset_test_split": "test",
        "question_key": "dialogue",
        "answer_key": "summary",
    }
    write(tmp_path / "test.jsonl", ROWS)
    samples = load_test_samples(config)
    write(tmp_path / "test.jsonl", [*reversed(ROWS), ROWS[0]])
    assert list(load_test_samples(config)) == list(samples)
    assert len({sample["id"] for sample in samples}) == len(ROWS)


def test_rows_that_ask_the_same_are_one_sample_with_several_references(tmp_path):
    config = {
        "dataset_name": str(tmp_path),
        "dataset_test_split": "test",
        "question_key": "dialogue",
        "answer_key": "summary",
    }
    write(tmp_path / "test.jsonl", [{"dialogue": "D", "summary": s} for s in ("A", "B", "A")])
    (sample,) = load_test_samples(config)
    assert sample["references"] == ["A", "B"]


def test_an_edited_file_is_read_anew(tmp_path):
    arguments = ScriptArguments(dataset_name=str(tmp_path), question_key="dialogue", answer_key="summary")
    write(tmp_path / "train.jsonl", ROWS)
    first, _, _ = load_training_rows(arguments)
    write(tmp_path / "train.jsonl", [{"dialogue": "new", "summary": "neu"}])
    second, _, _ = load_training_rows(arguments)
    assert len(first) == 10 and second["completion"] == [[{"role": "assistant", "content": "neu"}]]


def sentence(number: int) -> str:
    return " ".join(f"word{number}x{i}" for i in range(40))


def test_drop_leaks_leaves_out_what_held_out_samples_ask_and_nothing_else(tmp_path, capsys):
    rows = [{"dialogue": sentence(number), "summary": f"summary {number}"} for number in range(6)]
    write(tmp_path / "train.jsonl", rows)
    near = {"dialogue": sentence(2) + " and an end", "summary": "near"}
    write(tmp_path / "dev.jsonl", [{**rows[4], "summary": "other"}, {"dialogue": sentence(7), "summary": "s"}])
    write(tmp_path / "test.jsonl", [rows[0], near, {"dialogue": sentence(7).upper() + "!", "summary": "t"}])
    asked = {"dataset_eval_split": "dev", "question_key": "dialogue", "answer_key": "summary"}
    train, validation, _ = load_training_rows(ScriptArguments(dataset_name=str(tmp_path), drop_leaks=True, **asked))
    assert [row["completion"][0]["content"] for row in train] == ["summary 1", "summary 3", "summary 5"]
    assert validation["completion"][0][0]["content"] == "other" and len(validation) == 1
    printed = capsys.readouterr().out
    assert (
        "1 of 2 rows for validation are left out, as a held-out sample equals (1) or nearly equals (0) them: 1."
        in printed
    )
    assert (
        "3 of 6 rows for training are left out, as a held-out sample equals (2) or nearly equals (1) them: 0, 2, 4."
        in printed
    )
    whole, _, _ = load_training_rows(ScriptArguments(dataset_name=str(tmp_path), **asked))
    assert len(whole) == 6


def test_drop_leaks_says_so_where_nothing_leaks_or_nothing_is_left(tmp_path, capsys):
    write(tmp_path / "train.jsonl", [{"dialogue": sentence(number), "summary": "s"} for number in range(2)])
    asked = {"dataset_name": str(tmp_path), "question_key": "dialogue", "answer_key": "summary", "drop_leaks": True}
    with pytest.raises(InputError, match="test"):
        load_training_rows(ScriptArguments(**asked))
    write(tmp_path / "test.jsonl", [{"dialogue": sentence(3), "summary": "s"}])
    assert len(load_training_rows(ScriptArguments(**asked))[0]) == 2
    assert "no training row equals or nearly equals a held-out sample" in capsys.readouterr().out
    with pytest.raises(InputError, match="every training row equals"):
        load_training_rows(ScriptArguments(dataset_test_split="train", **asked))


CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "서울", "days": 10**17 + 1}},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "reasoning_content": "I look it up.", "tool_calls": [CALL]},
    {"role": "tool", "content": "no", "tool_call_id": "c1", "name": "weather"},
    {"role": "assistant", "content": "No rain."},
]


def read_both_ways(path, **arguments):
    """A row as training gets it, and as testing does."""
    (row,), _, _ = load_training_rows(ScriptArguments(dataset_name=str(path), **arguments))
    (sample,) = load_test_samples({"dataset_name": str(path), "dataset_test_split": "train", **arguments})
    return row, sample


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_tool_calls_and_reasoning_stay_with_their_messages(tmp_path, name):
    other = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "tools": None}
    path = write(tmp_path / name, [{"messages": ASKED, "tools": [TOOL]}, other])
    (row, second), _, _ = load_training_rows(ScriptArguments(dataset_name=str(path)))
    assert json.loads(row["conversation"]) == {"messages": ASKED, "tools": [TOOL]}
    assert row["learned"] == [2, 4]
    assert (
        row["prompt"][2]["content"] == '{"name": "weather", "arguments": {"city": "서울", "days": 100000000000000001}}'
    )
    assert second["conversation"] is None and second["learned"] == [1]


def test_testing_gets_the_tools_and_the_calls_of_a_conversation(tmp_path):
    _, sample = read_both_ways(write(tmp_path / "train.jsonl", [{"messages": ASKED, "tools": json.dumps([TOOL])}]))
    assert sample["prompt"] == ASKED[:-1] and sample["tools"] == [TOOL] and sample["references"] == ["No rain."]
    row, sample = read_both_ways(write(tmp_path / "train.jsonl", [{"messages": ASKED[:3]}]))
    assert sample["references"] == ['{"name": "weather", "arguments": {"city": "서울", "days": 100000000000000001}}']
    assert row["completion"] == [{"role": "assistant", "content": sample["references"][0]}] and "tools" not in sample


def test_keys_that_parquet_gives_to_all_messages_are_taken_off_again(tmp_path):
    call = {"function": {"name": "clock", "arguments": {"zone": "KST"}}}
    calls = [{**ASKED[2], "tool_calls": [CALL, call]}, *ASKED[3:]]
    path = write(tmp_path / "train.parquet", [{"messages": [*ASKED[:2], *calls], "tools": [TOOL]}])
    _, sample = read_both_ways(path)
    assert sample["prompt"][2]["tool_calls"] == [CALL, {"type": "function", **call}]
    assert list(sample["prompt"][1]) == ["role", "content"]


def test_personal_data_is_masked_in_the_arguments_of_tool_calls_too(tmp_path):
    call = {"function": {"name": "dial", "arguments": json.dumps({"number": "010-1234-5678"})}}
    messages = [{"role": "user", "content": "Call"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row, _ = read_both_ways(write(tmp_path / "train.jsonl", [{"messages": messages}]), mask_pii=True)
    assert "010-1234" not in str(row) and '"number": "#PhoneNumber#"' in row["completion"][0]["content"]


def test_share_gpt_conversations_are_read_as_messages(tmp_path):
    turns = [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Seoul"}}'},
        {"from": "observation", "value": "no"}, {"from": "gpt", "value": "No rain."},
    ]  # fmt: skip
    tools = json.dumps([{"name": "weather", "parameters": {}}])
    row, sample = read_both_ways(write(tmp_path / "train.jsonl", [{"conversations": turns, "tools": tools}]))
    assert [message["role"] for message in sample["prompt"]] == ["system", "user", "assistant", "tool"]
    assert sample["prompt"][2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Seoul"}}
    assert sample["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert row["learned"] == [2, 4] and sample["references"] == ["No rain."]


U, A, S, T = ({"role": role, "content": role} for role in ("user", "assistant", "system", "tool"))


@pytest.mark.parametrize(
    "row, arguments, learned",
    [
        ({"messages": [U, A, U, A]}, {}, [1, 3]),
        ({"messages": [U, A, U, A]}, {"mask_history": True}, [3]),
        ({"messages": [U, A, U, A]}, {"system_prompt": "Be brief."}, [2, 4]),
        ({"messages": [S, U, {**A, "weight": 0}, T, {**A, "weight": 1}]}, {}, [4]),
        ({"messages": [U, A, U, {**A, "weight": 0}]}, {}, [1]),
        ({"messages": [A, U, A]}, {}, [2]),  # a greeting answers nothing
        ({"prompt": [U, A, U], "completion": [A]}, {}, [3]),  # of a prompt nothing is learned
        ({"prompt": [U, A, U], "completion": [A, U, A]}, {}, [3, 5]),
        ({"prompt": [U], "completion": [A, U, A]}, {"mask_history": True}, [3]),
        ({"instruction": "I", "output": "A"}, {}, [1]),
    ],
)
def test_every_answer_is_learned_that_the_data_gives_to_learn(row, arguments, learned):
    assert to_training_row(row, find_row_format(list(row), **arguments))["learned"] == learned


def test_mask_history_is_refused_where_no_row_has_a_history():
    with pytest.raises(InputError, match="mask_history has no effect"):
        find_row_format(["instruction", "output"], mask_history=True)
    with pytest.raises(ValueError, match="mask_history has no effect with question_key"):
        ScriptArguments(dataset_name="d", question_key="q", answer_key="a", mask_history=True)


@pytest.mark.parametrize("answers", [[1, 2.5], ["2024-01-01 10:00:00"] * 2, ["1.10", {"a": 1}]], ids=str)
def test_values_that_datasets_has_changed_are_refused_by_column(tmp_path, answers):
    """As it does for files of JSON on the Hub."""
    path = write(tmp_path / "train.jsonl", [{"prompt": "Q", "completion": answer} for answer in answers])
    dataset = load_dataset("json", data_files=str(path), split="train")
    with pytest.raises(InputError, match="hub: `datasets` has read the column `completion` of JSON files as"):
        format_of(dataset, "hub", {})
    text = write(tmp_path / "text.jsonl", [{"prompt": "Q", "completion": "A", "score": 2.5}] * 2)
    assert format_of(load_dataset("json", data_files=str(text), split="train"), "hub", {}).unused == ("score",)
