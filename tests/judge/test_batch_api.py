"""Step 4 through the Batch API: its whole life, and what can go wrong in it, against a stub of ours."""

import json
import os
import signal
import time
from collections import Counter
from types import SimpleNamespace

import judge_runs
import pytest
from conftest import end_step, make_run, run_step, start_step, wait_until
from judge_runs import ANSWERS, evaluations, write_prices
from judge_servers import StubBatches, StubJudge, evaluation, serve

from finetuning.endpoint import find_endpoint
from finetuning.errors import InputError
from finetuning.judge.batch_api import BatchApi
from finetuning.judge.batch_files import (
    PendingBatch,
    check_pending,
    list_batches,
    pending_items,
    spent_on,
    write_batches,
)
from finetuning.judge.form import Evaluation
from finetuning.judge.rows import make_reply
from finetuning.report.samples import load_samples
from finetuning.results import read_rows

pytestmark = pytest.mark.slow
STEP = "4_openai_test.py"
COST = judge_runs.COST / 2  # of each reply of the stub
PAGE = (200, {"Content-Type": "text/html"}, "<html>log in</html>")
CUT_OFF = {"finish_reason": "length", "message": {"content": '{"rel'}}


@pytest.fixture
def run_dir(tmp_path):
    write_prices(tmp_path)
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


def arguments_for(run_dir, *args) -> list:
    common = ["--output_dir", run_dir, "--mode", "batch"]
    common += [] if "--judges" in args else ["--judge_model", "m"]
    common += [] if "--collect" in args else ["--poll_seconds", "0.05"]
    return [*common, "--prices", run_dir.parent / "prices.yaml", "--max_retries", "1", *args]


def judge(run_dir, url: str, *args, check: bool = True):
    environment = {"OPENAI_API_KEY": "sk-test-1234567890", "OPENAI_BASE_URL": url}
    status, printed = run_step(STEP, run_dir.with_name("printed"), *arguments_for(run_dir, *args), **environment)
    if check:
        assert status == 0, printed
    assert "Traceback" not in printed and "sk-test" not in printed
    return SimpleNamespace(returncode=status, printed=printed)


def states(run_dir):
    folder = run_dir / "qa_evaluation_results" / "batches"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def answer_of(request: dict) -> str:
    return json.loads(request["messages"][1]["content"])["answer"]


def test_a_batch_gives_the_rows_that_live_judging_gives(run_dir, tmp_path):
    def reply(request):
        answer = answer_of(request)
        return evaluation(1 + int(answer[-1])) if answer[-1].isdecimal() else {"message": {"refusal": "I cannot."}}

    live_dir = make_run(tmp_path / "live", {"checkpoint-10": ANSWERS})
    with serve(StubJudge(reply)) as url:
        arguments = ["--output_dir", live_dir, "--judge_model", "m"]
        run_step(STEP, tmp_path / "printed", *arguments, OPENAI_API_KEY="x", OPENAI_BASE_URL=url)
    with serve(stub := StubBatches(reply)) as url:
        printed = judge(run_dir, url).printed
    assert len(stub.batches) == 2 and len(stub.requests) == 9  # one for each model
    by_id = {row["id"]: row for row in evaluations(run_dir)}
    for row in evaluations(live_dir):
        same = ("prediction_hash", "status", "evaluation", "usage", "error")
        assert {key: row[key] for key in same} == {key: by_id[row["id"]][key] for key in same}
    assert Counter(row["status"] for row in evaluations(run_dir, "base")) == {"refusal": 3}
    assert f"cost of these evaluations: ${9 * COST:.6g}" in printed
    assert load_samples(run_dir)["overall"].notna().sum() == 6
    assert [state["status"] for state in states(run_dir)] == ["collected", "collected"]
    assert sorted(stub.deleted) == sorted(stub.files)  # and nothing of it at the endpoint
    assert not list(
        (run_dir / "qa_evaluation_results" / "batches").glob("*.jsonl")
    )  # nothing of it is left but its record


