"""
Loading models and adapters so that every weight of them finds its place, and every weight of the model is in the files.

transformers makes up the weights that the files of a model lack, and peft leaves out those of an adapter that have no place;
both only warn. Importing this module turns the first into an error wherever a model is loaded.
"""

from pathlib import Path

import torch
import transformers.modeling_utils
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict

from finetuning.errors import InputError, is_main_process
from finetuning.model_files import check_model_files, read_header
from finetuning.runs import read_json

WEIGHTS = "adapter_model.safetensors"

report_loading = transformers.modeling_utils.log_state_dict_report  # fails where a later version calls it otherwise


def refuse_made_up_weights(model, pretrained_model_name_or_path, *args, loading_info, **kwargs) -> None:
    """In place of transformers' report on what has been loaded."""
    missing, misshapen = sorted(loading_info.missing_keys), sorted(loading_info.mismatched_keys)
    if is_main_process() and (missing or misshapen):  # the other ranks may get their weights from the first one
        text = (
            f"{len(missing)} weights are missing, {missing[0]} first"
            if missing
            else f"{misshapen[0][0]} has another shape"
        )
        raise InputError(
            f"the weight files of {pretrained_model_name_or_path} do not fit its config.json: {text}; copy or download both again"
        )
    report_loading(model, pretrained_model_name_or_path, *args, loading_info=loading_info, **kwargs)


transformers.modeling_utils.log_state_dict_report = refuse_made_up_weights


def load_adapter(path: str, **settings) -> PeftModel:
    """Load an adapter, and its base model under it.

    Args:
        settings: Keyword arguments of from_pretrained.

    Raises:
        InputError: It does not fit its base model, lacks weights or has some that are no numbers.
    """
    folder = Path(path)
    check_model_files(path)
    if not (folder / WEIGHTS).is_file():  # adapter_model.bin is a pickle, which can run code
        raise InputError(f"{path} has no {WEIGHTS}; copy or download it again")
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(path, **settings)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
        raise InputError(f"{path} does not fit its base model {base}: {reason}") from error
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = set(read_header(folder / WEIGHTS)[1])
    missing = sorted(weights.keys() - stored)
    unknown = sorted(name for name in stored - weights.keys() if "lora_" in name)
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which has no place in its base model {base}"
        raise InputError(f"{folder / WEIGHTS} {what}; take adapter and base model from where they were trained")
    if is_main_process():
        for where, tensors in ((folder / WEIGHTS, weights), (base, dict(model.named_parameters()))):
            for name, tensor in tensors.items():
                if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
                    raise InputError(
                        f"{where} holds values that are no numbers (NaN, infinity), in {name}; take another"
                    )
    return model
