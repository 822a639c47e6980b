"""
Many prompts at once for encoder-decoder models: a batch in step, which those that have ended leave.

The encoder reads prompts in batches of like length, so that little of it is padding, which its mask hides. The decoder
writes a token of each sequence a step; all are at the same place, as some models know one place for a batch only. What
has ended stays until a quarter of the batch has, and then leaves the caches in one copy. Greedy tokens are those of
`model.generate` for each prompt alone, but for rounding.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from finetuning.inference.decoding import Decoder, Prompts, Running

ENDED = 0.25  # share of a batch


class PairDecoder(Decoder):
    """The same for an encoder-decoder model."""

    attention = None  # the model's own

    def _generate(self, prompts: Prompts, seeds: Sequence[int]) -> Iterator[tuple[int, list[int] | None]]:
        waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        while waiting:
            batch: list[Running] = []
            states: list[torch.Tensor] = []  # (tokens, hidden size) of each prompt
            while waiting and len(batch) < self.num_slots:
                taken = self._take(waiting, prompts, seeds, self.num_slots - len(batch), 0)
                ids = pad_sequence([torch.tensor(s.prompt) for s in taken], batch_first=True).to(self.model.device)
                mask = mask_of(taken, ids.device)
                hidden = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
                states += [row[: len(s.prompt)] for row, s in zip(hidden, taken, strict=True)]
                batch += taken
            yield from self._answer(batch, pad_sequence(states, batch_first=True))

    def _answer(self, batch: list[Running], states: torch.Tensor) -> Iterator[tuple[int, list[int] | None]]:
        mask, cache = mask_of(batch, states.device), None
        ends, limit = set(self.config.eos_token_id), self.config.max_new_tokens
        start = self.config.decoder_start_token_id
        start = self.config.bos_token_id if start is None else start
        ids = torch.full((len(batch), 1), start, device=states.device)
        ended: set[int] = set()  # indices of prompts
        while len(ended) < len(batch):
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                decoder_input_ids=ids[:, -1:],
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits = output.past_key_values, self.processors(ids, output.logits[:, -1].float())
            tokens, is_last = self._pick(logits, batch), ids.shape[1] == limit
            for sequence, token in zip(batch, tokens, strict=True):
                if sequence.index in ended:
                    continue
                sequence.new_ids += [] if token is None else [token]
                if token is None or token in ends or is_last or self._stops(sequence.new_ids):
                    ended.add(sequence.index)
                    yield sequence.index, None if token is None else sequence.new_ids
            ids = torch.cat([ids, torch.tensor([[token or 0] for token in tokens], device=ids.device)], dim=1)
            if len(ended) >= max(1, ENDED * len(batch)) and len(ended) < len(batch):
                kept = torch.tensor([place for place, s in enumerate(batch) if s.index not in ended], device=ids.device)
                batch = [s for s in batch if s.index not in ended]
                longest = max(len(s.prompt) for s in batch)
                states, mask, ids = states[kept, :longest], mask[kept, :longest], ids[kept]
                cache.batch_select_indices(kept)
                for layer in cache.cross_attention_cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, :longest], layer.values[:, :, :longest]
                ended.clear()


def mask_of(batch: list[Running], device: torch.device) -> torch.Tensor:
    """(sequences, tokens), 1 where a prompt has a token and 0 where it is padded."""
    lengths = torch.tensor([len(sequence.prompt) for sequence in batch], device=device)
    return (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).long()
