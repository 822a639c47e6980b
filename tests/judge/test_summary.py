"""What the rows of a judge amount to: pairs, juries, people, lengths and probabilities."""

import json
import math
from collections import Counter

import krippendorff
import numpy as np
import pytest
import scipy.stats
from conftest import make_run
from judge_runs import ANSWERS, evaluations, judge
from judge_servers import StubJudge, completion, evaluation, serve, start_llama_server

from finetuning.report.samples import load_samples
from finetuning.results import read_rows


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": ["no"] * 3, "checkpoint-10": ANSWERS})


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


@pytest.mark.slow
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
