"""
Keys of older YAMLs, and what became of them: written for trl from 0.8 and transformers from 4.36 on.

Each is converted and said, never dropped in silence. Imports without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass


def always(value) -> bool:
    return True


@dataclass(frozen=True)
class Change:
    """What became of a key.

    Attributes:
        new_keys: The keys that it sets today; of one that is gone, a key of the step that it belonged to.
        convert: Gives today's keys and values for an old value. Raises ValueError for a value with no counterpart.
        reason: Why the value is not used any more, or how it is read.
        applies: Whether a value is an older form at all, for a key that still has its name.
    """

    new_keys: tuple[str, ...]
    convert: Callable[[object], dict]
    reason: str = ""
    applies: Callable[[object], bool] = always
    renames_only: bool = False

    def describe(self, values: dict) -> str:
        if self.renames_only:
            return f"is called {self.new_keys[0]} now{self.reason}"
        read_as = ", ".join(f"{key}: {_yaml(value)}" for key, value in values.items())
        return "; ".join(part for part in (f"is read as {read_as}" if read_as else "", self.reason) if part)


def _yaml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(v)}" for key, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def renamed(new_key: str, reason: str = "") -> Change:
    return Change((new_key,), lambda value: {new_key: value}, reason, renames_only=True)


def gone(reason: str, belongs_to: str = "max_steps") -> Change:
    return Change((belongs_to,), lambda value: {}, f"has no effect any more: {reason}")


# FSDP: one switch and a mapping, where there was a line of words

FSDP1_KEYS = {"forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers"}
FSDP_CONFIG_KEYS = {
    "version", "min_num_params", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "cpu_offload",
    "cpu_ram_efficient_loading", "state_dict_type", "reshard_after_forward",
}  # fmt: skip


def as_flag(value) -> bool:
    """true and false, also as the text that old YAMLs have (`use_orig_params: "false"`)."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"needs true or false, got {value!r}")
    return str(value).lower() == "true"


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


def convert_fsdp_config(value) -> dict:
    values: dict = {}
    config = {}
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
        elif key in ("cpu_offload", "cpu_ram_efficient_loading", "reshard_after_forward"):
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
    names = {str(key).removeprefix("fsdp_") for key in value}
    prefixed = any(str(key).startswith("fsdp_") for key in value)
    flags = [value.get(key) for key in ("cpu_offload", "cpu_ram_efficient_loading", "reshard_after_forward")]
    return bool(names & old) or prefixed or any(isinstance(flag, str) for flag in flags) or value.get("version") == 1


def convert_warmup_ratio(value) -> dict:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"needs a share from 0 up to 1, got {value!r}")
    return {"warmup_steps": value}


FSDP1 = "FSDP2 has no prefetching, use_orig_params, sync_module_states or limit_all_gathers to set"
RESUMING = "a run that was stopped goes on by itself, and --overwrite true starts over"

RENAMES = {
    "model_name": renamed("model_name_or_path"),
    "model_id": renamed("model_name_or_path"),
    "tokenizer_name": gone("the tokenizer is the model's"),
    "tokenizer_name_or_path": gone("the tokenizer is the model's"),
    "torch_dtype": renamed("dtype"),
    "use_flash_attention_2": Change(
        ("attn_implementation",), lambda value: {"attn_implementation": "flash_attention_2"} if as_flag(value) else {}
    ),
    "use_flash_attn": Change(
        ("attn_implementation",), lambda value: {"attn_implementation": "flash_attention_2"} if as_flag(value) else {}
    ),
    "dataset_path": renamed("dataset_name"),
    "dataset_train_name": renamed("dataset_train_split"),
    "dataset_test_name": renamed("dataset_test_split"),
    "dataset_text_field": gone("the columns of the data are found, or named by question_key and answer_key"),
    "max_seq_length": renamed("max_length"),
    "max_seq_len": renamed("max_length"),
    "evaluation_strategy": renamed("eval_strategy"),
    "warmup_ratio": Change(("warmup_steps",), convert_warmup_ratio, "a warmup_steps below 1 is a share of all steps"),
    "group_by_length": Change(
        ("train_sampling_strategy",),
        lambda value: {"train_sampling_strategy": "group_by_length"} if as_flag(value) else {},
    ),
    "no_cuda": renamed("use_cpu"),
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "gradient_checkpointing": renamed("activation_checkpointing", "; auto, its default, turns it on where memory needs it"),
    "gradient_checkpointing_use_reentrant": gone("checkpointing is never re-entrant"),
    "adafactor": Change(("optim",), lambda value: {"optim": "adafactor"} if as_flag(value) else {}),
    "use_liger": renamed("use_liger_kernel"),
    "fsdp": Change(("fsdp",), convert_fsdp, applies=is_fsdp_words),
    "fsdp_config": Change(("fsdp_config",), convert_fsdp_config, FSDP1, applies=is_old_fsdp_config),
    "fsdp_transformer_layer_cls_to_wrap": Change(
        ("fsdp_config",), lambda value: {"fsdp_config": {"transformer_layer_cls_to_wrap": value}}
    ),
    "fsdp_min_num_params": Change(("fsdp_config",), lambda value: {"fsdp_config": {"min_num_params": value}}),
    "overwrite_output_dir": gone(RESUMING),
    "logging_dir": gone("each logger writes where its own settings say"),
    "dataset_batch_size": gone("rows are tokenised in batches of the library's own size"),
    "num_of_sequences": gone("packing fills each sequence as well as it can"),
    "chars_per_token": gone("packing counts tokens"),
    "infinite": gone("use max_steps"),
    "save_safetensors": gone("checkpoints are always safetensors"),
    "use_mps_device": gone("the accelerator that is there is used"),
    "half_precision_backend": gone("there is one backend"),
    "fp16_backend": gone("there is one backend"),
    "fp16_opt_level": gone("apex is not used"),
    "include_tokens_per_second": gone("it is always logged"),
    "include_inputs_for_metrics": gone("step 3 measures"),
    "dispatch_batches": gone("data is on every machine"),
    "split_batches": gone("per_device_train_batch_size is per device"),
    "past_index": gone("it was removed from transformers"),
    "jit_mode_eval": gone("it was removed from transformers"),
    "use_ipex": gone("it was removed from transformers"),
    "use_legacy_prediction_loop": gone("it was removed from transformers"),
    "mp_parameters": gone("it was removed from transformers"),
    "torchdynamo": renamed("torch_compile_backend"),
    "ray_scope": gone("there is no hyperparameter search here"),
    "tpu_num_cores": gone("it was removed from transformers"),
    "tpu_metrics_debug": gone("it was removed from transformers"),
    "push_to_hub_model_id": renamed("hub_model_id"),
}  # fmt: skip
RENAMES |= {key: gone(FSDP1, "fsdp_config") for key in FSDP1_KEYS}
