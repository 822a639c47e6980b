"""
Memory that step 1 estimates before it loads a model, beside what training then took.

    python benchmarks/memory.py

Trains Llama shapes with random weights for three steps each on the demo data, one process, and prints both from run.json.
On the CPU the peak is of the resident set, above what the process had before the model was loaded.
"""

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


def main() -> None:
    print(f"{'shape':<46}{'estimate':>10}{'measured':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (shape, arguments) in SHAPES.items():
            model, run = Path(folder, "model"), Path(folder, "run")
            save_random_model(model, **shape)
            command = [
                sys.executable, "1_train_full_fine_tuning.py", "--model_name_or_path", model, "--dataset_name", "demo/data",
                "--output_dir", run, "--max_steps", "3", "--save_steps", "3", "--overwrite", "true", *arguments,
            ]  # fmt: skip
            result = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True)
            if result.returncode != 0:
                sys.exit(result.stdout + result.stderr)
            memory = json.loads((run / "run.json").read_text())["memory"]
            estimate, measured = memory["estimate"]["total"] / 2**20, memory["measured_peak"] / 2**20
            print(f"{name:<46}{estimate:>6.0f} MiB{measured:>6.0f} MiB{estimate / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
