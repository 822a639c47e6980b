"""
What training will need of a device's memory, estimated before the model is loaded, and what it has taken in the end.

Weights, gradients and optimizer state are counted. Activations are measured: the model's own forward pass runs on
tensors that have a shape and no data (torch's FakeTensorMode), and what autograd would keep for the backward pass is
added up. docs/preflight.md has the estimate beside the measured peak, and the models that do not run without data.
"""

import contextlib
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from finetuning.data.checks import Finding
from finetuning.hardware import available_memory
from finetuning.models.config import load_model_config
from finetuning.ranks import get_local_world_size, get_world_size
from finetuning.training.arguments import TrainingArguments
from finetuning.training.attention import ROW_ATTENTION
from finetuning.training.model import ModelPlan, add_adapter, build_planned_model

GIB = 2**30
USABLE = 0.92  # share of the free memory; the rest is left to fragmentation and to other programs
CPU_BUFFERS = 0.06 * GIB  # for threads, oneDNN, and pages that training touches first
# On a CPU, glibc's malloc leaves holes between the tensors that live on, and gives none back to the system. A run with
# MALLOC_MMAP_THRESHOLD_=1048576 has none, and takes a third to a half more of the CPU's time. This share is fitted to
# runs of SmolLM2 and not derived: docs/preflight.md has them.
HOLES_PER_ACTIVATION = 0.3
MAPPED = 32 * 2**20  # bytes from which malloc always maps a buffer of its own, which leaves no hole
# The fused LM head of trl projects tiles of this many tokens and words (trl/kernels/chunked_logprob.py)
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
# Without Triton the gradient of a tile takes temporaries of its size: the logits, scaled, tempered, as log p and as p,
# the gradient, what is added to it, and a factor of that. Smaller tiles keep them small (ResumableSFTTrainer sets it).
HEAD_WORDS_ON_CPU, HEAD_COPIES_ON_CPU = 4096, 8
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
    answer: int = 0  # tokens that a decoder reads, where `length` is those of its encoder

    @property
    def tokens(self) -> int:
        return self.rows * (self.length + self.answer)


@dataclass(frozen=True)
class Shapes:
    """The counts of a model's parameters, and the bytes that its forward pass keeps, which decide the memory."""

    parameters: int
    trained: int
    outside_layers: int  # parameters of embeddings, last norm and head
    num_layers: int
    hidden_size: int
    vocab_size: int
    activations: int  # bytes, with nothing recomputed; 0 where they could not be measured
    unmeasured: str | None = None  # why they could not be measured


def measure_shapes(
    plan: ModelPlan, config: PreTrainedConfig, dtype: torch.dtype, batch: Batch, args: TrainingArguments
) -> Shapes:
    """Count parameters, run the model's forward pass without data, and add up what the backward pass would need.

    Raises:
        InputError: The model could not be loaded with these settings, or has no module of that name for an adapter.
    """
    compute = None if args.compute_dtype == torch.float32 else args.compute_dtype
    if args.fsdp and compute is not None:
        dtype, compute = compute, None  # FSDP hands each layer its weights in the lower precision
    with torch.device("meta"):
        model = build_planned_model(plan, config, dtype)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        inside = {id(parameter): parameter.numel() for module in layers for parameter in module.parameters()}
        outside = sum(parameter.numel() for parameter in model.parameters()) - sum(inside.values())
        trained = model if plan.peft_config is None else add_adapter(model, plan.peft_config)
    model.train()
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # it draws which layers are left out, and reads what was drawn
            module.training = False
    text_config = config.get_text_config()
    activations, unmeasured = 0, None
    try:
        # the loss of encoder-decoder models takes all logits, where trl's fused head keeps none
        whole = model if config.is_encoder_decoder else model.base_model
        activations = measure_activations(whole, batch, args.device.type, compute)
    except (RuntimeError, TypeError, ValueError) as error:  # the model's own code may read values, and there are none
        unmeasured = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Shapes(
        parameters=sum(p.numel() for p in trained.parameters()),
        trained=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        outside_layers=outside,
        num_layers=text_config.num_hidden_layers,  # a layer of an encoder counts with one of its decoder
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size + len(plan.new_ids),
        activations=activations,
        unmeasured=unmeasured,
    )


