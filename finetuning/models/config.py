"""
The configs of a model, which are its own or those of the base model under an adapter, and the trust it is loaded with.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig

from finetuning.errors import InputError
from finetuning.models.files import check_model_files, is_adapter
from finetuning.runs import ADAPTER_CONFIG, BASE, read_json
from finetuning.schemas import GENERATION_CONFIG, check

# Classes of models that a causal language model can be loaded from only with a head that was never trained.
OTHER_HEADS = tuple(
    f"For{task}"
    for task in ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering")
)

# Settings of generation: with which tokens the decoder of an encoder-decoder model begins.
OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id")


def describe_failure(error: Exception) -> str:
    """One line on why a model or a tokenizer could not be loaded."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; read that code, and let it run with --trust_remote_code true"
    return (str(error).splitlines() or [type(error).__name__])[0]


def base_of(name_or_path: str) -> str:
    """The model under an adapter; any other model itself."""
    return find_base(name_or_path)[0]


def find_base(name_or_path: str, **kwargs) -> tuple[str, dict]:
    """The model under an adapter, and from_pretrained's keywords for it: the adapter names its revision."""
    if not is_adapter(name_or_path):
        return name_or_path, kwargs
    adapter = Path(name_or_path) / ADAPTER_CONFIG
    config = read_json(adapter)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{adapter} names no base model (base_model_name_or_path); write there where it is")
    return base, {**kwargs, "revision": config.get("revision") or "main"}


def is_plain_lora(adapter: str) -> bool:
    """Whether an adapter is LoRA alone, without weights of another kind."""
    config = read_json(Path(adapter) / ADAPTER_CONFIG)
    return config.get("peft_type") == "LORA" and not (config.get("modules_to_save") or config.get("use_dora"))


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """The class that loads a model: AutoModelForCausalLM would take the decoder of some alone, without a word."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model_config(name_or_path: str, **kwargs) -> PreTrainedConfig:
    """The config of a causal language model or of an encoder-decoder one, or of the one under an adapter.

    Raises:
        InputError: There is no such model, or it is of another kind.
    """
    base, kwargs = find_base(name_or_path, **kwargs)
    adapter = "" if base == name_or_path else f", the base model that {name_or_path}/{ADAPTER_CONFIG} names"
    if base.startswith((".", "/", "~")) and not Path(base).is_dir():
        raise InputError(f"{base}{adapter}: no such folder; write there where it is")
    check_model_files(base)
    try:
        config = AutoConfig.from_pretrained(base, **kwargs)
    # a config with odd values raises any of these
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"could not load the model {base}{adapter}: {describe_failure(error)}") from error
    kinds, own_classes = config.architectures or [], getattr(config, "auto_map", {})
    if type(config) not in auto_class(config)._model_mapping and auto_class(config).__name__ not in own_classes:
        kind = f"a model of type {config.model_type}"
    elif kinds and all(name.endswith(OTHER_HEADS) for name in kinds):
        kind = f"a {', '.join(kinds)}"
    else:
        return config
    raise InputError(
        f"{name_or_path} is {kind}, and no model that writes text, which these steps are for; name another model"
    )


def is_capped(config: PreTrainedConfig) -> bool:
    """Whether the model caps its attention logits (Gemma 2), which sdpa would leave out without a word."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def own_code(config: PreTrainedConfig, revision: str | None) -> dict[str, str]:
    """The keyword of from_config that takes code which comes with a model from the revision of the model itself."""
    reference = getattr(config, "auto_map", {}).get(auto_class(config).__name__)
    if reference is None or "--" in reference or type(config) in auto_class(config)._model_mapping:
        return {}  # it has none, it is in another repository, or it is loaded already
    return {"code_revision": revision or "main"}


def loading_options(config: dict, name: str, in_run: bool, trust_remote_code: bool) -> dict:
    """Keywords of from_pretrained for a model; prints where code that comes with the model may be run.

    Args:
        config: The arguments of training. It trusted the code of its base model, and so of what it made of that one.
        in_run: Whether the model is that base, or in the run's folder.
    """
    as_in_training = in_run and config.get("trust_remote_code", False)
    trusted = trust_remote_code or as_in_training
    if trusted:
        source = "as in training" if as_in_training else "--trust_remote_code true"
        print(f"{name}: code that comes with the model may be run (trust_remote_code, {source})")
    revision = {"revision": config.get("model_revision", "main")} if name == BASE else {}
    return {"trust_remote_code": trusted, **revision}


def load_generation_config(name_or_path: str, **kwargs) -> GenerationConfig:
    """The model's own generation config, else that of the model under it, else what its config says."""
    for source, options in ((name_or_path, kwargs), find_base(name_or_path, **kwargs)):
        # from_pretrained would take any other keyword for a setting of generation
        revision = {"revision": options["revision"]} if "revision" in options else {}
        try:
            config = GenerationConfig.from_pretrained(source, **revision)
        except OSError:
            continue
        except TypeError:
            raise InputError(f"{source}: generation_config.json must hold settings by name") from None
        where = f"{source}: generation_config.json"
        check(config.to_dict(), GENERATION_CONFIG, where, "correct it, or delete the file")
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id or 0]
        if not all(isinstance(token_id, int) for token_id in ends):
            raise InputError(f"{source}: eos_token_id of generation_config.json must be ids of tokens, not {ends}")
        return config
    return GenerationConfig.from_model_config(load_model_config(name_or_path, **kwargs))
