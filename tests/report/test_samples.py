"""Predictions and evaluations of one and of several runs as one table."""

import json

import pytest
from conftest import make_run
from judged_run import FAIR, GOOD, POOR, add_evaluations

from finetuning.errors import InputError
from finetuning.report.__main__ import ScoreArguments, main
from finetuning.report.samples import find_runs, load_runs, load_samples
from finetuning.report.tables import summarize
from finetuning.report.verdict import decide
from finetuning.results import read_rows


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


def test_predictions_that_were_not_finished_are_refused(run_dir):
    path = run_dir / "predictions" / "base.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in info.items() if k != "metrics"}))
    with pytest.raises(InputError, match="step 3 has not finished"):
        load_samples(run_dir)


def test_an_evaluation_of_another_answer_does_not_count(run_dir):
    add_evaluations(run_dir, "checkpoint-10", [9] * 20)
    path = run_dir / "predictions" / "checkpoint-10.jsonl"
    rows = read_rows(path)
    rows[0]["prediction"] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize(load_samples(run_dir)).loc["checkpoint-10", "judged"] == 19


def test_no_run_at_all_is_refused():
    with pytest.raises(InputError, match="output_dirs is empty"):
        find_runs([])


@pytest.mark.slow
def test_runs_are_joined_on_their_samples(tmp_path, capsys):
    full = make_run(tmp_path / "full", {"base": POOR, "checkpoint-9": FAIR})
    lora = make_run(tmp_path / "lora", {"base": POOR[:10], "checkpoint-9": GOOD[:10]})
    samples = load_runs([full, lora])
    verdict = decide(samples, "full/base")
    assert list(verdict.means) == ["full/base", "full/checkpoint-9", "lora/base", "lora/checkpoint-9"]
    assert verdict.best == "lora/checkpoint-9" and verdict.num_samples == 10
    main(ScoreArguments(output_dir=[str(full), str(lora)]))
    printed = capsys.readouterr().out
    assert "lora/checkpoint-9" in printed and (tmp_path / "report.html").is_file() and "Against full/base" in printed
    page = (tmp_path / "report.html").read_text()
    assert "3 rows;\n20 test samples, 2 models;" in page and "3 rows;\n10 test samples, 2 models;" in page


def test_runs_with_other_test_data_are_refused(tmp_path):
    first = make_run(tmp_path / "a", {"base": GOOD})
    second = make_run(tmp_path / "b", {"base": GOOD})
    for path in (second / "predictions").iterdir():
        path.write_text(path.read_text().replace("sample00", "other00"))
    with pytest.raises(InputError, match="were tested on other samples"):
        load_runs([first, second])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    samples = load_runs([make_run(tmp_path / arm / "seed1", {"base": GOOD[:3]}) for arm in ("full", "lora")])
    assert samples["model"].unique().tolist() == ["full/seed1/base", "lora/seed1/base"]