def test_the_same_answer_is_in_one_batch_only(tmp_path):
    write_prices(tmp_path)
    run_dir = make_run(tmp_path / "run", {"base": ["a", "b", "c"], "checkpoint-10": ["a", "b", "d"]})
    with serve(stub := StubBatches(evaluation(6))) as url:
        printed = judge(run_dir, url).printed
        judge(run_dir, url)
    assert len(stub.requests) == 4 and f"cost of these evaluations: ${4 * COST:.6g}" in printed
    assert [row.get("shared_with") for row in sorted(evaluations(run_dir), key=lambda row: row["id"])] == [
        "base",
        "base",
        None,
    ]


def test_what_a_batch_cannot_read_goes_into_a_second_one_with_a_larger_limit(run_dir):
    with serve(stub := StubBatches(cut_off_at_first)) as url:
        judge(run_dir, url, "--max_tokens", "100", "--model_name", "checkpoint-10")
    assert len(stub.batches) == 2 and len(stub.requests) == 12
    rows = evaluations(run_dir)
    assert len(rows) == 6 and {row["status"] for row in rows} == {"ok"}
    assert {row["usage"]["completion_tokens"] for row in rows} == {100}  # both replies were paid for


def test_an_expired_batch_keeps_what_it_has_and_the_next_start_sends_the_rest(run_dir):
    def reply(request):
        return evaluation(6) if answer_of(request)[-1] in "012" else "unanswered"

    with serve(stub := StubBatches(reply, ends=("expired", "completed"))) as url:
        printed = judge(run_dir, url, "--model_name", "checkpoint-10").printed
        assert "expired, 6 of 6 requests have a reply" in printed and "judged 3 of 6" in printed
        assert Counter(row["status"] for row in evaluations(run_dir)) == {"ok": 3, "error": 3}
        assert "before it expired" in printed
        stub.replies = [evaluation(5)]
        assert "judged 6 of 6" in judge(run_dir, url, "--model_name", "checkpoint-10").printed
    assert [state["num_requests"] for state in sorted(states(run_dir), key=lambda s: s["created"])] == [6, 3]


def test_requests_that_failed_in_a_batch_are_errors_of_their_samples(run_dir):
    def reply(request):
        return evaluation(6) if answer_of(request)[-1] != "4" else (400, {}, {"error": {"message": "too long"}})

    with serve(StubBatches(reply)) as url:
        printed = judge(run_dir, url, "--model_name", "checkpoint-10").printed
    assert Counter(row["status"] for row in evaluations(run_dir)) == {"ok": 5, "error": 1}
    assert "too long" in printed


def test_a_batch_that_was_refused_says_why_and_is_sent_anew(run_dir):
    with serve(stub := StubBatches(evaluation(6), ends=("failed", "completed"))) as url:
        result = judge(run_dir, url, check=False)
        assert result.returncode == 2 and "line 1 is no JSON" in result.printed
        judge(run_dir, url)
    assert len(stub.batches) == 3 and len(evaluations(run_dir)) == 6


def test_a_cancelled_batch_keeps_what_was_done(run_dir):
    with serve(StubBatches(evaluation(6), ends=("cancelled",))) as url:
        assert "cancelled, 6 of 6" in judge(run_dir, url).printed


def start_and_leave(run_dir, stub, url, *args, by: int = signal.SIGINT) -> None:
    """Start step 4, and end it by a signal once its batches are submitted and one has been looked at."""
    wanted = len(stub.batches) + 1
    environment = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
    process = start_step(STEP, run_dir.with_name("printed"), *arguments_for(run_dir, *args), **environment)
    wait_until(lambda: len(stub.batches) >= wanted and stub.num_looks)
    os.kill(process, by)
    assert end_step(STEP) == (-by if by == signal.SIGKILL else 128 + by)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_can_be_collected_later(run_dir, by):
    stub = StubBatches(evaluation(6), looks=10_000)
    with serve(stub) as url:
        start_and_leave(run_dir, stub, url, by=by)
        assert "the same command goes on" in run_dir.with_name("printed").read_text()
        printed = judge(run_dir, url, "--collect", "true").printed
        assert "in_progress; start with --collect true again later" in printed and evaluations(run_dir) == []
        stub.looks = 0
        assert "judged 6 of 6" in judge(run_dir, url, "--collect", "true").printed
    assert len(stub.batches) == 2 and len(evaluations(run_dir)) == 6


