"""
Keys of older YAMLs, and what became of them: written for trl from 0.8 and transformers from 4.36 on.

Each is converted, and the user is told, never dropped in silence. Imports without torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import yaml


@dataclass(frozen=True)
class Change:
    """What became of a key.

    Attributes:
        new_key: The key that it is today; of one that is gone, a key of the step that it belonged to.
        convert: Gives today's keys and values for an old value. Raises ValueError for a value with no counterpart.
        reason: Why the value is not used any more, or how it is read.
        applies: Whether a value is an older form at all, for a key that still has its name.
    """

    new_key: str
    convert: Callable[..., dict]
    reason: str = ""
    applies: Callable[[object], bool] = lambda value: True
    renames_only: bool = False

    def describe(self, values: dict) -> str:
        if self.renames_only:
            return f"is called {self.new_key} now{self.reason}"
        read_as = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf).strip()[1:-1]
        return "; ".join(part for part in (f"is read as {read_as}" if read_as else "", self.reason) if part)


def renamed(new_key: str, reason: str = "") -> Change:
    return Change(new_key, lambda value: {new_key: value}, reason, renames_only=True)


def moved(mapping: str, key: str) -> Change:
    return Change(mapping, lambda value: {mapping: {key: value}})


def gone(reason: str, belongs_to: str = "max_steps") -> Change:
    return Change(belongs_to, lambda value: {}, f"has no effect any more: {reason}")


def switch(new_key: str, new_value: str) -> Change:
    """The change of a key that was true or false to a value of another one."""
    return Change(new_key, lambda value: {new_key: new_value} if as_flag(value) else {})


def as_flag(value) -> bool:
    """true and false, also as the text that old YAMLs have (`use_orig_params: "false"`)."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"needs true or false, got {value!r}")
    return str(value).lower() == "true"


def convert_warmup_ratio(value) -> dict:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"needs a share from 0 up to 1, got {value!r}")
    return {"warmup_steps": value}


# FSDP: one switch and a mapping, where there was a line of words

FSDP1 = "FSDP2 has no prefetching, use_orig_params, sync_module_states or limit_all_gathers to set"
FSDP1_KEYS = {"forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers"}
FSDP_FLAGS = ("cpu_offload", "cpu_ram_efficient_loading", "reshard_after_forward")
FSDP_CONFIG_KEYS = {
    *FSDP_FLAGS, "version", "min_num_params", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "state_dict_type",
}  # fmt: skip


def convert_fsdp(value) -> dict:
    words = [str(word) for word in value] if isinstance(value, list) else str(value).replace(",", " ").split()
    if words in ([], ["no_shard"]):
        return {"fsdp": None}
    config = {}
    for word in words:
        if word in ("full_shard", "shard_grad_op"):
            config["reshard_after_forward"] = word == "full_shard"
        elif word == "offload":
            config["cpu_offload"] = True
        elif word != "auto_wrap":
            raise ValueError(f"{word} does not exist in FSDP2; write true, which shards as full_shard did")
    return {"fsdp": True, "fsdp_config": config}


def is_fsdp_words(value) -> bool:
    return value is not None and str(value).lower() not in ("true", "false")


def convert_fsdp_config(value: dict) -> dict:
    values: dict = {}
    config: dict = {}
    for written, setting in value.items():
        key = str(written).removeprefix("fsdp_")
        if key == "activation_checkpointing":
            values["activation_checkpointing"] = as_flag(setting)
        elif key == "offload_params":
            config["cpu_offload"] = as_flag(setting)
        elif key == "sharding_strategy":
            config["reshard_after_forward"] = str(setting).upper() in ("FULL_SHARD", "1")
        elif key == "version":
            config["version"] = 2
        elif key in FSDP_FLAGS:
            full_shard = {"full_shard": True, "shard_grad_op": False}
            config[key] = full_shard[setting] if setting in full_shard else as_flag(setting)
        elif key not in FSDP1_KEYS:
            config[key] = setting
    return {"fsdp_config": config, **values}


