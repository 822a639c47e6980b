"""Files of a run that were cut, edited or copied badly: each fault is one line that names the file and the line or key."""

import json
import os
import re
import shutil

import pytest
from conftest import ROOT
from large_run import write_run

from finetuning import schemas
from finetuning.errors import InputError
from finetuning.report.__main__ import ScoreArguments, main
from finetuning.report.opinions import load_opinions
from finetuning.report.page import read_preflight
from finetuning.report.samples import load_samples, load_training_log
from finetuning.report.verdict import decide
from finetuning.results import RowFile, read_rows
from finetuning.runs import find_run, read_run, to_json

ROWS = "predictions/checkpoint-1.jsonl"
JUDGED = "qa_evaluation_results/checkpoint-1.jsonl"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    run_dir = write_run(tmp_path_factory.mktemp("whole") / "run", 4, ["base", "checkpoint-1"])
    preflight = {"findings": [{"level": "ok", "check": "c", "text": "t", "rows": [0]}], "preview": []}
    (run_dir / "preflight.json").write_text(json.dumps(preflight))
    (run_dir / "checkpoint-1").mkdir()
    (run_dir / "checkpoint-1/trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": NaN}]}')
    return run_dir


@pytest.fixture
def run_dir(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "run")


def change(run_dir, file, **changes):
    """Change keys of a JSON file, or of the second row; None deletes one."""
    path = run_dir / file
    lines = path.read_text().splitlines() if file.endswith(".jsonl") else [path.read_text()]
    content = json.loads(lines[1 if len(lines) > 1 else 0])
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = content
        for parent in parents:
            node = node[parent]
        node[last] = value
        if value is None:
            del node[last]
    lines[1 if len(lines) > 1 else 0] = json.dumps(content)
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    "line, fault",
    [
        (b"{}", "has no `id`"),
        (b"[]", "valid dictionary"),
        (b'{"id": "cut', "is no JSON"),
        (b"\xff\x00\xfe\x9c", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
    ],
    ids=["empty", "list", "cut", "binary", "nested"],
)
@pytest.mark.parametrize("file", [ROWS, JUDGED])
def test_a_line_that_is_no_row_is_named(run_dir, file, line, fault):
    path = run_dir / file
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:], b""]))
    with pytest.raises(InputError, match=rf"{file}:2 .*{fault}"):
        load_samples(run_dir)


