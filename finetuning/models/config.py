"""
The configs of a model: its own, or those of the base model under an adapter.
"""

from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

from finetuning.errors import InputError
from finetuning.models.files import check_model_files
from finetuning.runs import BASE, read_json
from finetuning.schemas import GENERATION_CONFIG, check


def describe_failure(error: Exception) -> str:
    """One line on why a model or a tokenizer could not be loaded."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; read that code, and let it run with --trust_remote_code true"
    return (str(error).splitlines() or [type(error).__name__])[0]


def base_of(name_or_path: str) -> str:
    """The model under an adapter; any other model itself."""
    return _source_of_base(name_or_path)[0]


def _source_of_base(name_or_path: str, **kwargs) -> tuple[str, dict]:
    """The model under an adapter and the arguments to load it with, as the adapter names its revision."""
    adapter = Path(name_or_path) / "adapter_config.json"
    if not adapter.is_file():
        return name_or_path, kwargs
    config = read_json(adapter)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{adapter} names no base model (base_model_name_or_path); write there where it is")
    return base, {**kwargs, "revision": config.get("revision") or "main"}


# classes of models that a causal language model can be loaded from only with a head that was never trained
OTHER_HEADS = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def load_model_config(name_or_path: str, **kwargs) -> PreTrainedConfig:
    """The config of a causal language model, or of the one under an adapter.

    Raises:
        InputError: There is no such model, or it is of another kind.
    """
    base, kwargs = _source_of_base(name_or_path, **kwargs)
    adapter = "" if base == name_or_path else f", the base model that {name_or_path}/adapter_config.json names"
    if base.startswith((".", "/", "~")) and not Path(base).is_dir():
        raise InputError(f"{base}{adapter}: no such folder; write there where it is")
    check_model_files(base)
    try:
        config = AutoConfig.from_pretrained(base, **kwargs)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # of a config with odd values, too
        raise InputError(f"could not load the model {base}{adapter}: {describe_failure(error)}") from error
    kinds = config.architectures or []
    if config.is_encoder_decoder:  # AutoModelForCausalLM would take the decoder of some alone, without a word
        kind = "an encoder-decoder model"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        kind = f"a model of type {config.model_type}"
    elif kinds and all(name.endswith(OTHER_HEADS) for name in kinds):
        kind = f"a {', '.join(kinds)}"
    else:
        return config
    raise InputError(
        f"{name_or_path} is {kind}, and no causal language model, which these steps are for; name another model"
    )


def own_code(config: PreTrainedConfig, revision: str | None) -> dict[str, str]:
    """Keyword of from_config for a model that comes with code, which else would be taken from another revision of it."""
    reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if reference is None or "--" in reference or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}  # it has none, it is in another repository, or it is loaded already
    return {"code_revision": revision or "main"}


def loading_options(config: dict, name: str, in_run: bool, trust_remote_code: bool) -> dict:
    """Keywords of from_pretrained for a model; says so where code that comes with the model may be run.

    Args:
        config: Of training, whose trust in code is in its base model and in what it made of that, and in no other model.
        in_run: Whether the model is the base or in the run's folder.
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
    for source, options in ((name_or_path, kwargs), _source_of_base(name_or_path, **kwargs)):
        # it would take any other keyword for one of its settings
        revision = {"revision": options["revision"]} if "revision" in options else {}
        try:
            config = GenerationConfig.from_pretrained(source, **revision)
        except OSError:
            continue
        except TypeError:
            raise InputError(f"{source}: generation_config.json must hold settings by name") from None
        check(
            config.to_dict(), GENERATION_CONFIG, f"{source}: generation_config.json", "correct it, or delete the file"
        )
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id or 0]
        if not all(isinstance(token_id, int) for token_id in ends):
            raise InputError(f"{source}: eos_token_id of generation_config.json must be ids of tokens, not {ends}")
        return config
    return GenerationConfig.from_model_config(load_model_config(name_or_path, **kwargs))
