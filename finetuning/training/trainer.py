"""
What step 1 adds to trl's SFTTrainer: settings that fit the hardware, FSDP2 with and without a GPU, checkpoints that are
complete and stand once, and training that survives SIGTERM.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import trl.trainer.utils
from accelerate import PartialState
from accelerate.utils import DistributedType, DynamoBackend
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer, get_peft_config
from trl.trainer.utils import create_model_from_path

from finetuning.config.model_arguments import ModelArguments
from finetuning.data.chat import end_token_ids
from finetuning.errors import InputError
from finetuning.hardware import accelerator_available, bf16_available, env_flag, tf32_available
from finetuning.models.config import load_model_config, own_code
from finetuning.models.loading import record_base, refuse_quantised
from finetuning.ranks import get_world_size, is_main_process, print_main
from finetuning.runs import INCOMPLETE, RUN_FILE, list_checkpoints
from finetuning.training.checkpoints import (
    OPTIMIZER_FOLDER,
    SCHEDULER_FILE,
    check_weights,
    delete_older_checkpoints,
    load_distributed,
    named_file,
    saved_shapes,
    without_tied_copies,
)
from finetuning.training.records import delete_run, save_record

assert hasattr(trl.trainer.utils, "_use_triton"), "trl has renamed _use_triton, which is replaced here"
# trl projects only the positions that have a label onto the vocabulary where it has Triton, and all positions elsewhere, so
# that compilers see constant shapes. Nothing is compiled on a CPU, and most positions are of the question: skip them there too.
trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass
class TrainingArguments(SFTConfig):
    """trl's SFTConfig, fitted to the machine it is read on: what the hardware cannot do is replaced, and said."""

    packing: bool = field(
        default=True,
        metadata={"help": "Fill sequences of max_length with several rows, which do not see each other."},
    )
    activation_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "Recompute activations in the backward pass, which saves memory and costs about a third of the "
            "speed. auto: only where training would not fit without it.",
            "choices": ["auto", "true", "false"],
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Show in place of a loss that is no number (NaN) the mean of those before it."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Older name of activation_checkpointing, which decides."}
    )

    def __post_init__(self):
        self.hardware_choices: dict[str, str] = {}
        self.gradient_checkpointing = False  # until the memory plan has decided
        world_size = get_world_size()
        if not accelerator_available():
            self.use_cpu = True
        if self.hub_token is not None:  # every checkpoint has these arguments in its training_args.bin
            os.environ["HF_TOKEN"] = self.hub_token
            self.hub_token = None
        self._check_compiler()
        self._choose_precision()
        self._choose_sharding(world_size)
        self._choose_packages()
        super().__post_init__()
        if self.fsdp:
            # Rank 0 alone loads the weights when this is set, and the wrapper hands them on only if it is told the same:
            # where they disagree, all other ranks would train from empty weights without a word.
            ram_efficient = self.fsdp_plugin_args["cpu_ram_efficient_loading"]
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(ram_efficient).lower()
        elif world_size == 1:
            self._n_gpu = min(self.n_gpu, 1)  # one process means one GPU; trl refuses nn.DataParallel
        if self.use_cpu and self.fsdp:
            # accelerate takes its FSDP path for the types of accelerators only, and would fall back to DDP without a
            # word; the path itself works on any device. Step 1 asserts that parameters are sharded in the end.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def _choose_precision(self) -> None:
        if self.tf32 and not tf32_available():
            self.tf32 = None
            self.hardware_choices["tf32"] = "off, this machine has no GPU that can"
        if self.use_cpu:
            for key in ("bf16", "fp16"):
                if getattr(self, key):
                    self.hardware_choices[key] = "off, training on the CPU in float32"
            self.bf16 = self.fp16 = False
        elif not bf16_available() and (self.bf16 or (self.bf16 is None and not self.fp16)):
            cuda = torch.cuda.is_available()
            self.hardware_choices["bf16"] = f"off, this device has none; {'fp16' if cuda else 'float32'} instead"
            self.bf16, self.fp16 = False, cuda

    def _check_compiler(self) -> None:
        backends = [backend.value.lower() for backend in DynamoBackend]
        if self.torch_compile_backend is not None and self.torch_compile_backend.lower() not in backends:
            raise ValueError(f"torch_compile_backend: {self.torch_compile_backend} is none of {', '.join(backends)}")
        if self.torch_compile_mode is not None and self.torch_compile_mode not in COMPILE_MODES:
            raise ValueError(f"torch_compile_mode: {self.torch_compile_mode} is none of {', '.join(COMPILE_MODES)}")

    def _choose_sharding(self, world_size: int) -> None:
        if self.use_cpu and self.activation_offloading:
            self.activation_offloading = False
            self.hardware_choices["activation_offloading"] = "off, there is no GPU to take activations from"
        if world_size == 1 and self.ddp_backend is not None:
            self.ddp_backend = None
            self.hardware_choices["ddp_backend"] = "off, there is only one process (start more with torchrun)"
        if str(self.fsdp).lower() in ("true", "false"):  # as the command line gives it
            self.fsdp = str(self.fsdp).lower() == "true"
        requested = env_flag("ACCELERATE_USE_FSDP") if self.fsdp is None else bool(self.fsdp)
        if requested and world_size > 1:
            if not self.fsdp:
                self.hardware_choices["fsdp"] = "on, the environment says ACCELERATE_USE_FSDP"
            self.fsdp = True
            if self.fsdp_config is None:
                self.fsdp_config = {}
            if isinstance(self.fsdp_config, str):
                self.fsdp_config = read_fsdp_config(self.fsdp_config)
            for key in ("state_dict_type", "fsdp_state_dict_type"):
                asked = str(self.fsdp_config.pop(key, "FULL_STATE_DICT"))
                if asked.upper() != "FULL_STATE_DICT":
                    self.hardware_choices["fsdp_state_dict_type"] = (
                        f"FULL_STATE_DICT and not {asked}, as the steps that follow read whole weights"
                    )
            # transformers takes its own default over the variable
            self.fsdp_config.setdefault("cpu_ram_efficient_loading", env_flag("FSDP_CPU_RAM_EFFICIENT_LOADING"))
            if self.use_cpu and self.fsdp_config.pop("cpu_offload", False):
                self.hardware_choices["fsdp_config"] = "cpu_offload is off, the weights are on the CPU already"
            return
        if requested and world_size == 1:
            self.hardware_choices["fsdp"] = "off, there is only one process (start more with torchrun)"
        self.fsdp = None
        # transformers reads these while loading weights, and would leave every rank but the first without any
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def _choose_packages(self) -> None:
        """What is not installed is left out: a run is not lost for the want of a logger, or of a faster kernel."""
        if self.use_liger_kernel and (self.use_cpu or not is_liger_kernel_available()):
            self.use_liger_kernel, self.liger_kernel_config = False, None
            reason = "the CPU has no such kernels" if self.use_cpu else "liger-kernel is not installed"
            self.hardware_choices["use_liger_kernel"] = f"off, {reason}"
        wanted = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        known = ("all", "none", *INTEGRATION_TO_CALLBACK)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"report_to: {', '.join(unknown)} is none of {', '.join(known)}")
        available = get_available_reporting_integrations()
        missing = [name for name in wanted if name not in ("all", "none", *available)]
        if missing:
            self.report_to = [name for name in wanted if name not in missing] or ["none"]
            self.hardware_choices["report_to"] = f"without {', '.join(missing)}, which is not installed"

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def check_model(name_or_path: str, **source) -> None:
    """Refuse a model that cannot be trained: one of another kind, or an adapter."""
    if (Path(name_or_path) / "adapter_config.json").is_file():
        raise InputError(
            f"model_name_or_path: {name_or_path} is an adapter; merge it with 2_merge_lora.py, and name the merged model"
        )
    if Path(name_or_path).is_dir() and source.get("revision", "main") not in (None, "main"):
        raise InputError(
            f"model_revision: {source['revision']} has no effect, as {name_or_path} is a folder, which has one state only; "
            "leave it out, or name a model on the Hub"
        )
    refuse_quantised(load_model_config(name_or_path, **source), name_or_path)


