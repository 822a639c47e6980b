"""
The arguments of every step, each key declared once, and the parser that reads them from YAML and the command line.

Imports without torch; what needs torch (the training arguments, which subclass trl's SFTConfig) is in training.py.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from trl import ModelConfig, TrlParser

from finetuning.errors import InputError


@dataclass
class ScriptArguments:
    """What step 1 trains on."""

    dataset_name: str = field(
        metadata={
            "help": "Data: a json, jsonl, csv or parquet file, a folder of them in which `train_dataset.json` or "
            "`train.jsonl` is the split `train`, or the id of a dataset on the Hub."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices as in `train[:-50]` or `train[:10%%]` work."}
    )
    dataset_eval_split: str | None = field(
        default=None, metadata={"help": "Split whose loss is measured while training, e.g. `train[-50:]`."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split that step 3 answers."})
    question_key: str | None = field(
        default=None,
        metadata={
            "help": "Column with the question or text. Unset: rows are read as `messages`, `prompt`/`completion` or "
            "`instruction`/`input`/`output`, whichever the columns are."
        },
    )
    answer_key: str | None = field(
        default=None,
        metadata={
            "help": "Column with the answer. Where it is missing, `<answer_key>1`, `<answer_key>2`, ... are several "
            "references of one sample; training uses the first."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put in front of rows that have none of their own."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the run in `output_dir`, with its checkpoints, and start over."}
    )

    def __post_init__(self):
        if (self.question_key is None) != (self.answer_key is None):
            raise ValueError("question_key and answer_key go together: set both, or neither")


@dataclass
class ModelArguments(ModelConfig):
    """trl's ModelConfig, whose dtype is chosen for the hardware unless it is set."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the weights while training. Unset: float32 for full fine-tuning (bf16 or fp16 mixed "
            "precision computes in the lower one), the compute dtype for the frozen base of LoRA.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is not set: name a folder with a model, or a model on the Hub")


@dataclass
class RunArguments:
    """Arguments by which steps 2 to 5 find their run."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run. Unset: the newest run under outputs/."}
    )


@dataclass
class MergeArguments(RunArguments):
    """Arguments of step 2, which merges a LoRA adapter into its base model."""

    model_name: str | None = field(
        default=None, metadata={"help": "Checkpoint of the run, or path of an adapter. Unset: the last checkpoint."}
    )
    merged_dir: str | None = field(
        default=None, metadata={"help": "Where to write the merged model. Unset: <adapter>-merged, beside the adapter."}
    )
    num_prompts: int = field(default=4, metadata={"help": "Test samples on which adapter and merged model must agree."})
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest allowed difference of a logit. Unset: 0.02 times the largest logit where the base is "
            "bfloat16, 0.005 float16, 0.0001 float32, and at most a tenth of what the adapter changes."
        },
    )

    def __post_init__(self):
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}")


@dataclass
class TestArguments(RunArguments):
    """Arguments of step 3, which lets checkpoints answer the test samples."""

    model_name: str = field(
        default="all",
        metadata={
            "help": "What answers: a checkpoint's name, `base`, a path, a Hub id, a glob such as 'checkpoint-*', or "
            "`all`, which is the base model and every checkpoint."
        },
    )
    num_samples: int = field(
        default=50,
        metadata={"help": "Number of test samples, drawn by their ids, so that 100 samples contain the first 50."},
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts answered at once."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Sample from the distribution; greedy otherwise."})
    temperature: float | None = field(default=None, metadata={"help": "Softmax temperature; needs do_sample."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of the distribution; needs do_sample."})
    top_k: int | None = field(default=None, metadata={"help": "Number of tokens to sample from; needs do_sample."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1 makes repetition less likely."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype to load models in. Unset: bfloat16 on GPUs that have it, float16 on older ones, else float32.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Answer again, and replace the predictions there are."})

    def __post_init__(self):
        for key in ("num_samples", "batch_size", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        sampling = [key for key in ("temperature", "top_p", "top_k") if getattr(self, key) is not None]
        if sampling and not self.do_sample:
            raise ValueError(f"{sampling[0]} has no effect without `do_sample: true`; set both, or neither")


@dataclass
class JudgeArguments(RunArguments):
    """Arguments of step 4, which asks an LLM to score every prediction."""

    model_name: str = field(default="all", metadata={"help": "Predictions to judge: a name, a glob, or `all`."})
    judge_model: str = field(default="gpt-5.4-mini", metadata={"help": "Name of the judge at the endpoint."})
    judge_language: str = field(
        default="en", metadata={"help": "Language of the judge's instructions.", "choices": ["en", "ko"]}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests in flight at once."})
    max_tokens: int = field(default=2048, metadata={"help": "Longest evaluation, in tokens, with any reasoning."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of the judge. Unset: the endpoint's default; some models take no other."},
    )
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for one reply."})
    max_retries: int = field(default=8, metadata={"help": "Retries of the client on 429, 5xx and broken connections."})
    overwrite: bool = field(default=False, metadata={"help": "Judge again, and replace the evaluations there are."})

    def __post_init__(self):
        for key in ("concurrency", "max_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> None:
    """Say once a machine what is wrong and what to do, and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # a path may be missing on one machine only
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_step(main: Callable, *dataclass_types: type) -> None:
    """Parse the arguments and run `main` with them; a fault in what the user gave ends it without a traceback."""
    arguments = Parser(dataclass_types).parse_args_and_config()
    try:
        main(*arguments)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        if is_main_process():
            print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + 2)


class Parser(TrlParser):
    """TrlParser that accepts `--config=file`, names the nearest key for an unknown one, and prints one line on a fault."""

    def error(self, message: str):
        fail(message)

    def parse_args_and_config(self, args: list[str] | None = None) -> tuple:
        args = [part for arg in (sys.argv[1:] if args is None else args) for part in _split_config(arg)]
        if "--config" in args:
            index = args.index("--config") + 1
            if index == len(args):
                fail("--config needs the path of a YAML file")
            self._check_keys(Path(args[index]))
        try:
            return super().parse_args_and_config(args)
        except (ValueError, TypeError) as error:
            fail(str(error))

    def _check_keys(self, path: Path) -> None:
        if not path.is_file():
            fail(f"{path}: no such file")
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            fail(f"{path}: not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(config, dict):
            fail(f"{path}: must hold `key: value` lines")
        known = {f.name for dataclass_type in self.dataclass_types for f in dataclasses.fields(dataclass_type)}
        problems = []
        for key in config:
            if key not in known | {"env"}:
                nearest = difflib.get_close_matches(str(key), known, n=1)
                problems.append(f"unknown key `{key}`" + (f"; did you mean `{nearest[0]}`?" if nearest else ""))
        if problems:
            fail("\n       ".join([f"{path}: " + problems[0], *problems[1:]]))


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]
