"""
Limits and rules of the keys that step 1's arguments have from trl's SFTConfig. Imports without trl and torch.
"""

from finetuning.config.arguments import MAX_SEED, OUTPUT_DIR
from finetuning.config.checks import Checked, Limits, needs, refuse

NOT_NEGATIVE, ONE_OR_MORE, POSITIVE = Limits(at_least=0), Limits(at_least=1), Limits(more_than=0)
SEED, BELOW_ONE = Limits(0, MAX_SEED), Limits(0, 0.9999999)


class TrainingKeys(Checked):
    """A base of step 1's training arguments, beside trl's."""

    LIMITS = {
        "per_device_train_batch_size": ONE_OR_MORE, "per_device_eval_batch_size": ONE_OR_MORE,
        "gradient_accumulation_steps": ONE_OR_MORE, "max_length": Limits(at_least=8), "pad_to_multiple_of": ONE_OR_MORE,
        "learning_rate": POSITIVE, "num_train_epochs": POSITIVE, "warmup_steps": NOT_NEGATIVE,
        "weight_decay": Limits(0, 1), "max_grad_norm": NOT_NEGATIVE, "adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE,
        "adam_epsilon": POSITIVE, "label_smoothing_factor": BELOW_ONE, "neftune_noise_alpha": NOT_NEGATIVE,
        "logging_steps": POSITIVE, "save_steps": POSITIVE, "eval_steps": POSITIVE, "save_total_limit": ONE_OR_MORE,
        "seed": SEED, "data_seed": SEED, "dataset_num_proc": ONE_OR_MORE, "dataloader_num_workers": NOT_NEGATIVE,
        "dataloader_prefetch_factor": ONE_OR_MORE,
    }  # fmt: skip
    RULES = (
        *OUTPUT_DIR,
        refuse(lambda learning_rate: learning_rate > 1,
               "learning_rate: {learning_rate} cannot learn; write it as 2e-5"),
        refuse(lambda max_steps: max_steps < 1 and max_steps != -1,
               "max_steps: must be at least 1, or -1 for epochs, got {max_steps}"),
        refuse(lambda num_train_epochs, max_steps: max_steps == -1 and num_train_epochs > 100_000,
               "num_train_epochs: {num_train_epochs} would not end; use at most 100000"),
        refuse(lambda bf16, fp16: bf16 and fp16, "bf16 and fp16 are both true; keep one of them"),
        refuse(lambda packing, max_length: packing and max_length is None,
               "packing fills sequences of max_length, which is null; set max_length, or packing: false"),
        refuse(lambda packing, truncation_mode: packing and truncation_mode == "keep_end",
               "truncation_mode: keep_end has no effect with packing, which cuts the end; set packing: false, or leave "
               "it out"),
        refuse(lambda packing, padding_free: padding_free and not packing,
               "padding_free does not enforce max_length without packing: true; set packing: true, or leave it out"),
        needs("packing: true", {"packing_strategy": "bfd"}, lambda packing: not packing),
        refuse(lambda assistant_only_loss, completion_only_loss: assistant_only_loss and completion_only_loss is False,
               "assistant_only_loss: true and completion_only_loss: false contradict each other; remove one of them"),
        needs("dataloader_num_workers of 1 or more", {"dataloader_persistent_workers": False},
              lambda dataloader_num_workers: dataloader_num_workers == 0),
        refuse(lambda lr_scheduler_type, lr_scheduler_kwargs: lr_scheduler_kwargs
               and lr_scheduler_type in ("constant", "constant_with_warmup"),
               "lr_scheduler_kwargs has no effect with lr_scheduler_type: constant; leave it out"),
        refuse(lambda save_strategy: save_strategy == "no",
               "save_strategy: no would leave nothing to test; use steps or epoch"),
        refuse(lambda save_strategy, load_best_model_at_end: save_strategy == "best" or load_best_model_at_end,
               "step 5 chooses the checkpoint; use save_strategy: steps or epoch, and no load_best_model_at_end"),
        refuse(lambda model_init_kwargs: model_init_kwargs is not None,
               "model_init_kwargs is not used here; dtype, attn_implementation and model_revision are keys of their "
               "own"),
        refuse(lambda deepspeed: deepspeed is not None,
               "deepspeed is not used here, FSDP2 shards; write fsdp: true instead"),
        refuse(lambda dataset_kwargs: dataset_kwargs is not None,
               "dataset_kwargs would skip the preparation of the data that preflight checks; remove it"),
        refuse(lambda save_dtype, use_peft: save_dtype is not None and use_peft,
               "save_dtype has no effect with use_peft: true, which saves what is trained; 2_merge_lora.py rounds"),
        refuse(lambda save_dtype, dtype: save_dtype is not None and dtype == "auto",
               "save_dtype and dtype: auto contradict each other when training goes on; set dtype as well"),
        needs("save_dtype: bfloat16 or float16", {"rounding": "auto"},
              lambda save_dtype: save_dtype in (None, "float32")),
        needs("eval_strategy: steps", {"eval_steps": None}, lambda eval_strategy: eval_strategy != "steps"),
        needs("eval_strategy: steps or epoch", {"eval_delay": 0, "eval_packing": None, "eval_on_start": False},
              lambda eval_strategy: eval_strategy == "no"),
        needs("use_liger_kernel: true", {"liger_kernel_config": None}, lambda use_liger_kernel: not use_liger_kernel),
        needs("push_to_hub: true", {"hub_model_id": None, "hub_private_repo": None, "hub_revision": None},
              lambda push_to_hub: not push_to_hub),
        needs("lr_scheduler_type: reduce_lr_on_plateau or greedy",
              {"metric_for_best_model": None, "greater_is_better": None},
              lambda lr_scheduler_type: lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy")),
    )  # fmt: skip
