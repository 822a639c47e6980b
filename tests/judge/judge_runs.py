"""Step 4 as the tests of this room start it."""

from pathlib import Path
from types import SimpleNamespace

from conftest import run_step

from finetuning.results import read_rows

ANSWERS = [f"#Person1# asks question {i}" for i in range(6)]
PRICES = "date: 2026-11-01\nmodels:\n  m: {prompt: 1.0, cached_prompt: 0.5, completion: 10.0, batch: 0.5}\n"
COST = 100 * 1.0 / 1e6 + 50 * 10.0 / 1e6  # of each reply of the stub


def write_prices(folder: Path) -> Path:
    (folder / "prices.yaml").write_text(PRICES)
    return folder / "prices.yaml"


def judge(run_dir, url: str, *args, check: bool = True, key: str = "sk-test-1234567890"):
    """Run step 4; gives its status and what it printed."""
    judge_model = [] if "--judges" in args else ["--judge_model", "m"]
    arguments = ["--output_dir", run_dir, *judge_model, "--max_retries", "2", *args]
    environment = {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": url}
    status, printed = run_step("4_openai_test.py", run_dir.with_name("printed"), *arguments, **environment)
    if check:
        assert status == 0, printed
    assert "Traceback" not in printed
    return SimpleNamespace(returncode=status, printed=printed)


def evaluations(run_dir, name="checkpoint-10"):
    return read_rows(run_dir / "qa_evaluation_results" / f"{name}.jsonl")
