"""
trl's SFTTrainer, and for encoder-decoder models transformers' Seq2SeqTrainer, with checkpoints that are complete, stand
once, and can be resumed on any number of devices.
"""

import contextlib
import functools
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
import torch.nn.functional as F
import trl.trainer.utils
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import ModelOutput
from trl import SFTTrainer

from finetuning.data.batches import build_collator, choose_preparation
from finetuning.data.chat import end_token_ids
from finetuning.data.tokens import IGNORED
from finetuning.errors import InputError
from finetuning.models.loading import record_base
from finetuning.models.rounding import describe_plan, dtype_name, plan_rounding, round_weights
from finetuning.ranks import is_main_process
from finetuning.runs import INCOMPLETE, PRECISION_FILE, list_checkpoints, write_json
from finetuning.training.arguments import TrainingArguments
from finetuning.training.checkpoints import (
    OPTIMIZER_FOLDER,
    SCHEDULER_FILE,
    SafePlanner,
    SafeReader,
    cause_of,
    check_weights,
    delete_older_checkpoints,
    named_file,
    saved_shapes,
    without_tied_copies,
)
from finetuning.training.lengths import token_ids
from finetuning.training.memory import HEAD_WORDS_ON_CPU

Value = TypeVar("Value")

for name in ("_use_triton", "_CHUNKED_LOGPROB_CHUNK_SIZE"):
    assert hasattr(trl.trainer.utils, name), f"trl has renamed {name}, which is replaced here"
# trl projects only the positions that have a label onto the vocabulary where it has Triton, and all positions where it
# has not, so that compilers see constant shapes. Nothing is compiled on a CPU, and most positions are of the question.
trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")


def on_main_process(function: Callable[[], Value]) -> Value:
    """Call a function on the first rank only; every rank gets its result, or its InputError."""
    outcome: list = [None, None]  # the result, or the text of the InputError
    if is_main_process():
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise InputError(problem)
    return result


@contextlib.contextmanager
def failing_together(folder: Path) -> Iterator[None]:
    """End all ranks with one line where one of them cannot write (mostly a full disk), so that none waits for it.

    Raises:
        InputError: A rank could not write into the folder.
    """
    problem = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        cause = cause_of(error)
        # torch's writer has no error of its own
        if not isinstance(cause, (OSError, SafetensorError)) and "inline_container" not in str(cause):
            raise
        problem = str(cause).strip().splitlines()[0]
    problems = [text for text in gather_object([problem]) if text]
    if problems:
        raise InputError(
            f"{folder} could not be saved ({problems[0]}); make room on the disk, or keep fewer "
            "checkpoints with save_total_limit: the same command goes on from the checkpoint before it"
        )


