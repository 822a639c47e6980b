"""
The model that step 1 trains: its tokenizer, its adapter, and how it is loaded.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from finetuning.config.model_arguments import ModelArguments
from finetuning.data.chat import add_tokens, load_tokenizer
from finetuning.errors import InputError
from finetuning.models.config import auto_class, load_model_config, own_code
from finetuning.models.files import is_adapter
from finetuning.models.loading import load_adapter, refuse_quantised
from finetuning.models.rounding import dtype_name
from finetuning.ranks import print_main
from finetuning.training.arguments import TrainingArguments
from finetuning.training.attention import ROW_ATTENTION, find_fallback
from finetuning.training.freezing import freeze_modules


def check_model(name_or_path: str, **source) -> None:
    """Refuse a model that cannot be trained: one of another kind, or an adapter."""
    if is_adapter(name_or_path):
        raise InputError(
            f"model_name_or_path: {name_or_path} is an adapter; merge it with 2_merge_lora.py, and name the merged "
            "model"
        )
    if Path(name_or_path).is_dir() and source.get("revision", "main") not in (None, "main"):
        raise InputError(
            f"model_revision: {source['revision']} has no effect, as {name_or_path} is a folder, which has one state "
            "only; leave it out, or name a model on the Hub"
        )
    refuse_quantised(load_model_config(name_or_path, **source), name_or_path)


@dataclass(frozen=True)
class ModelPlan:
    """The model that is trained, before it is loaded."""

    name_or_path: str
    settings: dict  # keyword arguments of from_pretrained
    tokenizer: PreTrainedTokenizerBase
    new_ids: list[int]  # the ids of the tokens that were added to its tokenizer
    peft_config: PeftConfig | None  # None means that all weights are trained but the frozen ones
    frozen: dict[str, int] = dataclasses.field(default_factory=dict)  # numbers of parameters by what freezes them

    @property
    def source(self) -> dict:
        """Which files of the model are read, and whether code in them may run."""
        return {key: self.settings[key] for key in ("revision", "trust_remote_code")}


def plan_model(model_args: ModelArguments, training_args: TrainingArguments, added_tokens: list[str]) -> ModelPlan:
    """Read everything of the model but its weights.

    Raises:
        InputError: It cannot be trained, or not as the arguments ask.
    """
    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    check_model(name, **source)
    config = load_model_config(name, **source)
    model = build_without_weights(config, **source)
    if model_args.attn_implementation == ROW_ATTENTION and config.is_encoder_decoder:  # whose rows are not packed
        model_args.attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    elif model_args.attn_implementation == ROW_ATTENTION:
        fallback = find_fallback(model)
        if fallback is not None:
            model_args.attn_implementation, reason = fallback
            training_args.hardware_choices["attn_implementation"] = f"{fallback[0]}, as {reason}"
    training_args.fit_to_kind(model)
    settings = choose_model_settings(model_args, training_args)
    tokenizer, new_ids = prepare_tokenizer(name, training_args, added_tokens, **source)
    if config.is_encoder_decoder:
        tokenizer.padding_side = "right"  # positions of an encoder count from the first column
    frozen = freeze_modules(model, model_args.freeze or [])
    return ModelPlan(name, settings, tokenizer, new_ids, build_adapter_config(model_args, new_ids, model), frozen)


def choose_model_settings(model_args: ModelArguments, training_args: TrainingArguments) -> dict:
    """Keyword arguments of from_pretrained."""
    if model_args.dtype is None:
        dtype = training_args.compute_dtype if model_args.use_peft else torch.float32
    else:
        dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    settings = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "dtype": dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    quantization_config = get_quantization_config(dataclasses.replace(model_args, dtype=None, attn_implementation=None))
    if quantization_config is not None:
        quantization_config.bnb_4bit_compute_dtype = training_args.compute_dtype
        settings |= {"quantization_config": quantization_config, "device_map": {"": training_args.device}}
    return settings


def print_hardware(hardware: dict, plan: ModelPlan, args: TrainingArguments) -> None:
    """Print the devices (`hardware` is that of run.json), and which arguments were replaced for them."""
    for key, choice in args.hardware_choices.items():
        print_main(f"{key}: {choice}")
    devices = ", ".join(dict.fromkeys(hardware["devices"]))
    dtype, compute_dtype = map(dtype_name, (plan.settings["dtype"], args.compute_dtype))
    attention = plan.settings["attn_implementation"]
    print_main(f"hardware: {devices}; weights {dtype}, compute {compute_dtype}, attention {attention}")


def read_chat_template(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"chat_template_path: {path} is no file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"chat_template_path: {path} is no text in UTF-8") from None


def prepare_tokenizer(
    name_or_path: str, args: TrainingArguments, added: list[str], **source
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer with the chat template and the tokens of the YAML, and the ids of tokens that are new to it.

    What the tokenizer has been given is removed from the arguments, so that trl does not set it again.
    """
    chat_template = read_chat_template(args.chat_template_path)
    args.chat_template_path = None
    tokenizer = load_tokenizer(name_or_path, chat_template, **source)
    for key in ("eos_token", "pad_token"):
        token = getattr(args, key)
        if token is not None and token not in tokenizer.get_vocab():
            raise InputError(
                f"{key}: {token} is not in the vocabulary of the tokenizer; leave it out, or see special_tokens"
            )
        if token is not None:
            setattr(tokenizer, key, token)
            setattr(args, key, None)
    return tokenizer, add_tokens(tokenizer, added)


