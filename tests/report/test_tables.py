"""Tables of models."""

import pytest
from conftest import make_run
from judged_run import FAIR, GOOD, POOR, add_evaluations

from finetuning.measures import criterion_column, describe_measure
from finetuning.report.page_tables import build_models
from finetuning.report.plots import plot_criteria
from finetuning.report.samples import load_samples
from finetuning.report.tables import format_table, summarize
from finetuning.results import RowFile, prediction_hash, read_rows


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


def test_models_stand_in_the_order_of_their_steps(run_dir):
    summary = summarize(load_samples(run_dir))
    assert list(summary.index) == ["base", "checkpoint-9", "checkpoint-10"]
    assert summary["rouge1"].is_monotonic_increasing and summary.loc["checkpoint-10", "rouge1"] == 1
    assert (summary["rouge1_low"] <= summary["rouge1"]).all() and (summary["rouge1"] <= summary["rouge1_high"]).all()
    assert "overall" not in summary  # nothing was judged


def test_failed_judgements_are_counted_and_in_no_mean(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9, 7, None, None])
    row = summarize(load_samples(run_dir)).loc["checkpoint-10"]
    assert (row["judged"], row["failed"], row["overall"], row["judge[relevance]"]) == (2, 2, 8, 8)


def test_a_success_counts_however_often_it_failed_before(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [None])
    add_evaluations(run_dir, "checkpoint-10", [9])
    assert summarize(load_samples(run_dir)).loc["checkpoint-10", ["judged", "failed"]].tolist() == [1, 0]


def test_a_criterion_can_have_the_name_of_any_column(run_dir):
    names = [*load_samples(run_dir), *summarize(load_samples(run_dir)), *(title.replace(" ", "_") for title in format_table(summarize(load_samples(run_dir))))]  # fmt: skip
    names += ["tokens", "judge_overall", "judge_expected", "overall", "cost", "coverage", "a", "a_low", "a_low_low"]
    criteria = [name for name in dict.fromkeys(names) if name.isidentifier()]
    for name in ("base", "checkpoint-9", "checkpoint-10"):
        file = RowFile(run_dir / "qa_evaluation_results" / f"{name}.jsonl", {"judge_model": "m", "criteria": criteria})
        for row in read_rows(run_dir / "predictions" / f"{name}.jsonl"):
            evaluation = {c: {"explanation": "e", "score": 1 + i % 10} for i, c in enumerate(criteria)}
            file.append({
                "id": row["id"], "prediction_hash": prediction_hash(row), "status": "ok", "evaluation": evaluation,
                "expected": None, "usage": None, "cost": None, "possible_cost": 0.0, "error": None,
            })  # fmt: skip
        file.close()
    summary = summarize(load_samples(run_dir))
    table = format_table(summary)
    assert table.columns.is_unique and table.loc["base", "tokens"].startswith("5.0")
    _, titles, rows = build_models(summary, use=None)
    assert titles == ["model", *table] and len(titles) == len(rows[0].cells)
    found = dict(zip(titles, rows[0].cells, strict=True))
    for i, criterion in enumerate(criteria):
        title = describe_measure(criterion_column(criterion))[0]
        assert title.startswith(criterion.replace("_", " ")) and found[title].number == 1 + i % 10
    assert plot_criteria(summary) is not None
