"""The notebook of step 5."""

import json
import re
import sys

import pytest
from conftest import ROOT, make_run, run
from judged_run import FAIR, GOOD, POOR, add_evaluations


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", {"base": POOR, "checkpoint-9": FAIR, "checkpoint-10": GOOD})


@pytest.mark.slow
@pytest.mark.parametrize("judged", [True, False])
def test_the_notebook_runs(run_dir, tmp_path, judged):
    if judged:
        for name in ("base", "checkpoint-9", "checkpoint-10"):
            add_evaluations(run_dir, name, [9, 8] * 10)
    notebook = tmp_path / "executed.ipynb"
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar", "-p", "output_dirs", run_dir]
    run([*papermill, "5_score_notebook.ipynb", notebook])
    outputs = [o for cell in json.loads(notebook.read_text())["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == (6 if judged else 5)
    printed = ["".join(o["text"]) for o in outputs if o.get("name") == "stdout"]
    assert printed[0].startswith(("Use checkpoint-", "Keep base")) and "Ranked by" in printed[1]
    assert (run_dir / "report.html").is_file()


def test_the_notebook_is_committed_thin_and_without_outputs():
    notebook = json.loads((ROOT / "5_score_notebook.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        code = cell["cell_type"] == "code"
        assert not code or not re.search(r"^\s*(def|for|while|class) ", "".join(cell["source"]), re.MULTILINE)
    assert any("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"])
