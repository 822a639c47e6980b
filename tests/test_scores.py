import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, make_run, run
from judge_servers import evaluation

from finetuning.errors import InputError
from finetuning.judge import Evaluation, prediction_hash
from finetuning.results import RowFile, read_rows
from finetuning.scores import (
    bootstrap_interval,
    choose_measure,
    compare,
    decide,
    format_table,
    load_samples,
    share_interval,
    summarize,
    write_report,
)

CRITERIA = list(Evaluation.model_fields)
GOOD = [f"#Person1# asks question number {i} about the old house" for i in range(20)]
FAIR = [f"#Person1# asks number {i} about a house" if i % 3 else GOOD[i] for i in range(20)]
POOR = ["something else <script>alert(1)</script>"] * 20


def add_evaluations(run_dir, name, scores):
    """Judge the first answers of a model with these scores; None is a failure."""
    predictions = read_rows(run_dir / "predictions" / f"{name}.jsonl")
    file = RowFile(run_dir / "qa_evaluation_results" / f"{name}.jsonl", {"judge_model": "m", "criteria": CRITERIA})
    for row, score in zip(predictions, scores, strict=False):
        failed = {"status": "truncated", "evaluation": None, "usage": None, "error": "..."}
        ok = {"status": "ok", "evaluation": json.loads(evaluation(score or 1)), "usage": None, "error": None}
        file.append({"id": row["id"], "prediction_hash": prediction_hash(row), **(failed if score is None else ok)})
    file.close()


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


def test_interval_is_scipys_and_repeatable():
    values = np.random.default_rng(1).normal(size=40)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(values) == bootstrap_interval([*values, math.nan]) == tuple(expected)


@pytest.mark.parametrize("values, low, high", [([], None, None), ([3.0], None, None), ([2.0, 2.0], 2, 2), ([math.nan], None, None)])  # fmt: skip
def test_degenerate_intervals(values, low, high):
    result = bootstrap_interval(values)
    assert result == (low, high) if low is not None else all(map(math.isnan, result))


def test_all_of_50_answers_stopped_is_no_certainty():
    low, high = share_interval([1.0] * 50)
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 50), abs=1e-4) and high == 1  # Wilson's closed form


def test_one_outlier_among_equals_has_an_interval():
    low, high = bootstrap_interval([1.0] * 49 + [0.0])
    assert low <= 0.98 <= high <= 1


def test_models_stand_in_the_order_of_their_steps(run_dir):
    summary = summarize(load_samples(run_dir))
    assert list(summary.index) == ["base", "checkpoint-9", "checkpoint-10"]
    assert summary["rouge1"].is_monotonic_increasing and summary.loc["checkpoint-10", "rouge1"] == 1
    assert (summary["rouge1_low"] <= summary["rouge1"]).all() and (summary["rouge1"] <= summary["rouge1_high"]).all()
    assert "overall" not in summary  # nothing was judged


def test_failed_judgements_are_counted_and_in_no_mean(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9, 7, None, None])
    row = summarize(load_samples(run_dir)).loc["checkpoint-10"]
    assert (row["judged"], row["failed"], row["overall"], row["relevance"]) == (2, 2, 8, 8)


def test_a_success_counts_however_often_it_failed_before(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [None])
    add_evaluations(run_dir, "checkpoint-10", [9])
    assert summarize(load_samples(run_dir)).loc["checkpoint-10", ["judged", "failed"]].tolist() == [1, 0]


def test_an_evaluation_of_another_answer_does_not_count(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9] * 20)
    path = run_dir / "predictions" / "checkpoint-10.jsonl"
    path.write_text(path.read_text().replace("question number 0", "question number zero"))
    assert summarize(load_samples(run_dir)).loc["checkpoint-10", "judged"] == 19


def test_without_a_judge_rouge_decides(run_dir):
    verdict = decide(load_samples(run_dir))
    assert (verdict.best, verdict.measure) == ("checkpoint-10", "rouge1")
    assert "nothing was judged" in verdict.sentences[0]


def test_a_model_with_few_judgements_is_not_ranked_by_them(run_dir):
    for name, scores in (("base", [1] * 20), ("checkpoint-9", [9] * 20), ("checkpoint-10", [10] * 18 + [None] * 2)):
        add_evaluations(run_dir, name, scores)
    measure, reason = choose_measure(load_samples(run_dir))
    assert measure == "rouge1" and "only 90% of the answers of checkpoint-10 have a judgement" in reason


