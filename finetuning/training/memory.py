"""
What training will need of a device's memory, estimated before the model is loaded.

Weights, gradients and optimizer state are counted. Activations are measured: the model's own forward pass runs on
tensors that have a shape and no data (torch's FakeTensorMode), and what autograd would keep for the backward pass is
added up. docs/preflight.md has the estimate beside the measured peak, and the models that do not run without data.
"""

import contextlib
import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from peft import PeftConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import SFTConfig

from finetuning.errors import InputError
from finetuning.models.config import own_code
from finetuning.ranks import get_world_size

GIB = 2**30
USABLE = 0.92  # of what is free; the rest is left to fragmentation and to what else runs
CPU_BUFFERS = 0.06 * GIB  # what threads and oneDNN keep, and the pages that training touches first
# The fused LM head of trl projects tiles of this many tokens and words (trl/kernels/chunked_logprob.py)
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
HEAD_COPIES_ON_CPU = 9  # temporaries of one tile in its backward pass; none on a GPU, where it is one kernel
# Bytes of optimizer state per trained parameter; what is not listed keeps two float32 numbers
OPTIMIZER_BYTES = {
    "sgd": 0, "adafactor": 0.1, "rmsprop": 4, "adagrad": 4, "lion_32bit": 4, "paged_lion_32bit": 4, "lion_8bit": 1,
    "paged_lion_8bit": 1, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1, "rmsprop_bnb_8bit": 1, "ademamix": 12, "ademamix_8bit": 3, "paged_ademamix_8bit": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """The tensors of one step: `rows` sequences of `length` tokens; packed ones are laid end to end in one row."""

    rows: int
    length: int
    packed: bool
    labelled: float = 1.0  # share of the tokens that the loss is on: the head projects no others

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Shapes:
    """What of a model decides the memory: counts of parameters, and bytes that its forward pass keeps."""

    parameters: int
    trained: int
    outside_layers: int  # parameters of embeddings, last norm and head
    num_layers: int
    hidden_size: int
    vocab_size: int
    activations: int  # bytes, with nothing recomputed; 0 where they could not be measured
    unmeasured: str | None = None  # why they could not


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that each rank needs at its peak, by what they are for, and what its device has (None: unknown)."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    gathered: float
    other: float
    available: float | None
    activation_checkpointing: bool
    accumulates: bool = False

    @property
    def total(self) -> float:
        """The larger of the two peaks of a step: before the backward pass, all activations and the head; after it, all
        gradients. Where gradients are accumulated, those of the batch before are there all the time."""
        steady = self.parameters + self.optimizer + self.gathered + self.other
        if self.accumulates:
            return steady + self.gradients + self.activations + self.head
        return steady + max(self.activations + self.head, self.gradients + self.head / 4)

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= USABLE * self.available

    def to_dict(self) -> dict:
        return {
            **{k: round(v) if isinstance(v, float) else v for k, v in asdict(self).items()},
            "total": round(self.total),
        }

    def describe(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "activations", "head", "gathered")
        sizes = ", ".join(f"{name} {gib(getattr(self, name))}" for name in parts if getattr(self, name) >= 0.005 * GIB)
        free = "of an unknown amount" if self.available is None else f"of {gib(self.available)} free"
        return f"{gib(self.total)} {free} per process ({sizes})"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def measure_shapes(
    config: PreTrainedConfig,
    batch: Batch,
    args: SFTConfig,
    settings: dict,
    peft_config: PeftConfig | None,
    num_added_tokens: int = 0,
) -> Shapes:
    """Count parameters, run the model's forward pass without data, and add up what the backward pass would need.

    Args:
        settings: Keyword arguments of from_pretrained: dtype, attn_implementation.

    Raises:
        InputError: The model could not be loaded with these settings, or has no module of that name for an adapter.
    """
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    dtype = settings["dtype"]
    if args.fsdp and compute is not None:
        dtype, compute = compute, None  # FSDP hands each layer its weights in the lower precision
    # FlashAttention's own kernels do not run without data; sdpa without a mask keeps the same tensors
    attention = "eager" if settings["attn_implementation"] == "eager" else "sdpa"
    masked = not settings["attn_implementation"].startswith("flash")
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=args.trust_remote_code,
                **own_code(config, settings.get("revision")),
            )
        except ValueError as error:  # loading it would end in the same words
            raise InputError(f"{config.name_or_path} cannot be built with attention {attention}: {error}") from error
        if num_added_tokens:
            size = model.get_input_embeddings().num_embeddings + num_added_tokens
            model.resize_token_embeddings(size, mean_resizing=False)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        inside = {id(parameter): parameter.numel() for module in layers for parameter in module.parameters()}
        outside = sum(parameter.numel() for parameter in model.parameters()) - sum(inside.values())
        trained = model
        if peft_config is not None:
            check_adapter_names(model, peft_config)
            try:
                trained = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
            except ValueError as error:  # a module of a kind that peft cannot adapt
                raise InputError(f"lora_target_modules: {error}") from error
    model.train()
    text_config = config.get_text_config()
    activations, unmeasured = 0, None
    try:
        activations = _kept_bytes(model.base_model, batch, args.device.type, compute, masked)
    except (RuntimeError, TypeError, ValueError) as error:  # the model's own code, which may look at its data
        unmeasured = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Shapes(
        parameters=sum(p.numel() for p in trained.parameters()),
        trained=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        outside_layers=outside,
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size + num_added_tokens,
        activations=activations,
        unmeasured=unmeasured,
    )


