"""
Which way of training makes a model repeat itself or never end? Four arms, on the demo model or on SmolLM2.

    python experiments/stopping/run.py       # the demo model, three seeds: 14 minutes on one core
    python experiments/stopping/run.py --arms experiments/stopping/smollm2 --seeds 1 --dataset_name <folder>

docs/stopping.md has the results of both.

Reads   experiments/<arms>/<arm>.yaml            what each arm trains; <arms> is stopping, or stopping/smollm2
Writes  outputs/<arms>/<arm>/preflight.json      what preflight says to the arm
        outputs/<arms>/<arm>/seed-<n>/           a run as step 1 writes it, with the predictions of step 3
        experiments/<arms>/results.json          means and intervals of the table that is printed at the end

An arm that preflight refuses is trained all the same, with --allow, which its run records. Stop it and start it again at
any time: what is finished is not done twice. To start over, delete outputs/<arms>.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd

from finetuning.config.yaml_file import read_yaml
from finetuning.errors import InputError, fail
from finetuning.measures import print_table
from finetuning.report.samples import load_predictions, load_training_log
from finetuning.resampling import share_interval
from finetuning.runs import PREFLIGHT_FILE, RUN_FILE, read_run, write_json

STEP_1 = ["1_train_full_fine_tuning.py"]
OLD_COLLATOR = ["-m", "experiments.stopping.train"]
ARMS = {"whole_text": STEP_1, "pad_is_eos": OLD_COLLATOR, "own_pad": OLD_COLLATOR, "default": STEP_1}
NUM_SAMPLES = 50
NUM_CHECKPOINTS = 3
MEASURES = {  # column of load_predictions: (title, decimals)
    "stopped": ("stopped", 2),
    "seq_rep_4": ("seq-rep-4", 3),
    "rouge1": ("ROUGE-1", 3),
    "num_new_tokens": ("tokens", 1),
}
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Experiment:
    """What is run: the arms of a folder, with some seeds."""

    folder: Path  # with the YAML of each arm
    seeds: list[int]
    dataset_name: str | None  # in place of that of the YAMLs

    @property
    def outputs(self) -> Path:
        return Path("outputs", self.folder.resolve().relative_to(ROOT / "experiments"))

    def run(self, arm: str, seed: int) -> Path:
        return self.outputs / arm / f"seed-{seed}"


def run_command(arguments: list[str], log: Path, allowed_codes: tuple[int, ...] = (0,)) -> int:
    """Run a Python command with its output in a file; gives its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # one thread: the same results on every machine of a kind, and no threads that wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with log.open("w", encoding="utf-8") as file:
        result = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if result.returncode not in allowed_codes:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise InputError(f"{' '.join(arguments)} failed with exit code {result.returncode}; {log} ends in\n{tail}")
    return result.returncode


def check_settings(experiment: Experiment) -> None:
    """Refuse to go on with runs that were made from other YAMLs."""
    settings = {arm: {s.key: s.value for s in read_yaml(experiment.folder / f"{arm}.yaml", [])} for arm in ARMS}
    file = experiment.outputs / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise InputError(f"{file.parent} holds runs of other settings than the YAMLs have; delete it to start over")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def arguments_of(experiment: Experiment, arm: str, output_dir: Path) -> list[str]:
    data = [] if experiment.dataset_name is None else ["--dataset_name", experiment.dataset_name]
    config = ["--config", str(experiment.folder / f"{arm}.yaml"), *data]
    return [*ARMS[arm], *config, "--output_dir", str(output_dir), "--preview_rows", "0"]


def inspect_arm(experiment: Experiment, arm: str) -> list[dict]:
    """What preflight finds in the batches of an arm; exit code 2 means that it refuses to train."""
    report = experiment.outputs / arm / PREFLIGHT_FILE
    if not report.is_file():
        command = [*arguments_of(experiment, arm, report.parent), "--preflight_only", "true"]
        run_command(command, report.parent / "preflight.log", allowed_codes=(0, 2))
    return json.loads(report.read_text(encoding="utf-8"))["findings"]


def is_finished(run: Path) -> bool:
    """Whether a run is trained, and every checkpoint has answered."""
    if not (run / RUN_FILE).is_file() or read_run(run)["finished"] is None:
        return False
    try:
        predictions = load_predictions(run)
    except InputError:
        return False
    return len(predictions) == (1 + NUM_CHECKPOINTS) * NUM_SAMPLES


