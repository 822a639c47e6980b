"""
Matrix products of float32 models on a CPU by oneDNN, which torch asks for bfloat16 only; for float32 it asks MKL.

On a CPU of AMD's MKL was slower, twice with few rows; on one of Intel's the two were alike (docs/generation.md). Sums
of products differ by rounding. The operator is the one that torch.compile puts in the place of linear layers.
"""

import contextlib
from collections.abc import Iterator

import torch

MIN_WEIGHTS = 1 << 16  # of a layer; with fewer, what oneDNN prepares for each new shape takes longer than the product


@contextlib.contextmanager
def onednn_products(model: torch.nn.Module) -> Iterator[None]:
    """Let the linear layers of `model` that are float32 and in a CPU's memory multiply by oneDNN, without gradients."""
    layers = [
        module
        for module in model.modules() if torch.backends.mkldnn.is_available()
        # subclasses have products of their own, and layers that accelerate brings from a file have another forward
        if type(module) is torch.nn.Linear and "forward" not in vars(module)
        and module.weight.numel() >= MIN_WEIGHTS
        and (module.weight.dtype, module.weight.device.type) == (torch.float32, "cpu")
    ]  # fmt: skip
    multiply = torch.ops.mkldnn._linear_pointwise
    for layer in layers:
        vars(layer)["forward"] = lambda rows, its=layer: multiply(rows, its.weight, its.bias, "none", [], "")
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
