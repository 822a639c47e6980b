"""
What a YAML is read as, and what step 1 says to one that is wrong: every problem at once, one line each, status 2, no
traceback, nothing written.

Each fault stands beside the file without it, which must parse, so that no test passes for another reason.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command, run, run_step
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetuning.config.arguments import OTHER_STEPS, JudgeArguments, ScriptArguments
from finetuning.config.checks import limits_of
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.parser import Parser
from finetuning.config.renames import RENAMES
from finetuning.credentials import is_secret
from finetuning.errors import InputError
from finetuning.training.arguments import TrainingArguments, check_optimizer

YAMLS = sorted([*ROOT.glob("0_*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
SCRIPT = "1_train_full_fine_tuning.py"
ARGUMENTS = (ScriptArguments, TrainingArguments, ModelArguments)
NEEDED = ["--model_name_or_path", "demo/model", "--dataset_name", "demo/data"]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of trl, for some of the right values
generated = settings(derandomize=True, deadline=None, max_examples=40, database=None)


@pytest.fixture(autouse=True)
def environment():
    """Arguments that parse set variables; they are taken back after each test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For generated files, which share a folder."""
    return tmp_path_factory.mktemp("yaml")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parse(path: Path, *arguments: str) -> tuple[dict, str]:
    """All values by key, as step 1 would get them, and what was printed."""
    parser = Parser(ARGUMENTS)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        output_dir = ["--output_dir", str(path.parent / "run")]
        parsed = parser.parse_args_and_config(["--config", str(path), *output_dir, *arguments])
    return {key: value for holder in parsed for key, value in vars(holder).items()}, printed.getvalue()


def refuse(path: Path, *arguments: str) -> list[str]:
    """Check that a YAML is refused as it should be; gives one line for each problem, without the path."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as exit_:
        parse(path, *arguments)
    return check_refusal(exit_.value.code, printed.getvalue(), path)


def check_refusal(status: int, printed: str, path: Path) -> list[str]:
    assert status == 2, printed
    assert "Traceback" not in printed and printed.count("error:") == 1
    assert not (path.parent / "run").exists(), "a run folder was left behind"
    lines = printed[printed.index("error: ") :].removeprefix("error: ").rstrip("\n").split("\n")
    if len(lines) > 1:
        assert lines[0] == f"{len(lines) - 1} problems", printed
        lines = [line.removeprefix("  ") for line in lines[1:]]
    assert all(line.startswith((str(path.parent), "command line")) for line in lines), printed
    assert not re.search("[\x00-\x1f\x7f]", "".join(lines))
    return [line.removeprefix(str(path)).removeprefix(":") for line in lines]


# By hand: what is wrong, its line and key, a part of the message, and the file without the fault

