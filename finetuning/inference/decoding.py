"""
Many prompts at once, with torch and transformers alone: one wide decode batch over a cache that is allocated once.

The cache has a fixed number of slots, and each sequence that is being answered sits in one. The active ones are always
the first, so that a step takes the front of every tensor and gathers nothing. Of eight slots, A to G are active here:

    slot        0     1     2     3     4     5     6     7
              [ A ] [ B ] [ C ] [ D ] [ E ] [ F ] [ G ] [   ]    each step gives every active sequence one token
    B ends    [ A ] [ G ] [ C ] [ D ] [ E ] [ F ] [   ] [   ]    B is yielded, and the last one is copied into its slot
    H, I wait [ A ] [ G ] [ C ] [ D ] [ E ] [ F ] [ H ] [ I ]    they are prefilled as a quarter of the slots is free

Along the length of the cache, one slot holds the keys and values of its sequence, of all tokens but the last:

    position      0 ............... p-1 | p ............... n-1 | n .................. length
                  of p prompt tokens    | of new tokens         | old values, which the mask hides

A step takes in that last token, writes its key and value at position n, and gives the logits of the next token. So the
prefill of a prompt leaves out its last token (n is p - 1 then): it takes a chunk of prompts of like length, padded on
the right, where causal attention does not look, and without the language model's head. What all prompts begin with, the
system message above all, is read once, and its keys and values are copied into each slot. A slot is free as soon as
its sequence has ended; memory is freed when all have.

Greedy tokens are those of `model.generate` for each prompt alone, but for rounding (docs/generation.md).
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetuning.hardware import keep_freed_memory
from finetuning.inference.onednn import onednn_products

Prompts = Sequence[Sequence[int]]  # token ids of each
SLOT_ATTENTION = "slots"
# Prompt tokens of one prefill, unless one prompt is longer. What a layer makes of 1024 stays in a CPU's L2 cache.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}
PREFILL_TOKENS_ELSEWHERE = 4096  # on other devices
# On a CPU attention runs per group of 8 slots, up to the longest sequence of the group; slots are filled longest first,
# so neighbours are of like length, until one that is moved makes its group as slow as itself.
SLOTS_PER_GROUP = 8
REFILL = 0.25  # share of the slots that has to be free before waiting prompts are prefilled


def slot_attention(module, query, key, value, attention_mask, scaling=None, slot_groups=None, **kwargs):
    """Attention (SDPA) of one token a slot, in which heads that share keys are rows of one matrix: no key is repeated.

    Shapes: query (slots, heads, 1, dim), key and value (slots, key heads, length, dim), mask (slots, 1, 1, length).

    Args:
        slot_groups: [(first slot, last slot + 1, length), ...]; no slot of a group has more keys than its length.
            None in a prefill, which is the library's own way.
    """
    if slot_groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    slots, heads, _, dim = query.shape
    grouped = query.view(slots, key.shape[1], heads // key.shape[1], dim)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            grouped[first:last],
            key[first:last, :, :length],
            value[first:last, :, :length],
            attn_mask=attention_mask[first:last, ..., :length],
            scale=scaling,
        )
        for first, last, length in slot_groups
    ]
    return torch.cat(outputs).reshape(slots, 1, heads, dim), None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)


class SlotCache:
    """Keys and values of `num_slots` sequences of up to `length` tokens, with what models call of transformers' Cache.

    Each layer is two tensors of shape (slots, key heads, length, dim), which are allocated once.
    """

    def __init__(self, num_slots: int, length: int):
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_slots, self.length = num_slots, length
        self.active = 0  # slots in use, which are the first ones
        self.longest = 0  # keys of the longest sequence, with that of this step's token
        self.positions = torch.empty(0, dtype=torch.long)  # where each active slot's key of this step goes

    def write(self, prompts: DynamicCache) -> None:
        """Put prompts into the next free slots."""
        if not self.layers:
            self.layers = [(self._allocate(layer.keys), self._allocate(layer.values)) for layer in prompts.layers]
        first, self.active = self.active, self.active + len(prompts.layers[0].keys)
        for tensors, layer in zip(self.layers, prompts.layers, strict=True):
            for tensor, new in zip(tensors, (layer.keys, layer.values), strict=True):
                tensor[first : self.active, :, : new.shape[2]] = new

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        # zeros, as what is masked must be a number
        return like.new_zeros(self.num_slots, like.shape[1], self.length, like.shape[3])

    def free(self, slot: int, last_length: int) -> None:
        """Free a slot, and copy into it the last active one, which has `last_length` keys, so that no gap is left."""
        self.active -= 1
        if slot != self.active:
            for tensor in itertools.chain(*self.layers):
                tensor[slot, :, :last_length] = tensor[self.active, :, :last_length]

    def begin_step(self, positions: torch.Tensor, longest: int) -> None:
        """Say where the token of each active slot goes in this step, and how many keys the longest then has."""
        self.positions, self.longest = positions[:, None, None, None], longest

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs):
        positions = self.positions.to(key.device)
        tensors = self.layers[layer_idx]
        for tensor, new in zip(tensors, (key, value), strict=True):
            tensor[: self.active].scatter_(2, positions.expand_as(new), new)
        return tuple(tensor[: self.active, :, : self.longest] for tensor in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many keys were cached before this step."""
        return self.longest - 1

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@dataclass
class Running:
    """A prompt that sits in a slot, and what has been generated for it."""

    index: int  # among all prompts
    prompt: list[int]
    generator: torch.Generator | None
    new_ids: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """The number of tokens whose keys are in the cache before the next step: all but the last one."""
        return len(self.prompt) + len(self.new_ids) - 1