def test_what_overwrites_in_a_batch_goes_on_without_overwriting_again(run_dir):
    stub = StubBatches(evaluation(6), looks=10_000)
    with serve(stub) as url:
        start_and_leave(run_dir, stub, url, "--overwrite", "true")
        assert "the same command without --overwrite goes on" in run_dir.with_name("printed").read_text()
        stub.looks = 0
        assert "judged 6 of 6" in judge(run_dir, url).printed
    assert len(stub.batches) == 2 and len(stub.requests) == 9


def cut_off_at_first(request):
    return evaluation(6) if request["max_completion_tokens"] == 200 else CUT_OFF


def test_what_a_batch_of_an_earlier_start_cannot_read_goes_into_a_second_one_too(tmp_path):
    """Also where another model gave the same answer, which waits for the first one's batch."""
    write_prices(tmp_path)
    run_dir = make_run(tmp_path / "run", {"base": [*ANSWERS[:3], "a", "b", "c"], "checkpoint-10": ANSWERS})
    arguments = ["--max_tokens", "100"]
    with serve(stub := StubBatches(cut_off_at_first, looks=10_000)) as url:
        start_and_leave(run_dir, stub, url, *arguments, "--model_name", "checkpoint-10", by=signal.SIGKILL)
        stub.looks = 0
        printed = judge(run_dir, url, *arguments).printed
    assert "checkpoint-10: judged 6 of 6" in printed and "base: judged 6 of 6" in printed
    sent = Counter((answer_of(request), request["max_completion_tokens"]) for request in stub.requests)
    assert sent == {(answer, limit): 1 for answer in (*ANSWERS, "a", "b", "c") for limit in (100, 200)}
    assert {row["shared_with"] for row in evaluations(run_dir, "base") if "shared_with" in row} == {"checkpoint-10"}


