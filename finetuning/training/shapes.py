"""
What of a model decides the memory of training: counts of parameters, and the bytes that its forward pass keeps.

Activations are measured: the model's own forward pass runs on tensors that have a shape and no data (torch's
FakeTensorMode), and what autograd would keep for the backward pass is added up.
"""

import contextlib
import logging
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finetuning.errors import InputError
from finetuning.models.config import own_code
from finetuning.training.arguments import TrainingArguments
from finetuning.training.model import ModelPlan


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
        model = build_model(plan, config, dtype)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        inside = {id(parameter): parameter.numel() for module in layers for parameter in module.parameters()}
        outside = sum(parameter.numel() for parameter in model.parameters()) - sum(inside.values())
        trained = model if plan.peft_config is None else add_adapter(model, plan.peft_config)
    model.train()
    text_config = config.get_text_config()
    masked = not plan.settings["attn_implementation"].startswith("flash")
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
        vocab_size=text_config.vocab_size + len(plan.new_ids),
        activations=activations,
        unmeasured=unmeasured,
    )


def build_model(plan: ModelPlan, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights, with embeddings for the tokens that are added."""
    # FlashAttention's own kernels do not run without data; sdpa without a mask keeps the same tensors
    attention = "eager" if plan.settings["attn_implementation"] == "eager" else "sdpa"
    code = {"trust_remote_code": plan.settings["trust_remote_code"], **own_code(config, plan.settings["revision"])}
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention, **code)
    except ValueError as error:  # loading it would end in the same words
        raise InputError(f"{config.name_or_path} cannot be built with attention {attention}: {error}") from error
    if plan.new_ids:
        size = model.get_input_embeddings().num_embeddings + len(plan.new_ids)
        model.resize_token_embeddings(size, mean_resizing=False)
    return model


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    check_adapter_names(model, peft_config)
    try:
        return get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    except ValueError as error:  # a module of a kind that peft cannot adapt
        raise InputError(f"lora_target_modules: {error}") from error


def check_adapter_names(model: torch.nn.Module, peft_config: PeftConfig) -> None:
    """Refuse a name that no module or parameter of the model has: peft leaves it out where others are found."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for key, names in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters)):
        wanted = getattr(peft_config, key) or []
        for name in [] if isinstance(wanted, str) else sorted(wanted):  # a text is `all-linear`, or an expression
            if not any(known == name or known.endswith(f".{name}") for known in names):
                ends = sorted({known.rpartition(".")[2] for known in names} - {""})
                ends = [end for end in ends if not end.isdigit() and key != "target_parameters"]
                known_names = f", which has {', '.join(ends)}" if ends else ""
                raise InputError(f"lora_{key}: {name} is nowhere in the model{known_names}")


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