def unsupported_reason(model: PreTrainedModel, config: GenerationConfig, longest: int) -> str | None:
    """Why this loop would not give the model's own answers, or None where it does.

    Args:
        longest: Tokens of the prompt and its longest answer.
    """
    if (config.num_beams or 1) > 1:
        return "beam search"
    if model.config.is_encoder_decoder:
        return None
    if config.min_new_tokens:
        return "min_new_tokens"
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        return "an adapter of virtual tokens"
    text_config = model.config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    max_positions = getattr(text_config, "max_position_embeddings", longest)
    original_positions = rope.get("original_max_position_embeddings") or max_positions
    if rope.get("rope_type") in ("dynamic", "longrope") and longest > original_positions:
        return f"rotary embeddings that change beyond {original_positions} tokens"
    other_layers = set(getattr(text_config, "layer_types", None) or []) - {"full_attention"}
    if other_layers:
        return f"layers of {', '.join(sorted(other_layers))}"
    window = getattr(text_config, "sliding_window", None)
    if window is not None and getattr(text_config, "use_sliding_window", True) and window < longest:
        return f"a sliding window of {window} tokens"
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        return "attention logits that are capped"
    if getattr(text_config, "alibi", False) or model._is_stateful or not model._supports_attention_backend:
        return "attention of its own kind"
    return None


