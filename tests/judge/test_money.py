"""What judging costs: the plan, the limit, and what is paid for and how often."""

import re
from collections import Counter

import pytest
from conftest import make_run
from judge_runs import ANSWERS, COST, evaluations, judge, write_prices
from judge_servers import StubJudge, evaluation, serve


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


@pytest.fixture
def prices(tmp_path):
    return write_prices(tmp_path)


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
        assert "--max_cost 0.02: some requests were not sent" in printed
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
