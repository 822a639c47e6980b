"""
What the trainer really gets: rows after template, tokenisation, truncation, packing and collation, without a model.

The steps are those of trl's SFTTrainer itself; training takes the tokenised rows from here, so that what was checked is
what is trained on.
"""

from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import global_then_local_main_first

from finetuning.data.chat import TEMPLATE_ERRORS
from finetuning.data.fingerprints import fingerprint_of_result
from finetuning.data.tokens import IGNORED, cut_pair, tokenize_pair, tokenize_row
from finetuning.errors import InputError


class RowPreparation(SFTTrainer):
    """The part of SFTTrainer that prepares rows. It has no model, and cannot train."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: SFTConfig):
        self._tokenizer = tokenizer
        self.args = args
        self.completion_only_loss = True if args.completion_only_loss is None else args.completion_only_loss
        needs_markers = args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template)
        try:
            self.chat_template = get_training_chat_template(tokenizer) if needs_markers else None
        except ValueError as error:
            raise InputError(f"assistant_only_loss: the chat template does not mark answers: {error}") from error

    def tokenize(self, rows: Dataset, name: str) -> Dataset:
        """Add what tokenize_row gives to rows of data.training_rows.load_training_rows."""
        function, settings = self._choose_tokenizing()
        try:
            with global_then_local_main_first():
                return rows.map(
                    function,
                    fn_kwargs=settings,
                    new_fingerprint=fingerprint_of_result(rows._fingerprint, settings),
                    num_proc=self.args.dataset_num_proc,
                    desc=f"Tokenizing {name} dataset",
                )
        except InputError:
            raise
        except TEMPLATE_ERRORS as error:  # roles that the template refuses, or a message in an unknown form
            raise InputError(f"the rows cannot be phrased with the chat template: {error}") from error

    def _choose_tokenizing(self) -> tuple[Callable, dict]:
        return tokenize_row, {
            "tokenizer": self._tokenizer,
            "chat_template": self.chat_template,
            "answers_only": self.completion_only_loss,
            "marked_only": self.args.assistant_only_loss,
        }

    def cut_and_pack(self, tokenized: Dataset, name: str) -> Dataset:
        """What the trainer makes of tokenised rows before it collates them."""
        return self._prepare_dataset(tokenized, self._tokenizer, self.args, self.args.packing, None, name)


class PairPreparation(RowPreparation):
    """The same for encoder-decoder models, whose rows are never packed."""

    def _choose_tokenizing(self) -> tuple[Callable, dict]:
        return tokenize_pair, {"tokenizer": self._tokenizer, "decoder_start": self.args.decoder_start}

    def cut_and_pack(self, tokenized: Dataset, name: str) -> Dataset:
        settings = {key: getattr(self.args, key) for key in ("max_length", "max_target_length", "truncation_mode")}
        settings["control_ids"] = set(self._tokenizer.all_special_ids)
        with global_then_local_main_first():
            return tokenized.map(
                cut_pair,
                fn_kwargs=settings,
                new_fingerprint=fingerprint_of_result(tokenized._fingerprint, settings),
                desc=f"Truncating {name} dataset",
            )


class PairCollator(DataCollatorForSeq2Seq):
    """Makes batches of input_ids (rows, question tokens) and labels (rows, answer tokens) out of rows of tokenize_pair;
    with a model also of decoder_input_ids, what its decoder reads: the labels, one place later."""

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict:
        pairs = []
        for row in features:
            size = row["labels"].count(IGNORED)
            pairs.append({"input_ids": row["input_ids"][:size], "labels": row["labels"][size:]})
        return super().__call__(pairs, return_tensors)


def choose_preparation(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> RowPreparation:
    return (RowPreparation if args.decoder_start is None else PairPreparation)(tokenizer, args)


def build_collator(
    tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> DataCollatorForLanguageModeling | PairCollator:
    """The collator that SFTTrainer builds for these arguments, or that of encoder-decoder models."""
    if args.decoder_start is not None:
        return PairCollator(tokenizer, pad_to_multiple_of=args.pad_to_multiple_of)
    packed = args.packing and args.packing_strategy in ("bfd", "bfd_split")
    return DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.pad_token_id,
        padding_free=args.padding_free or packed,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


def sequences(prepared: Dataset, collator: Callable, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of every sequence of every batch, as the model will get them, padding left out.

    Of encoder-decoder models they are those of a question and its answer, end to end.
    """
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in prepared.column_names]
    for start in range(0, len(prepared), batch_size):
        piece = prepared[start : start + batch_size]
        size = len(piece["input_ids"])
        batch = collator([{name: piece[name][i] for name in columns} for i in range(size)])
        ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        if isinstance(collator, PairCollator):
            for row, mask in enumerate(batch["attention_mask"].numpy().astype(bool)):
                question, answer = ids[row][mask], labels[row][labels[row] != IGNORED]
                yield np.concatenate([question, answer]), np.concatenate([np.full_like(question, IGNORED), answer])
        elif "attention_mask" in batch:
            for row, mask in enumerate(batch["attention_mask"].numpy().astype(bool)):
                yield ids[row][mask], labels[row][mask]
        else:  # packed: each sequence starts where positions do
            starts = np.flatnonzero(batch["position_ids"].numpy()[0] == 0)
            for first, last in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
                yield ids[0, first:last], labels[0, first:last]