def is_old_fsdp_config(value) -> bool:
    """Whether a mapping has keys of FSDP1 or of accelerate's files, or flags that are written as text."""
    if not isinstance(value, dict):
        return False
    old = FSDP1_KEYS | {"activation_checkpointing", "offload_params", "sharding_strategy"}
    is_old_key = any(str(key).startswith("fsdp_") or str(key) in old for key in value)
    return is_old_key or any(isinstance(value.get(key), str) for key in FSDP_FLAGS) or value.get("version") == 1


RENAMED = {
    "model_name": "model_name_or_path", "model_id": "model_name_or_path", "torch_dtype": "dtype",
    "dataset_path": "dataset_name", "dataset_train_name": "dataset_train_split",
    "dataset_test_name": "dataset_test_split", "max_seq_length": "max_length", "max_seq_len": "max_length",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size", "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu", "use_liger": "use_liger_kernel", "torchdynamo": "torch_compile_backend",
    "push_to_hub_model_id": "hub_model_id",
}  # fmt: skip
GONE = {  # why, and the keys
    "the tokenizer is the model's": ("tokenizer_name", "tokenizer_name_or_path"),
    "the columns of the data are found, or named by question_key and answer_key": ("dataset_text_field",),
    "rows are tokenised in batches of the library's own size": ("dataset_batch_size",),
    "packing fills each sequence as well as it can": ("num_of_sequences",),
    "packing counts tokens": ("chars_per_token",),
    "use max_steps": ("infinite",),
    "checkpointing is never re-entrant": ("gradient_checkpointing_use_reentrant",),
    "a run that was stopped goes on by itself, and --overwrite true starts over": ("overwrite_output_dir",),
    "each logger writes where its own settings say": ("logging_dir",),
    "checkpoints are always safetensors": ("save_safetensors",),
    "the accelerator that is there is used": ("use_mps_device",),
    "there is one backend": ("half_precision_backend", "fp16_backend"),
    "apex is not used": ("fp16_opt_level",),
    "it is always logged": ("include_tokens_per_second",),
    "step 3 measures": ("include_inputs_for_metrics",),
    "data is on every machine": ("dispatch_batches",),
    "per_device_train_batch_size is per device": ("split_batches",),
    "there is no hyperparameter search here": ("ray_scope",),
    "it was removed from transformers": (
        "past_index", "jit_mode_eval", "use_ipex", "use_legacy_prediction_loop", "mp_parameters", "tpu_num_cores",
        "tpu_metrics_debug",
    ),
}  # fmt: skip
RENAMES = {
    **{old: renamed(new) for old, new in RENAMED.items()},
    **{key: gone(reason) for reason, keys in GONE.items() for key in keys},
    **{key: gone(FSDP1, "fsdp_config") for key in FSDP1_KEYS},
    "gradient_checkpointing": renamed(
        "activation_checkpointing", "; auto, its default, turns it on where memory needs it"),
    "use_flash_attention_2": switch("attn_implementation", "flash_attention_2"),
    "use_flash_attn": switch("attn_implementation", "flash_attention_2"),
    "group_by_length": switch("train_sampling_strategy", "group_by_length"),
    "adafactor": switch("optim", "adafactor"),
    "warmup_ratio": Change("warmup_steps", convert_warmup_ratio, "a warmup_steps below 1 is a share of all steps"),
    "fsdp": Change("fsdp", convert_fsdp, applies=is_fsdp_words),
    "fsdp_config": Change("fsdp_config", convert_fsdp_config, FSDP1, applies=is_old_fsdp_config),
    "fsdp_transformer_layer_cls_to_wrap": moved("fsdp_config", "transformer_layer_cls_to_wrap"),
    "fsdp_min_num_params": moved("fsdp_config", "min_num_params"),
}  # fmt: skip
