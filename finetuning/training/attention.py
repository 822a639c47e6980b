"""
Attention within each row of a packed batch, at the cost of its rows.

Under packing trl lays the rows of a batch end to end, and transformers hides from each what is not its own by a mask of
(tokens, tokens). Where FlashAttention is not there, all of it is computed, and most of it hidden. Here each row is a
call of its own instead, and only what is computed here (*) is:

          A A A B B C C        a row starts where a token does not see the one before it, which the library's own
        A *                    mask function says of any pair of tokens, so no mask of all pairs is built. Causal
        A * *                  attention of such a row needs no mask. One that is longer than a sliding window gets
        A * * *                a mask, of its own tokens only.
        B       *
        B       * *
        C           *
        C           * *

What else models ask of attention (heads that share keys, scaling, dropout) is that of the library's sdpa, which is
called. Batches of padded rows need no mask either: what is padded on the right stands where causal attention does not
look.
"""

import itertools
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from finetuning.models.config import is_capped

ROW_ATTENTION = "sdpa_by_rows"
# Layers whose mask goes to the attention function as it is made here. Others are recurrent, or change the mask first.
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Rows:
    """Where the rows of a packed batch lie; models hand it from the mask function to the layers in place of a mask."""

    lengths: list[int]
    masks: list[torch.Tensor | None]  # (length, length) of each row; None means that it is causal


@torch.compiler.disable  # compiled, it would be compiled again for the lengths of each batch
def row_attention(module, query, key, value, attention_mask, **kwargs):
    """SDPA within each row; with a mask of torch, or none, it is the library's own.

    Shapes: query (1, heads, tokens, dim), key and value (1, key heads, tokens, dim); result (1, tokens, heads, dim).
    """
    if not isinstance(attention_mask, Rows):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = True
    rows = zip(
        *(t.split(attention_mask.lengths, dim=2) for t in (query, key, value)), attention_mask.masks, strict=True
    )
    return torch.cat([sdpa_attention_forward(module, *row, **kwargs)[0] for row in rows], dim=1), None


@torch.compiler.disable
def row_mask(*, mask_function, batch_size, q_length, kv_length, device, attention_mask=None, local_size=None, **kwargs):
    """The rows of a packed batch; of any other batch None, if causal attention hides enough, or else sdpa's mask.

    Args: Those of transformers' mask functions.
        mask_function: Whether a token sees another, by the indices (batch, head, token, other).
        attention_mask: (batch, tokens), False where a row is padded.
        local_size: How many tokens back a token sees, itself included.
    """
    if isinstance(torch.arange(q_length, device=device), FakeTensor):
        # the memory is measured without data; one row of all tokens keeps as much for the backward pass as many do
        return Rows([q_length], [None]) if batch_size == 1 else None
    whole = q_length == kv_length and not kwargs.get("use_vmap")  # and the function takes tensors of indices
    packed = whole and batch_size == 1 and attention_mask is None
    borders = find_borders(mask_function, q_length, device) if packed else None
    if borders is not None:
        rows = [torch.arange(first, end, device=device) for first, end in itertools.pairwise(borders)]
        wide = [local_size is not None and len(row) > local_size for row in rows]
        masks = [mask_function(0, 0, row[:, None], row) if w else None for row, w in zip(rows, wide, strict=True)]
        return Rows([len(row) for row in rows], masks)
    if whole and attention_mask is not None and mask_function is causal_mask_function:
        padded_on_the_right = attention_mask[:, 0].all() and (attention_mask[:, 1:] <= attention_mask[:, :-1]).all()
        if padded_on_the_right and kwargs["allow_is_causal_skip"]:
            return None
    return sdpa_mask(
        mask_function=mask_function, batch_size=batch_size, q_length=q_length, kv_length=kv_length, device=device,
        attention_mask=attention_mask, local_size=local_size, **kwargs,
    )  # fmt: skip


def find_borders(mask_function, num_tokens: int, device) -> list[int] | None:
    """Where rows that lie end to end begin, and where the last one ends; None where a token sees the one after it."""
    tokens = torch.arange(num_tokens - 1, device=device)
    if mask_function(0, 0, tokens, tokens + 1).any():
        return None
    starts = (~mask_function(0, 0, tokens + 1, tokens)).nonzero().flatten() + 1
    return [0, *starts.tolist(), num_tokens]


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, row_mask)


def find_fallback(model: PreTrainedModel) -> tuple[str, str] | None:
    """The attention that this model needs in its place, and why; None where it can go by rows."""
    if not model._supports_sdpa:
        return "eager", "the model has no sdpa"
    if is_capped(model.config):
        return "eager", "sdpa leaves out the cap of the model's attention logits"
    other_layers = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - LAYER_TYPES
    if other_layers:
        return "sdpa", f"its layers are of {', '.join(sorted(other_layers))}"
    return None if model._supports_attention_backend else ("sdpa", "its attention is of its own kind")