UNKNOWN = [
    ("learning_rat: 1e-5", 1, "learning_rat", "unknown key; did you mean learning_rate?", "learning_rate: 1e-5"),
    ("seed: 1\n\n# a comment\nmax_lenght: 64", 4, "max_lenght", "did you mean max_length?", "seed: 1\nmax_length: 64"),
    ("Learning_Rate: 1e-5", 1, "Learning_Rate", "did you mean learning_rate?", "learning_rate: 1e-5"),
    ("learning-rate: 1e-5", 1, "learning-rate", "did you mean learning_rate?", "learning_rate: 1e-5"),
    ("--seed: 1", 1, "--seed", "did you mean seed?", "seed: 1"),
    ("max_seq_lenght: 64", 1, "max_seq_lenght", "did you mean max_length?", "max_seq_length: 64"),
    ("evaluation_stratgy: steps", 1, "evaluation_stratgy", "did you mean eval_strategy?", "evaluation_strategy: 'no'"),
    ("qqqqqq: 1", 1, "qqqqqq", "unknown key; --help lists all keys", "seed: 1"),
    ("judge_model: x", 1, "judge_model", "is a key of 4_openai_test.py, not of this step", "run_name: x"),
    ("num_samples: 3", 1, "num_samples", "is a key of 3_test.py, not of this step", "preview_rows: 3"),
    ("merged_dir: x", 1, "merged_dir", "is a key of 2_merge_lora.py, not of this step", "run_name: x"),
    ("reshard_after_forward: true", 1, "reshard_after_forward", "belongs under fsdp_config", "fsdp: true"),
    ("fsdp_config: {versoin: 2}", 1, "fsdp_config.versoin", "did you mean version?", "fsdp_config: {version: 2}"),
    ("1: 2", 1, "1", "unknown key", "seed: 2"),
    ("null: 2", 1, "null", "unknown key", "seed: 2"),
    ("yes: 2", 1, "yes", "unknown key", "seed: 2"),
    ("2024-01-01: 2", 1, "2024-01-01", "unknown key", "seed: 2"),
    ('"a\\nb\\e[31m": 2', 1, "a\\nb\\x1b[31m", "unknown key", "seed: 2"),
    ("<<: {seed: 1}", 1, "<<", "write `base: other.yaml`", "seed: 1"),
    ("output_dir: run\nmodel_name_or_path:\n  name: x", 2, "model_name_or_path", "needs text", "model_name_or_path: x"),
]  # fmt: skip
TYPES = [
    ("seed: 3.7", 1, "seed", "needs an integer, got 3.7", "seed: 3"),
    ("seed: '3'", 1, "seed", 'needs an integer, got the text "3"', "seed: 3"),
    ("seed: true", 1, "seed", "needs an integer, got true", "seed: 1"),
    ("seed: 1e-3", 1, "seed", "needs an integer, got 0.001", "seed: 1e3"),
    ("seed: [1]", 1, "seed", "needs an integer, got [1]", "seed: 1"),
    ("seed:", 1, "seed", "needs an integer, got nothing", "seed: 0"),
    ("seed: ~", 1, "seed", "needs an integer, got nothing", "data_seed: ~"),
    ("seed: 0o17", 1, "seed", 'needs an integer, got the text "0o17"', "seed: 0x1F"),
    ("seed: 017", 1, "seed", "017 is 15 in YAML", "seed: 17"),
    ("max_seq_length: 0100", 1, "max_seq_length -> max_length", "0100 is 64 in YAML", "max_seq_length: 100"),
    ("max_steps: 1:30", 1, "max_steps", "1:30 is 90 in YAML", "max_steps: 1_000"),
    ("seed: 09", 1, "seed", 'needs an integer, got the text "09"', "seed: 9"),
    ("max_steps: 2024-01-01", 1, "max_steps", 'needs an integer, got "2024-01-01"', "run_name: 2024-01-01"),
    ("learning_rate: 2e-5x", 1, "learning_rate", 'needs a number, got the text "2e-5x"', "learning_rate: 2e-5"),
    ("learning_rate: '2e-5'", 1, "learning_rate", 'needs a number, got the text "2e-5"', "learning_rate: 2.e-5"),
    ("learning_rate: 1,5", 1, "learning_rate", 'needs a number, got the text "1,5"', "learning_rate: .5"),
    ("learning_rate: .nan", 1, "learning_rate", "needs a number, got NaN", "learning_rate: 1e-4"),
    ("learning_rate: .inf", 1, "learning_rate", "needs a number, got Infinity", "learning_rate: 1e-4"),
    ("learning_rate: 2e400", 1, "learning_rate", "needs a number, got Infinity", "learning_rate: 2e-40"),
    ("learning_rate: {a: 1}", 1, "learning_rate", 'needs a number, got {"a": 1}', "learning_rate: 1e-4"),
    ("packing: 'true'", 1, "packing", 'needs true or false, got the text "true"', "packing: true"),
    ("packing: 1", 1, "packing", "needs true or false, got 1", "packing: on"),
    ("packing: maybe", 1, "packing", 'needs true or false, got the text "maybe"', "packing: no"),
    ("run_name: yes", 1, "run_name", "needs text, got true", "run_name: 'yes'"),
    ("run_name: [a]", 1, "run_name", 'needs text, got ["a"]', "run_name: 12"),
    ("special_tokens: [a, 1]", 1, "special_tokens", "needs a list of texts", "special_tokens: [a, '1']"),
    ("special_tokens: {a: 1}", 1, "special_tokens", "needs a list of texts", "special_tokens: '#A#'"),
    ("allow: 3", 1, "allow", "needs a list of texts, got 3", "allow: [terminator]"),
    ("eval_strategy: on", 1, "eval_strategy", '"on" is none of no, steps, epoch', "eval_strategy: no"),
    ("eval_strategy: step", 1, "eval_strategy", "is none of no, steps, epoch; write steps", "eval_strategy: steps"),
    ("torch_dtype: bf16", 1, "torch_dtype -> dtype", "write bfloat16", "torch_dtype: float32"),
    ("optim: adamw_toch", 1, "optim", "none of the 41 that --help lists; write adamw_torch", "optim: adamw_torch"),
    ("lr_scheduler_type: 3", 1, "lr_scheduler_type", "3 is none of linear, cosine", "lr_scheduler_type: cosine"),
    ("lr_scheduler_kwargs: [1]", 1, "lr_scheduler_kwargs", "needs a mapping or text", "lr_scheduler_kwargs: {a: 1}"),
    ("lr_scheduler_kwargs: a", 1, "lr_scheduler_kwargs", "needs a mapping, or a JSON file", "lr_scheduler_kwargs: '{}'"),
    ("accelerator_config: no.json", 1, "accelerator_config", "needs a mapping, or a JSON file", "accelerator_config: {}"),
    ("accelerator_config: {foo: 1}", 1, "accelerator_config", "'foo'", "accelerator_config: {even_batches: true}"),
    ("parallelism_config: {a: 1}", 1, "parallelism_config", "cannot be set here", "seed: 1"),
    ("fsdp: 3", 1, "fsdp", "3 does not exist in FSDP2; write true", "fsdp: true"),
    ("fsdp: full_shard auto_warp", 1, "fsdp", "auto_warp does not exist in FSDP2", "fsdp: full_shard auto_wrap offload"),
    ("warmup_ratio: 3", 1, "warmup_ratio", "needs a share from 0 up to 1, got 3", "warmup_ratio: 0.1"),
    ("group_by_length: maybe", 1, "group_by_length", "needs true or false", "group_by_length: false"),
    ('run_name: "\\ud800"', 1, "run_name", "holds a NUL or half a character", 'run_name: "\\u1234"'),
    ('dataset_config: "a\\0b"', 1, "dataset_config", "holds a NUL or half a character", 'dataset_config: "ab"'),
    ("env: 3", 1, "env", "must hold `NAME: value` lines", "env: {A: 3}"),
    ("env: {'A=B': x}", 1, "env.A=B", "needs a NAME and one value", "env: {A_B: x}"),
    ("env: {A: [x]}", 1, "env.A", "needs a NAME and one value", "env: {A: x}"),
    ('env: {A: "\\0"}', 1, "env.A", "holds a NUL", "env: {A: ''}"),
    ("env: {HF_HOME: /data}", 1, "env.HF_HOME", "is read before this file is, so it would have no effect; export it", "env: {WANDB_PROJECT: x}"),
    ("env: {HF_HUB_OFFLINE: 1}", 1, "env.HF_HUB_OFFLINE", "is read before this file is", "env: {CUDA_MODULE_LOADING: LAZY}"),
    ("env: {OMP_NUM_THREADS: 4}", 1, "env.OMP_NUM_THREADS", "is read before this file is", "env: {MY_HF_HOME: x}"),
]  # fmt: skip
OUT_OF_RANGE = [
    ("seed: -1", 1, "seed", "must be at least 0 and at most 4294967295, got -1", "seed: 0"),
    ("seed: 99999999999999999999", 1, "seed", "at most 4294967295", "seed: 4294967295"),
    ("max_length: 4", 1, "max_length", "must be at least 8, got 4", "max_length: 8"),
    ("max_steps: 0", 1, "max_steps", "must be at least 1, or -1 for epochs, got 0", "max_steps: -1"),
    ("save_steps: 0", 1, "save_steps", "must be more than 0, got 0", "save_steps: 0.5"),
    ("save_steps: 3.7", 1, None, "save_steps must be an integer if bigger than 1", "save_steps: 3"),
    ("num_train_epochs: -1", 1, "num_train_epochs", "must be more than 0, got -1", "num_train_epochs: 0.1"),
    ("learning_rate: 5", 1, "learning_rate", "5 cannot learn; write it as 2e-5", "learning_rate: 1"),
    ("label_smoothing_factor: 1", 1, "label_smoothing_factor", "got 1", "label_smoothing_factor: 0.1"),
    ("dataloader_prefetch_factor: 0\ndataloader_num_workers: 1", 1, "dataloader_prefetch_factor", "must be at least 1", "seed: 1"),
    ("num_train_epochs: 1e300", 1, None, "num_train_epochs: 1e+300 would not end", "num_train_epochs: 1e3"),
    ("torch_compile_backend: nonsense", 1, None, "torch_compile_backend: nonsense is none of", "torch_compile_backend: inductor"),
    ("torch_compile_mode: fast", 1, None, "torch_compile_mode: fast is none of default", "torch_compile_mode: max-autotune"),
    ("weight_decay: 1.5", 1, "weight_decay", "at least 0 and at most 1, got 1.5", "weight_decay: 1"),
    ("lora_dropout: 1\nuse_peft: true", 1, "lora_dropout", "got 1", "lora_dropout: 0.1\nuse_peft: true"),
    ("per_device_train_batch_size: 0", 1, "per_device_train_batch_size", "at least 1", "per_device_train_batch_size: 1"),
    ("per_gpu_train_batch_size: 0", 1, "per_device_train_batch_size", "at least 1", "per_gpu_train_batch_size: 1"),
]  # fmt: skip
DUPLICATES = [
    ("seed: 1\nseed: 2", 2, "seed", "stands twice, first in line 1; keep one of them", "seed: 2"),
    ("seed: 1\nbf16: no\n'seed': 1", 3, "seed", "stands twice, first in line 1", "seed: 1\nbf16: no"),
    ("{seed: 1, seed: 1}", 1, "seed", "stands twice, first in line 1", "{seed: 1}"),
    ("lr_scheduler_kwargs:\n  a: 1\n  a: 2", 3, "lr_scheduler_kwargs", "a stands twice, first in line 2", "lr_scheduler_kwargs:\n  a: 1"),
    ("lr_scheduler_kwargs: {a: {b: [{c: 1, c: 1}]}}", 1, "lr_scheduler_kwargs", "c stands twice", "lr_scheduler_kwargs: {a: {b: [{c: 1}]}}"),
    ("max_length: 64\nmax_seq_length: 32", 2, "max_seq_length", "sets the same as max_length", "max_length: 32\nmax_seq_length: 32"),
    ("model_id: a\nmodel_name: b", 2, "model_name", "sets the same as model_id: ", "model_id: a"),
]  # fmt: skip
SYNTAX = [
    ("seed 1", 1, None, "write `key: value` lines, no list or text", "seed: 1"),
    ("bf16: no\nseed 1\n", 2, None, "write `key: value`, with a space after the colon", "bf16: no\nseed: 1\n"),
    ("bf16: no\nseed:1\n", 2, None, "write `key: value`, with a space after the colon", "bf16: no\nseed: 1\n"),
    ("\tseed: 1", 1, None, "indent with spaces, not tabs", "seed: 1"),
    ("fsdp_config:\n\tversion: 2", 2, None, "indent with spaces, not tabs", "fsdp_config:\n  version: 2"),
    ("bf16: no\n  seed: 1", 2, None, "begin all keys in the same column", "bf16: no\nseed: 1"),
    ("run_name: a: b", 1, None, "put a text with a colon in quotes", "run_name: 'a: b'"),
    ("run_name: 'a\nseed: 1\nbf16: no", 1, None, "close the quotes", "run_name: 'a'\nseed: 1"),
    ('run_name: "a\nseed: 1', 1, None, "close the quotes", 'run_name: "a"\nseed: 1'),
    ("special_tokens: [a,\nseed: 1", 1, None, "close the bracket", "special_tokens: [a]\nseed: 1"),
    ("lr_scheduler_kwargs: {a: 1\n", 1, None, "close the bracket", "lr_scheduler_kwargs: {a: 1}\n"),
    ("seed: 1]", 1, None, "", "seed: 1"),
    ("run_name: @a", 1, None, "put the text in quotes", "run_name: '@a'"),
    ("run_name: `a`", 1, None, "put the text in quotes", "run_name: '`a`'"),
    ("run_name: %a", 1, None, "put the text in quotes", "run_name: '%a'"),
    ('run_name: "a\\q"', 1, None, "double the backslash, or use single quotes", "run_name: 'a\\q'"),
    ("run_name: *a", 1, None, "put a text that begins with * in quotes", "run_name: '*a'"),
    ("seed: 1\n---\nbf16: no", 2, None, "a file is one document", "---\nseed: 1\nbf16: no"),
    ("seed: 1\n...\nbf16: no", 3, None, "not valid YAML", "seed: 1\nbf16: no\n..."),
    ("%YAML 3.0\n---\nseed: 1", 1, None, "version 1.* is required", "%YAML 1.2\n---\nseed: 1"),
    ("- seed: 1", 1, None, "write `key: value` lines, no list or text", "seed: 1"),
    ("# list\n[seed, 1]", 2, None, "write `key: value` lines, no list or text", "seed: 1"),
    ("only a text", 1, None, "write `key: value` lines, no list or text", "run_name: only a text"),
    ("? [a]\n: 1", 1, None, "a key must be a word", "? seed\n: 1"),
    ("? {a: b}\n: 1", 1, None, "a key must be a word", "'seed': 1"),
    ("seed: !!python/object:os.system 1", 1, "seed", "could not determine a constructor", "seed: !!int 1"),
    ("run_name: !mine a", 1, "run_name", "could not determine a constructor", "run_name: !!str a"),
    ("seed: !!int a", 1, "seed", "cannot be read as int", "seed: !!int '1'"),
    ("packing: !!bool a", 1, "packing", "cannot be read as bool", "packing: !!bool 'true'"),
    ("run_name: !!timestamp a", 1, "run_name", "cannot be read as timestamp", "run_name: 2024-12-01"),
    ("run_name: 2024-13-45", 1, "run_name", "put it in quotes if it is a text", "run_name: '2024-13-45'"),
    ("run_name: !!binary a", 1, "run_name", "failed to decode base64", "run_name: a"),
    ("special_tokens: &a [*a]", 1, "special_tokens", "recursive", "special_tokens: &a [a]"),
    ("lr_scheduler_kwargs: &a {b: *a}", 1, "lr_scheduler_kwargs", "recursive", "seed: &a 1\ndata_seed: *a"),
    ("seed: " + "9" * 5000, 1, "seed", "cannot be read as int", "seed: 9"),
]  # fmt: skip
BY_HAND = [*UNKNOWN, *TYPES, *OUT_OF_RANGE, *DUPLICATES, *SYNTAX]


