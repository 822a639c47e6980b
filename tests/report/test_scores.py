"""The page and the tables of step 5 as files, and its command."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, make_run
from judged_run import FAIR, GOOD, POOR, add_evaluations

from finetuning.report.__main__ import ScoreArguments, main
from finetuning.report.samples import load_samples
from finetuning.report.sentences import say_verdict
from finetuning.report.tables import summarize
from finetuning.report.verdict import decide
from finetuning.results import read_rows


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["👍🎉", "   "])
def test_references_that_rouge_cannot_read_have_a_report(run_dir, reference, capsys):
    from finetuning.inference.metrics import score_predictions

    for path in (run_dir / "predictions").glob("*.jsonl"):
        rows = [{**row, "references": [reference]} for row in read_rows(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        info = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**info, "metrics": score_predictions(rows)}))
    main(ScoreArguments(output_dir=[str(run_dir)]))
    assert ("chrF" if reference.strip() else "no reference has a text") in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("answers", [GOOD[:1], [None, None], GOOD], ids=["one sample", "all failed", "one model"])
def test_degenerate_runs_have_a_report(tmp_path, answers):
    for models in ({"checkpoint-9": answers}, {"base": answers, "checkpoint-9": answers}):
        run_dir = make_run(tmp_path / f"run{len(models)}", models)
        main(ScoreArguments(output_dir=[str(run_dir)]))
        assert (run_dir / "report.html").is_file()


@pytest.mark.slow
def test_a_name_that_is_a_formula_is_a_text_in_the_csvs(run_dir):
    for path in (run_dir / "predictions").glob("base.*"):
        path.rename(path.with_stem("=HYPERLINK(1)"))
    path = run_dir / "predictions" / "checkpoint-9.jsonl"
    rows = [{**row, "error": "no reply\r=HYPERLINK(1)"} for row in read_rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(ScoreArguments(output_dir=[str(run_dir)]))
    for name in ("summary", "comparisons", "samples"):
        path = run_dir / "scores" / f"{name}.csv"
        assert b"\r" not in path.read_bytes()  # which ends a row for a spreadsheet
        table = pd.read_csv(path)
        cells = [cell for column in table for cell in table[column] if isinstance(cell, str)]
        assert "'=HYPERLINK(1)" in cells and not any(cell[0] in "=+-@\t\r" for cell in cells)
        assert all(pd.api.types.is_numeric_dtype(table[column]) for column in table if column in ("rouge1", "difference", "low"))  # fmt: skip
    assert "=HYPERLINK(1)" in json.loads((run_dir / "scores" / "verdict.json").read_text())["means"]


@pytest.mark.slow
def test_tables_are_printed_and_written_for_other_tools(run_dir):
    for name in ("base", "checkpoint-9", "checkpoint-10"):
        add_evaluations(run_dir, name, [9, 8] * 10)
    result = subprocess.run(
        [sys.executable, "-m", "finetuning.report", "--output_dir", run_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "ROUGE-1" in result.stdout and f"The report is at {run_dir}/report.html" in result.stdout, result.stderr
    samples = load_samples(run_dir)
    summary = pd.read_csv(run_dir / "scores" / "summary.csv", index_col="model")
    assert summary.loc["checkpoint-9", "rouge1"] == pytest.approx(summarize(samples).loc["checkpoint-9", "rouge1"])
    assert len(pd.read_csv(run_dir / "scores" / "comparisons.csv")) == 3
    assert len(pd.read_csv(run_dir / "scores" / "samples.csv")) == 60
    verdict = json.loads((run_dir / "scores" / "verdict.json").read_text())
    assert verdict["best"] == decide(samples).best and verdict["sentences"] == say_verdict(decide(samples))


@pytest.mark.slow
def test_a_baseline_that_was_not_tested_is_named(run_dir):
    result = subprocess.run(
        [sys.executable, "-m", "finetuning.report", "--output_dir", run_dir, "--baseline", "checkpoint-99"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "no answers of `checkpoint-99`; there are those of base" in result.stderr


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_named_in_a_line(run_dir):
    python = [sys.executable, "-m", "finetuning.report", "--output_dir", run_dir]
    result = subprocess.run([*python, "--report_dir", "/proc/no"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "/proc/no/scores cannot be made" in result.stderr
    usage = subprocess.run([*python, "-h"], cwd=ROOT, capture_output=True, text=True).stdout
    assert usage.startswith("usage: python -m finetuning.report ")
