import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command, run

from finetuning.config import arguments as configs

SCRIPTS = ["1_train_full_fine_tuning.py", "2_merge_lora.py", "3_test.py", "4_openai_test.py"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed(script):
    assert "--output_dir" in run(command(script, "--help")).stdout


def test_contradicting_generation_settings_are_refused():
    with pytest.raises(ValueError, match="temperature has no effect without do_sample: true"):
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