class Decoder:
    """Generates for many prompts with one causal language model.

    Args:
        model: A model in evaluation mode for which `unsupported_reason` gives None.
        config: Settings of generation; `eos_token_id` is a list.
        num_slots: Sequences that are decoded at once.
        tokenizer: Makes the text in which stop strings are looked for.
    """

    attention: str | None = SLOT_ATTENTION

    def __init__(
        self, model: PreTrainedModel, config: GenerationConfig, num_slots: int, tokenizer: PreTrainedTokenizerBase
    ):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config, self.num_slots, self.tokenizer = config, num_slots, tokenizer
        # what changes logits before a token is chosen, as in `generate`; of its length, these settings use nothing
        self.model._prepare_special_tokens(config, device=self.model.device)  # of which min_new_tokens needs the ends
        self.processors = self.model._get_logits_processor(config, input_ids_seq_length=1)
        self.looks_back = config.repetition_penalty not in (None, 1.0) or bool(config.no_repeat_ngram_size)

    @torch.inference_mode()
    def generate(self, prompts: Prompts, seeds: Sequence[int]) -> Iterator[tuple[int, list[int] | None]]:
        """Yield (index of the prompt, new token ids with the end token if there is one), as sequences finish.

        None stands in place of the ids where the model's logits are NaN or infinite.

        Args:
            seeds: One for each prompt, for sampling.
        """
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.attention or implementation)
        if self.model.device.type == "cpu":
            keep_freed_memory()
        try:
            with onednn_products(self.model):
                yield from self._generate(prompts, seeds)
        finally:
            self.model.set_attn_implementation(implementation)

    def _generate(self, prompts: Prompts, seeds: Sequence[int]) -> Iterator[tuple[int, list[int] | None]]:
        # the longest first, so that memory runs out at once or not at all; pop() takes from the end
        waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        num_slots = min(self.num_slots, len(prompts))
        cache = SlotCache(num_slots, max(map(len, prompts), default=0) + self.config.max_new_tokens)
        # the first tokens of all prompts, but no prompt's last one, which is for its first step
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False) if len(prompts) > 1 else []
        shared = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
        prefix = self._read([shared], DynamicCache()) if shared else DynamicCache()
        active: list[Running] = []  # in the order of their slots
        ends = set(self.config.eos_token_id)
        while waiting or active:
            # 1. Prefill: put waiting prompts into the free slots, where enough of them are free.
            if waiting and num_slots - len(active) >= min(len(waiting), max(1, int(num_slots * REFILL))):
                while waiting and len(active) < num_slots:
                    taken = self._take(waiting, prompts, seeds, num_slots - len(active), len(shared))
                    cache.write(self._read([sequence.prompt[len(shared) : -1] for sequence in taken], prefix))
                    active += taken
            # 2. One step: every active slot takes in its last token, and gives the logits of the next one.
            logits = self._step(cache, active)
            # 3. Choose the tokens, and see which sequences end with theirs.
            finished: dict[int, list[int] | None] = {}  # by slot
            for slot, token in enumerate(self._choose(logits, active)):
                new_ids = active[slot].new_ids
                if token is None:
                    finished[slot] = None
                    continue
                new_ids.append(token)
                if token in ends or len(new_ids) == self.config.max_new_tokens or self._stops(new_ids):
                    finished[slot] = new_ids
            # 4. Yield what has ended, and move the last sequence to its slot; backwards, as that may have ended too.
            for slot, result in reversed(finished.items()):
                cache.free(slot, active[-1].cached)
                active[slot], active[-1] = active[-1], active[slot]
                yield active.pop().index, result

    def _choose(self, logits: torch.Tensor, active: list[Running]) -> list[int | None]:
        """The next token of each sequence; a sampled one by its own generator. None where logits are NaN or infinite.

        Args:
            logits: (sequences, vocabulary), float32.
        """
        if self.looks_back:
            ids = (torch.tensor([s.prompt + s.new_ids], device=logits.device) for s in active)
            logits = torch.cat([self.processors(own, row[None]) for own, row in zip(ids, logits, strict=True)])
        else:
            logits = self.processors(None, logits)
        return self._pick(logits, active)

    def _pick(self, logits: torch.Tensor, active: list[Running]) -> list[int | None]:
        if self.config.do_sample:
            # inverse of the cumulative distribution, drawn on the CPU, so independent of batch and device
            cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)
            drawn = torch.stack([torch.rand(1, generator=s.generator, dtype=torch.float64) for s in active])
            score = cumulated[:, -1]
            tokens = torch.searchsorted(cumulated, drawn.to(logits.device) * score[:, None])[:, 0]
        else:
            score, tokens = logits.max(dim=-1)
        pairs = zip(tokens.tolist(), score.isfinite().tolist(), strict=True)
        return [token if finite else None for token, finite in pairs]

    def _stops(self, new_ids: list[int]) -> bool:
        """Whether the text so far has a stop string; a token may end one that others began."""
        if not self.config.stop_strings:
            return False
        # a token is at least a byte, so no more tokens are part of a stop string that the last one completes
        longest = max(len(stop.encode()) for stop in self.config.stop_strings)
        tail = self.tokenizer.decode(new_ids[-longest - 1 :])
        return any(stop in tail for stop in self.config.stop_strings)

    def _take(
        self, waiting: list[int], prompts: Prompts, seeds: Sequence[int], free: int, num_shared: int
    ) -> list[Running]:
        """The longest prompts that wait, as many as one prefill takes, out of the list `waiting`."""
        limit = PREFILL_TOKENS.get(self.model.device.type, PREFILL_TOKENS_ELSEWHERE)
        taken: list[Running] = []
        while waiting and len(taken) < free:
            if taken and (len(taken[0].prompt) - num_shared) * (len(taken) + 1) > limit:
                break
            index = waiting.pop()
            generator = torch.Generator().manual_seed(seeds[index]) if self.config.do_sample else None
            taken.append(Running(index, list(prompts[index]), generator))
        return taken

    def _read(self, token_ids: list[list[int]], prefix: DynamicCache) -> DynamicCache:
        """Prefill: the keys and values of prompts, from the one of their shared prefix and their tokens behind it."""
        # where a prompt has nothing to read, the model wants a column all the same; its key is overwritten
        ids = pad_sequence([torch.tensor(own or [0]) for own in token_ids], batch_first=True).to(self.model.device)
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(ids))
        positions = cache.get_seq_length() + torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.model.base_model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return cache

    def _step(self, cache: SlotCache, active: list[Running]) -> torch.Tensor:
        """Logits (sequences, vocabulary) of the next token of each sequence."""
        device = self.model.device
        cached = [sequence.cached for sequence in active]
        tokens = torch.tensor([[(s.new_ids or s.prompt)[-1]] for s in active], device=device)
        positions = torch.tensor(cached, device=device)
        cache.begin_step(positions, longest=max(cached) + 1)
        mask = torch.arange(cache.longest, device=device) <= positions[:, None]
        size = SLOTS_PER_GROUP if device.type == "cpu" else len(active)
        groups = [
            (first, min(first + size, len(active)), 1 + max(cached[first : first + size]))
            for first in range(0, len(active), size)
        ]
        output = self.model(
            input_ids=tokens,
            attention_mask=mask[:, None, None],
            slot_groups=groups,  # the model hands on what it does not know, to slot_attention
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()