class Resumable(Trainer):
    """A Trainer with other checkpoints: weights as from_pretrained reads them, the tokenizer, a generation config with
    every end token, and the optimizer's state in torch's distributed format, of which each rank writes its share.

    There is no second copy of the weights: training goes on from those that from_pretrained reads, unless they were
    rounded (save_dtype). Then those before stand beside the optimizer's state.
    """

    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, ImportError) as error:  # some settings are refused by the libraries only here
            raise InputError(" ".join(str(error).split())) from error
        self.precision: dict = {"rounding": None}  # what the last checkpoint keeps of what was learned
        for module in self.model.modules():
            # On a CPU with bfloat16, bitsandbytes 0.50 packs 4-bit weights for answering at the first evaluation.
            # Training would go on without gradients through them, and without a word.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self._total_train_tokens = self._logged_tokens = 0
        self._logged_at = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        losses = ("loss", "grad_norm", "eval_loss", "train_loss")
        broken = [key for key in losses if not math.isfinite(logs.get(key, 0))]
        if broken and not self.args.fp16:  # its scaler skips steps until it has found its scale
            raise InputError(
                f"step {self.state.global_step}: {broken[0]} is {logs[broken[0]]}, and every weight will be; lower "
                "learning_rate, and see that the model's own weights are numbers. Start over with --overwrite true"
            )
        if "loss" in logs:  # the time since the last line includes saving and evaluating
            now = time.perf_counter()
            logs["tokens_per_second"] = (self._total_train_tokens - self._logged_tokens) / (now - self._logged_at)
            self._logged_tokens, self._logged_at = self._total_train_tokens, now
        super().log(logs, start_time)

    def init_hf_repo(self, *args, **kwargs) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, HfHubHTTPError, ValueError) as error:  # no login, or the Hub refuses or cannot be reached
            reason = " ".join(str(error).split())
            raise InputError(f"push_to_hub: {reason} Log in with `hf auth login`, or leave it out") from error

    def create_model_card(self, *args, **kwargs) -> None:
        """Write no card: run.json says more, and a card would stand in the run's folder as if it held a model."""

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
            checkpoint.mkdir(parents=True)
            (checkpoint / INCOMPLETE).touch()
        self.accelerator.wait_for_everyone()
        # older checkpoints are deleted by _complete, once this one has been seen to be complete
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
        # also within _save_checkpoint: the other ranks would go on to the optimizer, and wait there
        folder = Path(output_dir or self.args.output_dir)
        with failing_together(folder):
            if self.args.base_model is not None:
                dtype, weights = self.args.save_dtype or dtype_name(self.model.dtype), self.own_weights().items()
                self.precision = plan_rounding(weights, self.args.base_model, dtype, self.args.rounding)
            super().save_model(output_dir, _internal_call)
            if self.args.base_model is not None and self.args.should_save:
                write_json(folder / PRECISION_FILE, self.precision)
                tqdm.write(f"{folder.name}: {describe_plan(self.precision)}")

    def own_weights(self) -> dict[str, torch.Tensor]:
        """The weights as they are, this rank's shares where they are sharded, by their names in a checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        return without_tied_copies(model, model.state_dict())

    def train(self, *args, **kwargs):
        """Train, and save what was trained last, also where a checkpoint of another folder leaves nothing to train."""
        with sharing_groups(self.model):
            output = super().train(*args, **kwargs)
        last = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not on_main_process(lambda: last in list_checkpoints(last.parent)):
            self._save_checkpoint(self.model, trial=None)
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        unwrapped = self.accelerator.unwrap_model(self.model)
        base_model = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        generation_config = base_model.generation_config
        generation_config.eos_token_id = end_token_ids(self.processing_class, generation_config)
        generation_config.pad_token_id = self.processing_class.pad_token_id
        generation_config.use_cache = True
        base_model.config.use_cache = True
        if self.args.save_dtype is not None:
            state_dict, dtype = state_dict or self.own_weights(), getattr(torch, self.args.save_dtype)
            for name, tensor in state_dict.items():  # in place, so that what was gathered goes as it is rounded
                if tensor.is_floating_point():
                    state_dict[name] = round_weights(tensor, dtype, name, self.precision["rounding"])
        if state_dict is not None:
            state_dict = without_tied_copies(base_model, state_dict)
        if isinstance(unwrapped, PeftModel) and unwrapped.active_peft_config.modules_to_save:
            # peft would save resized embeddings twice, as they were and as they are
            unwrapped.save_pretrained = partial(PeftModel.save_pretrained, unwrapped, save_embedding_layers=False)
        super()._save(str(folder), state_dict)
        if self.args.save_dtype is not None:
            base_model.config.dtype = dtype
            base_model.config.save_pretrained(folder)
        if isinstance(unwrapped, PeftModel):
            record_base(folder, unwrapped.active_peft_config.base_model_name_or_path)
        base_model.config.use_cache = self.args.use_cache
        generation_config.save_pretrained(folder)  # peft saves none beside an adapter

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = {"optimizer": get_optimizer_state_dict(self.model_wrapped, self.optimizer.optimizer)}
        if self.args.save_dtype not in (None, dtype_name(self.model.dtype)):
            state["weights"] = self.own_weights()
        with warnings.catch_warnings(action="ignore"):  # the warning that a single process saves alone
            dcp.save(state, checkpoint_id=Path(output_dir, OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing to do: step 1 built the model from the checkpoint's own weights; what these were comes below."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, scheduler = (Path(checkpoint, name) for name in (OPTIMIZER_FOLDER, SCHEDULER_FILE))
        # the optimizer itself, not accelerate's wrapper, whose fp16 scaler has no scale before the first step
        optimizer = self.optimizer.optimizer
        state = {"optimizer": get_optimizer_state_dict(self.model_wrapped, optimizer)}
        with warnings.catch_warnings(action="ignore"), named_file(folder, Path(checkpoint)):
            saved = SafeReader(folder).read_metadata().state_dict_metadata
            if any(name.startswith("weights.") for name in saved):
                state["weights"] = self.own_weights()
            states = state["optimizer"]["state"]
            # a parameter that never had a gradient, as LED's for global attention, has no state yet
            begun = {n: v for n, v in states.items() if any(f"optimizer.state.{n}.{key}" in saved for key in v)}
            state["optimizer"]["state"] = begun
            dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())  # each rank its share, in place
            for name in states.keys() - begun.keys():
                states[name].get("step", torch.zeros(1)).zero_()
            state["optimizer"]["state"] = states
            set_optimizer_state_dict(self.model_wrapped, optimizer, state["optimizer"])
        with named_file(scheduler, Path(checkpoint)):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
        tokens = max((entry.get("num_tokens", 0) for entry in self.state.log_history), default=0)
        self._total_train_tokens = self._logged_tokens = tokens

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            name = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
            with named_file(Path(checkpoint, name), Path(checkpoint)):
                super()._load_rng_state(checkpoint)


class ResumableSFTTrainer(Resumable, SFTTrainer):
    """The trainer of causal language models."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_WORDS_ON_CPU


