"""Step 4 against a real OpenAI-compatible server, and against a stub for what that cannot do."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter

import pytest
from conftest import ROOT, command, end_step, make_run, run_step, start_step, wait_until
from judge_runs import ANSWERS, COST, evaluations, judge, write_prices
from judge_servers import StubJudge, evaluation, serve, start_llama_server

from finetuning.interrupts import SoftStop
from finetuning.judge.form import Evaluation
from finetuning.report.samples import load_samples
from finetuning.results import iterate_rows, read_rows

CRITERIA = list(Evaluation.model_fields)


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


@pytest.fixture
def prices(tmp_path):
    return write_prices(tmp_path)


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compare", "base"], "compare takes two different models"),
        (["--compare", "base", "base"], "compare takes two different models"),
        (["--compare", "base", "checkpoint-99"], "no predictions of `checkpoint-99`"),
        (["--compare", "base", "checkpoint-10", "--judges", "a,b"], "judges has no effect with compare"),
        (["--judges", "a"], "a jury has two or more"),
        (["--judges", "gpt,GPT"], "differ in capitals only"),
        (["--judges", "gpt,x\nWritten to here"], "a name holds a line break"),
        (["--judge_model", "x\x1b[2J"], "a name holds a line break"),
        (["--compare", "../predictions/base", "checkpoint-10"], "no predictions of `../predictions/base`"),
        (["--compare", "base", "checkpoint-10", "--model_name", "base"], "model_name has no effect with compare"),
        (
            ["--collect", "true", "--mode", "batch", "--max_cost", "1", "--prices", "PRICES"],
            "max_cost contradicts collect",
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
