"""
One model's rows over several ranks: the first one keeps them, the others write parts that it takes over.

    rank 0    opens <model>.jsonl, finds the samples without a row  |  answers its share  |  waits, takes over the parts
    others    wait for the ids of these samples                     |  answer theirs      |  wait

Without torchrun there is one rank, and the same code. Where a rank fails, torchrun ends those that wait for it.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from finetuning.config.run_step import same_command
from finetuning.errors import InputError
from finetuning.inference.engines import ModelUnderTest
from finetuning.ranks import get_rank, get_world_size, is_main_process
from finetuning.results import RowFile, iterate_rows
from finetuning.schemas import PREDICTION


def join_ranks() -> None:
    """Connect the processes that torchrun has started; only the first one goes on printing."""
    if get_world_size() > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # a rank may have much more to do
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open until the process ends


@contextlib.contextmanager
def shared_rows(
    folder: Path, model: ModelUnderTest, ids: list[str], all_ids: list[str], overwrite: bool
) -> Iterator[tuple[RowFile, set[str]]]:
    """The file that this rank's answers go to, and the ids of the samples that all ranks together have to answer.

    At the end of the block every rank waits for the others, and the first one has all rows in its file.

    Args:
        ids: Of the samples that are asked.
        all_ids: Of all samples of the test split.

    Raises:
        InputError: The test split lacks samples that have a row; or there are samples without a row at the end.
    """
    if not is_main_process():
        missing = _broadcast(set())
        path = folder / "parts" / f"{model.name}.{get_rank()}.jsonl"
        with RowFile(path, model.identity, overwrite=True) as file:
            yield file, missing
        _wait_for_all()
        return
    with RowFile(folder / f"{model.name}.jsonl", model.identity, overwrite) as file:
        file.absorb()  # of a start that was killed
        if model.served is not None:
            # the server may have had a bad moment; what a model fails at here, it mostly fails at again
            file.drop(lambda row: row["finish_reason"] == "error")
        missing = _find_missing(file, ids, all_ids)
        # metrics come when all is answered; until then step 5 says that this step has not finished
        seconds = file.info.get("seconds", 0.0)
        file.write_info(path=model.path, kept=model.precision["kept"], seconds=seconds, metrics=None)
        if not missing:
            print(f"{model.name}: all {len(ids)} samples have their row already")
        _broadcast(missing)
        yield file, missing
        _wait_for_all()
        file.absorb()
        if lost := _find_missing(file, ids, all_ids):
            raise InputError(f"{model.name}: {len(lost)} samples have no row; start {same_command(overwrite)} again")


def _find_missing(file: RowFile, ids: list[str], all_ids: list[str]) -> set[str]:
    answered = {row["id"] for row in iterate_rows(file.path, PREDICTION)}
    if unknown := answered.difference(all_ids):
        raise InputError(
            f"{file.path} has {len(unknown)} rows of samples that are not in the test split: it was changed. Start "
            "over with --overwrite true"
        )
    return set(ids) - answered


def _broadcast(ids: set[str]) -> set[str]:
    """The ids that the first rank gives, whatever the others do."""
    box = [ids]
    if get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _wait_for_all() -> None:
    if get_world_size() > 1:
        dist.barrier()
