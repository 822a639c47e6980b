"""
Speed of step 1 beside trl's own `sft` script with its defaults, on the same data and model, at the same losses.

    python benchmarks/training.py                 # a Llama of 17 million parameters with random weights
    python benchmarks/training.py --rounds 5 --steps 30

Both train on the same batches in the same order, in turns, each round in a new process; the time is that between the
first and the last line of the log, so neither start nor saving counts. What step 1 does otherwise than trl's defaults:
activations are not recomputed where memory allows (activation_checkpointing: auto), and on a CPU only the positions that
have a label are projected onto the vocabulary. A third arm packs rows, which changes the batches and so the losses.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
         "vocab_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": 2048}  # fmt: skip
TRL = [sys.executable, "-m", "trl.scripts.sft", "--use_cpu", "true", "--bf16", "false"]
OURS = [sys.executable, "1_train_full_fine_tuning.py", "--overwrite", "true"]
ARMS = {
    "trl sft, defaults": TRL,
    "step 1, same batches": [*OURS, "--packing", "false"],
    "step 1, packed as the demo is": [*OURS, "--per_device_train_batch_size", "2", "--max_length", "512"],
}


def save_random_model(folder: Path, **shape) -> None:
    """A Llama with random weights, and the tokenizer of the demo model."""
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(ROOT / "demo/model" / file, folder)


def prepare(folder: Path) -> tuple[Path, Path]:
    """A model with random weights, and the demo's training data as trl reads it: prompt and completion."""
    model, data = folder / "model", folder / "data"
    logging.disable_progress_bar()
    save_random_model(model)
    data.mkdir()
    rows = [row["messages"] for row in json.loads((ROOT / "demo/data/train_dataset.json").read_text())]
    lines = [json.dumps({"prompt": row[:-1], "completion": row[-1:]}, ensure_ascii=False) + "\n" for row in rows]
    (data / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return model, data


def train(command: list, output_dir: Path) -> tuple[float, dict[int, float]]:
    """Tokens per second between the first and the last logged step, and the loss of each step."""
    shutil.rmtree(output_dir, ignore_errors=True)
    times, lines = [], []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        lines.append(line)
        if "loss" in line and ("'grad_norm'" in line or "  grad_norm " in line):
            times.append(time.perf_counter())
    if process.wait() != 0:
        sys.exit("".join(lines))
    (state,) = output_dir.glob("checkpoint-*/trainer_state.json")
    log = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(log) == len(times), (len(log), len(times))
    tokens = log[-1]["num_tokens"] - log[0]["num_tokens"]
    return tokens / (times[-1] - times[0]), {entry["step"]: entry["loss"] for entry in log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in ARMS}
    losses: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, data = prepare(Path(folder))
        for round_number in range(args.rounds):
            for name, arm in ARMS.items():
                run = Path(folder, "run")
                settings = {"--model_name_or_path": model, "--dataset_name": data, "--output_dir": run,
                            "--max_steps": args.steps, "--save_steps": args.steps, "--logging_steps": 1,
                            "--learning_rate": 5e-4, "--seed": 42, "--report_to": "none"}  # fmt: skip
                speed, losses[name] = train([*arm, *(part for pair in settings.items() for part in pair)], run)
                speeds[name].append(speed)
                print(f"round {round_number + 1}: {name:<30}{speed:>8,.0f} tokens/s", flush=True)
    reference, same = list(ARMS)[:2]
    apart = max(abs(losses[same][step] / losses[reference][step] - 1) for step in losses[reference])
    print(f"\n{'median of ' + str(args.rounds) + ' rounds':<32}tokens/s   ratio")
    for name, values in speeds.items():
        ratio = statistics.median(values) / statistics.median(speeds[reference])
        print(f"{name:<32}{statistics.median(values):>8,.0f}{ratio:>8.2f}")
    print(f"largest difference of a step's loss between the first two: {apart:.4%} over {args.steps} steps")


if __name__ == "__main__":
    main()
