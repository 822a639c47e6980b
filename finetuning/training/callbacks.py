"""
What happens beside the steps of training: SIGTERM ends it, the share of each rank is recorded, its numbers are shown.
"""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback

from finetuning.hardware import available_memory, give_back_freed_memory
from finetuning.ranks import get_local_world_size, print_main
from finetuning.training.arguments import TrainingArguments
from finetuning.training.records import save_record


class SaveOnTermination(TrainerCallback):
    """On SIGTERM, finish the step, save a checkpoint, and end training; all ranks do so at the same step.

    torchrun passes the signal on and kills what still runs after 30 s; a large model needs
    `torchrun --shutdown-timeout 600`.
    """

    received = False  # whether this rank has got the signal
    stopped = False  # whether training ends because one of the ranks has

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
        if self.stopped:  # another checkpoint or a validation would cost the time that is left
            control.should_save = control.should_evaluate = False


class RecordShares(TrainerCallback):
    """Before the first step, assert that FSDP shards the parameters, and record each rank's share in `run.json`."""

    def __init__(self, run: Path, record: dict):
        self.run, self.record = run, record

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        total = sum(p.numel() for p in model.parameters())
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        shares = gather_object([held / total])  # 1.0 unless the model is sharded
        if args.fsdp:
            assert max(shares) < 1, f"FSDP was asked for, but a rank holds every parameter: {shares}"
        if state.is_world_process_zero:
            kind = "fsdp2" if args.fsdp else "ddp" if len(shares) > 1 else "single process"
            rounded = [round(share, 4) for share in shares]
            self.record["parallelism"] = {"kind": kind, "world_size": len(shares), "parameter_share_per_rank": rounded}
            save_record(self.run, self.record)
            percent = ", ".join(f"{share:.1%}" for share in shares)
            print_main(f"parallelism: {kind}, world size {len(shares)}; each rank holds {percent} of the parameters")


class GiveBackMemory(TrainerCallback):
    """On a CPU, give back what malloc keeps of freed memory once less is free than a quarter of the planned bytes.

    Batches differ in length, so what one leaves free does not fit the next, and a process grows for many steps until
    the system ends it (docs/preflight.md). Giving back costs a tenth of a step.
    """

    def __init__(self, planned: float):
        self.spare = planned / 4

    def on_step_end(self, args, state, control, **kwargs):
        free = available_memory(args.device, get_local_world_size()) if args.device.type == "cpu" else None
        if free is not None and free < self.spare:
            give_back_freed_memory()


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
            step = f"step {state.global_step}/{state.max_steps}  epoch {logs.get('epoch', 0):.2f}"
            tqdm.write("  ".join([step, *shown]))


def show_lines(trainer: Trainer) -> None:
    """Show progress by LineProgress, unless disable_tqdm asks for none."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LineProgress())


def prepare_wandb(args: TrainingArguments) -> None:
    """Let W&B write into the run's folder, and offline where nobody is logged in."""
    if "wandb" not in args.report_to:
        return
    import wandb  # it takes a second, and most runs do without

    os.environ.setdefault("WANDB_DIR", args.output_dir)
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
        wandb.teardown()  # it has read the environment when it looked for the login
        os.environ["WANDB_MODE"] = "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        print_main(
            "wandb: nobody is logged in, so the run is logged offline; send it later with "
            f"`wandb sync {args.output_dir}/wandb/offline-*`"
        )