def test_a_kill_while_rows_are_written_leaves_the_second_batch_to_the_next_start(run_dir):
    arguments = ["--max_tokens", "100", "--model_name", "checkpoint-10"]
    with serve(stub := StubBatches(cut_off_at_first, looks=10_000)) as url:
        start_and_leave(run_dir, stub, url, *arguments, by=signal.SIGKILL)
        folder = run_dir / "qa_evaluation_results"
        (items,) = (folder / "batches").glob("*.items.jsonl")
        rows = [
            {**item["row"], **make_reply("truncated", None, '{"rel'), "custom_id": item["custom_id"]}
            for item in read_rows(items)
        ]
        (folder / "checkpoint-10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stub.looks = 0
        assert "judged 6 of 6" in judge(run_dir, url, *arguments).printed
    assert len(stub.batches) == 2 and len(stub.requests) == 12


@pytest.mark.parametrize("moment", ["files", "batches", "look", "content"])
def test_a_kill_at_any_step_of_a_batch_submits_nothing_twice(run_dir, moment):
    """The step is killed right after the endpoint has done what was asked, and before it has heard of it."""
    reached = []

    class Slow(StubBatches):
        def post(self, path, body):
            reply = super().post(path, body)
            return self.pause(path.split("/")[-1], reply)

        def get(self, path):
            reply = super().get(path)
            kind = "content" if path.endswith("content") else "look" if "/batches/" in path else "list"
            return self.pause(kind, reply)

        def pause(self, kind, reply):
            if kind == moment and not reached:
                reached.append(kind)
                time.sleep(1.5)
            return reply

    with serve(stub := Slow(evaluation(6))) as url:
        environment = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        process = start_step(STEP, run_dir.with_name("printed"), *arguments_for(run_dir), **environment)
        wait_until(lambda: reached)
        os.kill(process, signal.SIGKILL)
        assert end_step(STEP) == -signal.SIGKILL
        assert "judged 6 of 6" in judge(run_dir, url).printed
    assert len(stub.batches) == 2 and len(stub.requests) == 9
    assert Counter(row["id"] for row in evaluations(run_dir)) == {f"sample{i:04d}": 1 for i in range(6)}


def test_a_kill_while_rows_are_written_doubles_none(run_dir):
    """What a kill leaves between the third row and the last: the replies are there, and so are three rows."""
    with serve(stub := StubBatches(evaluation(6))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10")
        (state,) = (run_dir / "qa_evaluation_results" / "batches").glob("*.json")
        state.write_text(json.dumps({**json.loads(state.read_text()), "status": "downloaded"}))
        items = [
            {
                "custom_id": f"{state.stem.split('.')[1]}-{i}",
                "row": {key: row[key] for key in ("id", "prediction_hash")},
            }
            for i, row in enumerate(sorted(evaluations(run_dir), key=lambda row: row["id"]))
        ]
        state.with_suffix(".items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        state.with_suffix(".output.jsonl").write_text(
            stub.files[stub.batches["batch-0"]["output_file_id"]].decode() + "\n"
        )
        path = run_dir / "qa_evaluation_results" / "checkpoint-10.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
        assert "judged 6 of 6" in judge(run_dir, url, "--model_name", "checkpoint-10").printed
    assert len(stub.batches) == 1
    rows = evaluations(run_dir)
    assert Counter(row["id"] for row in rows) == {f"sample{i:04d}": 1 for i in range(6)}
    assert {row["usage"]["completion_tokens"] for row in rows} == {50}


def test_an_answer_that_changed_meanwhile_is_not_given_the_old_reply(run_dir):
    stub = StubBatches(evaluation(6), looks=10_000)
    with serve(stub) as url:
        start_and_leave(run_dir, stub, url, by=signal.SIGKILL)
        path = run_dir / "predictions" / "checkpoint-10.jsonl"
        path.write_text(path.read_text().replace("asks question 3", "asks question 33"))
        stub.looks = 0
        assert "judged 5 of 6" in judge(run_dir, url, "--collect", "true").printed
        assert "judged 6 of 6" in judge(run_dir, url).printed
    assert len(stub.batches) == 3
    rows = evaluations(run_dir)
    assert len(rows) == 6 and sum(row["usage"]["completion_tokens"] for row in rows) == 7 * 50  # all that was paid for


def test_a_start_about_other_models_leaves_a_batch_alone(run_dir):
    with serve(stub := StubBatches(evaluation(6), looks=10_000)) as url:
        start_and_leave(run_dir, stub, url, "--model_name", "checkpoint-10")
        stub.looks = 0
        judge(run_dir, url, "--model_name", "base")
        assert evaluations(run_dir) == [] and len(evaluations(run_dir, "base")) == 3
        assert "judged 6 of 6" in judge(run_dir, url).printed
    assert len(stub.batches) == 2 and len(stub.requests) == 9


def test_a_batch_under_other_conditions_is_not_mixed_in(run_dir):
    with serve(stub := StubBatches(evaluation(6), looks=10_000)) as url:
        start_and_leave(run_dir, stub, url, "--model_name", "checkpoint-10")
        result = judge(run_dir, url, "--judge_language", "ko", check=False)
        assert (
            result.returncode == 2 and "a batch is under way for checkpoint-10 under other conditions" in result.printed
        )
        live = ["--output_dir", run_dir, "--judge_model", "m", "--model_name", "checkpoint-10"]
        status, printed = run_step(STEP, run_dir.with_name("printed"), *live, OPENAI_API_KEY="x", OPENAI_BASE_URL=url)
        assert status == 2 and "a batch is under way for checkpoint-10" in printed and "--mode batch" in printed
        stub.looks = 0
        assert "given up" in judge(run_dir, url, "--judge_language", "ko", "--overwrite", "true").printed
    assert stub.batches["batch-0"]["status"] == "cancelled" and len(evaluations(run_dir)) == 6
    assert "평가" in stub.requests[-1]["messages"][0]["content"]


def test_a_batch_that_is_given_up_and_cannot_be_cancelled_is_said_to_go_on(run_dir):
    class Busy(StubBatches):
        def post(self, path, body):
            return (500, {}, "busy") if path.endswith("/cancel") else super().post(path, body)

    with serve(stub := Busy(evaluation(6), looks=10_000)) as url:
        start_and_leave(run_dir, stub, url, "--model_name", "checkpoint-10")
        stub.looks = 0
        printed = judge(run_dir, url, "--model_name", "checkpoint-10", "--overwrite", "true").printed
    assert "could not be cancelled (InternalServerError" in printed and "so it may go on and cost more" in printed
    assert stub.batches["batch-0"]["status"] != "cancelled"


@pytest.mark.parametrize("listed", [PAGE[2], {"object": "list", "data": [5]}])
def test_an_upload_that_is_given_up_and_cannot_be_looked_for_is_said_to_go_on(run_dir, listed):
    class Cut(StubBatches):
        """Loses what is submitted, and gives something else than a list of batches."""

        loses = True

        def post(self, path, body):
            return "hang up" if self.loses and path.endswith("/batches") else super().post(path, body)

        def get(self, path):
            return listed if path.split("?")[0].endswith("/batches") else super().get(path)

    with serve(stub := Cut(evaluation(6))) as url:
        assert judge(run_dir, url, "--model_name", "checkpoint-10", check=False).returncode == 2
        assert [state["status"] for state in states(run_dir)] == ["uploaded"]
        stub.loses = False
        printed = judge(run_dir, url, "--model_name", "checkpoint-10", "--overwrite", "true").printed
    assert "given up; but it could not be cancelled" in printed and len(evaluations(run_dir)) == 6


def test_a_reply_in_a_batch_that_does_not_say_what_it_used_counts_with_the_most(run_dir):
    class Silent(StubBatches):
        def end(self, batch):
            super().end(batch)
            self.files = {name: content.replace(b'"usage"', b'"usages"') for name, content in self.files.items()}

    models = ["--model_name", "checkpoint-10", "--max_tokens", "100"]
    with serve(Silent(evaluation(6))) as url:
        judge(run_dir, url, *models, "--max_cost", "1")
    rows = evaluations(run_dir)
    assert len(rows) == 6 and all(row["cost"] is None and row["possible_cost"] > 100 * 5 / 1e6 for row in rows)
    assert sum(row["possible_cost"] for row in rows) < 1


def test_a_submission_whose_answer_is_lost_is_found_and_not_repeated(run_dir):
    class Cut(StubBatches):
        def post(self, path, body):
            reply = super().post(path, body)
            return "hang up" if path.endswith("/batches") and len(self.batches) == 1 else reply

    with serve(stub := Cut(evaluation(6))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10")
    assert len(stub.batches) == 1 and len(evaluations(run_dir)) == 6


def test_a_kill_during_the_second_batch_makes_no_third(run_dir):
    class Slow(StubBatches):
        def look_at(self, batch):
            return batch if batch["id"] == "batch-1" and self.looks == 2 else super().look_at(batch)

    with serve(stub := Slow(CUT_OFF)) as url:
        arguments = ["--model_name", "checkpoint-10", "--max_tokens", "100"]
        environment = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url}
        process = start_step(STEP, run_dir.with_name("printed"), *arguments_for(run_dir, *arguments), **environment)
        wait_until(lambda: len(stub.batches) == 2)
        os.kill(process, signal.SIGKILL)
        end_step(STEP)
        stub.looks = 1
        judge(run_dir, url, *arguments)
    assert len(stub.batches) == 2
    assert {(row["status"], row["usage"]["completion_tokens"]) for row in evaluations(run_dir)} == {("truncated", 100)}


@pytest.mark.parametrize("body", ["<html>busy</html>", {"error": "too long"}, {"error": None}, None, 7], ids=str)
def test_odd_lines_of_a_batch_are_errors_of_their_samples(run_dir, body):
    with serve(StubBatches((500, {}, body), evaluation(6))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10")
    assert Counter(row["status"] for row in evaluations(run_dir)) == {"ok": 5, "error": 1}


def test_a_reply_with_what_the_client_does_not_know_is_read(run_dir):
    class Newer(StubBatches):
        def end(self, batch):
            super().end(batch)
            self.files = {
                name: content.replace(b'"id": "x"', b'"service_tier": "of next year", "id": "x"')
                for name, content in self.files.items()
            }

    with serve(Newer(evaluation(6))) as url:
        judge(run_dir, url, "--model_name", "checkpoint-10")
    assert {row["status"] for row in evaluations(run_dir)} == {"ok"}


def test_the_limit_of_money_holds_for_batches(run_dir):
    with serve(stub := StubBatches(evaluation(6))) as url:
        printed = judge(run_dir, url, "--max_cost", "0.012", "--max_tokens", "100").printed
        assert "--max_cost 0.012: some requests were not sent" in printed
        sent = len(stub.requests)
        assert 0 < sent < 9 and sent * COST <= 0.012
        judge(run_dir, url, "--max_cost", "1", "--max_tokens", "100")
    assert len(stub.requests) == 9


def test_a_jury_and_a_comparison_go_in_batches_too(run_dir):
    with serve(stub := StubBatches(evaluation(6))) as url:
        judge(run_dir, url, "--judges", "m,n", "--model_name", "checkpoint-10")
        assert Counter(request["model"] for request in stub.requests) == {"m": 6, "n": 6} and len(stub.batches) == 2
        stub.replies = [json.dumps({"explanation": "so", "better": "first"})]
        printed = judge(run_dir, url, "--compare", "base", "checkpoint-10").printed
    assert len(stub.batches) == 3 and "flip rate 100%" in printed
    assert {row["evaluation"]["clarity"]["score"] for row in evaluations(run_dir)} == {6}


class WithoutBatches(StubBatches):
    """Judges live, and answers what is asked of the Batch API with `refusal`, at a path that ends in `where`."""

    where, refusal = "/files", None

    def post(self, path, body):
        return self.refusal if path.endswith(self.where) else super().post(path, body)


def test_a_batch_that_was_never_submitted_does_not_stand_in_the_way_of_live_judging(run_dir):
    refusals = {
        (404, "no such path"): "has no Batch API",
        (405, "<html>not allowed</html>"): "has no Batch API",
        (501, "not implemented"): "has no Batch API",
        PAGE[::2]: "needs no Batch API",
    }
    models = ["--model_name", "checkpoint-10"]
    with serve(stub := WithoutBatches(evaluation(6))) as url:
        for (status, text), said in refusals.items():
            stub.refusal = (status, {"Content-Type": "text/html"}, text)
            result = judge(run_dir, url, *models, check=False)
            assert result.returncode == 2 and said in result.printed and "--mode live" in result.printed
        refused = judge(run_dir, "http://127.0.0.1:9/v1", *models, check=False)
        assert refused.returncode == 2 and "All connection attempts failed" in refused.printed
        stub.where, stub.refusal = "/batches", (404, {}, {"error": {"message": "no such path"}})
        result = judge(run_dir, url, *models, check=False)
        assert result.returncode == 2 and "has no Batch API" in result.printed and stub.deleted == ["file-0"]
        live = ["--output_dir", run_dir, "--judge_model", "m", *models]
        status, printed = run_step(STEP, run_dir.with_name("printed"), *live, OPENAI_API_KEY="x", OPENAI_BASE_URL=url)
        assert status == 0 and "never submitted" in printed and "under way" not in printed
    assert len(stub.requests) == 6 and {row["status"] for row in evaluations(run_dir)} == {"ok"}
    assert {state["status"] for state in states(run_dir)} == {"given up"}


def test_a_batch_that_was_never_submitted_is_written_anew_under_the_limit_of_this_start(run_dir):
    with serve(stub := WithoutBatches(evaluation(6))) as url:
        stub.refusal = (404, {}, "no")
        judge(run_dir, url, "--judge_language", "ko", check=False)
        stub.where = "/nowhere"
        assert "judged 2 of 2" in judge(run_dir, url, "--model_name", "checkpoint-10", "--limit", "2").printed
    assert len(stub.requests) == 2


@pytest.fixture
def pending(tmp_path):
    """A batch of one request that is written, and the job that it is of."""
    identity = {"judge_model": "m"}
    job = SimpleNamespace(name="base", path=tmp_path / "base.jsonl", identity=identity)
    item = SimpleNamespace(row={"id": "sample0000", "prediction_hash": "0"})
    (batch,) = write_batches(job, [(item, {"model": "m"}, 0.01)], attempt=1)
    return batch, job


def connect(url: str, timeout: float = 120) -> BatchApi:
    return BatchApi(find_endpoint(url, timeout), max_retries=0)


class Dripping(StubBatches):
    """Sends what is asked for at a path that ends in `where` a byte at a time."""

    where = ""

    def get(self, path):
        return "drip" if path.split("?")[0].endswith(self.where) else super().get(path)

    def post(self, path, body):
        return "drip" if path.endswith(self.where) else super().post(path, body)


def test_each_request_about_a_batch_has_a_deadline_however_slowly_its_reply_comes(pending, monkeypatch):
    monkeypatch.setattr("finetuning.judge.batch_api.WAITS", (0,))
    batch, _ = pending
    with serve(stub := Dripping(evaluation(6), looks=1)) as url, connect(url, timeout=0.3) as api:
        for stub.where, ask in (
            ("/files", api.submit),
            ("/batches", api.submit),  # and may have arrived
            ("/batches", api.submit),  # where it is looked for
            ("nowhere", api.submit),
            ("/batch-0", api.look),
            ("/content", lambda batch: api.download(batch, api.look(batch))),
            ("nowhere", lambda batch: api.download(batch, api.look(batch))),
        ):
            if stub.where == "nowhere":
                ask(batch)
                continue
            with pytest.raises(InputError, match=r"no reply within 0.3 s \(--timeout\). Nothing is lost"):
                ask(batch)
    assert batch.state["status"] == "downloaded" and batch.is_whole()


def test_replies_that_were_deleted_before_they_were_rows_are_fetched_again(run_dir):
    with serve(stub := StubBatches(evaluation(6), "unanswered", looks=10_000)) as url:
        start_and_leave(run_dir, stub, url, "--model_name", "checkpoint-10")
        (path,) = (run_dir / "qa_evaluation_results" / "batches").glob("*[!l].json")
        stub.look_at(dict(stub.batches["batch-0"]))
        stub.looks = 0
        batch = PendingBatch(path, json.loads(path.read_text()))
        with connect(url) as api:
            api.download(batch, api.look(batch))
        batch.output.write_text(batch.output.read_text().splitlines(keepends=True)[0])  # of six
        printed = judge(run_dir, url, "--collect", "true").printed
        assert "completed, 6 of 6 requests have a reply" in printed and "judged 1 of 6" in printed
    assert len(stub.requests) == 6


@pytest.mark.parametrize(
    "reply",
    ["null", "[]", "5", "{}", '{"status": null}', '{"status": "completed", "request_counts": {"completed": "x"}}'],
)
def test_a_reply_that_is_no_batch_is_not_waited_for(pending, reply):
    batch, _ = pending
    with serve(stub := StubBatches(evaluation(6), looks=1)) as url, connect(url) as api:
        api.submit(batch)
        stub.get = lambda path: reply
        with pytest.raises(InputError, match="cannot be used now: .*Nothing is lost"):
            api.wait(batch)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "submitted", "endpoint": "x"}, "it is submitted and has no `batch_id`"),
        ({"status": "downloaded", "endpoint": "x", "batch_id": "b"}, "it is downloaded and has no `ended`"),
        ({"status": "uploaded"}, "it is uploaded and has no `endpoint`"),
        ({"status": "on its way"}, "`status`"),
        ({"num_requests": -1}, "`num_requests`"),
    ],
)
def test_a_record_of_a_batch_that_nothing_can_be_made_of_is_named(pending, changes, said):
    batch, job = pending
    batch.record(**changes)
    with pytest.raises(InputError, match=f"{batch.path} cannot be read: .*{said}.*delete it: the answers of its batch"):
        list_batches(job.path)


