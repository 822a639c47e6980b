"""Step 4 against a real OpenAI-compatible server, and against a stub for what that cannot do."""

import asyncio
import base64
import email.utils
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import krippendorff
import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, command, end_step, make_run, run_step, start_step, wait_until
from judge_servers import StubJudge, completion, evaluation, serve, start_llama_server

from finetuning.endpoint import read_retry_after
from finetuning.interrupts import SoftStop
from finetuning.judge.form import Evaluation
from finetuning.judge.rate import RateControl, RateLimits
from finetuning.report.tables import load_samples
from finetuning.results import iterate_rows, read_rows

CRITERIA = list(Evaluation.model_fields)
ANSWERS = [f"#Person1# asks question {i}" for i in range(6)]


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


def judge(run_dir, url: str, *args, check: bool = True, key: str = "sk-test-1234567890"):
    """Run step 4; gives its status and what it printed."""
    judge_model = [] if "--judges" in args else ["--judge_model", "m"]
    arguments = ["--output_dir", run_dir, *judge_model, "--max_retries", "2", *args]
    environment = {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": url}
    status, printed = run_step("4_openai_test.py", run_dir.with_name("printed"), *arguments, **environment)
    if check:
        assert status == 0, printed
    assert "Traceback" not in printed
    return SimpleNamespace(returncode=status, printed=printed)


def evaluations(run_dir, name="checkpoint-10"):
    return read_rows(run_dir / "qa_evaluation_results" / f"{name}.jsonl")


@pytest.mark.slow
def test_a_judge_that_always_says_5_scores_5(run_dir, tmp_path):
    url = start_llama_server(tmp_path, {'"': 10, "5": 8, "}": 6, ",": 6})
    result = judge(run_dir, url)
    rows = evaluations(run_dir)
    assert Counter(row["status"] for row in rows) == {"ok": 6}
    assert {row["evaluation"][c]["score"] for row in rows for c in CRITERIA} == {5}
    assert all(row["usage"]["completion_tokens"] > 0 for row in rows)
    assert "checkpoint-10: judged 6 of 6, mean 5.00 of 10" in result.printed
    info = json.loads((run_dir / "qa_evaluation_results" / "checkpoint-10.json").read_text())
    assert info["coverage"] == 1 and info["identity"]["criteria"] == list(CRITERIA)


@pytest.mark.slow
def test_a_random_judge_gives_valid_evaluations(run_dir, tmp_path):
    judge(run_dir, start_llama_server(tmp_path, {'"': 1.5}))
    for row in evaluations(run_dir):
        assert row["status"] in ("ok", "truncated")  # a random explanation may be long
        if row["status"] == "ok":
            assert all(1 <= row["evaluation"][c]["score"] <= 10 for c in CRITERIA)
    assert any(row["status"] == "ok" for row in evaluations(run_dir))


@pytest.mark.slow
def test_a_judge_that_never_ends_gives_no_score(run_dir, tmp_path):
    result = judge(run_dir, start_llama_server(tmp_path, {"a": 10}), "--max_tokens", "64")
    rows = evaluations(run_dir)
    assert {(row["status"], row["evaluation"]) for row in rows} == {("truncated", None)}
    assert "judged 0 of 6, no score" in result.printed and "6 truncated" in result.printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply, status",
    [
        ({"message": {"refusal": "I cannot."}}, "refusal"),
        ({"finish_reason": "content_filter"}, "content_filter"),
        ({"finish_reason": "length", "message": {"content": '{"relevance"'}}, "truncated"),
        ("10 out of 10!", "invalid"),
        (evaluation(11), "invalid"),
        (json.dumps({"relevance": {"explanation": "", "score": 5}}), "invalid"),
        ((200, {"Content-Type": "text/html"}, "<html>busy</html>"), "error"),
        ((500, {}, {"error": {"message": "down"}}), "error"),
        ((400, {}, {"error": {"message": "no such thing: sk-test-1234567890"}}), "error"),
        ("hang up", "error"),
    ],
    ids=["refusal", "filter", "truncated", "no JSON", "out of range", "incomplete", "HTML", "500", "400", "hang up"],
)  # fmt: skip
def test_a_failed_judgement_is_a_declared_state_and_never_a_score(run_dir, reply, status):
    with serve(StubJudge(reply)) as url:
        result = judge(run_dir, url, "--model_name", "checkpoint-10", "--max_retries", "0")
    rows = evaluations(run_dir)
    assert {(row["status"], row["evaluation"]) for row in rows} == {(status, None)}
    assert "judged 0 of 6, no score" in result.printed and f"6 {status}" in result.printed
    assert "sk-test" not in result.printed + json.dumps(rows)
    with serve(StubJudge(evaluation(7))) as url:  # failed ones are tried again on the next start
        result = judge(run_dir, url, "--model_name", "checkpoint-10")
    assert "judged 6 of 6, mean 7.00 of 10" in result.printed


