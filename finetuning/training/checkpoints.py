"""
The files of a checkpoint: whether its weights are all there, and everything else read without running code that
somebody has put into it. What is damaged is named before a model is loaded.

torch reads the optimizer's state with plain pickle (2.13: the index `.metadata`, and each setting that is no tensor). A
pickle can run any command, so what such a file may name is listed here.
"""

import contextlib
import enum
import pathlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_pt_utils import safe_globals

from finetuning.errors import InputError
from finetuning.models.files import check_model_files, is_adapter, read_header
from finetuning.runs import INCOMPLETE, TRAINER_STATE_FILE, checkpoint_step, list_resumable, read_json
from finetuning.schemas import TRAINER_STATE

OPTIMIZER_FOLDER = "optimizer"
METADATA_FILE = ".metadata"
WEIGHTS = "*model*.safetensors"  # files of a model, or of an adapter
SCHEDULER_FILE = "scheduler.pt"

# Everything that torch's index of an optimizer state may name, besides the dtypes, which are constants of torch.
METADATA_GLOBALS = {
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
            "TensorStorageMetadata _MEM_FORMAT_ENCODING"
        ).split()
    },
    (_StorageInfo.__module__, _StorageInfo.__name__): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # the path where the checkpoint was saved; Python 3.13 has another name for the module
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}


def enum_member(kind: type, name: str) -> enum.Enum:
    """Takes the place of getattr, by which Python 3.11.2 and others pickle the member of an enum."""
    if not isinstance(kind, enum.EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"{name} of {kind} is no part of an optimizer state")
    return kind[name]


class MetadataUnpickler(pickle.Unpickler):
    """Reads the index of an optimizer state, and refuses a file that names anything else."""

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if (module, name) not in METADATA_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an optimizer state")
        return METADATA_GLOBALS[module, name]


class SafeReader(FileSystemReader):
    """torch's reader, with an unpickler that runs no code."""

    def read_metadata(self, rank: int | None = None) -> Metadata:
        path = Path(self.path) / (METADATA_FILE if rank is None else f"__{rank}{METADATA_FILE}")
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("no index of an optimizer state")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which lets nothing but numbers and text stand where no tensor is expected."""

    def load_bytes(self, read_item, value) -> None:
        setting = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], setting)


def cause_of(error: BaseException) -> BaseException:
    """The error itself, or the one of a rank that torch's distributed format has wrapped."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


@contextlib.contextmanager
def named_file(path: Path, checkpoint: Path) -> Iterator[None]:
    """Raise an InputError that names `path` where reading or using the file fails.

    Damaged or crafted content makes the libraries raise errors of any kind; all of them become an InputError.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, CheckpointException) as error:
        cause = cause_of(error)
        reason = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0][:200]
        if isinstance(cause, pickle.UnpicklingError):
            reason = "it is damaged, or holds code"
        raise InputError(f"{path} cannot be used ({reason}); {remedy_for(checkpoint)}") from error


def remedy_for(checkpoint: Path) -> str:
    return f"copy it again, or delete {checkpoint} to go on from the one before it"


def check_resumable(checkpoint: Path) -> None:
    """Look at everything that training reads of a checkpoint, before a model is loaded.

    Raises:
        InputError: A file, which the message names, is missing, cut off, or holds what it should not.
    """
    optimizer = checkpoint / OPTIMIZER_FOLDER
    if not optimizer.is_dir():
        raise InputError(
            f"{checkpoint} has no optimizer state (saved with save_only_model?), training cannot go on from it"
        )
    remedy = remedy_for(checkpoint)
    with named_file(checkpoint / TRAINER_STATE_FILE, checkpoint):
        state = read_json(checkpoint / TRAINER_STATE_FILE, TRAINER_STATE, remedy)
    if checkpoint_step(checkpoint.name) not in (-1, state["global_step"]):
        raise InputError(f"{checkpoint / TRAINER_STATE_FILE} is of step {state['global_step']}; {remedy}")
    if not any(checkpoint.glob(WEIGHTS)):
        name = "adapter_model.safetensors" if is_adapter(checkpoint) else "model.safetensors"
        raise InputError(f"{checkpoint} holds no weights ({checkpoint / name}); {remedy}")
    try:
        check_model_files(str(checkpoint))
    except InputError as error:
        raise InputError(f"{error}, or delete {checkpoint} to go on from the one before it") from None
    others = [path.name for pattern in ("rng_state*.pth", "scaler.pt") for path in checkpoint.glob(pattern)]
    for name in sorted([SCHEDULER_FILE, *others]):
        with named_file(checkpoint / name, checkpoint), safe_globals():
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    with named_file(optimizer / METADATA_FILE, checkpoint):
        ends: dict[str, int] = {}  # the size that each file of a rank must have
        for part in SafeReader(optimizer).read_metadata().storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        with named_file(optimizer / name, checkpoint):
            size = (optimizer / name).stat().st_size
            if size < end:
                raise ValueError(f"cut off, {size:,} of {end:,} bytes")


def without_tied_copies(model: PreTrainedModel, state_dict: dict) -> dict:
    """A gathered state dict without the weights that are tied to others.

    `save_pretrained` finds tied weights by their storage, which gathering has duplicated.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state_dict.items() if name not in tied}


def saved_shapes(model: PreTrainedModel | PeftModel) -> dict[str, list[int]]:
    """Names and shapes of the tensors that a checkpoint of the model must hold, without gathering what is sharded."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
    else:
        ignored = model._keys_to_ignore_on_save or ()
        tensors = {name: tensor for name, tensor in without_tied_copies(model, tensors).items() if name not in ignored}
        # some models are saved under other names than they compute with
        tensors = revert_weight_conversion(model, tensors)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def check_weights(checkpoint: Path, shapes: dict[str, list[int]]) -> None:
    """Refuse a checkpoint whose files do not hold every tensor of these names and shapes."""
    check_model_files(str(checkpoint))
    headers = [read_header(path)[1] for path in checkpoint.glob(WEIGHTS)]
    saved = {name: tensor["shape"] for header in headers for name, tensor in header.items()}
    missing = [name for name, shape in shapes.items() if saved.get(name) != shape]
    if missing or not shapes:
        raise InputError(
            f"{checkpoint} lacks {len(missing)} of the {len(shapes)} tensors of the model ({', '.join(missing[:3])}); "
            "it stays marked as incomplete, and the same command goes on from the one before it"
        )


def delete_older_checkpoints(run: Path, save_total_limit: int | None) -> None:
    """Delete all but the newest `save_total_limit` checkpoints of a run; merged models are kept."""
    saved = list_resumable(run)
    for folder in saved[:-save_total_limit] if save_total_limit else []:
        (folder / INCOMPLETE).touch()  # if this is killed, what is left does not pass for a checkpoint
        shutil.rmtree(folder)
