"""
Shared by the tests: scripts are run as users run them, in a subprocess, on the demo data and model with a small budget.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two busy processes of several threads slow each other down many times
CONFIG = "./0_full_fine_tuning_config.yaml"
SMALL = ["--max_steps", "10", "--save_steps", "5", "--logging_steps", "1", "--max_length", "128", "--warmup_steps", "2"]


def command(script: str, *args: str, num_processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", "--standalone"]
    return [*launcher, f"./{script}", *map(str, args)]


def run(args: list[str], check: bool = True, timeout: int = 150, **env: str) -> subprocess.CompletedProcess:
    """Run a command in the project's folder and return what it printed; `check` asserts that it succeeds."""
    environment = {**os.environ, **env}
    result = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def train(output_dir: Path, *args: str, num_processes: int = 1, check: bool = True, **env: str):
    """Run step 1 with a small budget."""
    arguments = ["--config", CONFIG, *SMALL, "--output_dir", output_dir, *args]
    return run(command("1_train_full_fine_tuning.py", *arguments, num_processes=num_processes), check, **env)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL a process and all that it has started; torchrun's workers have process groups of their own."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)
    process.wait()


FSDP = {"ACCELERATE_USE_FSDP": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "1"}


def read_losses(run_dir: Path) -> dict[int, float]:
    """Training loss of each step, from the last checkpoint's log."""
    states = sorted(run_dir.glob("checkpoint-*/trainer_state.json"), key=lambda f: int(f.parent.name.split("-")[1]))
    entries = [e for e in json.loads(states[-1].read_text())["log_history"] if "loss" in e]
    assert len({e["step"] for e in entries}) == len(entries), "a step stands twice in the log"
    return {e["step"]: e["loss"] for e in entries}


@pytest.fixture(scope="session")
def fsdp_run(tmp_path_factory) -> Path:
    """A finished run of two ranks under FSDP2: 10 steps, checkpoints 5 and 10. Copy it before changing it."""
    output_dir = tmp_path_factory.mktemp("runs") / "fsdp"
    result = train(output_dir, num_processes=2, **FSDP)
    (output_dir / "printed.txt").write_text(result.stdout + result.stderr)
    return output_dir


@pytest.fixture
def copy_of_run(fsdp_run, tmp_path) -> Path:
    return Path(shutil.copytree(fsdp_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def tokenizer():
    from finetuning.chat import load_tokenizer

    return load_tokenizer(str(ROOT / "demo" / "model"))


def make_run(folder: Path, models: dict[str, list[str]]) -> Path:
    """A run's folder with the predictions of `models`, each a list of answers to the same questions."""
    from finetuning.metrics import score_predictions
    from finetuning.results import RowFile, read_rows
    from finetuning.runs import write_json

    folder.mkdir(parents=True)
    record = {
        "command": ["1_train_full_fine_tuning.py"],
        "finished": "2026-01-01T00:00:00+00:00",
        "config": {"model_name_or_path": "demo/model", "dataset_name": "demo/data"},
        "data": {"train": {"rows": 3}},
        "libraries": {"torch": "2.13.0"},
        "git_commit": None,
        "hardware": {"devices": ["cpu"]},
        "parallelism": {"kind": "fsdp2", "world_size": 2},
    }
    write_json(folder / "run.json", record)
    for name, answers in models.items():
        file = RowFile(folder / "predictions" / f"{name}.jsonl", {"model": name})
        for i, answer in enumerate(answers):
            file.append(
                {
                    "id": f"sample{i:04d}",
                    "messages": [{"role": "user", "content": f"#Person1#: 질문 {i} <b>&"}],
                    "references": [f"#Person1# asks question number {i} about the old house"],
                    "prediction": answer,
                    "num_prompt_tokens": 9,
                    "num_new_tokens": 5,
                    "finish_reason": "error" if answer is None else "stop",
                    "error": "too long" if answer is None else None,
                }
            )
        file.write_info(seconds=1.5, metrics=score_predictions(read_rows(file.path)))
        file.close()
    return folder
