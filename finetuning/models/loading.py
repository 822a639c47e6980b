"""
Loading models and adapters so that every weight of them finds its place, and every weight of the model is in the files.

transformers makes up the weights that the files of a model lack, and peft leaves out those of an adapter that have no
place; both only warn. Importing this module REPLACES a function of transformers, modeling_utils.log_state_dict_report,
by `refuse_made_up_weights`: from then on, the first is an error wherever this process loads a model, in trl as well.
"""

from pathlib import Path

import torch
import transformers.modeling_utils
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedConfig

from finetuning.errors import InputError
from finetuning.models.config import base_of, load_model_config
from finetuning.models.files import check_model_files, fingerprint_weights, read_header
from finetuning.ranks import is_main_process
from finetuning.runs import read_json, write_json

WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"  # in the folder of an adapter, of which weights it was trained on

# Importing fails here, and not silently, with a version of transformers that has no function of this name.
report_loading = transformers.modeling_utils.log_state_dict_report


def refuse_made_up_weights(model, pretrained_model_name_or_path, *args, loading_info, **kwargs) -> None:
    """Refuse a model whose files lack weights; else do what transformers does here, and report what has been loaded."""
    missing, misshapen = sorted(loading_info.missing_keys), sorted(loading_info.mismatched_keys)
    if is_main_process() and (missing or misshapen):  # the other ranks may get their weights from the first one
        if missing:
            problem = f"{len(missing)} weights are missing, {missing[0]} first"
        else:
            problem = f"{misshapen[0][0]} has another shape"
        raise InputError(
            f"the weight files of {pretrained_model_name_or_path} do not fit its config.json: {problem}; "
            "copy or download both again"
        )
    report_loading(model, pretrained_model_name_or_path, *args, loading_info=loading_info, **kwargs)


transformers.modeling_utils.log_state_dict_report = refuse_made_up_weights


def refuse_quantised(config: PreTrainedConfig, name_or_path: str) -> None:
    """Refuse weights that are stored in few bits, in which no update of training or of an adapter can be kept."""
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{name_or_path} holds quantised weights (its config.json has a quantization_config), which can neither be "
            "trained nor merged into; name the model in its own precision (use_peft: true with load_in_4bit: true "
            "quantises it for the training of an adapter)"
        )


def load_adapter(path: str, **settings) -> PeftModel:
    """Load an adapter on its base model.

    Args:
        settings: Keyword arguments of from_pretrained.

    Raises:
        InputError: It does not fit its base model, lacks weights, or has some that are NaN or infinite.
    """
    folder = Path(path)
    check_model_files(path)
    if not (folder / WEIGHTS).is_file():  # adapter_model.bin is a pickle, which can run code
        raise InputError(f"{path} has no {WEIGHTS}; copy or download it again")
    base = base_of(path)
    check_base(folder, base)
    source = {key: settings[key] for key in ("trust_remote_code",) if key in settings}
    pairs = load_model_config(path, **source).is_encoder_decoder
    try:
        model = (AutoPeftModelForSeq2SeqLM if pairs else AutoPeftModelForCausalLM).from_pretrained(path, **settings)
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
        _check_numbers(str(folder / WEIGHTS), weights)
        _check_numbers(base, dict(model.named_parameters()))
    return model


def _check_numbers(where: str, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise InputError(f"{where} holds values that are no numbers (NaN, infinity), in {name}; take another")


def record_base(adapter: Path, base: str) -> None:
    """Write beside an adapter which weights it was trained on; for those of the Hub, its config has the revision."""
    if (weights := fingerprint_weights(base)) is not None:
        write_json(adapter / BASE_FILE, {"weights": weights})


def check_base(adapter: Path, base: str) -> None:
    """Refuse other weights than those that record_base has seen: peft would add the adapter to them without a word."""
    check_model_files(base)
    weights = fingerprint_weights(base)
    if weights is None or not (adapter / BASE_FILE).is_file():
        return
    trained_on = read_json(adapter / BASE_FILE).get("weights")
    if weights != trained_on:
        raise InputError(
            f"{base} holds other weights ({weights}) than those that {adapter} was trained on ({trained_on}, in its "
            f"{BASE_FILE}); bring the base model back as it was"
        )