def measure_activations(backbone: torch.nn.Module, batch: Batch, device: str, compute: torch.dtype | None) -> int:
    """Bytes that autograd keeps from the forward pass of a model on the meta device, without the model's parameters."""
    kept: dict[int, int] = {}
    tensors = []  # while these live, no other storage gets the address of one of them
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

        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
        if batch.answer:
            inputs |= dict.fromkeys(("decoder_input_ids", "labels"), torch.zeros(rows, batch.answer, dtype=torch.long))
        else:
            inputs["position_ids"] = torch.arange(length)[None]
        if not batch.answer and backbone.config._attn_implementation != ROW_ATTENTION:
            inputs["attention_mask"] = torch.zeros(rows, 1, length, length, dtype=torch.bool)
            if backbone.config._attn_implementation == "eager":
                inputs["attention_mask"] = inputs["attention_mask"].to(compute or torch.float32)
        precision = contextlib.nullcontext() if compute is None else torch.autocast(device, compute)
        with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.func.functional_call(backbone, state, kwargs={**inputs, "use_cache": False})
    return sum(kept.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that each rank needs at its peak, by their use, and that its device has free; None means unknown."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    gathered: float
    holes: float  # what malloc keeps of freed memory
    other: float
    available: float | None
    activation_checkpointing: bool
    accumulates: bool = False

    @property
    def total(self) -> float:
        """The larger of the two peaks of a step: before the backward pass, all activations and the head; after it, all
        gradients. Where gradients are accumulated, those of the batch before are there all the time."""
        steady = self.parameters + self.optimizer + self.gathered + self.holes + self.other
        if self.accumulates:
            return steady + self.gradients + self.activations + self.head
        return steady + max(self.activations + self.head, self.gradients + self.head / 4)

    @property
    def usable(self) -> float:
        return math.inf if self.available is None else USABLE * self.available

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    def to_dict(self) -> dict:
        sizes = {key: round(value) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {**sizes, "total": round(self.total)}

    def describe(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "activations", "head", "gathered", "holes")
        sizes = ", ".join(f"{name} {gib(getattr(self, name))}" for name in parts if getattr(self, name) >= 0.005 * GIB)
        free = "of an unknown amount" if self.available is None else f"of {gib(self.available)} free"
        return f"{gib(self.total)} {free} per process ({sizes})"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def plan_memory(
    shapes: Shapes, batch: Batch, args: TrainingArguments, settings: dict, checkpointing: bool, available: float | None
) -> MemoryPlan:
    """Bytes at the peak of a step.

    Args:
        settings: Keyword arguments of from_pretrained, with the dtype as torch.dtype.
        checkpointing: Whether only each layer's input is kept, and one layer at a time is recomputed.
    """
    on_gpu = args.device.type != "cpu"
    parameters, gradients, optimizer = state_bytes(shapes, args, settings)
    if args.fsdp and (args.fsdp_config or {}).get("cpu_offload") and on_gpu:
        parameters = gradients = optimizer = 0.0
    activations = float(shapes.activations)
    if checkpointing:
        layer_input = batch.tokens * shapes.hidden_size * args.compute_dtype.itemsize
        activations = shapes.num_layers * layer_input + shapes.activations / shapes.num_layers
    return MemoryPlan(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        head=head_bytes(shapes, batch, args),
        gathered=gathered_bytes(shapes, args),
        holes=0.0 if on_gpu else hole_bytes(shapes, args, activations),
        other=0.0 if on_gpu else CPU_BUFFERS,
        available=available,
        activation_checkpointing=checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
    )


def state_bytes(shapes: Shapes, args: TrainingArguments, settings: dict) -> tuple[float, float, float]:
    """Bytes of each rank's weights, gradients and optimizer state."""
    world_size, compute_bytes = get_world_size(), args.compute_dtype.itemsize
    shards = world_size if args.fsdp else 1
    # FSDP2 keeps trained weights in float32 where it computes in a lower precision
    weight_bytes = 4 if args.fsdp and compute_bytes == 2 else settings["dtype"].itemsize
    quantization = settings.get("quantization_config")
    frozen_bytes = settings["dtype"].itemsize
    if quantization is not None:  # 4 or 8 bits, and a few percent more for block-wise scales
        frozen_bytes = 0.56 if quantization.load_in_4bit else 1.05
    frozen = shapes.parameters - shapes.trained
    trained_bytes = 4 if frozen else weight_bytes
    parameters = shapes.trained * trained_bytes + frozen * frozen_bytes
    if quantization is not None:  # embeddings and head stay unquantised
        parameters += shapes.outside_layers * (compute_bytes - frozen_bytes)
    gradients = shapes.trained * trained_bytes
    if world_size > 1 and not args.fsdp:
        gradients *= 2  # DDP reduces in buckets of its own
    optimizer = shapes.trained * OPTIMIZER_BYTES.get(str(getattr(args.optim, "value", args.optim)), 2 * trained_bytes)
    return parameters / shards, gradients / shards, optimizer / shards


def head_bytes(shapes: Shapes, batch: Batch, args: TrainingArguments) -> float:
    """Bytes that trl's fused head needs: tiles of logits, and the gradients of what it reads.

    Encoder-decoder models have no such head. Their logits count as activations, and here are the gradients of them.
    """
    if batch.answer:
        return batch.rows * batch.answer * shapes.vocab_size * (4 + args.compute_dtype.itemsize)
    on_gpu = args.device.type != "cpu"
    tile_tokens = min(round(batch.tokens * batch.labelled), HEAD_TOKENS)
    tile = tile_tokens * (HEAD_WORDS * args.compute_dtype.itemsize if on_gpu else HEAD_WORDS_ON_CPU * 4)
    head = tile * (1 if on_gpu else 1 + HEAD_COPIES_ON_CPU) + batch.tokens * shapes.hidden_size * 4
    if args.label_smoothing_factor:  # the loss is then made of all logits at once
        head += 3 * batch.tokens * shapes.vocab_size * 4
    if shapes.trained == shapes.parameters:
        head += shapes.vocab_size * shapes.hidden_size * 4  # the gradient of the head, gathered in float32
    return head


def gathered_bytes(shapes: Shapes, args: TrainingArguments) -> float:
    """Bytes that FSDP gathers from other ranks: two layers and what is outside of the layers, or the whole model."""
    if not args.fsdp or get_world_size() == 1:
        return 0.0
    one_layer = (shapes.parameters - shapes.outside_layers) / shapes.num_layers
    num_parameters = shapes.outside_layers + 3 * one_layer  # with the gradients of the layer that is being reduced
    if not (args.fsdp_config or {}).get("reshard_after_forward", True):
        num_parameters += shapes.parameters
    return num_parameters * args.compute_dtype.itemsize + shapes.vocab_size * shapes.hidden_size * 4


def hole_bytes(shapes: Shapes, args: TrainingArguments, activations: float) -> float:
    """Bytes that malloc keeps of freed memory: between activations, and where FSDP gathered and reduced each layer."""
    holes = HOLES_PER_ACTIVATION * activations
    if args.fsdp and get_world_size() > 1:
        one_layer = (shapes.parameters - shapes.outside_layers) / shapes.num_layers * args.compute_dtype.itemsize
        if one_layer < MAPPED:
            holes += shapes.parameters * args.compute_dtype.itemsize + shapes.trained * 4
    return holes


def what_would_fit(
    shapes: Shapes, batch: Batch, args: TrainingArguments, settings: dict, plan: MemoryPlan
) -> list[str]:
    """Changes under which a plan that does not fit would, the smallest change first."""

    def plan_row(length: int) -> MemoryPlan:
        """One row of this length a device, and activations recomputed."""
        activations = round(shapes.activations / batch.rows * length / batch.length)
        one_row = replace(batch, rows=1, length=length)
        return plan_memory(replace(shapes, activations=activations), one_row, args, settings, True, plan.available)

    found = []
    row = plan_row(batch.length)
    accumulated = replace(row, accumulates=True)
    if batch.rows > 1 and accumulated.fits:
        steps = args.gradient_accumulation_steps * batch.rows
        found.append(
            f"per_device_train_batch_size: 1 with gradient_accumulation_steps: {steps} and "
            f"activation_checkpointing: true ({gib(accumulated.total)})"
        )
    for length in (2048, 1024, 512):
        if not found and length < batch.length and (shorter := plan_row(length)).fits:
            size = gib(shorter.total)
            found.append(f"max_length: {length}, one row a device and activation_checkpointing: true ({size})")
    state = plan.parameters + plan.gradients + plan.optimizer
    world_size = get_world_size() if args.fsdp else 1
    room = plan.usable - (row.total - row.parameters - row.optimizer - row.gathered)
    if room > 0 and not found and args.device.type != "cpu":  # processes on one CPU share its memory
        devices = max(world_size + 1, -(-state * world_size // room))
        found.append(f"FSDP over {devices:.0f} or more such GPUs (fsdp: true, torchrun)")
    lora_bytes = shapes.parameters * 2 / world_size
    if shapes.trained == shapes.parameters and lora_bytes < room:
        found.append(f"use_peft: true, which trains an adapter on weights of {gib(lora_bytes)}")
    return found or ["a smaller model, or a device with more memory"]


def check_memory(
    args: TrainingArguments, model: ModelPlan, longest_row: int, labelled: float, longest_answer: int = 0
) -> Finding:
    """Whether training fits into memory, with activation checkpointing where it does not fit without.

    Args:
        longest_row: Tokens of the longest sequence, or for an encoder-decoder model of the longest question.
        labelled: Share of the tokens that the loss is on.
        longest_answer: Tokens of the longest answer, for an encoder-decoder model.

    Returns:
        The finding, with the plan as its numbers.
    """
    flattened = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
    # a batch may have a larger share of answers than the average
    batch = Batch(args.per_device_train_batch_size, longest_row, flattened, min(1.0, 1.5 * labelled), longest_answer)
    requested = args.activation_checkpointing
    config = load_model_config(model.name_or_path, **model.source)
    settings = model.settings
    if settings["dtype"] == "auto":
        settings = {**settings, "dtype": config.dtype or torch.float32}
    shapes = measure_shapes(model, config, settings["dtype"], batch, args)
    available = available_memory(args.device, get_local_world_size())

    def plan(checkpointing: bool) -> MemoryPlan:
        return plan_memory(shapes, batch, args, settings, checkpointing, available)

    chosen = plan(requested == "true")
    if requested == "auto" and (shapes.unmeasured or not chosen.fits):
        chosen = plan(True)
    numbers = {**chosen.to_dict(), "model_parameters": shapes.parameters, "trained_parameters": shapes.trained}
    state = "on" if chosen.activation_checkpointing else "off"
    if not chosen.fits:
        would = what_would_fit(shapes, batch, args, settings, chosen)
        if state == "off" and plan(True).fits:
            would = [f"activation_checkpointing: true ({gib(plan(True).total)})"]
        level, text = "refused", f"training needs {chosen.describe()}. What would fit: {'; or '.join(would)}"
    elif shapes.unmeasured:
        level, text = "warning", f"at least {chosen.describe()}, and the activations, which could not be measured "
        text += f"({shapes.unmeasured}); activation checkpointing {state}"
    else:
        why = {"on": "it does not fit without", "off": "it fits without"}[state] if requested == "auto" else "as asked"
        level, text = "ok", f"{chosen.describe()}; activation checkpointing {state}, {why}"
    return Finding("memory", level, text, numbers=numbers)


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
        """The peak, or None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved()
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(peak) * 1024 - self.start  # the file has it in kB
