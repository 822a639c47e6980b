"""
Parts of a model that are not trained: `freeze` names them by regular expressions, or as embeddings and encoder.
"""

import difflib
import re
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel

from finetuning.errors import InputError


def freeze_modules(model: PreTrainedModel, patterns: Iterable[str]) -> dict[str, int]:
    """Freeze the parameters of modules that patterns name, and count them by pattern.

    A pattern stands for whole parts of a module's name: `layers.1` is not in `layers.10`, and `self_attn` is in each
    layer. What shares a weight with a frozen module, as a language model's head with its embeddings, is frozen too.

    Raises:
        InputError: A pattern is no regular expression, or names no module, or all is frozen.
    """
    frozen = {}
    for pattern in patterns:
        found = {id(parameter): parameter for parameter in _find(model, pattern)}.values()
        frozen[pattern] = sum(parameter.numel() for parameter in found)
        for parameter in found:
            parameter.requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: {', '.join(patterns)} freezes every parameter, so nothing would be trained")
    return frozen


def _find(model: PreTrainedModel, pattern: str) -> Iterator[torch.nn.Parameter]:
    if pattern == "embeddings":
        size = model.get_input_embeddings().num_embeddings
        tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
        return (table.weight for table in tables if table.num_embeddings == size)
    names = model.named_parameters(remove_duplicate=False)
    if pattern == "encoder" and model.config.is_encoder_decoder:  # without what the decoder shares with it
        inside = {id(parameter) for parameter in model.get_encoder().parameters()}
        embeddings = {id(parameter) for parameter in _find(model, "embeddings")}
        return (parameter for _, parameter in names if id(parameter) in inside - embeddings)
    try:
        whole_parts = re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")
    except re.error as error:
        raise InputError(f"freeze: {pattern} is no regular expression: {error}") from error
    modules = [(name.rpartition(".")[0], parameter) for name, parameter in names]
    found = [parameter for module, parameter in modules if whole_parts.search(module)]
    if not found:
        parts = [module.split(".")[:size] for module, _ in modules for size in range(1, module.count(".") + 2)]
        known = dict.fromkeys(
            name for part in parts for name in (".".join(part), part[-1]) if not part[-1].isdigit() or "." in name
        )
        near = difflib.get_close_matches(pattern, [name for name in known if not name.isdigit()], n=4, cutoff=0.4)
        raise InputError(
            f"freeze: {pattern} names no module that has weights; near it: {', '.join(near or list(known)[:4])}"
        )
    return iter(found)
