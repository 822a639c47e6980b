"""
What this machine's hardware can do, what is chosen for it (dtype, attention, sharding), and how much memory is free.
"""

import contextlib
import ctypes
import importlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention


def bf16_available() -> bool:
    """Whether the accelerator computes in bfloat16 itself: CUDA from Ampere on, and other vendors' that say so."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type in ("xpu", "npu", "hpu", "mlu")


def measure_bf16_gain(hidden_size: int, intermediate_size: int, num_tokens: int) -> float:
    """How many times as fast as float32 this CPU computes in bfloat16, with the threads that this process has.

    The two take turns at the products of an MLP of these sizes, forward and backward, under autocast as in training, so
    that converting the weights counts too. The fastest of each counts, since other programs can only slow one down.
    """
    hidden_size, intermediate_size = min(hidden_size, 1024), min(intermediate_size, 2048)
    up = torch.ones(intermediate_size, hidden_size, requires_grad=True)
    down = torch.ones(hidden_size, intermediate_size, requires_grad=True)
    inputs = torch.ones(min(num_tokens, 512), hidden_size, requires_grad=True)

    def step(in_bf16: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            outputs = torch.nn.functional.linear(torch.nn.functional.linear(inputs, up), down)
        outputs.backward(outputs.detach())
        return time.perf_counter() - start

    step(False), step(True)  # the first calls prepare kernels
    in_float32, in_bf16 = map(min, zip(*[(step(False), step(True)) for _ in range(6)], strict=True))
    return in_float32 / in_bf16


def available_memory(device: torch.device, local_world_size: int) -> float | None:
    """Bytes of free memory of this rank's device; ranks on CPUs share the machine's, or the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        (cached,) = re.findall(r"^file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - used + int(cached))
    return free / local_world_size


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, where it runs on Linux with glibc.

    glibc gives large blocks back to the system, and a new one costs a page fault for every 4 KiB: a tenth of the time.
    """
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        _of_glibc("mallopt")(option, 1 << 30)  # bytes


def give_back_freed_memory() -> None:
    """Give the memory of freed tensors back to the system, where this process runs on Linux with glibc."""
    _of_glibc("malloc_trim")(0)


def _of_glibc(name: str) -> Callable[..., int]:
    """A function of glibc's malloc; one that does nothing where this process has another C library."""
    return getattr(ctypes.CDLL(None), name, lambda *_: 0) if sys.platform == "linux" else lambda *_: 0


def _flash_attention_problem(compute_dtype: torch.dtype) -> str | None:
    """Why FlashAttention 2 cannot be used here, or None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability()[0] < 8:
        return "the GPU is older than Ampere"
    try:
        flash_attn = importlib.import_module("flash_attn")
        tensor = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device="cuda")
        flash_attn.flash_attn_func(tensor, tensor, tensor)
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch or GPU fails in any of these ways
        return f"flash_attn does not run ({(str(error) or type(error).__name__).splitlines()[0]})"
    return "it does not compute in float32" if compute_dtype == torch.float32 else None


def choose_dtype(requested: str | None) -> torch.dtype:
    """The dtype to load a model in for inference: bfloat16 if the device has it, float16 on old GPUs, else float32."""
    if requested is not None:
        return getattr(torch, requested)
    return torch.bfloat16 if bf16_available() else torch.float16 if torch.cuda.is_available() else torch.float32


def choose_attention(requested: str | None, compute_dtype: torch.dtype) -> tuple[str, str | None]:
    """The attention implementation to load a model with, and the reason where it is not the one that was requested."""
    if requested == "flex_attention" and not torch.accelerator.is_available():
        return "sdpa", "it has no backward pass on a CPU"
    if requested in ("eager", "sdpa", "flex_attention"):
        return requested, None
    if requested not in (None, "flash_attention_2"):  # FlashAttention of another version, or a kernel of the Hub
        try:
            lazy_import_flash_attention(requested)
        except (ImportError, OSError, ValueError) as error:
            return "sdpa", f"{requested} does not load ({' '.join(str(error).split())})"
        return requested, None
    problem = _flash_attention_problem(compute_dtype)
    return ("flash_attention_2", None) if problem is None else ("sdpa", problem)