@pytest.mark.parametrize("wrong, line, key, message, right", BY_HAND, ids=[repr(case[0][:40]) for case in BY_HAND])
def test_a_fault_is_said_with_its_line_and_key(tmp_path, wrong, line, key, message, right):
    parse(write(tmp_path / "config.yaml", right), *NEEDED)
    (problem,) = refuse(write(tmp_path / "config.yaml", wrong), *NEEDED)
    assert problem.startswith(f"{line}: {key}: " if key else f"{line}: ") and message in problem


# Keys, the lines at which the problem is said, and what changes so that the file is right
CONTRADICTIONS = [
    ("question_key: q", (1,), "question_key and answer_key", "question_key: q\nanswer_key: a"),
    ("dataset_eval_split: x", (1,), "dataset_eval_split and eval_strategy", "dataset_eval_split: x\neval_strategy: steps"),
    ("bf16: true\nseed: 1\nfp16: true", (1, 3), "bf16 and fp16", "bf16: true\nseed: 1"),
    ("use_peft: true\nload_in_8bit: true\nload_in_4bit: true", (2, 3), "load_in_8bit and load_in_4bit", "use_peft: true"),
    ("load_in_4bit: true\nuse_peft: false", (1, 2), "nothing would train without use_peft: true", "use_peft: true"),
    ("max_length: ~\npacking: true", (1, 2), "packing fills sequences of max_length", "max_length: ~\npacking: false"),
    ("packing: true\ntruncation_mode: keep_end", (1, 2), "no effect with packing", "packing: false\ntruncation_mode: keep_end"),
    ("packing: false\npadding_free: true", (1, 2), "padding_free does not enforce", "packing: true\npadding_free: true"),
    ("assistant_only_loss: true\ncompletion_only_loss: false", (1, 2), "contradict each other", "assistant_only_loss: true"),
    ("overwrite: true\nresume_from_checkpoint: x", (1, 2), "overwrite deletes the run", "resume_from_checkpoint: x"),
    ("use_dora: true", (1,), "use_dora has no effect without use_peft", "use_dora: true\nuse_peft: true"),
    ("lora_target_modules: [q_proj]", (1,), "no effect without use_peft", "lora_target_modules: [q_proj]\nuse_peft: true"),
    ("save_strategy: no", (1,), "would leave nothing to test", "save_strategy: epoch"),
    ("load_best_model_at_end: true", (1,), "step 5 chooses the checkpoint", "load_best_model_at_end: false"),
    ("deepspeed: zero3.json", (1,), "write fsdp: true instead", "deepspeed: ~"),
    ("hub_model_id: a/b", (1,), "no effect without push_to_hub: true", "hub_model_id: a/b\npush_to_hub: true"),
    ("dataloader_persistent_workers: true", (1,), "no effect without dataloader_num_workers", "dataloader_persistent_workers: true\ndataloader_num_workers: 1"),
    ("liger_kernel_config: {rope: true}", (1,), "no effect without use_liger_kernel", "liger_kernel_config: {rope: true}\nuse_liger_kernel: true"),
    ("use_peft: true\nlora_task_type: SEQ_CLS", (1, 2), "for models of another kind", "use_peft: true"),
    ("use_peft: true\nlora_target_modules: [q_proj]\nlora_modules_to_save: [q_proj]", (2, 3), "name the same module", "use_peft: true\nlora_target_modules: [q_proj]\nlora_modules_to_save: [lm_head]"),
    ("use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_storage: uint9", (2, 3), "uint9 is none of uint8", "use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_storage: uint8"),
    ("bnb_4bit_quant_type: fp4", (1,), "no effect without load_in_4bit: true", "use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_type: fp4"),
    ("use_bnb_nested_quant: true", (1,), "no effect without load_in_4bit: true", "use_peft: true\nload_in_4bit: true\nuse_bnb_nested_quant: true"),
    ("packing: false\npacking_strategy: wrapped", (1, 2), "no effect without packing: true", "packing_strategy: wrapped"),
    ("eval_steps: 5", (1,), "no effect without eval_strategy: steps", "eval_steps: 5\neval_strategy: steps"),
    ("eval_strategy: epoch\neval_steps: 5", (1, 2), "no effect without eval_strategy: steps", "eval_strategy: epoch"),
    ("eval_on_start: true", (1,), "no effect without eval_strategy: steps or epoch", "eval_on_start: true\neval_strategy: epoch"),
    ("eval_packing: true", (1,), "no effect without eval_strategy: steps or epoch", "eval_packing: true\neval_strategy: epoch"),
    ("metric_for_best_model: loss", (1,), "no effect without lr_scheduler_type: reduce_lr_on_plateau", "seed: 1"),
    ("lr_scheduler_type: constant\nlr_scheduler_kwargs: {a: 1}", (1, 2), "no effect with lr_scheduler_type: constant", "lr_scheduler_kwargs: {a: 1}"),
    ("dataloader_prefetch_factor: 2", (1,), "dataloader_num_workers", "dataloader_num_workers: 1\ndataloader_prefetch_factor: 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    "wrong, lines, message, right", CONTRADICTIONS, ids=[repr(case[0][:40]) for case in CONTRADICTIONS]
)
def test_keys_that_contradict_each_other_are_both_named(tmp_path, wrong, lines, message, right):
    parse(write(tmp_path / "config.yaml", right), *NEEDED)
    path = write(tmp_path / "config.yaml", wrong)
    (problem,) = refuse(path, *NEEDED)
    places = ", ".join(f"{path}:{line}" for line in lines).removeprefix(f"{path}:")
    assert problem.startswith((f"{places}: ", f"{places}, command line: ")) and message in problem


@pytest.mark.parametrize(
    "wrong, arguments",
    [
        ("report_to: wandbb", ()),  # is left out as a logger that is not installed
        ("pad_to_multiple_of: -3", ()),
        ("question_key: a\nanswer_key: a", ()),  # trains to repeat the question
        ("seed: 1", ("--weight_decay", "nan")),  # is neither below nor above its range
    ],
)
def test_faults_that_would_be_taken_in_silence(tmp_path, wrong, arguments):
    assert refuse(write(tmp_path / "config.yaml", wrong), *NEEDED, *arguments)


@pytest.mark.parametrize(
    "wrong, message, right",
    [
        ("optim: lomo", "optim: lomo cannot be used as it is set: You need to install `lomo_optim`", "optim: adafactor"),
        ("optim: stable_adamw", "You need to install `torch-optimi`", "optim: adagrad"),
        ("optim: adamw_torch_4bit", "You need to have `torchao", "optim: sgd"),
        ("optim: adamw_anyprecision", "torchdistx", "optim: lion_8bit"),
        ("optim_args: foo=1", "optim_args: foo=1 changes nothing of adamw_torch", "optim: sgd\noptim_args: momentum=0.5"),
        ("optim: sgd\noptim_args: momentum", "optim: sgd cannot be used", "optim: rmsprop\noptim_args: alpha=0.5"),
        ("lr_scheduler_type: cosine_with_min_lr", "One of min_lr", "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0}"),
        ("lr_scheduler_kwargs: {num_cycles: 1}", "unexpected keyword argument 'num_cycles'", "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 1}"),
        ("lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: many}", "could not convert", "lr_scheduler_type: cosine"),
        ("lr_scheduler_type: warmup_stable_decay", "num_decay_steps", "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 5}"),
        ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1}", "must be smaller", "lr_scheduler_type: polynomial"),
    ],
)  # fmt: skip
def test_an_optimizer_or_schedule_that_cannot_run_is_said_before_anything_is_loaded(tmp_path, wrong, message, right):
    def check(text: str) -> None:
        path = write(tmp_path / "config.yaml", text)
        parser = Parser(ARGUMENTS)
        arguments = ["--config", str(path), "--output_dir", str(tmp_path / "run"), *NEEDED]
        check_optimizer(parser.parse_args_and_config(arguments)[1])

    check(right)
    with pytest.raises(InputError) as error:
        check(wrong)
    assert message in str(error.value) and "\n" not in str(error.value)