def check_optimizer(args: TrainingArguments) -> None:
    """Take a step with the optimizer and the schedule on a model of two layers, before data and model are loaded.

    Raises:
        InputError: A package for them is not installed, or they do not take what optim_args and lr_scheduler_kwargs say.
    """
    trial = copy.copy(args)
    if args.optim_target_modules is not None:  # names of modules that this model does not have
        trial.optim_target_modules = "all-linear"
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).to(args.device)
    key = "optim"
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(trial, model)
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & settings.keys():
            return  # it takes apart the model itself
        optimizer = kind(model.parameters(), **settings)
        model(torch.ones(1, 64, device=args.device)).sum().backward()
        optimizer.step()
        trial.optim_args = None
        without = Trainer.get_optimizer_cls_and_kwargs(trial, model)[1]
        if args.optim_args and without == settings:
            raise ValueError(f"optim_args: {args.optim_args} changes nothing of {args.optim.value}; leave it out")
        key, num_steps = "lr_scheduler_type", args.max_steps if args.max_steps > 0 else 100
        get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(num_steps), num_steps, args.lr_scheduler_kwargs
        )
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:  # each of many packages its own
        value = getattr(args, key).value
        raise InputError(f"{key}: {value} cannot be used as it is set: {' '.join(str(error).split())}") from error


