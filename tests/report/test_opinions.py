"""Answers side by side, the judges of a jury, and people."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from large_run import add_all_kinds_of_rows, write_run

from finetuning.agreement import measure_jury
from finetuning.errors import InputError
from finetuning.report.__main__ import ScoreArguments, main
from finetuning.report.headline import build_headline
from finetuning.report.opinion_sentences import say_opinions
from finetuning.report.opinions import load_opinions
from finetuning.report.samples import load_samples
from finetuning.report.sentences import say_headline
from finetuning.report.tables import summarize
from finetuning.report.verdict import decide
from finetuning.results import read_rows


@pytest.fixture
def full_run(tmp_path):
    models = ["base", "checkpoint-1", "checkpoint-2"]
    run_dir = write_run(tmp_path / "run", 40, models)
    add_all_kinds_of_rows(run_dir, models)
    return run_dir


@pytest.mark.slow
def test_pairs_juries_and_people_reach_the_verdict_and_the_tables(full_run, capsys):
    main(ScoreArguments(output_dir=[str(full_run)]))
    printed = capsys.readouterr().out
    assert printed.startswith("Use checkpoint-2: better than every other model\n")
    pairs = pd.read_csv(full_run / "scores" / "pairs.csv").iloc[0]
    assert (pairs["first"], pairs["second"], pairs["judge"], pairs["losses"]) == (
        "checkpoint-1",
        "checkpoint-2",
        "strict",
        0,
    )
    assert pairs["wins"] + pairs["ties"] == summarize(load_samples(full_run))["judged"].loc["checkpoint-2"]
    assert pairs["p"] == pytest.approx(scipy.stats.binomtest(int(pairs["wins"]), int(pairs["wins"])).pvalue)
    contradiction = (
        f"Side by side, strict prefers checkpoint-1 to checkpoint-2 in {pairs['wins']} of the {pairs['wins']} samples"
    )
    verdict = json.loads((full_run / "scores" / "verdict.json").read_text())
    assert verdict["use"] == "checkpoint-2" and verdict["headline"][0] in printed
    assert any(
        contradiction in line and "the scores say that checkpoint-2 is better" in line for line in verdict["headline"]
    )
    assert any(contradiction in line for line in verdict["judges_and_people"]) and contradiction in printed
    jury = pd.read_csv(full_run / "scores" / "jury.csv")
    assert len(jury) == 6 and set(jury["judge"]) == {"strict", "kind"}
    means = jury.pivot(index="model", columns="judge", values="mean")
    assert (means["kind"] > means["strict"]).all() and jury["alpha"].between(0.3, 1).all()
    people = pd.read_csv(full_run / "scores" / "people.csv").set_index("model")
    assert people.loc["all models", "scores"] == 24 and people.loc["checkpoint-1", "scores"] == 12
    assert people.loc["all models", "spearman_low"] < people.loc["all models", "spearman"] <= 1
    assert "over 24 scores" in printed and all(re.search("[가-힣]", line) for line in verdict["judges_and_people_ko"])
    assert 'id="judges-and-people"' in (full_run / "report.html").read_text()
    shutil.rmtree(full_run / "qa_evaluation_results")
    main(ScoreArguments(output_dir=[str(full_run)]))
    assert len(list((full_run / "scores").glob("*.csv"))) == 3
    assert 'id="judges-and-people"' not in (full_run / "report.html").read_text()


def test_a_judge_of_a_jury_whose_rows_are_lost_is_named(full_run):
    (full_run / "qa_evaluation_results/judges/strict/checkpoint-2.jsonl").unlink()
    with pytest.raises(InputError, match="judges has no rows of strict for checkpoint-2, which are in its mean"):
        load_opinions([full_run], load_samples(full_run))
    alone = measure_jury({"strict": [{"clarity": 3}, {"clarity": 5}]})
    assert alone.means == {"strict": 4} and np.isnan([alone.alpha, alone.disagreement]).all()


def test_what_was_said_of_answers_that_have_changed_does_not_count(full_run):
    path = full_run / "predictions" / "checkpoint-1.jsonl"
    path.write_text("".join(json.dumps({**row, "prediction": "new"}) + "\n" for row in read_rows(path)))
    samples = load_samples(full_run)
    opinions = load_opinions([full_run], samples)
    assert opinions.pairs[0].counts.num_pairs == 0 and set(opinions.jury["model"]) == {"base", "checkpoint-2"}
    assert len(opinions.scores) == 12 and opinions.num_changed == 12
    said = say_opinions(opinions, decide(samples))
    assert "No pair of answers of checkpoint-1 and checkpoint-2 was judged in both orders." in said
    assert "Scores of people of answers that have changed since, which are left out: 12." in said


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("pairs/checkpoint-1--checkpoint-2.jsonl", '"first"', '"best"', r"jsonl:1 cannot be read: `evaluation.better`"),
        ("pairs/checkpoint-1--checkpoint-2.json", '"models"', '"modles"', r"2.json has no `identity.models`"),
        ("judges/kind/base.jsonl", '"score"', '"socre"', r"jsonl:1 has no `evaluation.relevance.score`"),
        ("human_agreement.json", '"model"', '"modle"', r"has no `scores.0.model`; start 4_openai_test.py with --human"),
    ],
)
def test_damaged_files_of_judges_and_people_are_named(full_run, file, old, new, fault):
    path = full_run / "qa_evaluation_results" / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=fault):
        load_opinions([full_run], load_samples(full_run))


@pytest.mark.slow
def test_a_preference_side_by_side_decides_where_the_scores_do_not(full_run):
    samples = load_samples(full_run)
    samples.loc[samples["model"] == "checkpoint-1", "overall"] = samples[samples["model"] == "checkpoint-2"][
        "overall"
    ].tolist()
    pairs = load_opinions([full_run], samples).pairs
    pairs[0].first, pairs[0].second = "checkpoint-2", "checkpoint-1"
    lines = say_headline(build_headline(decide(samples), summarize(samples), pairs))
    assert lines[0] == "Use checkpoint-2: the scores cannot tell it from checkpoint-1, and side by side it is preferred"
    assert "Side by side, strict prefers checkpoint-2 to checkpoint-1" in lines[1]