# Several problems in one file

MANY = """\
learning_rate: fast
learning_rat: 1e-5
max_length: 64
max_length: 128
seed: -1
bf16: true
fp16: true
hub_token: abc
num_samples: 3
packing: 'true'
fsdp_config: {versoin: 2, cpu_ofload: true}
run_name: !x y
warmup_ratio: 4
"""


def test_every_problem_is_said_in_the_order_of_the_lines(tmp_path):
    problems = refuse(write(tmp_path / "config.yaml", MANY), *NEEDED)
    said = [(int(re.match(r"\d+", problem)[0]), problem) for problem in problems]
    assert [line for line, _ in said] == [1, 2, 4, 5, 6, 8, 9, 10, 11, 11, 12, 13]
    fragments = ["needs a number", "did you mean", "stands twice", "at least 0", "bf16 and fp16", "a token or key",
                 "3_test.py", "true or false", "", "", "constructor", "from 0 up to 1"]  # fmt: skip
    assert all(fragment in problem for fragment, (_, problem) in zip(fragments, said, strict=True))


def test_lines_are_ordered_as_numbers_and_across_files(tmp_path):
    write(tmp_path / "a, b.yaml", "seed: x\n")
    lines = [f"k{i}: 1" for i in range(11)]
    problems = refuse(write(tmp_path / "config, 2.yaml", "\n".join(["base: a, b.yaml", *lines])), *NEEDED)
    assert problems[0].startswith(f"{tmp_path / 'a, b.yaml'}:1: seed")
    assert [int(problem.split(":")[0]) for problem in problems[1:]] == list(range(2, 13))