@pytest.mark.parametrize(
    "file, key, value",
    [
        (ROWS, "references", 5),
        (ROWS, "references", [None]),
        (ROWS, "prediction", 3),
        (ROWS, "prediction", "half \ud800"),
        (ROWS, "messages", ["text"]),
        (ROWS, "finish_reason", "ended"),
        (ROWS, "num_new_tokens", "7"),
        (ROWS, "num_new_tokens", float("nan")),
        (ROWS, "id", None),
        (JUDGED, "evaluation", [1]),
        (JUDGED, "evaluation__relevance__score", "7"),
        (JUDGED, "evaluation__relevance__score", 11),
        (JUDGED, "evaluation__relevance__score", float("nan")),
        (JUDGED, "evaluation__relevance__explanation", 1),
        (JUDGED, "evaluation__relevance__explanation", None),
        (JUDGED, "cost", float("inf")),
        (JUDGED, "status", "fine"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named(run_dir, file, key, value):
    change(run_dir, file, **{key: value})
    with pytest.raises(InputError, match=rf"{file}:2 .*`{re.escape(key.replace('__', '.'))}") as error:
        load_samples(run_dir)
    assert "\n" not in str(error.value) and str(error.value).isascii()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, changes, fault",
    [
        ("predictions/base.json", {"seconds": None}, "has no `seconds`"),
        ("predictions/base.json", {"metrics__per_sample": {"id": ["0"], "rouge1": []}}, "not equally long"),
        ("predictions/base.json", {"metrics__per_sample__rouge1": ["1", 0, 0, 0]}, "per_sample.rouge1` holds"),
        ("predictions/base.json", {"metrics__per_sample": {}}, "no list of ids"),
        ("qa_evaluation_results/base.json", {"identity__criteria": None}, "has no `identity.criteria`"),
        ("run.json", {"hardware": None}, "has no `hardware`"),
        ("run.json", {"config__model_name_or_path": 7}, "`config.model_name_or_path`: .*valid string"),
        ("preflight.json", {"findings": [{}]}, "has no `findings.0.level`"),
        ("checkpoint-1/trainer_state.json", {"log_history": [{"loss": 1}]}, "has no `log_history.0.step`"),
    ],
)
def test_a_record_of_a_wrong_kind_is_named(run_dir, file, changes, fault):
    change(run_dir, file, **changes)
    with pytest.raises(InputError, match=rf"{file} .*{fault}"):
        main(ScoreArguments(output_dir=[str(run_dir)]))


FILES = ["predictions/base.json", "qa_evaluation_results/base.json", "run.json", "preflight.json", "checkpoint-1/trainer_state.json"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_record_that_was_cut_is_named(run_dir, file):
    content = json.dumps(json.loads((run_dir / file).read_text()), indent=1)
    (run_dir / file).write_text(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{file}:\d+ is no JSON"):
        main(ScoreArguments(output_dir=[str(run_dir)]))


def read_all(run_dir):
    samples = load_samples(run_dir)
    load_opinions([run_dir], samples)
    read_preflight(run_dir)
    load_training_log(run_dir)


def damage(path, kind):
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")


@pytest.mark.parametrize(
    "file, kind",
    [
        (ROWS, "folder"),
        (ROWS, "pipe"),
        (JUDGED, "loop"),
        ("predictions/base.json", "pipe"),
        ("preflight.json", "endless"),
        ("checkpoint-1/trainer_state.json", "folder"),
        ("qa_evaluation_results/human_agreement.json", "pipe"),
        ("qa_evaluation_results/pairs/base--checkpoint-1.jsonl", "folder"),
    ],
)
def test_what_has_the_name_of_a_file_and_is_none_is_named(run_dir, file, kind):
    damage(run_dir / file, kind)
    if "pairs" in file:
        (run_dir / file).with_suffix(".json").write_text(
            '{"identity": {"judge_model": "m", "models": ["base", "checkpoint-1"]}}'
        )
    with pytest.raises(InputError, match=f"{file} is no file"):
        read_all(run_dir)
    assert find_run(str(run_dir)) == run_dir
    damage(run_dir / "run.json", kind)
    with pytest.raises(InputError, match="run.json is no file"):
        find_run(str(run_dir))


def test_rows_are_not_looked_for_in_a_file(run_dir):
    shutil.rmtree(run_dir / "qa_evaluation_results")
    (run_dir / "qa_evaluation_results").write_text("")
    with pytest.raises(InputError, match="qa_evaluation_results is no folder"):
        load_samples(run_dir)


SENT = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    "file, changes, fault",
    [
        (ROWS, {"messages": [{"role": "user"}]}, "`messages.0.content`"),
        (ROWS, {"messages": [{**SENT, "content": 5}]}, "`messages.0.content`"),
        (ROWS, {"messages": [SENT, {**SENT, "content": [{"type": "text", "text": "?"}]}]}, "`messages.1.content`"),
        (ROWS, {"num_new_tokens": 10**400}, "`num_new_tokens`"),
        (ROWS, {"num_new_tokens": -1}, "`num_new_tokens`"),
        (ROWS, {"removed_tokens": {"x": 10**30}}, "`removed_tokens.x`"),
        (JUDGED, {"usage": {"prompt_tokens": 10**30}}, "`usage.prompt_tokens`"),
        (JUDGED, {"cost": 1e308}, "`cost`"),
        (JUDGED, {"expected": {"relevance": 1e308}}, "`expected.relevance`"),
        (ROWS, {"references": ["other"]}, "sample 000000000001 has not the question and references"),
        ("predictions/base.json", {"seconds": -1}, "`seconds`"),
        ("predictions/base.json", {"metrics__per_sample__rouge1": [1e308, 0, 0, 0]}, "per_sample.rouge1` holds"),
        ("predictions/base.json", {"metrics__per_sample__rouge1": [float("nan"), 0, 0, 0]}, "per_sample.rouge1` holds"),
        ("predictions/base.json", {"metrics__per_sample__id": ["1"] * 4}, "names a sample twice"),
        ("predictions/base.json", {"metrics__per_sample__rouge1": [3.5, 0, 0, 0]}, "per_sample.rouge1` holds"),
        (
            "predictions/base.json",
            {"metrics__per_sample__length_ratio": [-1, 0, 0, 0]},
            "per_sample.length_ratio` holds",
        ),
        ("predictions/base.json", {"metrics__rouge_tokenizer": "a\nb"}, "`metrics.rouge_tokenizer`"),
        ("predictions/base.json", {"metrics__num_errors": -1}, "`metrics.num_errors`"),
        (JUDGED, {"expected": {"relevance": 11}}, "`expected.relevance`"),
        ("checkpoint-1/trainer_state.json", {"log_history": [{"step": 1, "loss": "1"}]}, "`log_history.0.loss`"),
        ("checkpoint-1/trainer_state.json", {"log_history": [{"step": 10**30}]}, "`log_history.0.step`"),
    ],
)
def test_texts_and_numbers_that_nothing_can_be_made_of_are_named(run_dir, file, changes, fault):
    change(run_dir, file, **changes)
    with pytest.raises(InputError, match=f"{file}.*{fault}"):
        read_all(run_dir)


def test_a_model_whose_answers_are_gone_is_named(run_dir):
    (run_dir / ROWS).unlink()
    with pytest.raises(InputError, match="checkpoint-1.json has no checkpoint-1.jsonl beside it"):
        load_samples(run_dir)


def test_a_measure_that_was_not_taken_is_missing_and_no_fault(run_dir):
    change(run_dir, "predictions/base.json", metrics__per_sample__rouge1=None)
    samples = load_samples(run_dir)
    assert samples[samples["model"] == "base"]["rouge1"].isna().all() and samples["rouge1"].notna().any()
    change(run_dir, "predictions/checkpoint-1.json", metrics__per_sample__rouge1=None)
    assert decide(load_samples(run_dir)).measure == "overall"


def test_a_sample_that_has_two_predictions_is_named(run_dir):
    path = run_dir / ROWS
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match=rf"{ROWS}:5 is the second row of sample 000000000001, after line 2"):
        load_samples(run_dir)


def test_an_evaluation_under_other_criteria_is_named(run_dir):
    change(run_dir, JUDGED, evaluation__relevance=None)
    with pytest.raises(InputError, match=f"{JUDGED}: the evaluation of 000000000001 has not the criteria"):
        load_samples(run_dir)


def test_line_ends_and_byte_order_marks_of_other_systems_are_read(run_dir):
    expected = load_samples(run_dir)
    for file in (ROWS, JUDGED):
        content = (run_dir / file).read_bytes()
        (run_dir / file).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n")
    assert load_samples(run_dir).equals(expected)
    for file in FILES:
        (run_dir / file).write_bytes(b"\xef\xbb\xbf" + (run_dir / file).read_bytes())
    assert read_run(run_dir)["config"]["model_name_or_path"] == "demo/model"


def test_numbers_stay_as_they_are_written_and_no_number_is_null(tmp_path):
    row = read_rows(write_run(tmp_path / "run", 1, ["base"]) / "qa_evaluation_results/base.jsonl")[0]
    row["evaluation"]["relevance"]["score"], row["cost"] = 7, 0
    checked = schemas.check(row, schemas.EVALUATION, "", "")
    assert to_json(checked, sort_keys=True) == to_json(row, sort_keys=True)
    file = RowFile(tmp_path / "m.jsonl", {})
    file.append({"id": "0", "expected": {"relevance": float("nan")}, "cost": float("inf")})
    file.close()
    assert read_rows(tmp_path / "m.jsonl") == [{"id": "0", "expected": {"relevance": None}, "cost": None}]


def test_the_documented_rows_are_those_that_are_checked():
    text = (ROOT / "docs/design.md").read_text()
    for name, row in (("prediction", schemas.PredictionRow), ("evaluation", schemas.EvaluationRow)):
        described = re.search(rf"^    {name}   (.*(\n {{17}}.*)*)", text, re.MULTILINE)[1]
        keys = re.findall(r"(?:^|,)\s*(\w+)", re.sub(r"\{.*?\}+|\[.*?\]", "", described))
        assert sorted(keys) == sorted(row.__annotations__)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_name": None}, "has no `config.dataset_name`"),
        ({"dataset_test_split": None}, "has no `config.dataset_test_split`"),
        ({"question_key": "dialogue"}, "one of `question_key` and `answer_key` without the other"),
        ({"question_key": ["a"], "answer_key": "b"}, "`config.question_key`"),
        ({"system_prompt": 5}, "`config.system_prompt`"),
        ({"clean_jamo": "yes"}, "`config.clean_jamo`"),
        ({"model_revision": 5}, "`config.model_revision`"),
    ],
)
def test_a_run_that_says_not_how_it_is_tested_is_named(run_dir, changes, said):
    change(run_dir, "run.json", **{f"config__{key}": value for key, value in changes.items()})
    with pytest.raises(InputError, match=rf"run\.json .*{said}.*written by 1_train"):
        read_run(run_dir)


def test_a_run_without_its_chat_template_is_named(run_dir):
    content = json.loads((run_dir / "run.json").read_text())
    del content["chat_template"]
    (run_dir / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="run.json has no `chat_template`"):
        read_run(run_dir)


def test_what_step_3_goes_on_from_is_checked(run_dir):
    path = run_dir / ROWS
    info = json.loads(path.with_suffix(".json").read_text())
    part = path.parent / "parts" / f"{path.stem}.1.jsonl"
    part.parent.mkdir()
    part.write_text("{}\n")
    part.with_suffix(".json").write_text(json.dumps({"identity": info["identity"]}))
    with RowFile(path, info["identity"]) as file, pytest.raises(InputError, match=rf"{part.name}:1 has no `id`"):
        file.absorb()
    path.with_suffix(".json").write_text(json.dumps({**info, "seconds": "x"}))
    with pytest.raises(InputError, match="`seconds`"):
        RowFile(path, info["identity"])