@pytest.mark.parametrize("line", ["{}", '{"custom_id": [], "row": {}}', '{"custom_id": "a", "row": {"id": "x"}}'])
def test_items_of_a_batch_that_name_nothing_are_named(pending, line):
    batch, _ = pending
    batch.items.write_text(line + "\n")
    with pytest.raises(InputError, match=f"{batch.items}:1 .*custom_id|{batch.items}:1 .*prediction_hash"):
        batch.read_items()


@pytest.mark.parametrize(
    ("reply", "status"),
    [("hang up", "uploaded"), ((502, {}, "bad gateway"), "uploaded"), ((405, {}, "no"), "written"), (PAGE, "written"),
     ((400, {}, {"error": {"message": "no"}}), "written")],
    ids=str,
)  # fmt: skip
def test_a_submission_counts_unless_it_was_surely_refused(pending, monkeypatch, reply, status):
    monkeypatch.setattr("finetuning.judge.batch_api.WAITS", (0, 0))
    batch, job = pending
    stub = WithoutBatches(evaluation(6))
    stub.where, stub.refusal = "/batches", reply
    with serve(stub) as url, connect(url) as api, pytest.raises(InputError):
        api.submit(batch)
    assert batch.state["status"] == status
    assert len(pending_items(job.path)) == (status == "uploaded") and spent_on(job.path) == 0.01 * (
        status == "uploaded"
    )
    if status == "uploaded":
        with pytest.raises(InputError, match="a batch is under way for base; go on with it"):
            check_pending([job], live=True)
    else:
        check_pending([job], live=True)


