"""
Speed of step 1 beside trl's own `sft` script with its defaults, on the same data and model, at the same losses.

    python benchmarks/training.py                 # a Llama of 17 million parameters with random weights, the demo's data
    python benchmarks/training.py --rounds 5 --steps 30
    python benchmarks/training.py --model models/smollm2-135m-instruct --data data/dialogsum/dev.jsonl --max_length 1024 \\
        --arms packed "packed, dense mask" --rounds 1 --steps 4

The arms of a kind train on the same batches in the same order, in turns, each round in a new process; the time is that
between the first and the last line of the log, so neither start nor saving counts. What step 1 does otherwise than trl's
defaults: activations are not recomputed where memory allows (activation_checkpointing: auto), and on a CPU only the
positions that have a label are projected onto the vocabulary. Packed arms take 2 sequences a step, filled with several
rows each, where the others take 8 rows: other batches, so other losses. They attend within each row, where the dense
mask computes all tokens against all. All arms compute in float32 but for the one that says bf16.
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
OURS = [sys.executable, "1_train_full_fine_tuning.py", "--overwrite", "true", "--bf16"]
PACKED = ["--per_device_train_batch_size", "2", "--packing", "true"]
# Name: which batches it gets, and its command
ARMS = {
    "trl sft, defaults": ("rows", TRL),
    "unpacked": ("rows", [*OURS, "false", "--packing", "false"]),
    "packed": ("packed", [*OURS, "false", *PACKED]),
    "packed, dense mask": ("packed", [*OURS, "false", *PACKED, "--attn_implementation", "sdpa"]),
    "packed, bf16": ("packed, bf16", [*OURS, "true", *PACKED]),  # whose losses are not those of float32
}


def save_random_model(folder: Path, **shape) -> None:
    """A Llama with random weights, and the tokenizer of the demo model."""
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(ROOT / "demo/model" / file, folder)


def read_rows(file: Path | None) -> list[dict]:
    """Rows as trl reads them, prompt and completion: the demo's, or those of a file of DialogSum."""
    if file is None:
        conversations = [row["messages"] for row in json.loads((ROOT / "demo/data/train_dataset.json").read_text())]
        return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": row["dialogue"]}],
            "completion": [{"role": "assistant", "content": row["summary"]}],
        }
        for row in rows
    ]


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


def report(speeds: dict[str, list[float]], losses: dict[str, dict[int, float]]) -> None:
    """Print the median of each arm beside the last one's, and how far the losses of equal batches are apart."""
    slowest = statistics.median(list(speeds.values())[-1])
    print(f"\n{'medians':<24}tokens/s   ratio")
    for name, values in speeds.items():
        print(f"{name:<24}{statistics.median(values):>8,.0f}{statistics.median(values) / slowest:>8.2f}")
    for batches in ("rows", "packed"):
        first, *others = [losses[name] for name in losses if ARMS[name][0] == batches] or [{}]
        apart = [abs(other[step] / first[step] - 1) for other in others for step in first]
        if apart:
            print(f"largest difference of a step's loss between arms of equal batches ({batches}): {max(apart):.4%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", type=Path, help="folder of a model; left out: random weights")
    parser.add_argument("--data", type=Path, help="JSON lines with dialogue and summary; left out: the demo's rows")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a sequence, which packed rows fill")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[3::-1], help="ratios are to the last one")
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in args.arms}
    losses: dict[str, dict[int, float]] = {}
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model, data, run = (
            Path(args.model or Path(folder, "model")).absolute(),
            Path(folder, "data"),
            Path(folder, "run"),
        )
        if args.model is None:
            save_random_model(model)
        data.mkdir()
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_rows(args.data)]
        (data / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        for round_number in range(args.rounds):
            for name in args.arms:
                settings = {"--model_name_or_path": model, "--dataset_name": data, "--output_dir": run,
                            "--max_steps": args.steps, "--save_steps": args.steps, "--logging_steps": 1,
                            "--max_length": args.max_length, "--learning_rate": 2e-5 if args.model else 5e-4,
                            "--seed": 42, "--report_to": "none"}  # fmt: skip
                command = [*ARMS[name][1], *(part for pair in settings.items() for part in pair)]
                speed, losses[name] = train(command, run)
                speeds[name].append(speed)
                print(f"round {round_number + 1}: {name:<24}{speed:>8,.0f} tokens/s", flush=True)
    report(speeds, losses)


if __name__ == "__main__":
    main()