def build_adapter_config(model_args: ModelArguments, new_ids: list[int], model: PreTrainedModel) -> PeftConfig | None:
    """The adapter that the arguments describe, or None where they ask for none.

    Args:
        new_ids: Ids of added tokens, whose embeddings are trained: an adapter alone could neither read nor write them.
        model: That of the arguments, without its weights.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    config.revision = model_args.model_revision
    config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings = [name.split(".")[-1] for name, module in model.named_modules() if any(module is m for m in modules)]
    if new_ids and model.config.is_encoder_decoder:  # peft would train a copy that encoder and decoder do not read
        raise InputError(
            "special_tokens cannot be learned by an adapter of an encoder-decoder model, whose embeddings stand in "
            "several places; leave them out, or train all weights (use_peft: false)"
        )
    if new_ids:
        config.modules_to_save = [*(config.modules_to_save or []), *embeddings]
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    trained = {name.split(".")[-1] for name in [*targets, *(config.modules_to_save or [])]}
    # what is learned by one of two tied embeddings must be learned by both, as the merged model has one weight for them
    config.ensure_weight_tying = model.config.tie_word_embeddings and not trained.isdisjoint(embeddings)
    return config


def load_model(
    plan: ModelPlan, checkpoint: Path | None, args: TrainingArguments
) -> tuple[PreTrainedModel | PeftModel | str, PeftConfig | None]:
    """The trainer's model and peft_config. Of a causal model of which every weight is trained, and to which nothing is
    added, it is a path, from which trl loads it.

    Args:
        checkpoint: Training goes on from it; None means that it starts from the model itself.
    """
    args.base_model = None if plan.peft_config else (plan.name_or_path, plan.settings["revision"])
    if checkpoint is not None and plan.peft_config is not None:
        # the revision is that of the base model, which the adapter names itself
        settings = {key: value for key, value in plan.settings.items() if key != "revision"}
        return load_adapter(str(checkpoint), is_trainable=True, **settings), None
    path, new_ids = (plan.name_or_path, plan.new_ids) if checkpoint is None else (str(checkpoint), [])
    if not (new_ids or plan.frozen or args.decoder_start is not None):
        args.model_init_kwargs = plan.settings
        return path, plan.peft_config
    kind = auto_class(load_model_config(plan.name_or_path, **plan.source))
    model = create_model_from_path(path, kind, **{"device_map": None, **plan.settings})
    if new_ids:
        add_embeddings(model, new_ids)
    freeze_modules(model, plan.frozen)
    return model, plan.peft_config


def add_embeddings(model: PreTrainedModel, new_ids: list[int]) -> None:
    """Give tokens that are new to a model's tokenizer embeddings, which start as the mean of all others."""
    known = model.get_input_embeddings().num_embeddings
    if max(new_ids) >= known:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    old_ids = [i for i in range(known) if i not in set(new_ids)]
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        # a rank that will get its weights from the first one has none yet
        if embeddings is not None and embeddings.weight.device.type != "meta":
            with torch.no_grad():
                weight = embeddings.weight
                weight[new_ids] = weight[old_ids].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def build_without_weights(
    config: PreTrainedConfig, revision: str | None, trust_remote_code: bool, **options
) -> PreTrainedModel:
    with torch.device("meta"):
        code = {"trust_remote_code": trust_remote_code, **own_code(config, revision)}
        return auto_class(config).from_config(config, **code, **options)


def build_planned_model(plan: ModelPlan, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights, with embeddings for the tokens that are added."""
    # FlashAttention's own kernels do not run without data; sdpa by rows keeps the same tensors
    planned = plan.settings["attn_implementation"]
    attention = planned if planned in ("eager", "sdpa") else ROW_ATTENTION
    try:
        model = build_without_weights(config, **plan.source, dtype=dtype, attn_implementation=attention)
    except ValueError as error:  # loading the model would raise the same error
        raise InputError(f"{config.name_or_path} cannot be built with attention {attention}: {error}") from error
    if plan.new_ids:
        size = model.get_input_embeddings().num_embeddings + len(plan.new_ids)
        model.resize_token_embeddings(size, mean_resizing=False)
    freeze_modules(model, plan.frozen)
    return model


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    check_adapter_names(model, peft_config)
    try:
        return get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    except ValueError as error:  # peft cannot adapt modules of this kind
        raise InputError(f"lora_target_modules: {error}") from error


def check_adapter_names(model: torch.nn.Module, peft_config: PeftConfig) -> None:
    """Refuse a name that no module or parameter of the model has: peft leaves it out where others are found."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for key, names in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters)):
        wanted = getattr(peft_config, key) or []
        for name in [] if isinstance(wanted, str) else sorted(wanted):  # a text is `all-linear`, or an expression
            if not any(known == name or known.endswith(f".{name}") for known in names):
                ends = sorted({known.rpartition(".")[2] for known in names} - {""})
                ends = [end for end in ends if not end.isdigit() and key != "target_parameters"]
                known_names = f", which has {', '.join(ends)}" if ends else ""
                raise InputError(f"lora_{key}: {name} is nowhere in the model{known_names}")