def check_adapter_names(model: torch.nn.Module, peft_config: PeftConfig) -> None:
    """Refuse a name that no module or parameter of the model has: peft leaves it out where others are found."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for key, names in (
        ("target_modules", modules),
        ("modules_to_save", modules),
        ("target_parameters", parameters),
    ):
        wanted = getattr(peft_config, key) or []
        for name in [] if isinstance(wanted, str) else sorted(wanted):  # a text is `all-linear`, or an expression
            if not any(known == name or known.endswith(f".{name}") for known in names):
                ends = sorted({known.rpartition(".")[2] for known in names} - {""})
                ends = [end for end in ends if not end.isdigit() and key != "target_parameters"]
                raise InputError(
                    f"lora_{key}: {name} is nowhere in the model" + (f", which has {', '.join(ends)}" if ends else "")
                )


def _kept_bytes(backbone: torch.nn.Module, batch: Batch, device: str, compute: torch.dtype | None, masked: bool) -> int:
    """Bytes of what autograd keeps from the forward pass of a model on the meta device, its own parameters left out."""
    kept: dict[int, int] = {}
    tensors = []  # as long as they live, no other storage gets their address
    rows, length = (1, batch.tokens) if batch.packed else (batch.rows, batch.length)
    # where an operation has no form without data, torch prints a traceback before it raises
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with FakeTensorMode(), torch.device(device):
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
        }
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                tensors.append(tensor)
            return tensor

        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long), "position_ids": torch.arange(length)[None]}
        if masked:
            inputs["attention_mask"] = torch.zeros(rows, 1, length, length, dtype=torch.bool)
            if backbone.config._attn_implementation == "eager":
                inputs["attention_mask"] = inputs["attention_mask"].to(compute or torch.float32)
        precision = contextlib.nullcontext() if compute is None else torch.autocast(device, compute)
        with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.func.functional_call(backbone, state, kwargs={**inputs, "use_cache": False})
    return sum(kept.values())


def plan_memory(
    shapes: Shapes, batch: Batch, args: SFTConfig, settings: dict, checkpointing: bool, available: float | None
) -> MemoryPlan:
    """Bytes at the peak of a step.

    Args:
        checkpointing: Keep only each layer's input, and recompute one layer at a time.
    """
    world_size = get_world_size()
    shards = world_size if args.fsdp else 1
    on_gpu = args.device.type != "cpu"
    compute_bytes = 2 if args.bf16 or args.fp16 else 4
    fsdp = args.fsdp_config or {} if args.fsdp else {}
    # FSDP2 keeps trained weights in float32 where it computes in a lower precision
    weight_bytes = 4 if args.fsdp and compute_bytes == 2 else settings["dtype"].itemsize
    quantization = settings.get("quantization_config")
    frozen_bytes = settings["dtype"].itemsize
    if quantization is not None:  # block-wise scales are a few percent
        frozen_bytes = 0.56 if quantization.load_in_4bit else 1.05
    frozen = shapes.parameters - shapes.trained
    adapter_bytes = 4 if frozen else weight_bytes
    parameters = (shapes.trained * adapter_bytes + frozen * frozen_bytes) / shards
    if quantization is not None:  # embeddings and head are not quantised
        parameters += shapes.outside_layers * (compute_bytes - frozen_bytes) / shards
    gradients = shapes.trained * adapter_bytes / shards
    if world_size > 1 and not args.fsdp:
        gradients *= 2  # DDP reduces in buckets of its own
    state_bytes = OPTIMIZER_BYTES.get(str(getattr(args.optim, "value", args.optim)), 2 * adapter_bytes)
    optimizer = shapes.trained * state_bytes / shards

    per_layer = shapes.activations / shapes.num_layers
    layer_input = batch.tokens * shapes.hidden_size * compute_bytes
    activations = shapes.num_layers * layer_input + per_layer if checkpointing else shapes.activations

    tile_tokens, tile_words = min(round(batch.tokens * batch.labelled), HEAD_TOKENS), min(shapes.vocab_size, HEAD_WORDS)
    tile = tile_tokens * (HEAD_WORDS * compute_bytes if on_gpu else tile_words * 4)
    copies = 0 if on_gpu else HEAD_COPIES_ON_CPU
    head_trains = frozen == 0
    head = tile * (1 + copies) + batch.tokens * shapes.hidden_size * 4
    if args.label_smoothing_factor:  # the loss is then made of all logits at once
        head += 3 * batch.tokens * shapes.vocab_size * 4
    if head_trains:
        head += shapes.vocab_size * shapes.hidden_size * 4  # the gradient of the head, gathered in float32
    gathered = 0.0
    if shards > 1:
        one_layer = (shapes.parameters - shapes.outside_layers) / shapes.num_layers
        gathered = (shapes.outside_layers + 2 * one_layer) * compute_bytes + shapes.vocab_size * shapes.hidden_size * 4
        gathered += one_layer * compute_bytes  # gradients of the layer that is being reduced
        if not fsdp.get("reshard_after_forward", True):
            gathered += shapes.parameters * compute_bytes
    if fsdp.get("cpu_offload") and on_gpu:
        parameters = gradients = optimizer = 0.0
    other = 0.0 if on_gpu else CPU_BUFFERS
    accumulates = args.gradient_accumulation_steps > 1
    return MemoryPlan(
        parameters, gradients, optimizer, activations, head, gathered, other, available, checkpointing, accumulates
    )


def what_would_fit(shapes: Shapes, batch: Batch, args: SFTConfig, settings: dict, plan: MemoryPlan) -> list[str]:
    """Changes under which a plan that does not fit would, the smallest change first."""
    found = []
    row_batch = replace(batch, rows=1)
    single = replace(shapes, activations=round(shapes.activations / batch.rows))
    if batch.rows > 1:
        smaller = replace(plan_memory(single, row_batch, args, settings, True, plan.available), accumulates=True)
        if smaller.fits:
            accumulation = args.gradient_accumulation_steps * batch.rows
            found.append(
                "per_device_train_batch_size: 1 with "
                f"gradient_accumulation_steps: {accumulation} and activation_checkpointing: true ({gib(smaller.total)})"
            )
    for length in (2048, 1024, 512):
        if not found and length < batch.length:
            shorter = replace(single, activations=round(single.activations * length / batch.length))
            smaller = plan_memory(shorter, replace(row_batch, length=length), args, settings, True, plan.available)
            if smaller.fits:
                found.append(
                    f"max_length: {length}, one row a device and activation_checkpointing: true ({gib(smaller.total)})"
                )
    state = plan.parameters + plan.gradients + plan.optimizer
    rest = plan_memory(single, row_batch, args, settings, True, plan.available)
    rest = rest.total - (rest.parameters + rest.optimizer + rest.gathered)
    world_size = get_world_size() if args.fsdp else 1
    room = USABLE * plan.available - rest
    if room > 0 and not found and args.device.type != "cpu":  # processes on one CPU share its memory
        devices = max(world_size + 1, -(-state * world_size // room))
        found.append(f"FSDP over {devices:.0f} or more such GPUs (fsdp: true, torchrun)")
    if shapes.trained == shapes.parameters:
        lora_bytes = shapes.parameters * 2 / world_size
        if lora_bytes + rest < USABLE * plan.available:
            found.append(f"use_peft: true, which trains an adapter on weights of {gib(lora_bytes)}")
    return found or ["a smaller model, or a device with more memory"]


class MemoryPeak:
    """The largest number of bytes that this process has in use from now on, above what it has now."""

    def __init__(self, device: torch.device):
        self.start, self.device = 0, device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        self.start = psutil.Process().memory_info().rss

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved()
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024 - self.start
