"""
Weights in a lower precision: how they are rounded to it, and how much of what was learned survives that.

Fine-tuning moves most weights by less than a step of bfloat16, so rounding to nearest takes them back to where they
were. Rounded up or down at random, with the weight as the mean, the update stays in the sum over many of them (Gupta et
al. 2015, "Deep Learning with Limited Numerical Precision"). docs/precision.md has what that does to answers.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from finetuning.models.files import check_model_files, find_tensors
from finetuning.runs import PRECISION_FILE, is_there, read_json
from finetuning.schemas import PRECISION
from finetuning.wording import MIN_KEPT, plural, say_share

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32, by the lower precision
NEAREST_NEEDED = 0.95  # share of the update that rounding to nearest must keep, for `auto` to choose it
PIECE = 1 << 16  # values that are worked on at once, few enough for a core's cache


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def round_weights(tensor: torch.Tensor, dtype: torch.dtype, name: str, rounding: str | None) -> torch.Tensor:
    """A whole tensor in another dtype: each value as the nearest one there, unless `rounding` is stochastic.

    What is drawn depends on the name alone, and is the same on any number of ranks. What is finite stays finite, and
    what is not stays as it is. float16 has coarser steps below 6e-5; what is left there is rounded to nearest.
    """
    if rounding != "stochastic" or tensor.dtype != torch.float32 or dtype not in DROPPED_BITS:
        return tensor.to(dtype)
    num_bits, largest = DROPPED_BITS[dtype], torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
    rounded = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for piece, place in zip(tensor.reshape(-1).split(PIECE), rounded.view(-1).split(PIECE), strict=True):
        # below its sign, the bits of a float count up with its size: what is drawn carries over into those that stay
        bits = torch.randint(1 << num_bits, piece.shape, dtype=torch.int32, generator=generator).to(piece.device)
        bits = bits.add_(piece.view(torch.int32)).bitwise_and_(-(1 << num_bits))
        place.copy_(torch.where(piece.isfinite(), bits.view(torch.float32).clamp_(-largest, largest), piece))
    return rounded


def plan_rounding(
    weights: Iterable[tuple[str, torch.Tensor]], base: tuple[str, str | None], dtype: str, asked: str
) -> dict:
    """How weights w that are about to be stored in a dtype are rounded, and what that keeps of w - b, b being the base.

    What is kept by rounding to nearest is the projection <round(w) - b, w - b> / <w - b, w - b> over all tensors. The
    base (name and revision) is read tensor by tensor, and of a sharded one only what this rank holds; ranks add up.

    Returns:
        dtype; rounding: nearest, stochastic or None; kept: the share by lower precision, empty without an update;
        left_out: names of the tensors that the base has not, or in another shape.
    """
    sums, left_out, device = torch.zeros(1 + len(DROPPED_BITS), dtype=torch.float64), [], None
    check_model_files(base[0])
    files = find_tensors(*base)
    with contextlib.ExitStack() as stack, torch.no_grad():
        opened = functools.cache(lambda path: stack.enter_context(safe_open(path, "pt")))
        for name, tensor in weights:
            before = opened(files[name][0]).get_tensor(name) if name in files else None
            if before is None or before.shape != tensor.shape:
                left_out.append(name)
                continue
            if isinstance(tensor, DTensor):
                mesh, device = tensor.device_mesh, tensor.device
                shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
                before = before[tuple(slice(i, i + size) for i, size in zip(start, shape, strict=True))]
                tensor = tensor.to_local()
            size = PIECE if tensor.device.type == "cpu" else PIECE << 8  # a GPU likes them larger
            for w, b in zip(tensor.reshape(-1).split(size), before.reshape(-1).split(size), strict=True):
                w, b = w.float(), b.to(w.device).float()
                update = w - b
                products = [update.dot(update), *((w.to(lower).float() - b).dot(update) for lower in DROPPED_BITS)]
                sums += torch.stack(products).to("cpu", torch.float64)
    if device is not None:
        sums = sums.to(device)
        dist.all_reduce(sums)
    shares = zip(map(dtype_name, DROPPED_BITS), (sums[1:] / sums[0]).tolist(), strict=True)
    kept = {lower: share for lower, share in shares if math.isfinite(share)}
    return {"dtype": dtype, "rounding": choose_rounding(asked, dtype, kept), "kept": kept, "left_out": left_out}


def choose_rounding(asked: str, dtype: str, kept: dict[str, float]) -> str | None:
    """How float32 is rounded to a dtype; `auto` is stochastic where nearest keeps too little. None: it is not."""
    if dtype == "float32":
        return None
    return asked if asked != "auto" else "stochastic" if kept.get(dtype, 1) < NEAREST_NEEDED else "nearest"


def read_tensors(name_or_path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, (path, *_) in find_tensors(name_or_path).items():
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def plan_loading(name_or_path: str, base: tuple[str, str | None], dtype: str, asked: str) -> dict:
    """The plan of a model that is loaded in a dtype: what is kept as steps 1 and 2 have recorded it.

    Of other models it is measured, where they are in float32 and rounded at all.
    """
    check_model_files(name_or_path)
    record = Path(name_or_path) / PRECISION_FILE
    if all(tensor["dtype"] != "F32" for _, _, tensor in find_tensors(name_or_path).values()):
        dtype = "float32"  # to which nothing has to be rounded
    plan: dict = {"rounding": None, "kept": {}, "left_out": []}
    if is_there(record):
        plan = read_json(record, PRECISION)
    elif dtype != "float32" and name_or_path != base[0]:
        return plan_rounding(read_tensors(name_or_path), base, dtype, asked)
    kept = plan["kept"]
    if plan["rounding"] is not None:  # it was rounded when it was saved; where that was stochastic, nothing was lost
        kept = {d: share for d, share in kept.items() if d == plan["dtype"] and plan["rounding"] == "nearest"}
    return plan | {"dtype": dtype, "kept": kept, "rounding": choose_rounding(asked, dtype, kept)}


def describe_plan(plan: dict) -> str:
    """One line, with a warning where nothing is rounded here and other tools would keep too little."""
    shares = [
        f"{say_share(share if share < 0.99995 else 1.0, MIN_KEPT)} in {dtype}" for dtype, share in plan["kept"].items()
    ]
    text = f"of what was learned, rounding to nearest keeps {' and '.join(shares) or 'an unknown share'}"
    if plan["left_out"]:
        text += f" (without {plural(len(plan['left_out']), 'tensor')} that the base has not in this shape)"
    if plan["rounding"] is not None:
        return f"{text}; rounded to {plan['dtype']}: {plan['rounding']}"
    too_little = min(plan["kept"].values(), default=1) < MIN_KEPT
    return f"{text}; warning: most tools round so, and docs/precision.md says what to do" if too_little else text


@torch.no_grad()
def round_loaded(model: torch.nn.Module, name_or_path: str) -> None:
    """Give a model that was loaded in a lower precision its float32 weights again, each rounded stochastically."""
    loaded = model.state_dict()
    for name, tensor in read_tensors(name_or_path):
        if tensor.dtype == torch.float32 and name in loaded:
            loaded[name].copy_(round_weights(tensor, loaded[name].dtype, name, "stochastic"))