def train_and_test(experiment: Experiment, arm: str, seed: int, refused: list[str]) -> None:
    run = experiment.run(arm, seed)
    allow = ["--allow", *refused] if refused else []
    run_command([*arguments_of(experiment, arm, run), "--seed", str(seed), *allow], Path(f"{run}-train.log"))
    test = ["3_test.py", "--output_dir", str(run), "--model_name", "all", "--num_samples", str(NUM_SAMPLES)]
    run_command(test, Path(f"{run}-test.log"))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over seeds and samples.

    Args:
        values: One row a seed, one column a sample. Each resample draws seeds, and then samples that are the same for
            all of its seeds, as every seed has answered the same ones.
    """
    num_seeds, num_samples = values.shape
    rng = np.random.default_rng(0)
    seeds = rng.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds, 1))
    samples = rng.integers(num_samples, size=(NUM_RESAMPLES, 1, num_samples))
    low, high = np.percentile(np.nanmean(values[seeds, samples], axis=(1, 2)), [2.5, 97.5])
    return float(low), float(high)


def measure(runs: list[pd.DataFrame]) -> dict:
    """Means and intervals of one checkpoint, from the predictions of each seed."""
    result = {}
    for column in MEASURES:
        values = np.stack([run.sort_values("id")[column].to_numpy(dtype=float) for run in runs])
        # an answer of fewer than four words repeats no run of four, and is left out there
        assert column == "seq_rep_4" or not np.isnan(values).any(), "a sample was not answered"
        low, high = interval(values)
        if column == "stopped":  # at least Wilson's over the samples: 50 answers that are all alike are no certainty
            wilson = share_interval(np.round(values.mean(axis=0)))
            low, high = min(low, wilson[0]), max(high, wilson[1])
        result[column] = {
            **{
                key: round(float(value), 6)
                for key, value in (("mean", np.nanmean(values)), ("low", low), ("high", high))
            },
            "seeds": np.nanmean(values, axis=1).round(6).tolist(),
        }
    return result


def collect(experiment: Experiment, findings: dict[str, list[dict]]) -> dict:
    """The results of all arms, as results.json has them."""
    arms = {}
    for arm in ARMS:
        runs = [experiment.run(arm, seed) for seed in experiment.seeds]
        predictions = [load_predictions(run) for run in runs]
        losses = pd.concat([load_training_log(run).dropna(subset="loss").set_index("step")["loss"] for run in runs])
        report = json.loads((experiment.outputs / arm / PREFLIGHT_FILE).read_text(encoding="utf-8"))
        num_steps, rows_per_step = report["plan"]["steps"], report["plan"]["rows_per_step"]
        num_rows = read_run(runs[0])["data"]["train"]["rows"]
        arms[arm] = {
            "preflight": {f["check"]: f["level"] for f in findings[arm]},
            "rows_per_step": rows_per_step,
            "checkpoints": [
                {"step": int(step), "rows": round(num_rows * step / num_steps),
                 **measure([p[p["step"] == step] for p in predictions])}
                for step in sorted(predictions[0]["step"].unique())
            ],
            "training_loss": {str(step): round(loss, 4) for step, loss in losses.groupby(level=0).mean().items()},
        }  # fmt: skip
    return {"seeds": len(experiment.seeds), "samples": NUM_SAMPLES, "arms": arms}


def format_results(results: dict) -> pd.DataFrame:
    """One row an arm and checkpoint, `0.712 [0.680, 0.741]`."""
    rows = []
    for arm, result in results["arms"].items():
        faults = ", ".join(f"{level} {check}" for check, level in result["preflight"].items() if level != "ok")
        for checkpoint in result["checkpoints"]:
            row = {"arm": arm, "step": checkpoint["step"], "rows": checkpoint["rows"]}
            for column, (title, decimals) in MEASURES.items():
                mean, low, high = (f"{checkpoint[column][key]:.{decimals}f}" for key in ("mean", "low", "high"))
                row[title] = f"{mean} [{low}, {high}]"
            rows.append({**row, "preflight": faults or "ok"})
    return pd.DataFrame(rows).set_index("arm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=Path("experiments/stopping"), help="folder with the YAMLs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dataset_name", help="data in place of that of the YAMLs")
    args = parser.parse_args()
    experiment = Experiment(args.arms, args.seeds, args.dataset_name)
    check_settings(experiment)
    findings = {}
    for arm in ARMS:
        findings[arm] = inspect_arm(experiment, arm)
        faults = [f for f in findings[arm] if f["level"] != "ok"]
        print(f"preflight of {arm}: " + ("" if faults else "ok"), flush=True)
        for fault in faults:
            print(f"    {fault['level']} {fault['check']}: {fault['text']}", flush=True)

    runs = [(arm, seed) for seed in experiment.seeds for arm in ARMS]
    todo = [(arm, seed) for arm, seed in runs if not is_finished(experiment.run(arm, seed))]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished", flush=True)
    start = time.perf_counter()
    for done, (arm, seed) in enumerate(todo, start=1):
        train_and_test(experiment, arm, seed, [f["check"] for f in findings[arm] if f["level"] == "refused"])
        seconds = time.perf_counter() - start
        eta = seconds / done * (len(todo) - done)
        print(
            f"{done}/{len(todo)}  {arm}, seed {seed}: trained and tested  {seconds:.0f} s  ETA {eta:.0f} s", flush=True
        )

    results, file = collect(experiment, findings), experiment.folder / "results.json"
    write_json(file, results)
    print_table(format_results(results))
    print(f"means over {len(args.seeds)} seeds and {NUM_SAMPLES} samples [95 % interval]; step 0 is the base model")
    print(f"Written to {file}; the runs are under {experiment.outputs}")


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        main()
    except InputError as error:
        fail(str(error))
