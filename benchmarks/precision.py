"""
Copies of a float32 checkpoint in lower precisions, beside it, for steps 3 and 5 to compare (docs/precision.md).

    python benchmarks/precision.py outputs/smollm2/checkpoint-61

Of each copy it prints which share of the update from the base it keeps (the projection), how much energy rounding adds to
the update's, and which share of the weights are those of the base again.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetuning.models.rounding import dtype_name, plan_rounding, read_tensors, round_weights
from finetuning.runs import PRECISION_FILE, read_json, read_run, write_json

COPIES = ((torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "nearest"))
OF_TRAINING = ("*.safetensors", "*.index.json", "optimizer", "*.pt", "*.pth", "*.bin", "trainer_state.json")


def compare(rounded: dict[str, torch.Tensor], learned: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> str:
    """The projection of the rounded update on the true one, the noise, and the weights that are the base's again."""
    sums = torch.zeros(5, dtype=torch.float64)
    for name, tensor in learned.items():
        before = base[name].float()
        update, left = tensor - before, rounded[name].float() - before
        noise = left - update
        products = [(a * b).sum(dtype=torch.float64) for a, b in ((left, update), (update, update), (noise, noise))]
        sums += torch.stack([*products, (left == 0).sum(), torch.tensor(left.numel())])
    projection, energy, noise, same, number = sums.tolist()
    return f"keeps {projection / energy:.4f}, noise {noise / energy:.3f}, {same / number:.1%} of the weights as before"


def main(checkpoint: Path) -> None:
    config = read_run(checkpoint.parent)["config"]
    base = (config["model_name_or_path"], config.get("model_revision"))
    learned, before = (dict(read_tensors(name)) for name in (str(checkpoint), base[0]))
    start = time.perf_counter()
    plan = plan_rounding(learned.items(), base, "float32", "auto")
    seconds = time.perf_counter() - start
    print(f"measured in {seconds:.2f} s, {sum(t.numel() for t in learned.values()):,} weights: {plan['kept']}")
    learned = {name: tensor for name, tensor in learned.items() if name not in plan["left_out"]}
    for dtype, rounding in COPIES:
        folder = checkpoint.with_name(f"{checkpoint.name}-{dtype_name(dtype)}-{rounding}")
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*OF_TRAINING))
        start = time.perf_counter()
        rounded = {name: round_weights(tensor, dtype, name, rounding) for name, tensor in read_tensors(str(checkpoint))}
        seconds = time.perf_counter() - start
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", read_json(folder / "config.json") | {"dtype": dtype_name(dtype)})
        write_json(folder / PRECISION_FILE, plan | {"dtype": dtype_name(dtype), "rounding": rounding})
        print(f"{folder.name}: rounded in {seconds:.2f} s; {compare(rounded, learned, before)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint in a run's folder")
    main(parser.parse_args().checkpoint)