def test_a_batch_that_is_lost_or_damaged_is_named_with_the_way_out(pending):
    batch, job = pending
    with serve(StubBatches(evaluation(6))) as url, connect(url) as api:
        api.submit(batch)
        with (
            serve(StubBatches(evaluation(6))) as other,
            connect(other) as elsewhere,
            pytest.raises(InputError, match=f"under way at {url}.*{other}"),
        ):
            elsewhere.look(batch)
        batch.record(batch_id="batch-7")
        with pytest.raises(InputError, match=f"does not know the batch batch-7 .*delete {batch.path}: its answers"):
            api.look(batch)
    batch.items.unlink()
    with pytest.raises(InputError, match=f"names 0 of the 1 requests.*delete {batch.path}"):
        pending_items(job.path)
    for text in ('{"status": "subm', "{}", '{"status": "submitted"}'):
        batch.path.write_text(text)
        with pytest.raises(InputError, match=f"{batch.path}.*or delete it: the answers of its batch are judged again"):
            list_batches(job.path)


def test_criteria_of_a_batch_are_those_of_the_rubric(run_dir, tmp_path):
    (tmp_path / "tone.yaml").write_text("warmth: It is friendly.\n")
    reply = json.dumps({"warmth": {"explanation": "so", "score": 3}})
    with serve(StubBatches(reply)) as url:
        judge(run_dir, url, "--rubric", tmp_path / "tone.yaml")
    assert list(evaluations(run_dir)[0]["evaluation"]) == ["warmth"] != list(Evaluation.model_fields)
