"""
One model's answers over several ranks: the first one keeps the rows, the others write parts that it takes over.

    rank 0    opens <model>.jsonl, and finds the samples without a row  |  answers its share,  |  takes over the parts,
    others    wait for the ids of these samples                         |  and they theirs     |  measures all rows

Without torchrun there is one rank, and the same code.
"""

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from finetuning.errors import InputError
from finetuning.inference.engines import ModelUnderTest
from finetuning.ranks import get_rank, get_world_size, is_main_process
from finetuning.results import RowFile, iterate_rows
from finetuning.schemas import PREDICTION

T = TypeVar("T")
AnswerShare = Callable[[RowFile, set[str]], None]  # answers this rank's share of the samples of these ids


def join_ranks() -> None:
    """Connect the processes that torchrun has started; only the first one goes on printing."""
    if get_world_size() > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # a rank may have much more to do
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open until the process ends


def broadcast(value: T) -> T:
    """The first rank's value, on all ranks, once all of them are here."""
    box = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
        dist.barrier()
    return box[0]


def keep_rows(file: RowFile, model: ModelUnderTest, ids: set[str], all_ids: set[str], answer: AnswerShare) -> None:
    """On the first rank: have the samples answered that have no row in `file`, and take over what the others wrote.

    Args:
        ids: Of the samples that are asked.
        all_ids: Of all samples of the test split.

    Raises:
        InputError: There are samples without a row at the end.
    """
    # metrics come when all is answered; until then step 5 says that this step has not finished
    file.write_info(path=model.path, seconds=file.info.get("seconds", 0.0), metrics=None)
    file.absorb()  # of a start that was killed
    if model.served is not None:
        file.drop(lambda row: row["finish_reason"] == "error")  # the server may have had a bad moment
    missing = broadcast(find_missing(file, ids, all_ids))
    if missing:
        answer(file, missing)
    else:
        print(f"{model.name}: all {len(ids)} samples have their row already")
    broadcast(None)  # until all ranks are here
    file.absorb()
    if lost := find_missing(file, ids, all_ids):
        raise InputError(
            f"{model.name}: {len(lost)} samples have no row; start the same command again, but without --overwrite"
        )


def write_part(folder: Path, model: ModelUnderTest, answer: AnswerShare) -> None:
    """On every other rank: write the rows of its share to a file of its own in `folder`."""
    missing: set[str] = broadcast(set())
    if missing:
        with RowFile(folder / "parts" / f"{model.name}.{get_rank()}.jsonl", model.identity, overwrite=True) as file:
            answer(file, missing)
    broadcast(None)  # until all ranks are here


def find_missing(file: RowFile, ids: set[str], all_ids: set[str]) -> set[str]:
    """Ids of the samples that have no row.

    Raises:
        InputError: There are rows of samples that the test split does not have any more.
    """
    answered = {row["id"] for row in iterate_rows(file.path, PREDICTION)}
    if answered - all_ids:
        raise InputError(
            f"{file.path} has {len(answered - all_ids)} rows of samples that are not in the test split: it was "
            "changed. Start over with --overwrite true"
        )
    return ids - answered
