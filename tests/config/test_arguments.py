import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command, run

from finetuning.config import arguments as configs
from finetuning.config.arguments import JudgeArguments, ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.parser import Parser
from finetuning.config.run_step import run_step
from finetuning.report.__main__ import ScoreArguments
from finetuning.training.arguments import TrainingArguments

YAMLS = sorted([*ROOT.glob("0_*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
SCRIPTS = ["1_train_full_fine_tuning.py", "2_merge_lora.py", "3_test.py", "4_openai_test.py"]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_every_yaml_parses_and_trains_where_there_is_no_gpu(path, tmp_path):
    arguments = ["--config", str(path), "--output_dir", str(tmp_path)]
    script, training, model = Parser((ScriptArguments, TrainingArguments, ModelArguments)).parse_args_and_config(
        arguments
    )
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("output_dir", "report_to"):
            assert value == next(getattr(a, key) for a in (script, training, model) if hasattr(a, key)), key


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed(script):
    assert "--output_dir" in run(command(script, "--help")).stdout


@pytest.mark.parametrize(
    "text, message",
    [
        ("judge_modle: x\n", "config.yaml:1: judge_modle: unknown key; did you mean judge_model?"),
        ("- a\n", "write `key: value` lines"),
        ("a: [\n", "not valid YAML"),
        ("concurrency: 0\n", "concurrency: must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_faulty_yaml_is_one_line_and_status_2(tmp_path, capsys, text, message, form):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        Parser((JudgeArguments,)).parse_args_and_config(form.format(path).split(" "))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"learning_rate: 2e-5\ndataset_name: x\nmodel_name_or_path: y\noutput_dir: {tmp_path}\n")
    _, training, _ = Parser((ScriptArguments, TrainingArguments, ModelArguments)).parse_args_and_config(
        ["--config", str(path)]
    )
    assert training.learning_rate == 2e-5


def test_contradicting_generation_settings_are_refused():
    with pytest.raises(ValueError, match="temperature has no effect without `do_sample: true`"):
        configs.TestArguments(temperature=0.7)


WITHOUT_TORCH = """
import importlib.util
assert importlib.util.find_spec("torch") is None
import finetuning.config.arguments, finetuning.judge.form, finetuning.inference.metrics, finetuning.results, finetuning.runs, finetuning.report.scores
assert finetuning.inference.metrics.compute_rouge(["안녕"], [["안녕"]])["rouge1"] == 1
"""


@pytest.mark.slow
def test_judging_and_scoring_need_no_torch(tmp_path):
    """In an environment that has every package but torch."""
    for package in Path(yaml.__file__).parents[1].iterdir():
        if not package.name.startswith("torch"):
            (tmp_path / package.name).symlink_to(package)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    python = [sys.executable, "-S", "-c", WITHOUT_TORCH]  # -S leaves the usual site-packages out
    result = subprocess.run(python, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_text_of_a_model_or_dataset_commands_the_terminal(monkeypatch, capsys):
    text = "\x1b]0;title\x07 \x1b[2J \r \x9b31m \u202egnp.exe\u2066 half \ud83d"
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which run_step replaces
    monkeypatch.setattr(sys, "argv", ["scores", "--holdout", "0.5"])
    run_step(lambda args: print(f"{text}\n\t가 👩‍👩‍👧 {args.holdout}"), ScoreArguments)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*", printed)
    assert printed.startswith(r"\x1b]0;title\x07 ") and printed.endswith("\n\t가 👩‍👩‍👧 0.5\n")


@pytest.mark.parametrize("kind", ["file", "inside a file", "loop"])
def test_a_folder_that_cannot_be_made_is_named(monkeypatch, capsys, tmp_path, kind):
    folder = tmp_path / "there"
    folder.symlink_to(folder) if kind == "loop" else folder.write_text("")
    folder = folder / "scores" if kind == "inside a file" else folder
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "argv", ["scores", "--report_dir", str(folder)])
    with pytest.raises(SystemExit) as exit:
        run_step(lambda args: (Path(args.report_dir) / "scores").mkdir(parents=True), ScoreArguments)
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and str(folder) in printed and "another place" in printed and printed.count("\n") == 1
