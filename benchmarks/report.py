"""
Step 5 on a large run: seconds, memory, size of the page, and how long a browser takes to open it.

    python benchmarks/report.py --samples 1000

Writes a run of so many samples and six models with generated answers and evaluations, runs `python -m finetuning.report` on
it, and opens the page in headless Chromium if there is one: until the first samples are on the screen, and until a search
through all of them has been answered.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MODELS = ["base", *(f"checkpoint-{100 * i}" for i in range(1, 6))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from large_run import write_run

    with tempfile.TemporaryDirectory() as folder:
        run_dir = write_run(Path(folder) / "run", args.samples, MODELS)
        command = [sys.executable, "-X", "importtime", "-m", "finetuning.report", "--output_dir", str(run_dir)]
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        imported = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, imported
        seconds = time.monotonic() - started
        torch = any(line.rpartition("|")[2].strip() == "torch" for line in imported.splitlines())
        print(
            f"{args.samples} samples x {len(MODELS)} models: {seconds:.1f} s, {usage.ru_maxrss / 1e6:.2f} GB at most, ",
            end="",
        )
        print(f"{'with' if torch else 'without'} torch; page {(run_dir / 'report.html').stat().st_size / 1e6:.1f} MB")
        open_in_browser(run_dir / "report.html", args.rounds)


def open_in_browser(page: Path, rounds: int) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        print("no Chromium on this machine")
        return
    from playwright.sync_api import sync_playwright

    opening, searching = [], []
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(rounds):
            tab = opened.new_page(viewport={"width": 1400, "height": 900})
            started = time.monotonic()
            tab.goto(f"file://{page}")
            tab.wait_for_selector("article")
            opening.append(time.monotonic() - started)
            milliseconds = tab.evaluate(
                "() => { const begin = performance.now(); search.value = 'zzz'; show(); return performance.now() - begin; }"
            )
            searching.append(milliseconds / 1000)
            tab.close()
        opened.close()
    print(
        f"opens in {statistics.median(opening):.2f} s; first search through all texts {statistics.median(searching):.2f} s"
    )


if __name__ == "__main__":
    main()
