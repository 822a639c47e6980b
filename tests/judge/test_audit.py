"""The audit of a judge, on judges of known worth, and what it is made of."""

import json

import pytest
from conftest import make_run
from judge_runs import COST, judge, write_prices
from judge_servers import StubBatches, StubJudge, evaluation, serve, start_llama_server

from finetuning.judge.audit import build_texts, measure_preferences
from finetuning.report.__main__ import ScoreArguments, main
from finetuning.resampling import bootstrap_interval, share_interval
from finetuning.results import read_rows

DIALOGUE = "Summarise.\n#Person1#: Hello!\n#Person2#: Hi."
TRUE = [f"#Person1# sells #Person2# a house with {i + 1} rooms." for i in range(11)] + ["They talk about the weather."]


@pytest.fixture
def run_dir(tmp_path):
    """Twelve samples of two references; the last one names no speakers, so there are none to swap."""
    run = make_run(tmp_path / "run", {"base": ["A house."] * 12, "checkpoint-10": TRUE})
    for path in (run / "predictions").glob("*.jsonl"):
        rows = read_rows(path)
        for row, text in zip(rows, TRUE, strict=True):
            row |= {"messages": [{"role": "user", "content": DIALOGUE}], "references": [text, f"Somebody else: {text}"]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def read_audit(run, name="m"):
    return json.loads((run / "qa_evaluation_results" / "audit" / name / "reference.json").read_text())


def knowing(request):
    """A judge that knows the references: 9 for one of them, 3 for all else."""
    material = json.loads(request["messages"][1]["content"])
    return evaluation(9 if f"Somebody else: {material['answer']}" in material["references"] else 3)


@pytest.mark.parametrize(
    "text, dialogue, swapped",
    [
        ("#Person1# asks #Person2# to stay.", DIALOGUE, "#Person2# asks #Person1# to stay."),
        ("#Person2#에게 #Person1#이 묻는다.", DIALOGUE, "#Person1#에게 #Person2#이 묻는다."),
        ("Ann visits Ann Lee.", "Ann: Hi\nAnn Lee: Hello", "Ann Lee visits Ann."),
        ("민수가 영희에게 묻는다.", "민수: 응\n영희: 응", "영희가 민수에게 묻는다."),
        ("#Person1# and #Person2# talk.", DIALOGUE, None),  # is as true the other way round
        ("#Person1# and #Person2# talk, until #Person1# leaves.", DIALOGUE, "#Person2# and #Person1# talk, until #Person2# leaves."),
        ("#Person1# asks Ms. Dawson to stay.", DIALOGUE, None),  # who may be anyone
        ("Annabel asks Bob.", "Ann: Hi\nBob: Hello", None),
        ("Ann asks Bob about Eve.", "Ann: Hi\nBob: Hello\nEve: No", None),
        ("It rains.", "no dialogue", None),
    ],
)  # fmt: skip
def test_speakers_are_swapped_where_that_makes_a_text_untrue(text, dialogue, swapped):
    row = {"id": "a", "messages": [{"role": "user", "content": dialogue}], "references": [text]}
    assert [made["prediction"] for made in build_texts({"a": row}, None)["swapped"]] == [swapped] * (
        swapped is not None
    )


@pytest.mark.parametrize(
    "text, half",
    [
        ("Ann asks, and Bob says no.", "Ann asks, and."),
        ("Ann asks Bob, who says no!", "Ann asks Bob!"),
        ("Ann asks and\n Bob answers her", "Ann asks and"),
        ("Ann asks Bob.", None),
        ("Ann is here. Bob is not.", "Ann is here."),
    ],
)
def test_a_half_ends_as_the_whole_does(text, half):
    row = {"id": "a", "messages": [], "references": [text]}
    assert [made["prediction"] for made in build_texts({"a": row}, None)["half"]] == [half] * (half is not None)


def test_the_other_reference_is_the_next_one_that_is_another():
    references = {"c": ["x"], "a": ["x", "y"], "b": ["y"], "d": [], "e": [" "]}
    rows = {key: {"id": key, "messages": [], "references": its} for key, its in references.items()}
    texts = build_texts(rows, None)
    assert {row["id"]: row["prediction"] for row in texts["other"]} == {"b": "x", "c": "y"}  # a has x and y itself
    assert {row["id"]: row["references"] for row in texts["reference"]} == {"a": ["y"], "b": ["y"], "c": ["x"]}
    assert [row["id"] for row in build_texts(rows, {"b", "d"})["other"]] == ["b"]


def test_a_preference_is_a_share_in_which_a_tie_is_one_half():
    true = {str(i): 5.0 for i in range(20)}
    other = {
        str(i): 4.0 if i < 12 else 6.0 if i < 15 else 5.0 + 1e-9 for i in range(19)
    }  # 12 higher, 3 lower, 4 the same
    found = measure_preferences(
        {"reference": true, "other": other, "half": {str(i): 4.0 for i in range(20)}, "swapped": {}}
    )
    low, high = bootstrap_interval([1.0] * 12 + [0.0] * 3 + [0.5] * 4)
    assert found["other"] == {"value": pytest.approx(14 / 19), "low": low, "high": high, "num_samples": 19}
    assert (found["half"]["low"], found["half"]["high"]) == share_interval([1] * 20) and "swapped" not in found
    tie = measure_preferences({"reference": {"a": 5.0}, "half": {"a": 5.0}})["half"]
    assert (tie["value"], tie["low"], tie["high"]) == (0.5, 0, 1)


@pytest.mark.slow
def test_an_audit_asks_for_what_is_missing_and_is_counted_before(run_dir, tmp_path):
    prices = write_prices(tmp_path)
    with serve(stub := StubJudge(knowing)) as url:
        planned = judge(run_dir, url, "--audit", "true", "--dry_run", "true").printed
        assert "plan for m: 47 requests" in planned and not stub.requests  # 4 texts of 12 samples, one without speakers
        judge(run_dir, url, "--audit", "true", "--limit", "5", "--prices", prices)
        assert len(stub.requests) == 4 * 5
        judge(run_dir, url, "--audit", "true", "--max_cost", str(30 * COST), "--prices", prices, "--max_tokens", "50", "--concurrency", "1")  # fmt: skip
        assert 20 < len(stub.requests) < 47
        printed = judge(run_dir, url, "--audit", "true").printed
        assert len(stub.requests) == 47 and "which 1 samples cannot have" in printed
        assert "nothing is missing" in judge(run_dir, url, "--audit", "true", "--dry_run", "true").printed
        judge(run_dir, url)  # in the same words, of the answers
    assert len({request["messages"][0]["content"] for request in stub.requests}) == 1
    assert read_audit(run_dir)["preferred"]["score"]["swapped"]["num_samples"] == 11


@pytest.mark.slow
def test_a_judge_that_knows_the_references_passes_and_ranks(run_dir, capsys):
    with serve(StubBatches(knowing)) as url:
        printed = judge(run_dir, url, "--audit", "true", "--mode", "batch", "--poll_seconds", "0.01").printed
        judge(run_dir, url)
    low, _ = share_interval([1] * 12)
    assert f"to `other`; by score in 100.0% of 12 pairs (95 % {low:.1%} to 100.0%)" in printed
    assert {kind: share["value"] for kind, share in read_audit(run_dir)["preferred"]["score"].items()} == {
        "other": 1, "swapped": 1, "half": 1,
    }  # fmt: skip
    main(ScoreArguments(output_dir=[str(run_dir)]))
    printed = capsys.readouterr().out
    assert "Ranked by the judge's overall score" in printed and "Audited without labels, m has passed" in printed
    assert "to itself with its speakers swapped in 100.0% of 11 (95 % " in printed
    assert "Audited without labels, m has passed" in (run_dir / "report.html").read_text()


@pytest.mark.slow
def test_a_judge_that_always_says_5_is_at_chance_and_does_not_rank(run_dir, tmp_path, capsys):
    url = start_llama_server(tmp_path, {'"': 10, "5": 8, "}": 6, ",": 6})
    printed = judge(run_dir, url, "--audit", "true", "--expected_scores", "true").printed
    assert "to `half`; by score in 50.0% of 12 pairs (95 % 50.0% to 50.0%)" in printed  # all ties
    assert "by expected score in 50.0% of " in printed  # where each digit is a token of its own in the reply
    judge(run_dir, url)
    main(ScoreArguments(output_dir=[str(run_dir)]))
    printed = capsys.readouterr().out
    assert (
        "Ranked by ROUGE-1, since m prefers the true reference to another sample's in only 50.0% of 12 pairs (95 % 50.0% "
        "to 50.0%): its scores say nothing here." in printed
    )
    assert "ROUGE-1, as the judge has failed its audit: " in printed and "m has failed: it prefers" in printed
    said = json.loads((run_dir / "scores" / "verdict.json").read_text())
    assert said["measure"] == "rouge1" and "점검을 통과하지 못했습니다" in " ".join(said["judges_and_people_ko"])


@pytest.mark.slow
def test_an_audit_in_other_words_than_the_scores_says_nothing_of_them(run_dir, tmp_path, capsys):
    with serve(StubJudge(evaluation(5))) as url:
        judge(run_dir, url, "--judges", "a,b", "--audit", "true", "--judge_language", "ko")
        refused = judge(run_dir, url, "--judges", "a,b", "--audit", "true", check=False)
        assert (
            refused.returncode == 2
            and "audit/a/reference.jsonl was made under other conditions: prompt" in refused.printed
        )
        judge(run_dir, url, "--judges", "a,b")
        judge(run_dir, url, "--judges", "b,c", "--audit", "true", "--overwrite", "true")
    main(ScoreArguments(output_dir=[str(run_dir)]))
    printed = capsys.readouterr().out
    assert "The audit of a says nothing of its scores" in printed and "Ranked by ROUGE-1, since b prefers" in printed


def test_without_references_nothing_is_audited(tmp_path):
    run = make_run(tmp_path / "run", {"base": ["yes"]})
    path = run / "predictions" / "base.jsonl"
    path.write_text(json.dumps({**read_rows(path)[0], "references": []}) + "\n")
    result = judge(run, "http://127.0.0.1:9/v1", "--audit", "true", check=False)
    assert result.returncode == 2 and "audit: no sample has a reference" in result.printed
    result = judge(run, "http://127.0.0.1:9/v1", "--audit", "true", "--model_name", "base", check=False)
    assert result.returncode == 2 and "model_name has no effect with audit" in result.printed