def test_what_is_missing_is_said_beside_the_rest(tmp_path):
    problems = refuse(write(tmp_path / "config.yaml", "seed: x\n"))
    assert (
        problems[0].lstrip().startswith("dataset_name: is not set") and "model_name_or_path is not set" in problems[1]
    )
    assert problems[2].startswith("1: seed") and len(problems) == 3
    (problem,) = refuse(write(tmp_path / "config.yaml", "model_name_or_path: x\ndataset_nam: y\n"))
    assert "did you mean dataset_name?" in problem  # which is not said to be missing as well
    (problem,) = refuse(write(tmp_path / "config.yaml", "model_name_or_pat: x\ndataset_name: y\n"))
    assert "did you mean model_name_or_path?" in problem


@pytest.mark.parametrize("text", ["seed: [", "base: missing.yaml", "run_name: \x00", "- a"])
def test_nothing_is_said_to_be_missing_from_a_file_that_could_not_be_read(tmp_path, text):
    (problem,) = refuse(write(tmp_path / "config.yaml", text))
    assert "is not set" not in problem


@pytest.mark.parametrize("text", ["a: 1\n" * 2 + "seed: 1\n", "question_key: q\nseed: x\n"])
def test_a_value_that_was_refused_takes_no_part_in_other_checks(tmp_path, text):
    path = write(tmp_path / "config.yaml", text.replace("question_key: q", "question_key: [q]"))
    assert not any("go together" in problem for problem in refuse(path, *NEEDED))


# Files and what they are


@pytest.mark.parametrize(
    "content", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "~", "---\n...\n", b"\xef\xbb\xbf"]
)
def test_an_empty_file_is_said_to_be_empty(tmp_path, content):
    (problem,) = refuse(write(tmp_path / "config.yaml", content))
    assert "the file is empty; write `key: value` lines" in problem


@pytest.mark.parametrize(
    "content, line, message",
    [
        ("seed: 1\nrun_name: 한국".encode("cp949"), 2, "not a text in UTF-8"),
        ("run_name: é".encode("latin-1"), 1, "not a text in UTF-8"),
        ("seed: 1".encode("utf-16"), 1, "not a text in UTF-8"),
        ("seed: 1".encode("utf-16-le"), 1, "holds the character U+0000"),
        (b"seed: 1\nbf16: \x00no", 2, "holds the character U+0000"),
        (b"seed: 1\n\nbf16: \x1b[31mno", 3, "holds the character U+001B"),
        (b"\x89PNG\r\n\x1a\n", 1, "not a text in UTF-8"),
    ],
)
def test_what_is_no_text_is_said_with_its_line(tmp_path, content, line, message):
    (problem,) = refuse(write(tmp_path / "config.yaml", content))
    assert problem.startswith(f"{line}: {message}")


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfseed: 7\n", b"seed: 7\r\nrun_name: x\r\n", b"run_name: x\rseed: 7\r", "seed: 7 # 한국어\n".encode()],
)
def test_byte_order_marks_and_any_line_ends_are_read(tmp_path, content):
    assert parse(write(tmp_path / "config.yaml", content), *NEEDED)[0]["seed"] == 7


