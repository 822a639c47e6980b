"""
The training arguments of step 1, fitted to the hardware: what this machine cannot do is replaced, with a reason.
"""

import contextlib
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, DynamoBackend, broadcast_object_list, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import is_liger_kernel_available, is_torch_tf32_available
from trl import SFTConfig

from finetuning.config.arguments import ROUNDING, ROUNDING_HELP, ScriptArguments
from finetuning.config.checks import argument
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.training_keys import TrainingKeys
from finetuning.errors import InputError
from finetuning.hardware import bf16_available, choose_attention, measure_bf16_gain
from finetuning.models.config import load_model_config
from finetuning.ranks import get_world_size, is_main_process
from finetuning.training.attention import ROW_ATTENTION

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Over float32, for which a CPU computes in bfloat16. Less than that is lost again outside of the matrix products.
MIN_BF16_GAIN = 1.3
MIN_BF16_WIDTH = 256  # hidden_size below which the matrix products are too small a part of the time
# Keys that an encoder-decoder model has no use for, and their values where they are not set
NOT_OF_PAIRS = {
    "packing_strategy": "bfd", "padding_free": False, "eval_packing": None, "completion_only_loss": None,
    "assistant_only_loss": False, "loss_type": "nll", "activation_offloading": False, "use_liger_kernel": False,
    "router_aux_loss_coef": None,
}  # fmt: skip
ONE_PROCESS = "off, there is only one process (start more with torchrun)"


