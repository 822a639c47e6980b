"""
Step 1 beside LLaMA-Factory and ms-swift: the same rows, the same model, without a GPU.

    python3.11 -m venv /tmp/llamafactory
    /tmp/llamafactory/bin/pip install torch==2.13.0 llamafactory==0.9.5
    python3.11 -m venv /tmp/swift
    /tmp/swift/bin/pip install torch==2.13.0 ms-swift==4.6.0
    python benchmarks/others.py --llamafactory /tmp/llamafactory --swift /tmp/swift \
        --model models/smollm2-135m-instruct --data ../shared/data/dialogsum/dev.jsonl

The tools' pins contradict each other's and ours, so each has an environment of its own. Beside a torch that is built for
CPUs, PyPI's torchvision and torchaudio do not load. LLaMA-Factory needs neither for text, but imports torchaudio:

    /tmp/llamafactory/bin/pip uninstall torchvision torchaudio
    touch /tmp/llamafactory/lib/python3.11/site-packages/torchaudio.py

All train every weight, on the first 450 rows in their order, with the same optimizer; each arm is a process of its own,
in turns. All three train with the Trainer of transformers, and `probe` watches it: how many tokens each step has,
padding not counted, when the step ends and what its loss is. The time is that from the end of the first step to the
end of the last, so neither start nor saving counts.

Padded arms take the next four rows (`--rows`) in each step, so all have the same batches, and their losses are compared.
Packed arms take two sequences of 1,024 tokens, filled as the tool does it; ms-swift has none, since it packs with
FlashAttention only, which needs a GPU. Both tools recompute activations in the backward pass if nothing is said, which
saves memory and costs time; the arms "recomputed" let them, the others switch it off. Arms "bf16" have float32
weights and compute in bfloat16, but for the last, which does what ms-swift does with a checkpoint in bfloat16 if nothing
is said: weights and optimizer are in bfloat16 too. `--arms` picks those whose names begin so.
"""

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.999, "seed": 42,
            "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}  # fmt: skip
PROGRAMS = {
    "step 1": "1_train_full_fine_tuning.py",
    "LLaMA-Factory": "llamafactory.launcher",
    "ms-swift": "swift.cli.sft",
}
FULL = {
    "step 1": {"overwrite": True, "train_sampling_strategy": "sequential"},
    "LLaMA-Factory": {"stage": "sft", "do_train": True, "finetuning_type": "full", "template": "chatml",
                      "disable_shuffling": True, "overwrite_cache": True},
    "ms-swift": {"tuner_type": "full", "model_type": "llama", "template": "chatml", "use_cpu": True,
                 "split_dataset_ratio": 0, "dataset_shuffle": False, "train_dataloader_shuffle": False},
}  # fmt: skip
# ms-swift computes float32 weights in float16, on a CPU as well, unless fp16 is switched off
FLOAT32 = {"step 1": {"bf16": False}, "LLaMA-Factory": {}, "ms-swift": {"torch_dtype": "float32", "fp16": False}}
BFLOAT16 = {
    "step 1": {"bf16": True},
    "LLaMA-Factory": {"use_cpu": True, "bf16": True},
    "ms-swift": {"torch_dtype": "float32", "bf16": True, "fp16": False},
}
UNPACKED, PACKED = (
    {"step 1": {"packing": False}},
    {"step 1": {"packing": True}, "LLaMA-Factory": {"neat_packing": True}},
)
KEPT = {"LLaMA-Factory": {"disable_gradient_checkpointing": True}, "ms-swift": {"gradient_checkpointing": False}}
ARMS = {  # those of one kind of batch begin alike, and the first of them is what the others are compared with
    "padded, step 1": ("step 1", FLOAT32, UNPACKED),
    "padded, LLaMA-Factory": ("LLaMA-Factory", FLOAT32, KEPT),
    "padded, ms-swift": ("ms-swift", FLOAT32, KEPT),
    "padded, recomputed, LLaMA-Factory": ("LLaMA-Factory", FLOAT32),
    "padded, recomputed, ms-swift": ("ms-swift", FLOAT32),
    "packed, step 1": ("step 1", FLOAT32, PACKED),
    "packed, LLaMA-Factory": ("LLaMA-Factory", FLOAT32, PACKED, KEPT),
    "packed, recomputed, LLaMA-Factory": ("LLaMA-Factory", FLOAT32, PACKED),
    "bf16 packed, step 1": ("step 1", BFLOAT16, PACKED),
    "bf16 packed, LLaMA-Factory": ("LLaMA-Factory", BFLOAT16, PACKED, KEPT),
    "bf16 padded, step 1": ("step 1", BFLOAT16, UNPACKED),
    "bf16 padded, LLaMA-Factory": ("LLaMA-Factory", BFLOAT16, KEPT),
    "bf16 padded, ms-swift": ("ms-swift", BFLOAT16, KEPT),
    "bf16 padded, weights too, ms-swift": ("ms-swift", KEPT),
}


