"""Requests to a judge: rates, faults and keys, against a stub that has them."""

import asyncio
import base64
import email.utils
import json
import re
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from conftest import make_run
from judge_runs import ANSWERS, evaluations, judge, write_prices
from judge_servers import StubJudge, completion, evaluation, serve

from finetuning.endpoint import read_retry_after
from finetuning.judge.rate import RateControl, RateLimits


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


@pytest.fixture
def prices(tmp_path):
    return write_prices(tmp_path)


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
        rate = RateControl(RateLimits(8, None, 60_000))  # a thousand a second
        started = time.monotonic()
        for _ in range(num_requests):
            await rate.leave(expected)
            rate.correct_tokens(expected, used)
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
