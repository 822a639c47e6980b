"""
Memory that step 1 estimates before it loads a model, beside what training then took.

    python benchmarks/memory.py                                                    # Llama shapes with random weights
    python benchmarks/memory.py --model models/smollm2-135m-instruct --data data/dialogsum      # a real model and data
    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/memory.py ...      # without what malloc keeps, and more slowly

Trains for three steps each and prints both from run.json; on the demo data and as one process, unless a model and a folder
with DialogSum are named: then in full, as one process and as two under FSDP2, LoRA and QLoRA.
On the CPU the peak is of the first process's resident set, above what it had before the model was loaded. Pages of the
model's file that are mapped count too, although the system could take them back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from training import ROOT, save_random_model

SHAPES = {
    "25M parameters, 8 layers, 8k words": (
        {"hidden_size": 448, "intermediate_size": 1216, "num_attention_heads": 7},
        ["--max_length", "1024", "--per_device_train_batch_size", "2"],
    ),
    "the same, activations recomputed": (
        {"hidden_size": 448, "intermediate_size": 1216, "num_attention_heads": 7},
        ["--max_length", "1024", "--per_device_train_batch_size", "2", "--activation_checkpointing", "true"],
    ),
    "135M parameters, 30 layers, 49k words": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152},
        ["--max_length", "512", "--per_device_train_batch_size", "1"],
    ),
    "90M parameters, 4 layers, 64k words, untied": (
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
         "vocab_size": 65536, "tie_word_embeddings": False},
        ["--max_length", "256", "--per_device_train_batch_size", "2", "--packing", "false"],
    ),
    "135M parameters, LoRA": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152},
        ["--max_length", "512", "--per_device_train_batch_size", "2",
         "--use_peft", "true", "--lora_target_modules", "all-linear"],
    ),
}  # fmt: skip


LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear"]
REAL = {
    "full": [],
    "full, FSDP2 over 2 processes": ["--fsdp", "true"],
    "LoRA": LORA,
    "QLoRA": [*LORA, "--load_in_4bit", "true"],
}
DIALOGSUM = ["--dataset_train_split", "dev[:-50]", "--question_key", "dialogue", "--answer_key", "summary",
             "--max_length", "1024", "--per_device_train_batch_size", "1"]  # fmt: skip


def measure(model: Path, data: Path, run: Path, arguments: list[str]) -> tuple[float, float]:
    """Train three steps; the estimate and the measured peak of the first process, in MiB."""
    launcher = [sys.executable]
    if "--fsdp" in arguments:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [
        *launcher, "1_train_full_fine_tuning.py", "--model_name_or_path", model, "--dataset_name", data,
        "--output_dir", run, "--max_steps", "3", "--save_steps", "3", "--overwrite", "true", *arguments,
    ]  # fmt: skip
    result = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    memory = json.loads((run / "run.json").read_text())["memory"]
    return memory["estimate"]["total"] / 2**20, memory["measured_peak"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Folder of a model, measured in place of random weights.")
    parser.add_argument("--data", type=Path, help="Folder with DialogSum's dev.jsonl and test.jsonl, with --model.")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    print(f"{'shape':<46}{'estimate':>10}{'measured':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        model, run = Path(folder, "model"), Path(folder, "run")
        cases = {name: ({}, [*DIALOGSUM, *kind]) for name, kind in REAL.items()} if options.model else SHAPES
        for name, (shape, arguments) in cases.items():
            if not options.model:
                save_random_model(model, **shape)
            where = (options.model.resolve(), options.data.resolve()) if options.model else (model, "demo/data")
            estimate, measured = measure(*where, run, arguments)
            print(f"{name:<46}{estimate:>6.0f} MiB{measured:>6.0f} MiB{estimate / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