def test_the_judge_decides_where_all_are_judged(run_dir):
    rng = np.random.default_rng(0)
    for name, mean in (("base", 2), ("checkpoint-9", 8), ("checkpoint-10", 8)):
        add_evaluations(run_dir, name, [int(s) for s in np.clip(rng.normal(mean, 1, 20).round(), 1, 10)])
    verdict = decide(load_samples(run_dir))
    text = " ".join(verdict.sentences)
    assert verdict.measure == "overall" and "is better than base by" in text
    assert "these samples do not show that it is better than checkpoint-" in text
    assert "use checkpoint-9, which had the least training" in text or verdict.best == "checkpoint-9"


def test_models_are_ranked_on_the_samples_that_all_have(tmp_path):
    run_dir = make_run(tmp_path / "run", {"checkpoint-9": FAIR, "checkpoint-10": GOOD[:5]})
    verdict = decide(load_samples(run_dir))
    assert "Compared on the 5 samples that every model has a score of; 15 others are left out." in verdict.sentences


def test_prompts_without_an_answer_do_not_lower_the_coverage(tmp_path):
    run_dir = make_run(tmp_path / "run", {"checkpoint-9": [*GOOD[:10], *[None] * 10]})
    add_evaluations(run_dir, "checkpoint-9", [8] * 10)
    assert choose_measure(load_samples(run_dir))[0] == "overall"


def test_comparison_is_paired(run_dir):
    samples = load_samples(run_dir)
    comparison = compare(samples, "rouge1", "checkpoint-10", "checkpoint-9")
    scores = samples.pivot(index="id", columns="model", values="rouge1")
    differences = scores["checkpoint-10"] - scores["checkpoint-9"]
    assert comparison.difference == pytest.approx(differences.mean())
    assert (comparison.low, comparison.high) == bootstrap_interval(differences)
    assert comparison.detectable == pytest.approx(2.8016 * differences.std() / math.sqrt(20), rel=1e-3)


@pytest.mark.parametrize("answers", [GOOD[:1], [None, None], GOOD], ids=["one sample", "all failed", "one model"])
def test_degenerate_runs_have_a_report(tmp_path, answers):
    run_dir = make_run(tmp_path / "run", {"checkpoint-9": answers})
    samples = load_samples(run_dir)
    format_table(summarize(samples))
    assert write_report(run_dir, samples).is_file()


def test_predictions_that_were_not_finished_are_refused(run_dir):
    path = run_dir / "predictions" / "base.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in info.items() if k != "metrics"}))
    with pytest.raises(InputError, match="step 3 has not finished"):
        load_samples(run_dir)


def test_report_is_self_contained_and_escapes_what_models_wrote(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9] * 20)
    page = write_report(run_dir, load_samples(run_dir)).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "질문 0 &lt;b&gt;&amp;" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert page.count("<article") == 20


@pytest.mark.parametrize("judged", [True, False])
def test_the_notebook_runs(run_dir, tmp_path, judged):
    if judged:
        for name in ("base", "checkpoint-9", "checkpoint-10"):
            add_evaluations(run_dir, name, [9, 8] * 10)
    notebook = tmp_path / "executed.ipynb"
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar", "-p", "output_dir", run_dir]
    run([*papermill, "5_score_notebook.ipynb", notebook])
    outputs = [o for cell in json.loads(notebook.read_text())["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == (2 if judged else 1)
    assert any("Ranked by" in "".join(o.get("text", "")) for o in outputs)
    assert (run_dir / "report.html").is_file()


def test_the_notebook_is_committed_thin_and_without_outputs():
    notebook = json.loads((ROOT / "5_score_notebook.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "def " not in "".join(cell["source"]) and "for " not in "".join(cell["source"])


def test_tables_are_printed_on_the_command_line(run_dir):
    result = subprocess.run(
        [sys.executable, "-m", "finetuning.scores", "--output_dir", run_dir], cwd=ROOT, capture_output=True, text=True
    )
    assert "ROUGE-1" in result.stdout and f"The report is at {run_dir}/report.html" in result.stdout, result.stderr
    shutil.rmtree(run_dir)