def mean_loss(outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor, smoothing: float):
    """Cross-entropy over the labels (rows, tokens) of a batch, divided by the number of those of the whole step.

    The library's encoder-decoder models divide by the labels of their own batch, and the Trainer adds up batches and
    ranks as if they had not: with two processes, the loss would double.
    """
    logits = outputs.logits.flatten(0, 1).float()
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total / num_items_in_batch


class ByLength(LengthGroupedSampler):
    """Rows in an order that brings those of like length into one step, drawn anew for each epoch from the seed."""

    def __init__(self, step_size: int, lengths: list[int], seed: int):
        self.seed = seed
        super().__init__(step_size, lengths=lengths, generator=torch.Generator())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class ResumablePairTrainer(Resumable, Seq2SeqTrainer):
    """The trainer of encoder-decoder models, which takes what SFTTrainer takes."""

    def __init__(self, *, model: PreTrainedModel | PeftModel, args, peft_config, train_dataset, eval_dataset, **kwargs):
        preparation = choose_preparation(kwargs["processing_class"], args)
        collator = build_collator(kwargs["processing_class"], args)
        collator.model = model
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            model.enable_input_require_grads()
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=preparation.cut_and_pack(train_dataset, "train"),
            eval_dataset=None if eval_dataset is None else preparation.cut_and_pack(eval_dataset, "eval"),
            compute_loss_func=partial(mean_loss, smoothing=args.label_smoothing_factor),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # mean_loss divides, and not the model

    def _get_train_sampler(self, train_dataset=None) -> ByLength:
        lengths = token_ids(self.train_dataset if train_dataset is None else train_dataset)[1].tolist()
        step_size = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return ByLength(step_size, lengths, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        num_tokens = inputs["attention_mask"].sum() + (inputs["labels"] != IGNORED).sum()
        self._total_train_tokens += int(self.accelerator.gather(num_tokens.to(self.args.device)).sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "num_tokens": self._total_train_tokens} if "loss" in logs else logs, start_time)


def choose_trainer(args: TrainingArguments) -> type[ResumableSFTTrainer] | type[ResumablePairTrainer]:
    return ResumableSFTTrainer if args.decoder_start is None else ResumablePairTrainer


@contextlib.contextmanager
def sharing_groups(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, FSDP2 gets modules that share a weight in one group, as it demands.

    accelerate groups the embeddings of the input and the output only; those of an encoder and a decoder are one weight
    in two more modules.
    """
    fully_shard = torch.distributed.fsdp.fully_shard

    @functools.wraps(fully_shard)
    def shard_together(module, **kwargs):
        modules = module if isinstance(module, list) else [module]
        if module is not model:
            weights = {id(weight) for each in modules for weight in each.parameters(recurse=False)}
            owners = [m for m in model.modules() if any(id(w) in weights for w in m.parameters(recurse=False))]
            modules = list(dict.fromkeys([*modules, *owners]))
        return fully_shard(modules if len(modules) > 1 else modules[0], **kwargs)

    torch.distributed.fsdp.fully_shard = shard_together
    try:
        yield
    finally:
        torch.distributed.fsdp.fully_shard = fully_shard