def test_lines_are_counted_with_any_line_ends(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (problem,) = refuse(write(tmp_path / "config.yaml", end.join(["bf16: no", "", "seed: x"])), *NEEDED)
        assert problem.startswith("3: seed: needs an integer")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[" * 1200, "{" * 1200, "a: " * 1200, "run_name: " + "[" * 1200 + "]" * 1200])
def test_brackets_that_are_too_deep_are_no_traceback(tmp_path, text):
    (problem,) = refuse(write(tmp_path / "config.yaml", text))
    assert "too deep" in problem or "mapping values are not allowed" in problem


@pytest.fixture
def usual_recursion_limit():
    """Python's own: torch's compiler raises it for the whole process."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


def test_a_value_that_is_too_deep_is_said_with_its_key(tmp_path, usual_recursion_limit):
    text = "seed: 1\nlr_scheduler_kwargs: " + "{a: " * 300 + "1" + "}" * 300
    (problem,) = refuse(write(tmp_path / "config.yaml", text), *NEEDED)
    assert problem.startswith("2: lr_scheduler_kwargs: ") and "too deep" in problem
    parse(write(tmp_path / "config.yaml", text.replace("{a: " * 270, "").replace("}" * 270, "")), *NEEDED)


@pytest.mark.slow
def test_the_last_line_of_a_large_file_still_counts(tmp_path):
    comments = "# what all of these lines say is left out\n" * 125_000  # 5 MB
    (problem,) = refuse(write(tmp_path / "config.yaml", f"{comments}seed: x\n"), *NEEDED)
    assert problem.startswith("125001: seed")
    path = write(tmp_path / "config.yaml", f"{comments[:50_000]}\nseed: 5\nsystem_prompt: {'x' * 50_000}\n")
    assert parse(path, *NEEDED)[0]["seed"] == 5


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("gone.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("missing.yaml", "loop.yaml", "dangling.yaml", "x" * 5000):
        assert refuse(tmp_path / name) == [" no such file"]
    assert refuse(tmp_path / "folder.yaml") == [" is a folder; name a YAML file in it"]


def test_a_file_that_may_not_be_read_is_said():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users altogether
        path = write(Path(name) / "config.yaml", "seed: 1")
        Path(name).chmod(0o755)
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # root reads everything
            os.seteuid(65534)
        try:
            problems = refuse(path)
        finally:
            os.seteuid(user)
        assert problems == [" cannot be read: Permission denied"]


# base


def test_layers_are_read_and_the_command_line_wins(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "root.yaml", "seed: 1\nmax_length: 64\nmax_steps: 5\n")
    write(tmp_path / "sub" / "middle.yaml", "base: root.yaml\nmax_length: 32\n")
    path = write(tmp_path / "config.yaml", "seed: 3\nbase: sub/middle.yaml\n")
    values, _ = parse(path, *NEEDED, "--max_steps", "9")
    assert (values["seed"], values["max_length"], values["max_steps"]) == (3, 32, 9)


@pytest.mark.parametrize(
    "base, message",
    [
        ("missing.yaml", "no such file: missing.yaml; paths are relative to this file"),
        (".", "no such file: ."),
        ("x" * 5000, "no such file"),
        ("", "needs the path of a YAML file, got nothing"),
        ("[a.yaml]", 'needs the path of a YAML file, got ["a.yaml"]'),
        ("config.yaml", "in a circle"),
        ("'a\\0b'", "no such file"),
    ],
)
def test_a_base_that_is_no_file_is_said_with_its_line(tmp_path, base, message):
    (problem,) = refuse(write(tmp_path / "config.yaml", f"seed: 1\nbase: {base}\n"))
    assert problem.startswith("2: base: ") and message in problem


def test_files_that_name_each_other_are_said_with_the_whole_circle(tmp_path):
    write(tmp_path / "b.yaml", "base: c.yaml\n")
    write(tmp_path / "c.yaml", "seed: 1\nbase: config.yaml\n")
    path = write(tmp_path / "config.yaml", "base: b.yaml\n")
    (problem,) = refuse(path)
    names = " -> ".join(str(tmp_path / name) for name in ("config.yaml", "b.yaml", "c.yaml", "config.yaml"))
    assert problem == f"{tmp_path / 'c.yaml'}:2: base: the files name each other in a circle: {names}"
    write(tmp_path / "c.yaml", "seed: 1\n")
    assert parse(path, *NEEDED)[0]["seed"] == 1


def test_a_fault_of_a_base_is_said_with_its_own_file_and_line(tmp_path):
    write(tmp_path / "b.yaml", "bf16: no\nseed: x\n")
    problems = refuse(write(tmp_path / "config.yaml", "base: b.yaml\nmax_length: y\n"), *NEEDED)
    assert problems[0].startswith(f"{tmp_path / 'b.yaml'}:2: seed") and problems[1].startswith("2: max_length")


# Secrets: neither accepted nor printed, under whatever key

HF, OPENAI = "hf_" + "aB3" * 12, "sk-proj-" + "Zy9-" * 10
WANDB = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "text",
    [
        "hub_token: {}", "HF_TOKEN: {}", "hf-token: {}", "hfToken: {}", "openai.api_key: {}", "OPENAI_API_KEY: {}",
        "wandb_api_key: {}", "wandb_key: {}", "password: {}", "client_secret: {}", "env: {{HF_TOKEN: {}}}",
        "env: {{WANDB_API_KEY: {}}}", "model_init_kwargs: {{token: {}}}", "model_init_kwargs: {{a: [{{api_key: {}}}]}}",
        "run_name: {}", "seed: {}", "system_prompt: my key is {}, keep it", "special_tokens: [a, {}]", "unknown: {}",
        "packing: !x {}", "seed: *{}", "base: {}", "run_name: '{}", "run_name: a_{}", "env: {{MINE: {}}}", "{}: 1",
        "fsdp_config: {{{}: 1}}", "warmup_ratio: {}", "fsdp: {}", "model_id: {}", "lr_scheduler_kwargs: '{{{}'",
    ],
)  # fmt: skip
@pytest.mark.parametrize("secret", [HF, OPENAI], ids=["hf", "openai"])
def test_a_secret_is_refused_and_never_printed(tmp_path, text, secret):
    problems = refuse(write(tmp_path / "config.yaml", text.format(secret)), *NEEDED)
    assert secret not in "".join(problems) and secret[10:] not in "".join(problems)


@pytest.mark.parametrize("key", ["wandb_api_key", "hub_token", "run_name", "seed", "model_id", "unknown"])
def test_a_key_of_wandb_is_known_by_its_form(tmp_path, key):
    """It has nothing but 40 hexadecimal digits, as a commit has."""
    (problem,) = refuse(write(tmp_path / "config.yaml", f"{key}: {WANDB}\n"), *NEEDED)
    assert problem.startswith(f"1: {key}: a token or key does not belong in a file") and WANDB not in problem


def test_what_only_resembles_a_secret_is_accepted(tmp_path):
    text = f"eos_token: <|end|>\npad_token: <pad>\nmodel_revision: {WANDB}\nhub_token: ~\nrun_name: sk-hynix\n"
    values, _ = parse(write(tmp_path / "config.yaml", text), *NEEDED)
    assert values["model_revision"] == WANDB and values["eos_token"] == "<|end|>"


def test_a_secret_of_the_command_line_is_not_printed_with_the_configuration(tmp_path):
    parser = Parser(ARGUMENTS)
    path = write(tmp_path / "config.yaml", "seed: 1\n")
    arguments = parser.parse_args_and_config(["--config", str(path), *NEEDED, "--hub_token", "my-own-secret"])
    printed = "\n".join(parser.describe(arguments, {}))
    assert "hub_token" in printed and "my-own-secret" not in printed


# Right files, so that the wrong ones are wrong for their own reason


def test_older_names_and_the_traps_of_yaml_1_1_are_read_as_they_are_meant(tmp_path):
    text = """\
model_id: demo/model
evaluation_strategy: no
max_seq_length: 1_000
learning_rate: 2e-5
torch_dtype: float32
warmup_ratio: 0.1
gradient_checkpointing: yes
overwrite_output_dir: true
fsdp: full_shard auto_wrap
fsdp_config: {backward_prefetch: backward_pre, use_orig_params: "false"}
model_revision: 1.10
dataset_config: 2024-01-01
run_name: "012"
data_seed: &same 7
seed: *same
lr_scheduler_kwargs: {<<: {a: 1}, b: 2}
"""
    values, printed = parse(write(tmp_path / "config.yaml", text), "--dataset_name", "demo/data")
    assert values["model_name_or_path"] == "demo/model" and values["max_length"] == 1000
    assert values["learning_rate"] == 2e-5 and values["warmup_steps"] == 0.1
    assert values["eval_strategy"] == "no" and values["activation_checkpointing"] == "true"
    assert (values["model_revision"], values["dataset_config"], values["run_name"]) == ("1.10", "2024-01-01", "012")
    assert values["seed"] == values["data_seed"] == 7 and values["lr_scheduler_kwargs"] == {"a": 1, "b": 2}
    for line, key in ((1, "model_id"), (2, "evaluation_strategy"), (3, "max_seq_length"), (8, "overwrite_output_dir")):
        assert f"config.yaml:{line}: {key}: " in printed


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_every_yaml_parses_and_trains_where_there_is_no_gpu(path, tmp_path):
    arguments = ["--config", str(path), "--output_dir", str(tmp_path)]
    script, training, model = Parser((ScriptArguments, TrainingArguments, ModelArguments)).parse_args_and_config(
        arguments
    )
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("output_dir", "report_to", "base"):
            assert value == next(getattr(a, key) for a in (script, training, model) if hasattr(a, key)), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, message",
    [
        ("judge_modle: x\n", "config.yaml:1: judge_modle: unknown key; did you mean judge_model?"),
        ("- a\n", "write `key: value` lines"),
        ("a: [\n", "not valid YAML"),
        ("concurrency: 0\n", "concurrency: must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_faulty_yaml_is_one_line_and_status_2(tmp_path, capsys, text, message, form):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        Parser((JudgeArguments,)).parse_args_and_config(form.format(path).split(" "))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"learning_rate: 2e-5\ndataset_name: x\nmodel_name_or_path: y\noutput_dir: {tmp_path}\n")
    _, training, _ = Parser((ScriptArguments, TrainingArguments, ModelArguments)).parse_args_and_config(
        ["--config", str(path)]
    )
    assert training.learning_rate == 2e-5


# Generated from the arguments themselves

FIELDS = {field.name: field for kind in ARGUMENTS for field in dataclasses.fields(kind) if field.init}
HINTS = Parser(ARGUMENTS).hints
KEYS = sorted(key for key in FIELDS if key not in RENAMES and not is_secret(key))
comments = st.integers(0, 5).map(lambda count: "# a comment\n" * count)


@st.composite
def misspelt_keys(draw) -> str:
    """A key with one letter lost, doubled, replaced or swapped with the next."""
    key = draw(st.sampled_from(KEYS))
    place = draw(st.integers(0, len(key) - 2))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    edits = [
        key[:place] + key[place + 1 :],
        key[:place] + key[place] + key[place:],
        key[:place] + letter + key[place + 1 :],
        key[:place] + key[place + 1] + key[place] + key[place + 2 :],
    ]
    return draw(st.sampled_from(edits))


@pytest.mark.slow
@generated
@given(key=misspelt_keys(), before=comments)
def test_any_misspelt_key_is_found_and_mostly_corrected(folder, key, before):
    known = FIELDS.keys() | RENAMES.keys() | {f.name for kind in OTHER_STEPS.values() for f in dataclasses.fields(kind)}
    assume(key not in known | {"env", "base"} and not is_secret(key))
    (problem,) = refuse(write(folder / "config.yaml", f"{before}{key}: 1\n"), *NEEDED)
    assert problem.startswith(f"{before.count(chr(10)) + 1}: {key}: unknown key; did you mean ")


WRONG_VALUES = {
    bool: ["1", "0", "3.7", "'true'", "text", "[true]", "{a: 1}", "2024-01-01"],
    int: ["3.7", "text", "'5'", "[1]", "true", "1e-3", ".inf", "010", "1:30", "{a: 1}"],
    float: ["text", "'1.0'", "[1.0]", "true", ".nan", "-.inf", "1.0.0", "1e", "{a: 1}"],
    str: ["[a]", "{a: 1}", "true"],
    list: ["3", "{a: 1}", "[1]", "true", "[[a]]"],
    dict: ["3", "[a]", "true", "text"],
}


def wrong_values(key: str) -> list[str]:
    """Values that no type of the key takes."""
    kinds = [kind for kind in WRONG_VALUES if re.search(rf"\b{kind.__name__}\b", str(HINTS[key]))]
    if "choices" in FIELDS[key].metadata or "<enum" in str(HINTS[key]) or "Strategy" in str(HINTS[key]):
        return ["[a]", "{a: 1}", "xyzzy", "3.7"]
    both = [value for value in WRONG_VALUES[kinds[0]] if all(value in WRONG_VALUES[kind] for kind in kinds)]
    return both or ["{a: 1}"] * ("dict" not in str(HINTS[key]))


TYPED = [(key, value) for key in KEYS if re.search(r"bool|int|float|str|list|dict", str(HINTS[key]))
         for value in wrong_values(key)]  # fmt: skip


@pytest.mark.slow
@generated
@given(setting=st.sampled_from(TYPED), before=comments)
def test_any_value_of_a_wrong_type_is_found(folder, setting, before):
    key, value = setting
    (problem,) = refuse(write(folder / "config.yaml", f"{before}{key}: {value}\n"), *NEEDED)
    assert problem.startswith(f"{before.count(chr(10)) + 1}: {key}: ")
    assert re.search("needs |is none of|in YAML", problem)


LIMITS = sorted(((key, limits) for kind in ARGUMENTS for key, limits in limits_of(kind).items()), key=lambda x: x[0])


@st.composite
def values_out_of_range(draw) -> dict:
    """One to four keys, each with a value below its lowest or above its highest."""
    settings_ = {}
    for key, limits in draw(st.lists(st.sampled_from(LIMITS), min_size=1, max_size=4, unique_by=lambda x: x[0])):
        beyond = draw(st.integers(1, 10**6))
        above = math.isfinite(limits.at_most) and draw(st.booleans())
        settings_[key] = int(limits.at_most) + beyond if above else int(max(limits.at_least, limits.more_than)) - beyond
    return settings_


@pytest.mark.slow
@generated
@given(values=values_out_of_range())
def test_any_values_out_of_range_are_found_together(folder, values):
    problems = refuse(write(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False)), *NEEDED)
    for line, (key, problem) in enumerate(zip(values, problems, strict=True), 1):
        assert problem.startswith(f"{line}: {key}: must be ") and problem.endswith(f"got {values[key]}")


@pytest.mark.slow
@generated
@given(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=8, unique=True), data=st.data())
def test_any_key_that_stands_twice_is_found(folder, keys, data):
    twice = data.draw(st.sampled_from(keys))
    place = data.draw(st.integers(keys.index(twice) + 1, len(keys)))
    lines = [f"{key}: x" for key in [*keys[:place], twice, *keys[place:]]]
    problems = refuse(write(folder / "config.yaml", "\n".join(lines)), *NEEDED)
    found = [problem for problem in problems if "stands twice" in problem]
    text = f"{place + 1}: {twice}: stands twice, first in line {keys.index(twice) + 1}; keep one of them"
    assert found == [text]


@pytest.mark.slow
@generated
@given(content=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode)))
def test_any_bytes_and_any_text_are_refused_in_words(folder, content):
    assert refuse(write(folder / "config.yaml", content))


@pytest.mark.slow
@generated
@given(text=st.text("ab: -?[]{}&*!|>'\"%@`#,\n\t~<=0.1", max_size=60))
def test_any_signs_of_yaml_are_refused_in_words(folder, text):
    assert refuse(write(folder / "config.yaml", text))


nested = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.slow
@generated
@given(
    values=st.dictionaries(
        st.sampled_from([*KEYS, "env", "base", "fsdp", "fsdp_config"]) | st.text(), nested, max_size=5
    )
)
def test_any_nesting_is_refused_in_words(folder, values):
    assert refuse(write(folder / "config.yaml", yaml.safe_dump(values, allow_unicode=True)))


@pytest.mark.slow
@generated
@given(data=st.data())
def test_any_typing_error_in_a_right_file_is_read_or_refused_in_words(folder, data):
    text = (ROOT / "recipes" / "lora.yaml").read_text()
    place = data.draw(st.integers(0, len(text) - 1))
    typed = data.draw(
        st.sampled_from(["", ":", " ", "\n", "\t", "'", '"', "[", "{", "&a", "*a", "0", "é", "\x00", "- "])
    )
    path = write(folder / "config.yaml", text[:place] + typed + text[place + 1 :])
    try:
        parse(path)
    except SystemExit:
        assert refuse(path)


@pytest.mark.slow
@generated
@given(secret=st.from_regex(r"hf_[A-Za-z0-9]{30}|sk-[A-Za-z0-9_]{30}", fullmatch=True), key=misspelt_keys())
def test_any_secret_under_any_key_is_never_printed(folder, secret, key):
    assert secret not in "".join(refuse(write(folder / "config.yaml", f"{key}: {secret}\n")))


# Through the script


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, messages",
    [
        (MANY.encode(), ["12 problems", "config.yaml:1: learning_rate: needs a number"]),
        (b"", ["the file is empty"]),
        (b"a: [", ["config.yaml:1: not valid YAML"]),
        (b"\xff\xfe\x00", ["config.yaml:1: not a text in UTF-8"]),
        (b"[" * 1200, ["too deep to read"]),
        (b"hub_token: abcdef", ["a token or key does not belong in a file"]),
    ],
    ids=["many", "empty", "syntax", "bytes", "deep", "secret"],
)
def test_the_script_says_the_same(tmp_path, content, messages):
    path = write(tmp_path / "config.yaml", content)
    for form in (["--config", path], [f"--config={path}"]):
        status, printed = run_step(SCRIPT, tmp_path / "printed", *form, *NEEDED, "--output_dir", tmp_path / "run")
        check_refusal(status, printed, path)
        assert all(message in printed for message in messages) and "abcdef" not in printed


@pytest.mark.slow
def test_under_torchrun_the_message_is_printed_once(tmp_path):
    path = write(tmp_path / "config.yaml", MANY)
    result = run(
        command(SCRIPT, "--config", path, *NEEDED, "--output_dir", tmp_path / "run", num_processes=2), check=False
    )
    assert result.returncode != 0 and result.stderr.count("error: 12 problems") == 1
    assert result.stderr.count("learning_rat: unknown key") == 1
    ours, _, report_of_torchrun = result.stderr.partition("torch/distributed")
    assert "Traceback" not in ours and "exitcode  : 2" in report_of_torchrun
    assert not (tmp_path / "run").exists()


LATE = """
import os, sys, time
from finetuning.errors import fail
if os.environ["RANK"] == "0":
    time.sleep(1)
fail("the reason")
"""


@pytest.mark.slow
def test_under_torchrun_a_late_first_rank_still_says_it(tmp_path):
    script = write(tmp_path / "late.py", LATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    assert run([*launcher, str(script)], check=False, PYTHONPATH=str(ROOT)).stderr.count("error: the reason") == 1
