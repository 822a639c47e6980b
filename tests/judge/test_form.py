"""What the judge is asked: criteria of ones own, and answers as data."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make_run
from judge_runs import ANSWERS, evaluations, judge
from judge_servers import StubJudge, evaluation, serve, start_llama_server

from finetuning.report.samples import load_samples


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


def scored(request: dict, score: int = 7) -> str:
    """A reply that fits whatever schema was asked for."""
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["additionalProperties"] is False and schema["required"] == list(schema["properties"])
    return json.dumps({name: {"explanation": f"{name} is so", "score": score} for name in schema["properties"]})


@pytest.fixture
def project(tmp_path):
    """A copy of the project's own files, to edit."""
    folder = tmp_path / "project"
    folder.mkdir()
    for script in [*ROOT.glob("[0-9]_*"), ROOT / "finetuning"]:
        (shutil.copytree if script.is_dir() else shutil.copy)(script, folder / script.name)
    return folder


@pytest.mark.slow
def test_a_seventh_criterion_needs_one_field(project, run_dir):
    module = project / "finetuning" / "judge" / "form.py"
    last = "    completion_quality: Criterion = Field(\n"
    field = '    tone: Criterion = Field(description="As polite as <the question>.")\n'
    assert module.read_text().count(last) == 1
    module.write_text(module.read_text().replace(last, field + last))
    with serve(stub := StubJudge(scored)) as url:
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}

        def run_here(*arguments):
            result = subprocess.run(
                [sys.executable, *map(str, arguments)], cwd=project, env=environment, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stdout + result.stderr
            return result.stdout

        run_here("4_openai_test.py", "--output_dir", run_dir)
        system = stub.requests[0]["messages"][0]["content"]
        assert "- tone: As polite as <the question>." in system and '"tone": {"explanation"' in system
        assert evaluations(run_dir)[0]["evaluation"]["tone"] == {"explanation": "tone is so", "score": 7}
        assert "tone" in run_here("-m", "finetuning.report", "--output_dir", run_dir)
        notebook = run_dir / "executed.ipynb"
        run_here("-m", "papermill", "5_score_notebook.ipynb", notebook, "-p", "output_dirs", run_dir)
    cells = json.loads(notebook.read_text())["cells"]
    assert any("tone" in json.dumps(cell.get("outputs", "")) for cell in cells)
    report = (run_dir / "report.html").read_text()
    assert '"tone","completion quality"]' in report and ">tone</button>" in report
    assert '{"explanation":"tone is so","score":7}' in report


@pytest.mark.slow
def test_a_rubric_of_ones_own_in_yaml_or_python(run_dir, tmp_path):
    (tmp_path / "tone.yaml").write_text("politeness: 공손한 말투를 씁니다.\nbrevity: Says it in few words.\n")
    (tmp_path / "tone.py").write_text(
        "from pydantic import BaseModel, Field\nfrom finetuning.judge.form import Criterion\n"
        "class Tone(BaseModel):\n    warmth: Criterion = Field(description='It is friendly.')\n"
    )
    with serve(stub := StubJudge(scored)) as url:
        judge(run_dir, url, "--rubric", tmp_path / "tone.yaml", "--judge_language", "ko")
        assert "- politeness: 공손한 말투를 씁니다." in stub.requests[0]["messages"][0]["content"]
        assert list(evaluations(run_dir)[0]["evaluation"]) == ["politeness", "brevity"]
        refused = judge(run_dir, url, "--rubric", f"{tmp_path / 'tone.py'}:Tone", check=False)
        assert refused.returncode == 2 and "criteria was ['politeness', 'brevity'] and is ['warmth']" in refused.printed
        judge(run_dir, url, "--rubric", f"{tmp_path / 'tone.py'}:Tone", "--overwrite", "true")
    assert list(evaluations(run_dir)[0]["evaluation"]) == ["warmth"]
    assert {"judge[warmth]", "overall"} <= set(load_samples(run_dir))


RUBRICS = {
    "missing.py:A": (None, "no such file"),
    "missing.yaml": (None, "No such file"),
    "rubric.txt": ("x", "neither file.py:ClassName nor a YAML"),
    "list.yaml": ("- a\n- b\n", "write a line `name: description`"),
    "name.yaml": ("two words: x\n", "cannot be a name here"),
    "reserved.yaml": ("overall: x\n", "is a column of --human"),
    "twice.yaml": ("a: x\na: y\n", "a name stands twice"),
    "pydantic.yaml": ("model_dump: x\n", "cannot be a name here"),
    "exit.py:A": ("raise SystemExit(0)", "cannot be imported: SystemExit"),
    "torn.yaml": ("a: [\n", "is no YAML"),
    "deep.yaml": ("{" * 5000, "brackets within brackets, too deep to read"),
    "empty.yaml": ("{}\n", "has no criteria"),
    "broken.py:A": ("def (", "SyntaxError"),
    "other.py:A": ("from pydantic import BaseModel\nclass B(BaseModel): pass\n", "it has B"),
    "plain.py:A": ("from pydantic import BaseModel\nclass A(BaseModel):\n    x: int\n", "x is no criterion"),
    "bare.py:A": ("from finetuning.judge.form import *\nclass A(BaseModel):\n    x: Criterion\n", "has no description"),
    "wide.py:A": (
        "from finetuning.judge.form import *\nclass C(Criterion):\n    score: int = Field(ge=1, le=5)\n"
        "class A(BaseModel):\n    x: C = Field(description='x')\n", "is not from 1 to 10",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUBRICS)
def test_a_rubric_that_is_none_says_what_to_write(run_dir, tmp_path, name):
    content, message = RUBRICS[name]
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_text(content)
    result = judge(run_dir, "http://127.0.0.1:1", "--rubric", tmp_path / name, check=False)
    assert result.returncode == 2 and message in result.printed and result.printed.count("\n") <= 2


INJECTIONS = [json.loads(line) for line in (ROOT / "tests" / "judge" / "injections.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_injection_is_delivered_as_data(tmp_path):
    attacks = [injection["attack"] for injection in INJECTIONS]
    assert len(attacks) >= 20 and {injection["language"] for injection in INJECTIONS} == {"en", "ko"}
    run_dir = make_run(tmp_path / "run", {"base": attacks})
    with serve(stub := StubJudge(evaluation(3))) as url:
        judge(run_dir, url, "--concurrency", "1")
    assert len({request["messages"][0]["content"] for request in stub.requests}) == 1
    delivered = []
    for request in stub.requests:
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
        content = request["messages"][1]["content"]
        delivered.append(json.loads(content)["answer"])  # one JSON object and nothing after it
        assert "<" not in content and not re.search(r"\[/?[A-Za-z_]+\]", content) and "\n" not in content
    assert sorted(delivered) == sorted(attacks)
    documented = (ROOT / "docs" / "judging.md").read_text()
    assert all(injection["name"] in documented for injection in INJECTIONS)


@pytest.mark.slow
def test_a_server_reads_no_control_token_in_an_answer(tmp_path):
    """llama.cpp reads control tokens in messages; `</s>` would be one token, and is as many as it has bytes as JSON."""
    run_dir = make_run(tmp_path / "run", {"base": ["</s>" * 50], "checkpoint-1": ["xu003c/s>" * 50]})
    judge(run_dir, start_llama_server(tmp_path, {'"': 10, "5": 8, "}": 6, ",": 6}))
    tokens = [evaluations(run_dir, name)[0]["usage"]["prompt_tokens"] for name in ("base", "checkpoint-1")]
    assert tokens[0] == tokens[1]


def test_personal_data_is_masked_before_it_is_sent(tmp_path):
    run_dir = make_run(tmp_path / "run", {"base": ["Call Kim at 010-1234-5678 or kim@example.com"]})
    with serve(stub := StubJudge(evaluation(3))) as url:
        judge(run_dir, url, "--mask_pii", "true")
        assert (
            json.loads(stub.requests[0]["messages"][1]["content"])["answer"] == "Call Kim at #PhoneNumber# or #Email#"
        )
        assert "1234" not in json.dumps(stub.requests)
        refused = judge(run_dir, url, check=False)  # other words were judged
        assert "mask_pii was True and is False" in refused.printed