def on_main_process(function: Callable):
    """Call a function on the first rank only; every rank gets its result, or its InputError."""
    result, problem = None, None
    if is_main_process():
        try:
            result = function()
        except InputError as error:
            problem = str(error)
    if dist.is_initialized():
        shared = [result, problem]
        dist.broadcast_object_list(shared, src=0)
        result, problem = shared
    if problem is not None:
        raise InputError(problem)
    return result


def embedding_names(name_or_path: str, revision: str, trust_remote_code: bool) -> list[str]:
    """Names of the modules that read and write tokens, as `modules_to_save` takes them."""
    config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **own_code(config, revision)
        )
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name.split(".")[-1] for name, module in model.named_modules() if any(module is e for e in embeddings)]


def build_adapter_config(model_args: ModelArguments, new_ids: list[int], **source) -> PeftConfig | None:
    """The adapter that the arguments describe, or None.

    Args:
        new_ids: Ids of added tokens, whose embeddings are trained: an adapter could neither read nor write them otherwise.
        source: revision and trust_remote_code of the model.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    config.revision = model_args.model_revision
    embeddings = embedding_names(model_args.model_name_or_path, **source)
    if new_ids:
        config.modules_to_save = [*(config.modules_to_save or []), *embeddings]
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    trained = {name.split(".")[-1] for name in [*targets, *(config.modules_to_save or [])]}
    is_tied = AutoConfig.from_pretrained(model_args.model_name_or_path, **source).tie_word_embeddings
    # what is learned by one of two tied embeddings must be learned by both, as the merged model has one weight for them
    config.ensure_weight_tying = is_tied and not trained.isdisjoint(embeddings)
    return config


def load_with_new_tokens(name_or_path: str, new_ids: list[int], settings: dict) -> PreTrainedModel:
    """Load a model whose tokenizer has been given tokens; their embeddings start as the mean of all others.

    Args:
        new_ids: Their ids; embeddings are added where there are too few.
        settings: Keyword arguments of from_pretrained.
    """
    settings = {"device_map": None, **settings}
    model = create_model_from_path(name_or_path, **settings)
    known = model.get_input_embeddings().num_embeddings
    if max(new_ids) >= known:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    old_ids = [i for i in range(known) if i not in set(new_ids)]
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        # ranks that wait for the weights of the first one have none to start from
        if embeddings is not None and embeddings.weight.device.type != "meta":
            with torch.no_grad():
                weight = embeddings.weight
                weight[new_ids] = weight[old_ids].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    return model


def read_fsdp_config(path: str) -> dict:
    """FSDP settings from text that is JSON itself, or from a JSON file."""
    try:
        return json.loads(path if path.lstrip().startswith("{") else Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"fsdp_config: {path} is neither JSON nor a JSON file: {error}") from error


def parameter_shares(model: PreTrainedModel) -> list[float]:
    """Share of all parameters that each rank holds, one number a rank: 1.0 unless the model is sharded."""
    total = sum(p.numel() for p in model.parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    if not dist.is_initialized():
        return [held / total]
    shares: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(shares, held / total)
    return shares


class ResumableSFTTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are complete, hold everything once, and can be resumed on any number of devices.

    A checkpoint has the weights as from_pretrained reads them, the tokenizer, a generation config with every end token,
    and the optimizer's state in torch's distributed format, written by each rank for its own share. There is no second
    copy of the weights: training goes on from the ones that from_pretrained reads.
    """

    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, ImportError) as error:  # a setting that the libraries refuse only here
            raise InputError(" ".join(str(error).split())) from error
        self._logged_tokens = 0
        self._logged_at = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        broken = [
            key for key in ("loss", "grad_norm", "eval_loss", "train_loss") if not math.isfinite(logs.get(key, 0))
        ]
        if broken and not self.args.fp16:  # whose scaler leaves steps out until it has found its scale
            raise InputError(
                f"step {self.state.global_step}: {broken[0]} is {logs[broken[0]]}, and every weight will be; lower "
                "learning_rate, and see that the model's own weights are numbers. Start over with --overwrite true"
            )
        if "loss" in logs:  # wall-clock time since the last line, with what was saved and evaluated in between
            now = time.perf_counter()
            logs["tokens_per_second"] = (self._total_train_tokens - self._logged_tokens) / (now - self._logged_at)
            self._logged_tokens, self._logged_at = self._total_train_tokens, now
        super().log(logs, start_time)

    def init_hf_repo(self, *args, **kwargs) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except (
            OSError,
            HfHubHTTPError,
            ValueError,
        ) as error:  # nobody is logged in, or the Hub refuses or cannot be reached
            reason = " ".join(str(error).split())
            raise InputError(f"push_to_hub: {reason} Log in with `hf auth login`, or leave it out") from error

    def create_model_card(self, *args, **kwargs) -> None:
        """None is written: run.json says more, and a card would stand in the run's folder as if it held a model."""

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
            checkpoint.mkdir(parents=True)
            (checkpoint / INCOMPLETE).touch()
        self.accelerator.wait_for_everyone()
        # older checkpoints go only when this one has been seen to be complete
        save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        with failing_together(checkpoint):
            super()._save_checkpoint(model, trial)
        self.args.save_total_limit = save_total_limit
        on_main_process(lambda: self._complete(checkpoint))

    def _complete(self, checkpoint: Path) -> None:
        check_weights(checkpoint, saved_shapes(self.accelerator.unwrap_model(self.model)))
        (checkpoint / INCOMPLETE).unlink()
        delete_older_checkpoints(checkpoint.parent, self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with failing_together(Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def train(self, *args, **kwargs):
        """Train; what was trained last is saved, also where a checkpoint from another folder leaves nothing to train."""
        output = super().train(*args, **kwargs)
        last = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not on_main_process(lambda: last in list_checkpoints(last.parent)):
            self._save_checkpoint(self.model, trial=None)
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        unwrapped = self.accelerator.unwrap_model(self.model)
        base_model = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
        generation_config = base_model.generation_config
        generation_config.eos_token_id = end_token_ids(self.processing_class, generation_config)
        generation_config.pad_token_id = self.processing_class.pad_token_id
        generation_config.use_cache = True
        base_model.config.use_cache = True
        if state_dict is not None:
            state_dict = without_tied_copies(base_model, state_dict)
        if isinstance(unwrapped, PeftModel) and unwrapped.active_peft_config.modules_to_save:
            # peft would save the embeddings again, as they were and as they are, where their number has changed
            unwrapped.save_pretrained = partial(PeftModel.save_pretrained, unwrapped, save_embedding_layers=False)
        super()._save(output_dir, state_dict)
        if isinstance(unwrapped, PeftModel):
            record_base(Path(output_dir), unwrapped.active_peft_config.base_model_name_or_path)
        base_model.config.use_cache = self.args.use_cache
        generation_config.save_pretrained(output_dir)  # an adapter is saved without one

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = get_optimizer_state_dict(self.model_wrapped, self.optimizer.optimizer)
        with quiet_checkpointing():
            dcp.save({"optimizer": state}, checkpoint_id=os.path.join(output_dir, OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing to do: step 1 built the model from the checkpoint's own weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, scheduler = (Path(checkpoint, name) for name in (OPTIMIZER_FOLDER, SCHEDULER_FILE))
        # the optimizer itself, not accelerate's wrapper, whose fp16 scaler has no scale before the first step
        optimizer = self.optimizer.optimizer
        state = {"optimizer": get_optimizer_state_dict(self.model_wrapped, optimizer)}
        with quiet_checkpointing(), named_file(folder, Path(checkpoint)):
            load_distributed(state, folder)
            set_optimizer_state_dict(self.model_wrapped, optimizer, state["optimizer"])
        with named_file(scheduler, Path(checkpoint)):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
        self._total_train_tokens = self._logged_tokens = max(
            (entry.get("num_tokens", 0) for entry in self.state.log_history), default=0
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            name = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
            with named_file(Path(checkpoint, name), Path(checkpoint)):
                super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def failing_together(folder: Path) -> Iterator[None]:
    """End all ranks in one line where one of them cannot write (a full disk, mostly), so that none waits for it.

    Raises:
        InputError: A rank could not write into the folder.
    """
    problem = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        # torch's writer has no error of its own
        if not isinstance(cause, (OSError, SafetensorError)) and "inline_container" not in str(cause):
            raise
        problem = str(cause).strip().splitlines()[0]
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if any(problems):
        raise InputError(
            f"{folder} could not be saved ({next(filter(None, problems))}); make room on the disk, or keep fewer "
            "checkpoints with save_total_limit: the same command goes on from the checkpoint before it"
        )


@contextlib.contextmanager
def quiet_checkpointing():
    """torch warns about what is meant: a single process saves without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class SaveOnTermination(TrainerCallback):
    """On SIGTERM, finish the step, save a checkpoint, and end training; all ranks do so at the same step.

    torchrun passes the signal on and kills what still runs after 30 s; a large model needs
    `torchrun --shutdown-timeout 600`.
    """

    def __init__(self):
        self.received = False
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous_handler = signal.signal(signal.SIGTERM, self._receive)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous_handler)

    def _receive(self, signum, frame):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = self.received
        if dist.is_initialized():  # one rank may get the signal a step before another
            flag = torch.tensor(float(received), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            received = bool(flag.item())
        if received and not control.should_training_stop:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # the checkpoint is saved; a second one, or a validation, would eat the time that is left
            control.should_save = control.should_evaluate = False


class RecordShares(TrainerCallback):
    """Before the first step, assert that FSDP shards the parameters, and record each rank's share in `run.json`."""

    def __init__(self, run: Path, record: dict, overwrite: bool = False):
        self.run, self.record, self.overwrite = run, record, overwrite

    def on_init_end(self, args, state, control, **kwargs):
        """The model is loaded and the trainer stands: only now an older run makes room."""
        if self.overwrite and state.is_world_process_zero and (self.run / RUN_FILE).is_file():
            delete_run(self.run)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        shares = parameter_shares(model)
        if args.fsdp:
            assert max(shares) < 1, f"FSDP was asked for, but a rank holds every parameter: {shares}"
        if state.is_world_process_zero:
            kind = "fsdp2" if args.fsdp else "ddp" if len(shares) > 1 else "single process"
            self.record["parallelism"] = {
                "kind": kind,
                "world_size": len(shares),
                "parameter_share_per_rank": [round(share, 4) for share in shares],
            }
            save_record(self.run, self.record)
            percent = ", ".join(f"{share:.1%}" for share in shares)
            print(
                f"parallelism: {kind}, world size {len(shares)}; each rank holds {percent} of the parameters",
                flush=True,
            )


def prepare_wandb(args: TrainingArguments) -> None:
    """Let W&B write into the run's folder, and offline where nobody is logged in."""
    if "wandb" not in args.report_to:
        return
    import wandb

    os.environ.setdefault("WANDB_DIR", args.output_dir)
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
        wandb.teardown()  # it has read the environment when it looked for the login
        os.environ["WANDB_MODE"] = "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        print_main(
            f"wandb: nobody is logged in, so the run is logged offline; send it later with `wandb sync {args.output_dir}/wandb/offline-*`"
        )


class LineProgress(ProgressCallback):
    """A progress bar with ETA, and one line of numbers for each log entry, from the main process only."""

    SHOWN = {
        "loss": "loss {:.4f}",
        "eval_loss": "eval_loss {:.4f}",
        "grad_norm": "grad_norm {:.3f}",
        "learning_rate": "lr {:.2e}",
        "mean_token_accuracy": "accuracy {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [text.format(logs[key]) for key, text in self.SHOWN.items() if key in logs]
        if state.is_world_process_zero and shown and "train_runtime" not in logs:
            tqdm.write(
                f"step {state.global_step}/{state.max_steps}  epoch {logs.get('epoch', 0):.2f}  " + "  ".join(shown)
            )