@dataclass
class TrainingArguments(SFTConfig, TrainingKeys):
    """trl's SFTConfig, fitted to this machine; `hardware_choices` has the reason for each key that was replaced."""

    packing: bool = argument(True, "Fill sequences of max_length with several rows, which do not see each other.")
    activation_checkpointing: str = argument(
        "auto",
        "Recompute activations in the backward pass, which saves memory and costs about a third of the speed. auto: "
        "only where training would not fit without it.",
        ["auto", "true", "false"],
    )
    logging_nan_inf_filter: bool = argument(
        False, "Show the mean of the losses before it in place of one that is NaN or infinite."
    )
    bf16: bool | None = argument(
        None,
        "Compute in bfloat16; weights and optimizer stay in float32. Unset: on GPUs that have it, and on CPUs that a "
        "measurement at the start shows to be at least 1.3 times as fast in it at the model's shapes.",
    )
    save_dtype: str | None = argument(
        None,
        "dtype of the weights in checkpoints. Unset: that of training. The optimizer's state then holds those that "
        "training goes on from.",
        ["float32", "bfloat16", "float16"],
    )
    rounding: str = argument("auto", ROUNDING_HELP, ROUNDING)
    max_target_length: int | None = argument(
        None,
        "Longest answer that an encoder-decoder model learns, in tokens; max_length is then that of its questions.",
        at_least=2,
    )
    gradient_checkpointing: bool = argument(False, "Older name of activation_checkpointing, which decides.")

    # what Seq2SeqTrainer asks for; step 3 generates
    predict_with_generate, generation_config, generation_max_length, generation_num_beams = False, None, None, None

    def __post_init__(self):
        self.hardware_choices: dict[str, str] = {}
        self.base_model: tuple[str, str | None] | None = None  # name and revision; load_model sets them
        self.decoder_start: int | None = None  # of an encoder-decoder model; fit_to_kind sets it
        self.gradient_checkpointing = False  # the memory plan decides later
        world_size = get_world_size()
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.hub_token is not None:  # it would stand in the training_args.bin of every checkpoint
            os.environ["HF_TOKEN"] = self.hub_token
            self.hub_token: str | None = None
        self._check_compiler()
        self._choose_precision()
        self._choose_sharding(world_size)
        self._choose_packages()
        super().__post_init__()
        if self.fsdp:
            # Rank 0 alone loads the weights when this is set, and the wrapper hands them on only if it is told the
            # same: where they disagree, all other ranks would train from empty weights without a word.
            ram_efficient = self.fsdp_plugin_args["cpu_ram_efficient_loading"]
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(ram_efficient).lower()
        elif world_size == 1:
            self._n_gpu = min(self.n_gpu, 1)  # one process means one GPU; trl refuses nn.DataParallel
        if self.use_cpu and self.fsdp:
            # accelerate takes its FSDP path for the types of accelerators only, and would fall back to DDP without a
            # word; the path itself works on any device. Step 1 asserts that parameters are sharded in the end.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def _replace(self, key: str, value, choice: str) -> None:
        """Set a key to what this machine can do; `choice` says so, and why."""
        setattr(self, key, value)
        self.hardware_choices[key] = choice

    def _check_compiler(self) -> None:
        backends = [backend.value.lower() for backend in DynamoBackend]
        if self.torch_compile_backend is not None and self.torch_compile_backend.lower() not in backends:
            raise ValueError(f"torch_compile_backend: {self.torch_compile_backend} is none of {', '.join(backends)}")
        if self.torch_compile_mode is not None and self.torch_compile_mode not in COMPILE_MODES:
            raise ValueError(f"torch_compile_mode: {self.torch_compile_mode} is none of {', '.join(COMPILE_MODES)}")

    def _choose_precision(self) -> None:
        if self.tf32 and not is_torch_tf32_available():
            self._replace("tf32", None, "off, this machine has no GPU that can")
        self.measures_bf16 = self.bf16 is not False  # choose_cpu_precision does, on a CPU
        if self.use_cpu:
            if self.fp16:
                self._replace("fp16", False, "off, a CPU trains in float32 or bfloat16")
            self.bf16 = bool(self.bf16)
        elif not bf16_available() and (self.bf16 or (self.bf16 is None and not self.fp16)):
            self.fp16: bool = torch.cuda.is_available()
            self._replace("bf16", False, f"off, this device has none; {'fp16' if self.fp16 else 'float32'} instead")

    def _choose_sharding(self, world_size: int) -> None:
        if self.use_cpu and self.activation_offloading:
            self._replace("activation_offloading", False, "off, there is no GPU to take activations from")
        if world_size == 1 and self.ddp_backend is not None:
            self._replace("ddp_backend", None, ONE_PROCESS)
        # the value is text where it comes from the command line
        asked = {"true": True, "false": False}.get(str(self.fsdp).lower(), self.fsdp)
        requested = parse_flag_from_env("ACCELERATE_USE_FSDP") if asked is None else bool(asked)
        if requested and world_size > 1:
            if not asked:
                self.hardware_choices["fsdp"] = "on, the environment says ACCELERATE_USE_FSDP"
            self.fsdp: bool | None = True
            self.fsdp_config: dict | None = self._fit_fsdp_config()
            return
        if requested:
            self.hardware_choices["fsdp"] = ONE_PROCESS
        self.fsdp = None
        # transformers reads these while it loads weights, and would leave every rank but the first without weights
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def _fit_fsdp_config(self) -> dict:
        given: dict | str | None = self.fsdp_config
        if isinstance(given, str):  # JSON, or the path of a JSON file
            try:
                text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
                config = json.loads(text)
            except (OSError, ValueError) as error:
                raise ValueError(f"fsdp_config: {given} is neither JSON nor a JSON file: {error}") from error
        else:
            config = given or {}
        for key in ("state_dict_type", "fsdp_state_dict_type"):
            asked = str(config.pop(key, "FULL_STATE_DICT"))
            if asked.upper() != "FULL_STATE_DICT":
                choice = f"FULL_STATE_DICT and not {asked}, as the steps that follow read whole weights"
                self.hardware_choices["fsdp_state_dict_type"] = choice
        # without the key, transformers would override the variable with its own default
        config.setdefault("cpu_ram_efficient_loading", parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        if self.use_cpu and config.pop("cpu_offload", False):
            self.hardware_choices["fsdp_config"] = "cpu_offload is off, the weights are on the CPU already"
        return config

    def _choose_packages(self) -> None:
        """Leave out loggers and kernels that are not installed, so that no run is lost for the want of them."""
        if self.use_liger_kernel and (self.use_cpu or not is_liger_kernel_available()):
            self.liger_kernel_config = None
            reason = "the CPU has no such kernels" if self.use_cpu else "liger-kernel is not installed"
            self._replace("use_liger_kernel", False, f"off, {reason}")
        wanted = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        known = ("all", "none", *INTEGRATION_TO_CALLBACK)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"report_to: {', '.join(unknown)} is none of {', '.join(known)}")
        available = ("all", "none", *get_available_reporting_integrations())
        missing = [name for name in wanted if name not in available]
        if missing:
            left = [name for name in wanted if name in available] or ["none"]
            self._replace("report_to", left, f"without {', '.join(missing)}, which is not installed")

    def fit_to_kind(self, model: PreTrainedModel) -> None:
        """Set what depends on the kind of the model, which has no weights yet.

        Raises:
            InputError: A key has no effect on this kind, or the model lacks a token that its kind needs.
        """
        if not model.config.is_encoder_decoder:
            if self.max_target_length is not None:
                raise InputError("max_target_length is for encoder-decoder models; max_length counts the answer too")
            return
        for key, neutral in NOT_OF_PAIRS.items():
            if getattr(self, key) != neutral:
                raise InputError(f"{key}: {getattr(self, key)} has no effect on an encoder-decoder model; leave it out")
        config = model.config.get_text_config()
        start = getattr(model.config, "decoder_start_token_id", None)
        start = config.bos_token_id if start is None else start
        for key, token_id in (("decoder_start_token_id", start), ("pad_token_id", config.pad_token_id)):
            if token_id is None or not 0 <= token_id < config.vocab_size:
                raise InputError(
                    f"{key} of the model's config.json is {token_id}, none of its {config.vocab_size} tokens; write "
                    "there the one that it was made with, as its decoder cannot be trained without"
                )
        self.decoder_start = start
        if self.fsdp and self.fsdp_plugin_args["cpu_ram_efficient_loading"]:
            # accelerate hands on no buffers, as BART's final_logits_bias, and ties mT5's head, which is its own
            self.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
            self.hardware_choices["cpu_ram_efficient_loading"] = "off, each rank reads an encoder-decoder model itself"
        if self.packing:
            self._replace("packing", False, "off, an encoder-decoder model reads each row by itself")

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def fit_to_hardware(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> dict[str, str]:
    """Replace what this machine cannot do, and choose what the YAML leaves open; returns the reasons by key."""
    check_optimizer(training_args)
    choose_cpu_precision(training_args, model_args)
    reasons = training_args.hardware_choices
    compute_dtype, dtype = training_args.compute_dtype, model_args.dtype
    has_bf16 = bf16_available() or compute_dtype == torch.bfloat16
    low_precision = dtype in ("bfloat16", "float16")
    if low_precision and (compute_dtype == torch.float32 or (dtype == "bfloat16" and not has_bf16)):
        model_args.dtype = "float32"
        reasons["dtype"] = f"float32, this machine does not compute in {dtype}"
    elif dtype == "float16" and not model_args.use_peft:
        model_args.dtype = "float32"
        reasons["dtype"] = "float32, weights in float16 cannot be trained; fp16: true computes in it"
    attention, problem = choose_attention(model_args.attn_implementation, compute_dtype)
    if model_args.attn_implementation is not None and problem:
        reasons["attn_implementation"] = f"sdpa, {problem}"
    unset = model_args.attn_implementation is None
    model_args.attn_implementation = ROW_ATTENTION if unset and attention == "sdpa" else attention
    if training_args.eval_strategy != "no" and script_args.dataset_eval_split is None:
        script_args.dataset_eval_split = script_args.dataset_test_split
        reasons["dataset_eval_split"] = f"{script_args.dataset_test_split}, as eval_strategy needs a split to measure"
    return reasons


def choose_cpu_precision(args: TrainingArguments, model_args: ModelArguments) -> None:
    """Compute in bfloat16 where that is asked for, or left open and clearly faster on this CPU at the model's shapes.

    The first rank measures for all of them, since ranks that differ would not train the same model.
    """
    if not args.use_cpu:
        return
    gains: list[float | None] = [None]
    if args.measures_bf16 and is_main_process():
        source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
        with contextlib.suppress(InputError):  # plan_model says what is wrong with the model
            config = load_model_config(model_args.model_name_or_path, **source).get_text_config()
            if args.bf16 or config.hidden_size >= MIN_BF16_WIDTH:
                width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
                num_tokens = args.per_device_train_batch_size * (args.max_length or 512)
                gains = [measure_bf16_gain(config.hidden_size, width, num_tokens)]
    (gain,) = broadcast_object_list(gains)
    if gain is not None:
        asked, args.bf16 = args.bf16, args.bf16 or gain >= MIN_BF16_GAIN
        state = "on as asked" if asked else "on" if args.bf16 else "off"
        args.hardware_choices["bf16"] = f"{state}, bfloat16 is {gain:.1f} times as fast as float32 on this CPU"
    if args.bf16:
        args.mixed_precision = "bf16"
        if args.fsdp:  # accelerate's own policy would add up the ranks' gradients in bfloat16, and round the loss to it
            args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def check_optimizer(args: TrainingArguments) -> None:
    """Take a step with the optimizer and the schedule on a model of two layers, before data and model are loaded.

    Raises:
        InputError: A package for them is not installed, or they do not take optim_args or lr_scheduler_kwargs.
    """
    trial = copy.copy(args)
    if args.optim_target_modules is not None:  # they name modules that the small model does not have
        trial.optim_target_modules = "all-linear"
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).to(args.device)
    key = "optim"
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(trial, model)
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & settings.keys():
            return  # such an optimizer takes apart the model itself
        optimizer = kind(model.parameters(), **settings)
        model(torch.ones(1, 64, device=args.device)).sum().backward()
        optimizer.step()
        trial.optim_args = None
        without = Trainer.get_optimizer_cls_and_kwargs(trial, model)[1]
        if args.optim_args and without == settings:
            raise ValueError(f"optim_args: {args.optim_args} changes nothing of {args.optim.value}; leave it out")
        key, num_steps = "lr_scheduler_type", args.max_steps if args.max_steps > 0 else 100
        warmup_steps = args.get_warmup_steps(num_steps)
        get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, num_steps, args.lr_scheduler_kwargs)
    except (
        ValueError,
        TypeError,
        ImportError,
        RuntimeError,
        AttributeError,
    ) as error:  # optimizers of many packages raise them
        reason = " ".join(str(error).split())
        raise InputError(f"{key}: {getattr(args, key).value} cannot be used as it is set: {reason}") from error
