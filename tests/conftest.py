"""
Shared by the tests: scripts are run as users run them, in a subprocess, on the demo data and model with a small budget.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import filelock
import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
# a shell starts what runs in the background with SIGINT ignored, which all processes of the tests would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # two busy processes of several threads slow each other down many times
TRAIN = "1_train_full_fine_tuning.py"
CONFIG = "./0_full_fine_tuning_config.yaml"
MAX_QUICK_SECONDS = 3  # of a test that make check runs
SMALL = ["--max_steps", "10", "--save_steps", "5", "--logging_steps", "1", "--max_length", "128", "--warmup_steps", "2"]


def command(script: str, *args: str, num_processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", "--standalone"]
    return [*launcher, f"./{script}", *map(str, args)]


def run(
    args: list[str], check: bool = True, timeout: int = 150, fork: bool = True, **env: str
) -> subprocess.CompletedProcess:
    """Run a command in the project's folder and return what it printed; `check` asserts that it succeeds.

    A script as a single process is forked from one that has imported what it needs; `fork=False` starts Python anew.
    """
    if fork and args[:1] == [sys.executable] and args[1].startswith("./"):
        result = fork_step(args[1].removeprefix("./"), *args[2:], **env)
    else:
        environment = {**os.environ, **env}
        result = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


# Many tests start the same script; a process that has imported all it needs forks to run it in a second instead of eight.
SERVER = """
import importlib, json, os, runpy, signal, sys
script, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
runpy.run_path(script, run_name="imported")
for line in sys.stdin:
    printed, environment, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(140)
        os.environ.update(environment)
        for number, path in enumerate(printed, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)  # an ordinary end takes seconds to free what was imported
"""


@functools.cache
def script_server(script: str) -> subprocess.Popen:
    """A process that has imported what a step imports, and forks to run it; it ends with the tests."""
    # what a script imports only once it needs it
    late = {"3_test.py": ["finetuning.inference.rouge"], "4_openai_test.py": ["finetuning.judge.live"]}
    arguments = [sys.executable, "-c", SERVER, script, *late.get(script, [])]
    server = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def start_step(script: str, printed: Path, *arguments: str, errors: Path | None = None, **env: str) -> int:
    """Start a script in a process of its own, that need not import everything anew; gives the process id.

    What it prints goes to the file `printed`, and what of it is errors to the file `errors`, if there is one.
    """
    server = script_server(script)
    server.stdin.write(json.dumps([[str(printed), str(errors or printed)], env, *map(str, arguments)]) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def end_step(script: str) -> int:
    """Wait until the script that was started last has ended; gives its status, negative for a signal."""
    return int(script_server(script).stdout.readline())


def run_step(script: str, printed: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Run a script in a process of its own; gives the status and all that it printed."""
    start_step(script, printed, *arguments, **env)
    return end_step(script), printed.read_text()


def fork_step(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run a script as `run_step` does, with what it printed and its errors apart."""
    with tempfile.TemporaryDirectory() as folder:
        printed, errors = Path(folder, "stdout"), Path(folder, "stderr")
        start_step(script, printed, *arguments, errors=errors, **env)
        return subprocess.CompletedProcess(arguments, end_step(script), printed.read_text(), errors.read_text())


def train(output_dir: Path, *args: str, num_processes: int = 1, check: bool = True, **env: str):
    """Run step 1 with a small budget."""
    arguments = ["--config", CONFIG, *SMALL, "--output_dir", output_dir, *args]
    return run(command(TRAIN, *arguments, num_processes=num_processes), check, **env)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for what another process is to do, and fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


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
    temporary = tmp_path_factory.getbasetemp()
    shared = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary  # by the workers of this start
    output_dir = shared / "fsdp_run"
    with filelock.FileLock(f"{output_dir}.lock"):
        if not (output_dir / "printed.txt").is_file():
            result = train(output_dir, num_processes=2, **FSDP)
            (output_dir / "printed.txt").write_text(result.stdout + result.stderr)
    return output_dir


@pytest.fixture
def copy_of_run(fsdp_run, tmp_path) -> Path:
    return Path(shutil.copytree(fsdp_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def tokenizer():
    from finetuning.data.chat import load_tokenizer

    return load_tokenizer(str(ROOT / "demo" / "model"))


def read_table(document: str, header: str) -> list[list[str]]:
    """The cells of each row of the table in a Markdown file that begins with this header."""
    text = (ROOT / document).read_text(encoding="utf-8").split(f"| {header} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in text.splitlines()[2:]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests over the sharded run as slow, since the first of them waits twenty seconds for it."""
    for item in items:
        if "fsdp_run" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter) -> None:
    """Name the tests that are too slow for `make check` and not marked; a busy machine may name others."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and "slow" not in report.keywords:
                seconds[report.nodeid] += report.duration
    for test, duration in seconds.most_common():
        if duration > MAX_QUICK_SECONDS:
            terminalreporter.write_line(f"{test} took {duration:.1f} s: make it faster, or mark it slow", yellow=True)


def make_run(folder: Path, models: dict[str, list[str]]) -> Path:
    """A run's folder with the predictions of `models`, each a list of answers to the same questions."""
    from large_run import RECORD

    from finetuning.inference.metrics import score_predictions
    from finetuning.results import RowFile, read_rows
    from finetuning.runs import write_json

    folder.mkdir(parents=True)
    write_json(folder / "run.json", RECORD)
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