def count_tokens(batch: dict) -> int:
    """How many tokens of a batch are no padding.

    Packed batches have position ids, which begin with 0 in each row; a run of zeros is padding.
    """
    positions = batch.get("position_ids")
    if positions is None:
        return int(batch["attention_mask"].sum())
    starts = positions == 0
    return int((~(starts & starts.roll(-1, dims=-1))).sum())


def probe(output_file: str, program: str, *arguments: str) -> None:
    """Run a script or a module as it runs by itself, and write to output_file what its Trainer did."""
    from transformers import Trainer  # that of the environment which trains

    seen: dict = {"tokens": [], "times": [], "losses": []}
    training_step, log = Trainer.training_step, Trainer.log

    def watched_step(self, model, inputs, *args, **kwargs):
        weights = str(next(model.parameters()).dtype).removeprefix("torch.")
        compute = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else weights
        recomputed = ", recomputed" if model.is_gradient_checkpointing else ""
        seen["how"] = f"{model.config._attn_implementation}, weights {weights}, computed in {compute}{recomputed}"
        seen["tokens"].append(count_tokens(inputs))
        return training_step(self, model, inputs, *args, **kwargs)

    def watched_log(self, logs, *args, **kwargs):
        if "loss" in logs:
            seen["times"].append(time.perf_counter())
            seen["losses"].append(float(logs["loss"]))
        return log(self, logs, *args, **kwargs)

    Trainer.training_step, Trainer.log = watched_step, watched_log
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path[0] = str(ROOT)
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")
    Path(output_file).write_text(json.dumps(seen))


def write_rows(data: Path, folder: Path) -> None:
    """The rows in the one form that all three read, and the description of it that LLaMA-Factory needs."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for line in data.read_text(encoding="utf-8").splitlines()[:450]:
            row = json.loads(line)
            turns = {"system": "Summarize the dialogue.", "user": row["dialogue"], "assistant": row["summary"]}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    tags = {"role_tag": "role", "content_tag": "content", "system_tag": "system",
            "user_tag": "user", "assistant_tag": "assistant"}  # fmt: skip
    rows = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": rows}))


def train(name: str, folder: Path, args: argparse.Namespace) -> dict:
    """What the probe saw of one arm."""
    tool, *layers = ARMS[name]
    model, rows = args.model.resolve(), folder / "rows"
    pythons = {
        "step 1": sys.executable,
        "LLaMA-Factory": args.llamafactory / "bin/python",
        "ms-swift": args.swift / "bin/python",
    }
    inputs = {
        "step 1": {"model_name_or_path": model, "dataset_name": rows, "max_length": 1024,
                   "save_strategy": "steps", "save_steps": args.steps},  # it refuses a run without a checkpoint
        "LLaMA-Factory": {"model_name_or_path": model, "dataset_dir": rows, "dataset": "rows", "cutoff_len": 1024},
        "ms-swift": {"model": model, "dataset": rows / "train.jsonl", "max_length": 1024},
    }  # fmt: skip
    output_dir, seen = folder / "model", folder / "seen.json"
    size = {"max_steps": args.steps, "per_device_train_batch_size": 2 if "packed" in name else args.rows}
    settings = {**SETTINGS, **FULL[tool], **inputs[tool], **size, "output_dir": output_dir}
    for layer in layers:
        settings |= layer.get(tool, {})
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(
        [pythons[tool], __file__, "probe", seen, PROGRAMS[tool], *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{name}:\n{done.stdout}{done.stderr}")
    shutil.rmtree(output_dir)
    return json.loads(seen.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamafactory", type=Path, required=True, help="Its environment.")
    parser.add_argument("--swift", type=Path, required=True, help="Its environment.")
    parser.add_argument("--model", type=Path, required=True, help="A Llama with a ChatML template.")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with dialogue and summary.")
    parser.add_argument("--arms", nargs="+", default=["p", "bf16"], help="How the names of the arms begin.")
    parser.add_argument("--rows", type=int, default=4, help="Rows of a padded batch.")
    parser.add_argument("--steps", type=int, default=3, help="Steps of an arm; the first is not timed.")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    names = [name for name in ARMS if name.startswith(tuple(args.arms))]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(args.data, Path(folder, "rows"))
        for _ in range(args.rounds):
            for name in names:
                seen = train(name, Path(folder), args)
                losses[name] = seen["losses"]
                speeds[name].append(sum(seen["tokens"][1:]) / (seen["times"][-1] - seen["times"][0]))
                print(
                    f"{name:<35}{speeds[name][-1]:>7.1f} tokens/s; {seen['how']}; tokens {seen['tokens']}", flush=True
                )
    print(f"\n{'median of ' + str(args.rounds):<35}tokens/s  first of its kind / it  losses")
    for name in names:
        speed, first = statistics.median(speeds[name]), next(n for n in names if n.split(",")[0] == name.split(",")[0])
        print(f"{name:<35}{speed:>8.1f}{statistics.median(speeds[first]) / speed:>24.2f}  {losses[name]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        probe(*sys.argv[2:])
    else:
        main()