@pytest.mark.slow
@pytest.mark.parametrize("first", [{"finish_reason": "length", "message": {"content": '{"rel'}}, "ten of ten"], ids=["truncated", "invalid"])  # fmt: skip
def test_a_reply_that_cannot_be_read_is_asked_for_once_more_with_a_larger_limit(run_dir, first):
    with serve(stub := StubJudge(first, evaluation(7))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--limit", "1", "--max_tokens", "100")
    (row,) = evaluations(run_dir)
    assert row["status"] == "ok"
    assert row["usage"] == {"prompt_tokens": 200, "cached_tokens": 0, "completion_tokens": 100}  # both are paid for
    assert [request["max_completion_tokens"] for request in stub.requests] == [100, 200]


@pytest.mark.slow
def test_a_limit_takes_the_same_samples_of_every_model(run_dir):
    with serve(StubJudge(evaluation(7))) as url:
        judge(run_dir, url, "--limit", "2")
        assert "judged 2 of 2" in judge(run_dir, url, "--limit", "2").printed
        ids = [{row["id"] for row in evaluations(run_dir, name)} for name in ("base", "checkpoint-10")]
        assert ids[0] == ids[1] == {"sample0000", "sample0001"}
        assert "checkpoint-10: judged 6 of 6" in judge(run_dir, url).printed


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_in_flight(run_dir):
    stub = StubJudge(evaluation(8))
    next_reply = stub.next_reply
    stub.next_reply = lambda request: (next_reply(request), time.sleep(1))[0]
    with serve(stub) as url:
        arguments = [
            "--output_dir",
            run_dir,
            "--judge_model",
            "m",
            "--concurrency",
            "2",
            "--model_name",
            "checkpoint-10",
        ]
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        process = subprocess.Popen(
            command("4_openai_test.py", *arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: len(stub.requests) == 3)  # the first goes alone
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert (
        process.returncode == 130
        and "waiting for the 2 requests in flight, at most 120 s" in printed
        and "Traceback" not in printed
    )
    assert len(evaluations(run_dir)) == len(stub.requests) == 3


def start_judging(run_dir, url: str, *args) -> int:
    """Start step 4 about one answer, without waiting for it; gives the process id."""
    arguments = ["--output_dir", run_dir, "--judge_model", "m", "--model_name", "checkpoint-10", "--limit", "1", *args]
    environment = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
    return start_step("4_openai_test.py", run_dir.with_name("printed"), *arguments, **environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_between_two_attempts_is_not_sent_again_and_counts_with_what_it_may_have_cost(
    run_dir, prices, number
):
    with serve(stub := StubJudge("hang up")) as url:
        judge(run_dir, url, "--limit", "1", "--model_name", "checkpoint-10", "--max_retries", "0", "--prices", prices)
        (once,) = evaluations(run_dir)
        process = start_judging(run_dir, url, "--max_retries", "8", "--prices", prices, "--overwrite", "true")
        wait_until(lambda: len(stub.requests) == 4)  # the next attempt is more than a second away
        os.kill(process, number)
        assert end_step("4_openai_test.py") == 128 + number
    (row,) = evaluations(run_dir)
    assert len(stub.requests) == 4 and row["error"].endswith("stopped before it was asked again")
    assert row["possible_cost"] == pytest.approx(3 * once["possible_cost"]) and once["possible_cost"] > 0


def test_a_second_interrupt_ends_at_once_and_says_what_it_may_have_cost(run_dir, prices):
    with serve(stub := StubJudge("drip")) as url:
        process = start_judging(run_dir, url, "--prices", prices)
        wait_until(lambda: stub.requests)
        os.kill(process, signal.SIGINT)
        wait_until(lambda: "waiting for the 1 requests in flight" in run_dir.with_name("printed").read_text())
        interrupted = time.monotonic()
        os.kill(process, signal.SIGINT)
        assert end_step("4_openai_test.py") == 130 and time.monotonic() - interrupted < 10
    (row,) = evaluations(run_dir)
    assert row["error"] == "given up before its reply came" and row["possible_cost"] > 0


def test_an_interrupt_that_was_ignored_at_the_start_stays_so_and_sigterm_stops(capsys):
    """As under `nohup command &`."""

    async def wait() -> int | None:
        with SoftStop(asyncio.get_running_loop(), lambda: "waiting for what is in flight") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not await stop.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await stop.sleep(10)
            return stop.signal

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert asyncio.run(wait()) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.count("waiting") == 1


@pytest.mark.slow
def test_an_attempt_has_a_deadline_however_slowly_its_reply_comes(run_dir):
    with serve(StubJudge("drip")) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--timeout", "0.4", "--max_retries", "0")
    assert {row["error"] for row in evaluations(run_dir)} == {"no reply within 0.4 s (--timeout)"}


@pytest.mark.slow
def test_many_models_are_judged_as_fast_as_one(tmp_path):
    run_dir = make_run(tmp_path / "run", {f"checkpoint-{n}": [f"answer {n}{i}" for i in "abc"] for n in range(1, 11)})
    in_flight, seen = set(), []

    class Slow(StubJudge):
        def post(self, path, body):
            with self.lock:
                in_flight.add(body)
                seen.append(len(in_flight))
            time.sleep(0.3)
            with self.lock:
                in_flight.discard(body)
            return super().post(path, body)

    with serve(Slow(evaluation(6))) as url:
        judge(run_dir, url, "--concurrency", "30")
    assert seen[:2] == [1, 1] and max(seen) >= 6  # the first goes alone; then models wait for no other one
    assert [len(evaluations(run_dir, f"checkpoint-{n}")) for n in range(1, 11)] == [3] * 10


@pytest.mark.slow
def test_a_model_is_done_with_as_soon_as_its_last_reply_is_in(run_dir):
    def reply(request):
        assert "asks question" not in request["messages"][1]["content"].split('"answer"')[1] or released.wait(30)
        return evaluation(6)

    released = threading.Event()
    with serve(StubJudge(reply)) as url:
        arguments = ["--output_dir", run_dir, "--judge_model", "m"]
        environment = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        start_step("4_openai_test.py", run_dir.with_name("printed"), *arguments, **environment)
        info = run_dir / "qa_evaluation_results" / "base.json"
        wait_until(lambda: info.is_file() and json.loads(info.read_text()).get("coverage") == 1)
        assert evaluations(run_dir) == []
        released.set()
        assert end_step("4_openai_test.py") == 0
    assert run_dir.with_name("printed").read_text().count("base: judged 3 of 3") == 1


@pytest.mark.slow
def test_the_same_answer_is_judged_once_whichever_models_gave_it(tmp_path, prices):
    answers = [f"answer {i}" for i in range(6)]
    run_dir = make_run(tmp_path / "run", {"base": answers, "checkpoint-10": [*answers[:4], "other", "another"]})
    arguments = ["--prices", prices, "--concurrency", "4"]
    with serve(stub := StubJudge(*[evaluation(score) for score in range(1, 9)])) as url:
        printed = judge(run_dir, url, *arguments, "--dry_run", "true").printed
        assert "4 answers are another model's, word for word" in printed and "plan for m: 8 requests" in printed
        printed = judge(run_dir, url, *arguments).printed
        assert len(stub.requests) == 8 and f"cost of these evaluations: ${8 * COST:.6g}" in printed
        assert "judged 6 of 6" in printed and "4 shared with another model" in printed
        mine, theirs = ({row["id"]: row for row in evaluations(run_dir, name)} for name in ("base", "checkpoint-10"))
        shared = [row for row in theirs.values() if row.get("shared_with") == "base"]
        assert len(shared) == 4 and {(row["cost"], row["usage"]) for row in shared} == {(0, None)}
        assert all(row["evaluation"] == mine[row["id"]]["evaluation"] for row in shared)
        # a model that is judged later has what stands under the same identity
        predictions = run_dir / "predictions"
        for suffix in (".jsonl", ".json"):
            shutil.copy(predictions / f"base{suffix}", predictions / f"checkpoint-20{suffix}")
        printed = judge(run_dir, url, *arguments, "--model_name", "checkpoint-20", key="").printed
    assert len(stub.requests) == 8 and "checkpoint-20: judged 6 of 6" in printed
    assert {row["shared_with"] for row in evaluations(run_dir, "checkpoint-20")} <= {"base", "checkpoint-10"}
    assert load_samples(run_dir)["cost"].sum() == pytest.approx(8 * COST)


@pytest.mark.slow
def test_rate_limits_are_waited_out(run_dir):
    busy = (429, {"Retry-After": "0.2"}, {"error": {"message": "slow down"}})
    with serve(StubJudge(busy, busy, evaluation(6))) as url:
        result = judge(run_dir, url, "--concurrency", "2")
    assert "checkpoint-10: judged 6 of 6, mean 6.00" in result.printed


@pytest.mark.slow
@pytest.mark.parametrize("status, message", [(401, "check OPENAI_API_KEY"), (404, "has no model `m`")])
def test_what_cannot_succeed_ends_at_once(run_dir, status, message):
    with serve(stub := StubJudge((status, {}, {"error": {"message": "no"}}))) as url:
        result = judge(run_dir, url, check=False)
    assert result.returncode == 2 and message in result.printed and "Traceback" not in result.printed
    assert len(stub.requests) == 1


def test_what_arrived_before_a_fault_is_kept(run_dir):
    with serve(StubJudge(evaluation(5), evaluation(6), (401, {}, {"error": {"message": "no"}}))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", check=False)
    assert sorted(row["evaluation"]["relevance"]["score"] for row in evaluations(run_dir)) == [5, 6]


@pytest.mark.slow
def test_a_judge_killed_in_the_middle_goes_on_and_sends_nothing_twice(run_dir):
    stub = StubJudge(evaluation(8))
    next_reply = stub.next_reply
    stub.next_reply = lambda request: (time.sleep(0.5), next_reply(request))[1]
    with serve(stub) as url:
        arguments = ["--output_dir", run_dir, "--judge_model", "m", "--concurrency", "1"]
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        process = subprocess.Popen(command("4_openai_test.py", *arguments), cwd=ROOT, env=environment)
        wait_until(lambda: evaluations(run_dir))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = evaluations(run_dir)
        assert 0 < len(before) < 6
        judge(run_dir, url)
    rows = evaluations(run_dir)
    assert rows[: len(before)] == before
    assert Counter(row["id"] for row in rows) == {f"sample{i:04d}": 1 for i in range(6)}
    assert len(stub.requests) <= 9 + 1  # 3 of base, 6 of the checkpoint, and one that was in flight
    with serve(StubJudge((500, {}, ""))) as url:  # nothing is left to send
        assert "judged 6 of 6" in judge(run_dir, url).printed


@pytest.mark.slow
def test_evaluations_of_another_judge_are_not_mixed(run_dir):
    with serve(StubJudge(evaluation(8))) as url:
        judge(run_dir, url)
        result = judge(run_dir, url, "--judge_model", "other", check=False)
        assert result.returncode == 2 and "judge_model was 'm' and is 'other'" in result.printed
        judge(run_dir, url, "--judge_model", "other", "--overwrite", "true")


@pytest.mark.slow
def test_an_answer_that_changed_is_judged_again(run_dir):
    with serve(stub := StubJudge(evaluation(8))) as url:
        judge(run_dir, url, "--model_name", "base")
        path = run_dir / "predictions" / "base.jsonl"
        path.write_text(path.read_text().replace('"prediction": "no"', '"prediction": "yes"', 1))
        judge(run_dir, url, "--model_name", "base")
    assert len(stub.requests) == 4


def test_without_a_key_it_says_what_to_set_and_does_not_fail(run_dir):
    result = judge(run_dir, "", key="")
    assert "OPENAI_API_KEY is not set" in result.printed
    assert not (run_dir / "qa_evaluation_results").exists()


def test_without_predictions_it_says_what_to_run(tmp_path):
    result = judge(make_run(tmp_path / "empty", {}), "http://127.0.0.1:1", check=False)
    assert result.returncode == 2 and "run 3_test.py first" in result.printed


# --- Criteria ---------------------------------------------------------------------------------------------------------


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
    assert '"tone","completion quality"]' in report and '[7,"tone is so"]' in report and ">tone</button>" in report


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


# --- What the endpoint can do, and when -------------------------------------------------------------------------------


def clocked(stub: StubJudge) -> list[float]:
    """When each request came in."""
    times: list[float] = []
    next_reply = stub.next_reply

    def note(request):
        times.append(time.monotonic())
        return next_reply(request)

    stub.next_reply = note
    return times


BUSY = (429, {"Retry-After": "1"}, {"error": {"message": "slow down"}})


@pytest.mark.slow
def test_a_rate_limit_holds_back_all_requests(run_dir):
    stub = StubJudge(evaluation(6), BUSY, evaluation(6))
    times = clocked(stub)
    with serve(stub) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--concurrency", "2")
    assert {row["status"] for row in evaluations(run_dir)} == {"ok"}
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert max(gaps) >= 0.95 and len(times) <= 8  # two were in flight; none of the others came before its time


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_without_retry_after_is_asked_again(run_dir, status):
    busy = (status, {}, {"error": {"message": "slow down"}})
    with serve(StubJudge(busy, evaluation(6), busy, evaluation(6))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--concurrency", "2")
    assert {row["status"] for row in evaluations(run_dir)} == {"ok"}


@pytest.mark.slow
def test_concurrency_falls_to_what_the_endpoint_takes(tmp_path):
    run_dir = make_run(tmp_path / "run", {"base": [f"answer {i}" for i in range(120)]})
    running, refused = set(), []

    class Narrow(StubJudge):
        def post(self, path, body):
            me = object()
            with self.lock:
                full = len(running) >= 3
                running.update([] if full else [me])
            if full:
                refused.append(me)
                return 429, {"Retry-After": "0.05"}, {"error": {"message": "too many at once"}}
            time.sleep(0.02)
            with self.lock:
                running.discard(me)
            return super().post(path, body)

    with serve(Narrow(evaluation(6))) as url:
        judge(run_dir, url, "--concurrency", "32", "--max_retries", "8")
    assert Counter(row["status"] for row in evaluations(run_dir, "base")) == {"ok": 120}
    assert len(refused) < 120  # 32 at once would be refused many times for each that is taken


@pytest.mark.slow
def test_requests_leave_no_faster_than_asked(run_dir):
    stub = StubJudge(evaluation(6))
    times = clocked(stub)
    with serve(stub) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--concurrency", "6", "--requests_per_minute", "300")
    assert times[-1] - times[1] >= 4 * 0.2 - 0.05  # the first is longer on its way, over a new connection


@pytest.mark.slow
def test_tokens_of_a_minute_are_counted_as_they_are_used():
    async def seconds_for(num_requests: int, expected: float, used: float) -> float:
        rate = RateControl(RateLimits(8, None, 60_000), asyncio.Event())  # a thousand a second
        started = time.monotonic()
        for _ in range(num_requests):
            await rate.leave(expected)
            rate.settle(expected, used)
        return time.monotonic() - started

    assert asyncio.run(seconds_for(6, 100, 100)) == pytest.approx(0.5, abs=0.1)
    assert asyncio.run(seconds_for(6, 100, 300)) == pytest.approx(1.5, abs=0.1)
    assert asyncio.run(seconds_for(6, 200, 20)) == pytest.approx(0.1, abs=0.1)


def test_every_form_of_retry_after_is_read():
    date = email.utils.format_datetime(datetime.now(UTC) + timedelta(minutes=5))
    for headers, seconds in (
        ({"retry-after": "7"}, 7), ({"retry-after-ms": "250", "retry-after": "7"}, 0.25), ({}, 0),
        ({"retry-after": "soon"}, 0), ({"retry-after": date}, 300),
    ):  # fmt: skip
        assert read_retry_after(headers) == pytest.approx(seconds, abs=2)


def test_a_wait_of_an_hour_ends_the_start(run_dir):
    later = (429, {"Retry-After": "3600"}, {"error": {"message": "tomorrow"}})
    with serve(stub := StubJudge(evaluation(6), later)) as url:
        result = judge(run_dir, url, "--model_name", "checkpoint-10", "--concurrency", "1", check=False)
    assert result.returncode == 2 and "asks to wait 60 minutes" in result.printed
    assert len(stub.requests) == 2 and len(evaluations(run_dir)) == 1


def test_a_used_up_quota_is_not_asked_again(run_dir):
    quota = (429, {}, {"error": {"message": "no money", "code": "insufficient_quota"}})
    with serve(stub := StubJudge(quota)) as url:
        result = judge(run_dir, url, check=False)
    assert result.returncode == 2 and "quota of this key is used up" in result.printed and len(stub.requests) == 1


@pytest.mark.slow
def test_a_reply_that_comes_too_late_is_an_error_of_its_sample(run_dir):
    stub = StubJudge(evaluation(6))
    next_reply = stub.next_reply
    stub.next_reply = lambda request: (time.sleep(2.5 * ("질문 4" in str(request))), next_reply(request))[1]
    with serve(stub) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--timeout", "1.5", "--max_retries", "0")
    late = [row for row in evaluations(run_dir) if row["status"] != "ok"]
    assert [(row["id"], row["status"]) for row in late] == [("sample0004", "error")]
    assert late[0]["error"] == "no reply within 1.5 s (--timeout)"


@pytest.mark.slow
def test_without_a_server_it_says_so_soon(run_dir):
    result = judge(run_dir, "http://127.0.0.1:1/v1", "--max_retries", "8", check=False)
    assert result.returncode == 2 and "no server answers at http://127.0.0.1:1/v1" in result.printed


def test_ten_failures_from_the_start_on_end_it(tmp_path):
    run_dir = make_run(tmp_path / "run", {"base": [f"answer {i}" for i in range(40)]})
    with serve(stub := StubJudge((400, {}, {"error": {"message": "temperature is not supported"}}))) as url:
        result = judge(run_dir, url, "--concurrency", "1", check=False)
    assert result.returncode == 2 and "the first 10 requests all failed" in result.printed
    assert "temperature is not supported" in result.printed and len(stub.requests) <= 11
    assert len(evaluations(run_dir, "base")) == 10


@pytest.mark.slow
def test_a_server_that_takes_no_schema_is_found_out_at_the_first_request(run_dir):
    def reply(request):
        if "response_format" in request:
            return 400, {}, {"error": {"message": "response_format of type json_schema is not supported"}}
        return evaluation(4)

    with serve(stub := StubJudge(reply)) as url:
        result = judge(run_dir, url)
    assert "takes no JSON schema" in result.printed
    assert sum("response_format" in request for request in stub.requests) == 1
    assert {row["status"] for row in evaluations(run_dir)} == {"ok"}


def test_all_that_left_with_a_schema_is_sent_again_without_it(run_dir):
    """The first reply fits; then those in flight are refused together."""
    together = threading.Barrier(5, timeout=20)

    def refuse(request):
        if "response_format" not in request:
            return evaluation(4)
        together.wait()
        return 400, {}, {"error": {"message": "response_format is not supported"}}

    with serve(StubJudge(evaluation(4), refuse)) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10", "--concurrency", "6", "--max_retries", "0")
    assert Counter(row["status"] for row in evaluations(run_dir)) == {"ok": 6}


@pytest.mark.slow
def test_a_server_that_ignores_the_schema_is_named(run_dir):
    with serve(StubJudge("I would say: 8!")) as url:
        result = judge(run_dir, url, "--model_name", "checkpoint-10")
    assert "does not keep to the JSON schema" in result.printed and "6 invalid" in result.printed


def test_an_address_in_the_environment_that_is_none_is_refused(run_dir):
    result = judge(run_dir, "localhost:8000/v1", check=False)
    assert result.returncode == 2 and "OPENAI_BASE_URL: localhost:8000/v1 is no address" in result.printed
    assert "at https://api.openai.com/v1" in judge(run_dir, "", "--dry_run", "true").printed  # an empty one is none


@pytest.mark.slow
def test_an_address_on_the_command_line_needs_no_key(run_dir):
    with serve(StubJudge(evaluation(4))) as url:
        judge(run_dir, "", "--base_url", url, key="")
    assert len(evaluations(run_dir)) == 6


STRANGE = {
    "no message": {"choices": [{}]},
    "no choices": {"choices": []},
    "no usage": {"usage": None},
    "empty usage": {"usage": {}},
    "usage of no number of tokens": {"usage": {"prompt_tokens": 10**30, "completion_tokens": 1}},
    "text": "busy, come back later",
    "list": [1, 2],
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_reply_is_an_error_of_its_sample(run_dir, prices, name):
    strange = STRANGE[name]
    body = {**completion(evaluation(5)), **strange} if isinstance(strange, dict) else strange
    with serve(StubJudge(evaluation(5), (200, {}, body), evaluation(5))) as url:
        arguments = ["--model_name", "checkpoint-10", "--concurrency", "1", "--max_retries", "0", "--prices", prices]
        printed = judge(run_dir, url, *arguments).printed
    statuses = Counter(row["status"] for row in evaluations(run_dir))
    assert statuses == ({"ok": 6} if "usage" in name else {"ok": 5, "error": 1})
    known = name in ("no message", "no choices")  # these say what was used
    assert known != ("more for replies that never came" in printed)


@pytest.mark.slow
def test_the_key_is_in_no_row_whatever_the_endpoint_repeats(run_dir):
    key = "sk-test-1234567890"
    for message in (f"bad key {key}", "x" * 290 + f" {key}"):
        with serve(StubJudge((400, {}, {"error": {"message": message}}))) as url:
            result = judge(run_dir, url, "--overwrite", "true", key=key + "\n", check=False)  # as a file gives it
        assert key[:10] not in result.printed + json.dumps(evaluations(run_dir))
    with serve(StubJudge(f"my key is {key}")) as url:
        judge(run_dir, url, "--overwrite", "true", key=key)
        assert {row["error"] for row in evaluations(run_dir)} == {"my key is ***"}
        result = judge(run_dir, url, key="sk-키", check=False)
    assert (
        result.returncode == 2 and "holds spaces, line breaks, quotes or characters that no key has" in result.printed
    )


@pytest.mark.parametrize("key", ["sk-12 34567890", "sk-12\n34567890", '"sk-1234567890"', "sk-12\r34567890"])
def test_a_key_that_is_none_is_refused_and_not_shown(run_dir, key):
    with serve(stub := StubJudge(evaluation(5))) as url:
        result = judge(run_dir, url, key=key, check=False)
    assert result.returncode == 2 and stub.requests == [] and "34567890" not in result.printed


def test_what_the_endpoint_repeats_of_key_and_password_is_nowhere(run_dir):
    with serve(stub := StubJudge("echo")) as url:
        address = url.replace("//", "//me:secret%2Fword@")
        printed = judge(run_dir, "", "--base_url", address, "--model_name", "checkpoint-10").printed
        stub.replies = [evaluation(5).replace("because", "sk-test-1234567890")]
        printed += judge(run_dir, "", "--base_url", url, "--model_name", "base").printed
    written = printed + "".join(path.read_text() for path in (run_dir / "qa_evaluation_results").glob("*.json*"))
    assert "cannot read" in written and "***" in written
    for secret in ("sk-test", "secret", base64.b64encode(b"me:secret/word").decode()):
        assert secret not in written


def test_a_password_in_an_address_is_not_shown(run_dir):
    result = judge(run_dir, "http://me:p@ss/w@127.0.0.1:1/v1", "--dry_run", "true", check=False)
    assert "ss" not in re.sub("pass|less|necess|messa|asse", "", result.printed.splitlines()[0])


def test_a_paid_reply_is_kept_when_the_second_one_cannot_be_had(run_dir):
    quota = (429, {}, {"error": {"message": "no money", "code": "insufficient_quota"}})
    with serve(StubJudge("ten of ten", quota)) as url:
        result = judge(run_dir, url, "--model_name", "checkpoint-10", check=False)
    (row,) = evaluations(run_dir)
    assert result.returncode == 2 and row["status"] == "invalid" and row["usage"]["completion_tokens"] == 50


@pytest.mark.slow
def test_overwriting_with_a_wrong_key_deletes_nothing(run_dir):
    with serve(StubJudge(evaluation(8))) as url:
        judge(run_dir, url)
    before = evaluations(run_dir)
    with serve(StubJudge((401, {}, {"error": {"message": "no"}}))) as url:
        assert judge(run_dir, url, "--overwrite", "true", check=False).returncode == 2
    assert evaluations(run_dir) == before
    with serve(StubJudge(evaluation(3))) as url:
        judge(run_dir, url, "--overwrite", "true")
    assert {row["evaluation"]["clarity"]["score"] for row in evaluations(run_dir)} == {3}
    assert not list((run_dir / "qa_evaluation_results").glob("*.previous"))


@pytest.mark.slow
def test_two_starts_do_not_write_the_same_rows(run_dir):
    stub = StubJudge(evaluation(8))
    next_reply = stub.next_reply
    stub.next_reply = lambda request: (next_reply(request), time.sleep(1.5))[0]
    with serve(stub) as url:
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        arguments = ["--output_dir", run_dir, "--judge_model", "m", "--model_name", "base"]
        first = subprocess.Popen(command("4_openai_test.py", *arguments), cwd=ROOT, env=environment)
        wait_until(lambda: stub.requests)
        for overwrite in ("false", "true"):
            result = judge(run_dir, url, "--model_name", "base", "--overwrite", overwrite, check=False)
            assert result.returncode == 2 and "is being written by another process" in result.printed
        assert first.wait() == 0 and len(evaluations(run_dir, "base")) == len(stub.requests) == 3


def test_models_are_judged_alike(run_dir):
    with serve(stub := StubJudge(evaluation(8))) as url:
        judge(run_dir, url, "--model_name", "base")
        num_requests = len(stub.requests)
        result = judge(run_dir, url, "--model_name", "checkpoint-10", "--judge_language", "ko", check=False)
        assert result.returncode == 2 and "All models are judged in the same way" in result.printed
        assert len(stub.requests) == num_requests


@pytest.mark.slow
def test_scores_are_whole_numbers_that_the_judge_wrote(run_dir):
    for score in ("true", '"7"', "7.5"):
        with serve(StubJudge(evaluation(7).replace("7", score))) as url:
            judge(run_dir, url, "--model_name", "base", "--overwrite", "true")
        assert {row["status"] for row in evaluations(run_dir, "base")} == {"invalid"}


def test_predictions_that_are_none_are_named(run_dir):
    path = run_dir / "predictions" / "base.jsonl"
    whole = path.read_text()
    for content, message in ((whole + "no JSON\n", "base.jsonl:4 is no JSON"), (whole.replace("references", "labels"), "base.jsonl:1 has no `references`")):  # fmt: skip
        path.write_text(content)
        result = judge(run_dir, "http://127.0.0.1:1", check=False)
        assert result.returncode == 2 and message in result.printed


# --- Money ------------------------------------------------------------------------------------------------------------

PRICES = "date: 2026-11-01\nmodels:\n  m: {prompt: 1.0, cached_prompt: 0.5, completion: 10.0, batch: 0.5}\n"
COST = 100 * 1.0 / 1e6 + 50 * 10.0 / 1e6  # of each reply of the stub


@pytest.fixture
def prices(tmp_path):
    (tmp_path / "prices.yaml").write_text(PRICES)
    return tmp_path / "prices.yaml"


def test_the_plan_says_what_it_will_cost(run_dir, prices):
    with serve(stub := StubJudge(evaluation(4))) as url:
        printed = judge(run_dir, url, "--prices", prices, "--dry_run", "true").printed
    assert stub.requests == [] and not (run_dir / "qa_evaluation_results").exists()
    assert "plan for m: 9 requests" in printed and "prices of 2026-11-01" in printed
    tokens = int(re.search(r"about ([\d,]+) prompt tokens", printed)[1].replace(",", ""))
    completion_tokens = 9 * 6 * 45
    live, batch = map(float, re.search(r"about \$([\d.]+), as a batch .* \$([\d.]+);", printed).groups())
    assert live == pytest.approx((tokens + 10 * completion_tokens) / 1e6, abs=0.006)
    assert batch == pytest.approx(live / 2, abs=0.006)
    assert "--- system\nYou judge the answer" in printed and '"answer": "no"' in printed
    judge(run_dir, "", "--dry_run", "true", key="")  # needs no key


def test_the_printed_cost_is_that_of_the_replies(run_dir, prices):
    truncated = {"finish_reason": "length", "message": {"content": ""}}
    with serve(stub := StubJudge(truncated, evaluation(4))) as url:
        printed = judge(run_dir, url, "--prices", prices, "--model_name", "checkpoint-10").printed
    assert len(stub.requests) == 7
    assert f"cost of these evaluations: ${7 * COST:.6g}" in printed
    assert sum(row["cost"] for row in evaluations(run_dir)) == pytest.approx(7 * COST)


def test_the_limit_of_money_is_never_passed(tmp_path, prices):
    run_dir = make_run(tmp_path / "run", {"base": [f"answer {i}" for i in range(60)]})
    arguments = ["--prices", prices, "--max_tokens", "100", "--concurrency", "4"]
    with serve(stub := StubJudge(evaluation(4))) as url:
        printed = judge(run_dir, url, *arguments, "--max_cost", "0.02").printed
        num_requests = len(stub.requests)
        assert "--max_cost 0.02: nothing more was sent" in printed
        assert 0.012 < num_requests * COST <= 0.02
        judge(run_dir, url, *arguments, "--max_cost", "0.02")  # what was spent before counts
        assert len(stub.requests) == num_requests
        judge(run_dir, url, *arguments, "--max_cost", "1")
    assert len(evaluations(run_dir, "base")) == len(stub.requests) == 60


def test_replies_that_never_came_count_against_the_limit_of_money(tmp_path, prices):
    """Each may have been billed: its cost is not known, so that it counts with the most that it can be, on later starts too."""
    run_dir = make_run(tmp_path / "run", {"base": [f"answer {i}" for i in range(60)]})
    arguments = ["--prices", prices, "--max_tokens", "100", "--concurrency", "4", "--max_cost", "0.03"]
    with serve(stub := StubJudge(evaluation(4), "hang up")) as url:
        printed = judge(run_dir, url, *arguments).printed
        num_requests = len(stub.requests)
        assert 3 <= num_requests <= 10 and "more for replies that never came" in printed  # each at most half a cent
        judge(run_dir, url, *arguments)
        assert len(stub.requests) <= num_requests + 1


def test_a_limit_of_money_needs_a_price(run_dir):
    result = judge(run_dir, "http://127.0.0.1:1", "--max_cost", "1", check=False)
    assert result.returncode == 2 and "max_cost needs the price of `m`" in result.printed


@pytest.mark.slow
def test_failed_judgements_are_left_alone_if_asked(run_dir):
    with serve(stub := StubJudge({"message": {"refusal": "no"}})) as url:
        judge(run_dir, url)
        judge(run_dir, url, "--retry_failed", "false")
        assert len(stub.requests) == 9
    with serve(StubJudge(evaluation(5))) as url:
        judge(run_dir, url)
    rows = evaluations(run_dir)
    assert Counter(row["id"] for row in rows) == {f"sample{i:04d}": 1 for i in range(6)}  # one row each
    assert all(row["status"] == "ok" and row["usage"]["completion_tokens"] == 100 for row in rows)  # both were paid for


# --- Trust ------------------------------------------------------------------------------------------------------------

INJECTIONS = [json.loads(line) for line in (ROOT / "tests" / "judge" / "injections.jsonl").read_text().splitlines()]


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


def prefer(choose) -> StubJudge:
    """A judge of pairs."""

    def reply(request):
        pair = json.loads(request["messages"][1]["content"])
        return json.dumps({"explanation": "so", "better": choose(pair["first"], pair["second"])})

    return StubJudge(reply)


@pytest.mark.slow
def test_a_comparison_asks_in_both_orders(tmp_path):
    answers = {"base": ["no"] * 5 + [None, "yes"], "checkpoint-10": ["longer"] * 4 + ["no", "x", "y"]}
    run_dir = make_run(tmp_path / "run", answers)

    def longer(first, second):
        return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"

    with serve(stub := prefer(longer)) as url:
        printed = judge(run_dir, url, "--compare", "checkpoint-10", "base").printed
    assert len(stub.requests) == 10  # of six samples that both have answered, one in the same way
    assert "checkpoint-10 is better in 4 of 6 pairs, base in 1, neither in 1" in printed and "flip rate 0%" in printed
    assert "1 pairs hold the same answer twice" in printed and "in 1 of them both gave the same answer" in printed
    path = run_dir / "qa_evaluation_results" / "pairs" / "checkpoint-10--base.jsonl"
    rows = read_rows(path)
    assert Counter(row["order"] for row in rows) == {"AB": 6, "BA": 6}
    assert "base" not in json.dumps(stub.requests) and "checkpoint" not in json.dumps(stub.requests)
    for reply, kept in (((401, {}, {"error": {"message": "no"}}), True), (prefer(longer).replies[0], False)):
        with serve(StubJudge(reply)) as url:
            again = judge(run_dir, url, "--compare", "checkpoint-10", "base", "--overwrite", "true", check=False)
        assert (again.returncode == 2) == (read_rows(path) == rows) == kept and len(read_rows(path)) == 12


def test_a_judge_that_takes_whatever_stands_first_decides_nothing(run_dir):
    with serve(prefer(lambda first, second: "first")) as url:
        printed = judge(run_dir, url, "--compare", "checkpoint-10", "base").printed
    assert "better in 0 of 3 pairs, base in 0, neither in 3" in printed and "flip rate 100%" in printed


def test_a_jury_gives_its_mean_and_how_far_it_agrees(run_dir):
    def reply(request):
        answer = json.loads(request["messages"][1]["content"])["answer"]
        number = int(answer[-1]) if answer[-1].isdecimal() else 0
        return evaluation(2 + number + (request["model"] == "kind"))

    with serve(StubJudge(reply)) as url:
        printed = judge(run_dir, url, "--judges", "strict,kind").printed
        rows = sorted(evaluations(run_dir), key=lambda row: row["id"])
        assert [row["evaluation"]["clarity"]["score"] for row in rows] == [2.5 + i for i in range(6)]
        assert rows[0]["evaluation"]["clarity"]["explanation"].count("because") == 2
        agreement = json.loads((run_dir / "qa_evaluation_results" / "checkpoint-10.json").read_text())["jury"]
        table = np.array([[2 + i for i in range(6)], [3 + i for i in range(6)]])
        assert agreement["alpha"] == pytest.approx(krippendorff.alpha(table, level_of_measurement="interval"))
        assert agreement["means"] == {"strict": 4.5, "kind": 5.5}
        assert "means strict 4.50, kind 5.50; standard deviation between the judges 0.71" in printed
        assert "warning: kind and strict all replied as stub" in printed
        assert load_samples(run_dir).groupby("model")["overall"].mean()["checkpoint-10"] == 5
        refused = judge(run_dir, url, check=False)  # a single judge is not mixed with a jury
        assert "judge_model was ['strict', 'kind'] and is 'm'" in refused.printed


@pytest.mark.slow
def test_an_answer_that_one_of_the_jury_cannot_judge_has_no_score(run_dir):
    def reply(request):
        refused = request["model"] == "b" and "질문 1" in request["messages"][1]["content"]
        said = completion({"message": {"refusal": "no"}} if refused else evaluation(5))
        return 200, {}, {**said, "model": request["model"] + "-2026-11-01"}

    with serve(StubJudge(reply)) as url:
        assert "warning" not in judge(run_dir, url, "--judges", "a", "b").printed
    info = json.loads((run_dir / "qa_evaluation_results" / "judges" / "b" / "base.json").read_text())
    assert info["replied_as"] == ["b-2026-11-01"]
    found = {row["id"]: (row["status"], row["error"]) for row in evaluations(run_dir)}
    assert found["sample0001"] == ("refusal", "b: no") and Counter(found.values())["ok", None] == 5


@pytest.mark.slow
def test_a_judge_is_measured_against_people(tmp_path):
    run_dir = make_run(tmp_path / "run", {"base": [f"answer {i % 10 + 1}" for i in range(40)]})
    rng = np.random.default_rng(1)
    human = [int(np.clip(i % 10 + 1 + rng.integers(-1, 2), 1, 10)) for i in range(40)]
    labels = tmp_path / "labels.csv"
    labels.write_text("id,score\n" + "".join(f"sample{i:04d},{score}\n" for i, score in enumerate(human)) + "gone,3\n")

    def reply(request):
        return evaluation(int(json.loads(request["messages"][1]["content"])["answer"].split()[-1]))

    with serve(StubJudge(reply)) as url:
        printed = judge(run_dir, url, "--human", labels).printed
    found = json.loads((run_dir / "qa_evaluation_results" / "human_agreement.json").read_text())["agreement"]["overall"]
    given = [i % 10 + 1 for i in range(40)]
    assert found["spearman"]["value"] == pytest.approx(scipy.stats.spearmanr(given, human).statistic)
    assert found["kendall"]["value"] == pytest.approx(scipy.stats.kendalltau(given, human).statistic)
    assert found["kappa"]["low"] < found["kappa"]["value"] < found["kappa"]["high"] <= 1
    assert (
        "1 of 41 scores" in printed and "judge and people on overall, within models, 40 scores: Spearman 0.9" in printed
    )


@pytest.mark.slow
def test_scores_of_people_add_to_those_of_earlier_starts(run_dir, tmp_path):
    def start(url, lines: str, *args) -> tuple[str, list]:
        (tmp_path / "labels.csv").write_text(lines)
        printed = judge(run_dir, url, "--human", tmp_path / "labels.csv", *args).printed
        written = json.loads((run_dir / "qa_evaluation_results" / "human_agreement.json").read_text())
        return printed, [(row["model"], row["id"][-1], row["score"]) for row in written["scores"]]

    with serve(StubJudge(evaluation(5))) as url:
        start(url, "id,model,score\nsample0000,base,3\nsample0001,base,4\n")
        printed, found = start(
            url,
            "id,score\nsample0001,9\n" + "".join(f"sample000{i},7\n" for i in (2, 3)),
            "--model_name",
            "checkpoint-10",
        )
        assert found == [
            ("base", "0", 3),
            ("base", "1", 4),
            *(("checkpoint-10", i, s) for i, s in (("1", 9), ("2", 7), ("3", 7))),
        ]
        assert "2 scores of people from earlier starts count, too" in printed and "replaced" not in printed
        assert "judge and people on overall, within models, 5 scores: Spearman not defined" in printed
        printed, found = start(url, "id,model,score\nsample0001,base,8\n")
        assert "4 scores of people from earlier starts count, too" in printed and len(found) == 5
        assert "1 score of people from earlier starts are replaced, as" in printed
        (run_dir / "qa_evaluation_results" / "human_agreement.json").write_text("{")
        result = judge(run_dir, url, "--human", tmp_path / "labels.csv", check=False)
        assert result.returncode == 2 and "human_agreement.json:1 is no JSON" in result.printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, message",
    [
        ("id,note\nsample0000,x\n", "needs the columns id and score"),
        ("id,score\nsample0000,eleven\n", "labels.csv:2: score must be a number from 1 to 10, got eleven"),
        ("id,score\nsample0000,11\n", "must be a number from 1 to 10"),
        ("id,score\nelsewhere,5\n", "none of its 1 scores is of an answer that is judged"),
        ("id,score,overall\nsample0000,5,6\n", "score and overall mean the same"),
        ("", "needs the columns id and score"),
    ],
)
def test_scores_of_people_that_cannot_be_used_are_named(run_dir, tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content)
    with serve(StubJudge(evaluation(5))) as url:
        result = judge(run_dir, url, "--model_name", "base", "--human", tmp_path / "labels.csv", check=False)
    assert result.returncode == 2 and message in result.printed


@pytest.mark.slow
def test_scores_and_lengths_are_correlated(tmp_path):
    run_dir = make_run(tmp_path / "run", {"base": ["x" * (i + 1) for i in range(10)]})

    def reply(request):
        return evaluation(len(json.loads(request["messages"][1]["content"])["answer"]))

    with serve(StubJudge(reply)) as url:
        printed = judge(run_dir, url).printed
    assert "rank correlation of the score with the length of the answer: 1.00" in printed


@pytest.mark.slow
def test_an_expected_score_is_the_mean_of_the_judges_own_probabilities(run_dir, tmp_path):
    """A judge of one byte a token whose logits are known."""
    preferences = {'"': 10, "5": 8, "6": 7.5, "1": 7, "}": 6, ",": 6}
    url = start_llama_server(tmp_path, preferences)
    printed = judge(run_dir, url, "--expected_scores", "true", "--temperature", "0", "--max_tokens", "4096").printed
    rows = [row for row in evaluations(run_dir) if row["status"] == "ok"]
    assert rows and all(row["expected"] is not None for row in rows)
    weights = {score: math.exp(preferences.get(str(score), 0)) for score in range(1, 10)}
    expected = sum(score * weight for score, weight in weights.items()) / sum(weights.values())
    assert rows[0]["expected"]["clarity"] == pytest.approx(expected, abs=0.02)
    assert f"expected {expected:.2f}" in printed
    assert load_samples(run_dir)["expected_overall"].max() == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_a_server_without_probabilities_is_said_so(run_dir):
    with serve(StubJudge(evaluation(5))) as url:
        printed = judge(run_dir, url, "--expected_scores", "true").printed
    assert "no log-probabilities from the endpoint" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compare", "base"], "compare takes two models"),
        (["--compare", "base", "base"], "both models are the same"),
        (["--compare", "base", "checkpoint-99"], "no predictions of `checkpoint-99`"),
        (["--compare", "base", "checkpoint-10", "--judges", "a,b"], "compare asks one judge"),
        (["--judges", "a"], "a jury has two or more"),
        (["--judges", "gpt,GPT"], "differ in capitals only"),
        (["--judges", "gpt,x\nWritten to here"], "a name holds a line break"),
        (["--judge_model", "x\x1b[2J"], "a name holds a line break"),
        (["--compare", "../predictions/base", "checkpoint-10"], "no predictions of `../predictions/base`"),
        (["--compare", "base", "checkpoint-10", "--model_name", "base"], "compare names the models itself"),
        (
            ["--collect", "true", "--mode", "batch", "--max_cost", "1", "--prices", "PRICES"],
            "max_cost has no effect with collect",
        ),
        (["--mode", "batch", "--concurrency", "4"], "concurrency has no effect with mode: batch"),
        (["--poll_seconds", "4"], "poll_seconds has no effect without mode: batch"),
        (["--base_url", "http://[::1"], "is no address"),
        (["--base_url", "http:///v1"], "is no address"),
        (["--base_url", "http://한글 x/v1"], "is no address"),
        (["--mode", "batch", "--poll_seconds", "1e300"], "must be at least 0.01 and at most 86400"),
        (["--collect", "true"], "collect has no effect without mode: batch"),
        (["--mode", "batch", "--requests_per_minute", "5"], "requests_per_minute has no effect with mode: batch"),
        (["--max_cost", "0"], "max_cost: must be more than 0"),
        (["--base_url", "localhost:8000"], "is no address"),
        (["--prices", "nowhere.yaml"], "cannot be read"),
        (["--human", "nowhere.csv"], "cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(run_dir, arguments, message):
    with serve(stub := StubJudge(evaluation(5))) as url:
        result = judge(run_dir, url, *arguments, check=False)
    assert result.returncode == 2 and message in result.printed and stub.requests == []


# --- All of it at once ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_answers_with_faults_and_kills(tmp_path, prices):
    """30 % of the replies are faults, and the step is killed twenty times: one row an answer, and nothing paid twice."""
    num_answers, concurrency = 1000, 8
    run_dir = make_run(tmp_path / "run", {"base": [f"answer {i}" for i in range(num_answers)]})
    rng, paid = random.Random(7), Counter()
    faults = [
        (429, {}, {"error": {"message": "slow down"}}), (429, {"Retry-After": "0.05"}, {"error": {"message": "slow"}}),
        (500, {}, {"error": {"message": "down"}}), "hang up", (200, {"Content-Type": "text/html"}, "<html>"),
        {"message": {"refusal": "I cannot."}}, {"finish_reason": "content_filter"}, "10 out of 10!",
        {"finish_reason": "length", "message": {"content": '{"rel'}},
    ]  # fmt: skip

    def reply(request):
        answer = json.loads(request["messages"][1]["content"])["answer"]
        with stub.lock:
            given = rng.choice(faults) if rng.random() < 0.3 else evaluation(rng.randint(1, 10))
            if isinstance(given, dict) or (isinstance(given, str) and given != "hang up"):
                paid[answer] += 1
        return given

    stub = StubJudge(reply)
    arguments = ["--output_dir", run_dir, "--judge_model", "m", "--prices", prices]
    arguments += ["--concurrency", concurrency, "--max_retries", "4"]
    path = run_dir / "qa_evaluation_results" / "base.jsonl"
    with serve(stub) as url:
        environment = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        for _ in range(20):
            wanted = len(stub.requests) + rng.randint(1, 50)
            process = start_step("4_openai_test.py", tmp_path / "printed", *arguments, **environment)
            wait_until(lambda wanted=wanted: len(stub.requests) >= wanted)
            os.kill(process, signal.SIGKILL)
            assert end_step("4_openai_test.py") == -signal.SIGKILL
        assert 100 < sum(1 for _ in iterate_rows(path)) < num_answers
        for _ in range(20):  # what failed is tried again on each start
            status, printed = run_step("4_openai_test.py", tmp_path / "printed", *arguments, **environment)
            assert status == 0 and "Traceback" not in printed
            if "judged 1000 of 1000" in printed:
                break
    rows = read_rows(path)
    assert Counter(row["id"] for row in rows) == {f"sample{i:04d}": 1 for i in range(num_answers)}
    assert {row["status"] for row in rows} == {"ok"}
    replies = sum(row["usage"]["completion_tokens"] for row in rows) // 50
    lost = sum(paid.values()) - replies
    assert 0 <= lost <= 20 * concurrency  # what was in flight when it was killed
    total = sum(row["usage"]["prompt_tokens"] * 1.0 + row["usage"]["completion_tokens"] * 10.0 for row in rows) / 1e6
    assert f"cost of these evaluations: ${total:.6g}" in printed
