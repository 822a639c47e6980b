"""
The arguments of every step, each key declared once.

Imports without torch; what needs torch (the training arguments, which subclass trl's SFTConfig) is in training/trainer.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from finetuning.errors import to_line

# Lowest and highest value of a key, both allowed. Keys of every step; None is always allowed where it is the default.
RANGES = {
    "per_device_train_batch_size": (1, None), "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None), "max_length": (8, None), "save_total_limit": (1, None),
    "seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1), "dataloader_num_workers": (0, None), "dataloader_prefetch_factor": (1, None),
    "dataset_num_proc": (1, None), "warmup_steps": (0, None), "weight_decay": (0, 1), "max_grad_norm": (0, None),
    "adam_beta1": (0, 0.9999999), "adam_beta2": (0, 0.9999999), "label_smoothing_factor": (0, 0.9999999),
    "neftune_noise_alpha": (0, None), "lora_r": (1, None), "lora_alpha": (1, None), "lora_dropout": (0, 0.9999999),
    "num_prompts": (1, None), "num_samples": (1, None), "batch_size": (1, None), "max_new_tokens": (1, None),
    "top_p": (0, 1), "num_beams": (1, None), "no_repeat_ngram_size": (0, None), "top_k": (0, None), "concurrency": (1, None),
    "max_tokens": (1, None), "max_retries": (0, None), "limit": (1, None),
    "preview_rows": (0, None), "pad_to_multiple_of": (1, None), "holdout": (0, 0.9),
    "temperature": (0, None), "length_penalty": (-10, 10), "poll_seconds": (0.01, 86_400), "requests_per_minute": (0.01, None), "tokens_per_minute": (1, None),
}  # fmt: skip
POSITIVE = {
    "learning_rate", "num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "eval_steps", "tolerance",
    "repetition_penalty", "timeout", "max_cost",
}  # fmt: skip

JUDGE_MODEL = "gpt-5.4-mini"
# checks of preflight that refuse a run
REFUSALS = ("terminator", "terminators_agree", "supervision", "empty_rows", "leakage", "memory", "positions")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
QUANT_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
NOT_OF_VLLM = {
    "load_in_8bit": False,
    "load_in_4bit": False,
    "device_map": None,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
}
NOT_OF_ENGINE = {  # keys of step 3 that an engine cannot obey, and their neutral values
    "vllm": NOT_OF_VLLM,
    "openai": {**NOT_OF_VLLM, "batch_size": None, "dtype": None},  # the server has loaded the model in its own way
}
NEEDS = {  # keys with their neutral values, and the other key with the values of which they have an effect
    "use_bnb_nested_quant": (False, "load_in_4bit", ("true",)),
    "bnb_4bit_quant_type": ("nf4", "load_in_4bit", ("true",)),
    "bnb_4bit_quant_storage": (None, "load_in_4bit", ("true",)),
    "packing_strategy": ("bfd", "packing", ("true",)),
    "eval_steps": (None, "eval_strategy", ("steps",)),
    "eval_delay": (0, "eval_strategy", ("steps", "epoch")),
    "eval_packing": (None, "eval_strategy", ("steps", "epoch")),
    "liger_kernel_config": (None, "use_liger_kernel", ("true",)),
    "hub_model_id": (None, "push_to_hub", ("true",)),
    "hub_private_repo": (None, "push_to_hub", ("true",)),
    "hub_revision": (None, "push_to_hub", ("true",)),
    "eval_on_start": (False, "eval_strategy", ("steps", "epoch")),
    "metric_for_best_model": (None, "lr_scheduler_type", ("reduce_lr_on_plateau", "greedy")),
    "greater_is_better": (None, "lr_scheduler_type", ("reduce_lr_on_plateau", "greedy")),
}


def _lora_keys(values: Mapping) -> list[str]:
    """The keys of LoRA that are set to something else than their default."""
    from finetuning.config.model_arguments import (
        ModelArguments,  # which needs trl, as step 1 does and steps 4 and 5 do not
    )

    defaults = {f.name: f.default for f in fields(ModelArguments) if f.name.startswith("lora_")}
    return [key for key, default in defaults.items() if values.get(key, default) not in (None, default)]


def find_faults(values: Mapping) -> list[tuple[tuple[str, ...], str]]:
    """What is out of range or contradicts itself in the arguments of a step.

    Args:
        values: Any of the keys of a step; those that are not there are not looked at.

    Returns:
        [(keys, text), ...], the text naming every key of the fault.
    """
    faults = []
    for key, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            faults.append(((key,), f"{key}: must be a finite number, got {value}"))
            continue
        low, high = RANGES.get(key, (None, None))
        if (low is not None and value < low) or (high is not None and value > high):
            at_most = "" if high is None else f" and at most {high}"
            faults.append(((key,), f"{key}: must be at least {low}{at_most}, got {value}"))
        if key in POSITIVE and not value > 0:
            faults.append(((key,), f"{key}: must be more than 0, got {value}"))
    if "learning_rate" in values and values["learning_rate"] > 1:
        faults.append((("learning_rate",), f"learning_rate: {values['learning_rate']} cannot learn; write it as 2e-5"))
    if values.get("max_steps", -1) != -1 and values["max_steps"] < 1:
        faults.append((("max_steps",), f"max_steps: must be at least 1, or -1 for epochs, got {values['max_steps']}"))
    if "model_name_or_path" in values and values["model_name_or_path"] is None:
        text = "model_name_or_path is not set: name a folder with a model, or a model on the Hub"
        faults.append((("model_name_or_path",), text))
    for keys, wrong, text in CONTRADICTIONS:
        if set(keys) <= values.keys() and wrong(*(values[key] for key in keys)):
            faults.append((keys, text.format(**{key: values[key] for key in keys})))
    for quantised in ("load_in_8bit", "load_in_4bit"):
        if values.get(quantised) and values.get("use_peft") is False:
            keys = (quantised, "use_peft")
            faults.append((keys, f"{quantised} freezes the weights, so nothing would train without use_peft: true"))
    engine = "openai" if values.get("base_url") else values.get("engine")
    for key, neutral in NOT_OF_ENGINE.get(engine, {}).items():
        if values.get(key) not in (None, neutral):
            text = f"{key} is not known to the engine {engine}; use engine: transformers, or leave it out"
            faults.append(((key, "base_url" if engine == "openai" else "engine"), text))
    faulty = {key for keys, _ in faults for key in keys}
    for key, (neutral, needed, effective) in NEEDS.items():
        is_set = key not in faulty and {key, needed} <= values.keys() and values[key] not in (None, neutral)
        if is_set and _text(values[needed]) not in effective:
            text = f"{key} has no effect without {needed}: {' or '.join(effective)}; add it, or leave {key} out"
            faults.append(((key, needed), text))
    if values.get("use_peft") is False and (lora := [key for key in _lora_keys(values) if key not in faulty]):
        text = f"{lora[0]} has no effect without use_peft: true; add it, or leave the lora_ keys out"
        faults.append(((lora[0], "use_peft"), text))
    unknown = [name for name in values.get("allow") or [] if name not in REFUSALS]
    if unknown:
        faults.append((("allow",), f"allow: {unknown[0]} is none of the checks that refuse: {', '.join(REFUSALS)}"))
    attention = values.get("attn_implementation")
    if attention is not None and attention not in ATTENTION and "/" not in attention:  # kernels of the Hub have a slash
        text = f"attn_implementation: {attention} is none of {', '.join(ATTENTION)}"
        faults.append((("attn_implementation",), text))
    return faults


def _text(value) -> str:
    """A value as it stands in a YAML."""
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def _no(strategy) -> bool:
    return _text(strategy) == "no"


# Keys, when their values are a fault, and what to do.
CONTRADICTIONS = (
    (("question_key", "answer_key"), lambda q, a: (q is None) != (a is None),
     "question_key and answer_key go together: set both, or neither"),
    (("question_key", "answer_key"), lambda q, a: q is not None and q == a,
     "question_key and answer_key are both {question_key}; the model would learn to repeat the question"),
    (("question_key", "mask_history"), lambda question, mask: question is not None and mask,
     "mask_history has no effect with question_key, whose rows have one answer; leave it out"),
    (("special_tokens", "dataset_name"), lambda tokens, _: any(not token.strip() for token in tokens or []),
     "special_tokens: a token must not be empty; remove it"),
    (("dataset_eval_split", "eval_strategy"), lambda split, strategy: split is not None and _no(strategy),
     "dataset_eval_split and eval_strategy go together: eval_strategy is no, so {dataset_eval_split} would not be used; "
     "set eval_strategy to steps or epoch"),
    (("bf16", "fp16"), lambda bf16, fp16: bf16 and fp16, "bf16 and fp16 are both true; keep one of them"),
    (("load_in_8bit", "load_in_4bit"), lambda a, b: a and b, "load_in_8bit and load_in_4bit are both true; keep one of them"),
    (("packing", "max_length"), lambda packing, length: packing and length is None,
     "packing fills sequences of max_length, which is null; set max_length, or packing: false"),
    (("packing", "truncation_mode"), lambda packing, mode: packing and mode == "keep_end",
     "truncation_mode: keep_end has no effect with packing, which cuts the end; set packing: false, or leave it out"),
    (("packing", "padding_free"), lambda packing, free: free and not packing,
     "padding_free does not enforce max_length without packing: true; set packing: true, or leave it out"),
    (("assistant_only_loss", "completion_only_loss"), lambda assistant, completion: assistant and completion is False,
     "assistant_only_loss: true and completion_only_loss: false contradict each other; remove one of them"),
    (("overwrite", "resume_from_checkpoint"), lambda overwrite, resume: overwrite and resume not in (None, "false", "False"),
     "overwrite deletes the run that resume_from_checkpoint goes on with; keep one of them"),
    (("use_peft", "use_dora"), lambda peft, dora: dora and not peft, "use_dora has no effect without use_peft: true"),
    (("use_peft", "use_rslora"), lambda peft, rs: rs and not peft, "use_rslora has no effect without use_peft: true"),
    (("dataloader_persistent_workers", "dataloader_num_workers"), lambda persistent, workers: persistent and workers == 0,
     "dataloader_persistent_workers has no effect without dataloader_num_workers; set both, or neither"),
    (("output_dir", "output_dir"), lambda folder, _: isinstance(folder, str) and not folder.strip(),
     "output_dir is empty; name a folder"),
    (("output_dir", "output_dir"), lambda folder, _: isinstance(folder, str) and to_line(folder) != folder,
     "output_dir: {output_dir} holds a line break or another control character; choose another name"),
    (("num_train_epochs", "max_steps"), lambda epochs, steps: steps == -1 and epochs > 100_000,
     "num_train_epochs: {num_train_epochs} would not end; use at most 100000"),
    (("lora_task_type", "use_peft"), lambda task, peft: peft and task != "CAUSAL_LM",
     "lora_task_type: {lora_task_type} is for models of another kind; leave it out"),
    (("lora_target_modules", "lora_modules_to_save"), lambda targets, saved: bool(set(targets or []) & set(saved or [])),
     "lora_target_modules and lora_modules_to_save name the same module, which is adapted or trained as a whole; keep one"),
    (("bnb_4bit_quant_storage", "load_in_4bit"), lambda storage, four: four and storage not in (None, *QUANT_STORAGE),
     "bnb_4bit_quant_storage: {bnb_4bit_quant_storage} is none of " + ", ".join(QUANT_STORAGE)),
    (("lr_scheduler_type", "lr_scheduler_kwargs"),
     lambda kind, kwargs: _text(kind) in ("constant", "constant_with_warmup") and bool(kwargs),
     "lr_scheduler_kwargs has no effect with lr_scheduler_type: constant; leave it out"),
    (("save_strategy", "output_dir"), lambda strategy, _: _no(strategy),
     "save_strategy: no would leave nothing to test; use steps or epoch"),
    (("save_strategy", "save_only_model"), lambda strategy, only: str(getattr(strategy, "value", strategy)) == "best",
     "save_strategy: best has no use here, step 5 chooses the checkpoint; use steps or epoch"),
    (("load_best_model_at_end", "output_dir"), lambda best, _: best,
     "load_best_model_at_end has no use here, step 5 chooses the checkpoint; remove it"),
    (("model_init_kwargs", "output_dir"), lambda kwargs, _: kwargs is not None,
     "model_init_kwargs is not used here; dtype, attn_implementation and model_revision are keys of their own"),
    (("deepspeed", "output_dir"), lambda deepspeed, _: deepspeed is not None,
     "deepspeed is not used here, FSDP2 shards; write fsdp: true instead"),
    (("dataset_kwargs", "output_dir"), lambda kwargs, _: kwargs is not None,
     "dataset_kwargs would skip the preparation of the data that preflight checks; remove it"),
    (("do_sample", "temperature"), lambda sample, t: t is not None and not sample,
     "temperature has no effect without `do_sample: true`; set both, or neither"),
    (("do_sample", "top_p"), lambda sample, p: p is not None and not sample,
     "top_p has no effect without `do_sample: true`; set both, or neither"),
    (("do_sample", "top_k"), lambda sample, k: k is not None and not sample,
     "top_k has no effect without `do_sample: true`; set both, or neither"),
    (("do_sample", "num_beams"), lambda sample, beams: sample and (beams or 1) > 1,
     "do_sample and num_beams: {num_beams} exclude each other; keep one of them"),
    (("num_beams", "length_penalty"), lambda beams, penalty: penalty is not None and (beams or 1) == 1,
     "length_penalty has no effect without num_beams of 2 or more; set both, or neither"),
    (("engine", "base_url"), lambda engine, url: engine == "openai" and url is None,
     "engine: openai needs base_url, the address of the server, e.g. http://localhost:8000/v1"),
    (("engine", "base_url"), lambda engine, url: engine in ("transformers", "vllm") and url is not None,
     "base_url is for engine: openai, not {engine}; leave one of them out"),
    (("base_url", "base_url"), lambda url, _: url is not None and not url.startswith(("http://", "https://")),
     "base_url: {base_url} is no address; write it as http://localhost:8000/v1"),
    (("base_url", "concurrency", "engine"), lambda url, value, _: url is None and value is not None,
     "concurrency has no effect without base_url; leave it out"),
    (("base_url", "timeout", "engine"), lambda url, value, _: url is None and value is not None,
     "timeout has no effect without base_url; leave it out"),
    (("compare", "judges"), lambda compare, judges: compare is not None and len(compare) != 2,
     "compare takes two models, as in --compare checkpoint-148 checkpoint-296"),
    (("compare", "judges"), lambda compare, judges: compare is not None and len(set(compare)) == 1,
     "compare: both models are the same"),
    (("compare", "judges"), lambda compare, judges: compare is not None and judges is not None,
     "compare asks one judge; leave judges out and name it with judge_model"),
    (("compare", "human"), lambda compare, human: compare is not None and human is not None,
     "compare gives no scores to hold against those of human; leave one of them out"),
    (("compare", "expected_scores"), lambda compare, expected: compare is not None and expected,
     "compare gives no scores, so expected_scores has no effect; leave one of them out"),
    (("judges", "judge_language"), lambda judges, _: judges is not None
     and len({name.lower() for name in split_names(judges)}) < len(set(split_names(judges))),
     "judges: two of the names differ in capitals only, and some file systems would give them one folder"),
    (("judges", "judge_language"), lambda judges, _: judges is not None and len(set(split_names(judges))) < 2,
     "judges: a jury has two or more different judges; for one, use judge_model"),
    (("mode", "collect"), lambda mode, collect: mode == "live" and collect,
     "collect has no effect without mode: batch; set both, or neither"),
    (("dry_run", "collect"), lambda dry, collect: dry and collect,
     "dry_run sends nothing and collect fetches; leave one of them out"),
    (("collect", "overwrite"), lambda collect, overwrite: collect and overwrite,
     "overwrite would delete what collect fetches; leave one of them out"),
    (("mode", "concurrency"), lambda mode, value: mode == "batch" and value is not None,
     "concurrency has no effect with mode: batch; leave it out"),
    (("mode", "poll_seconds"), lambda mode, value: mode == "live" and value is not None,
     "poll_seconds has no effect without mode: batch; leave it out"),
    (("collect", "poll_seconds"), lambda collect, value: collect and value is not None,
     "poll_seconds has no effect with collect, which looks once; leave it out"),
    (("collect", "max_cost"), lambda collect, value: collect and value is not None,
     "max_cost has no effect with collect, which sends nothing; leave it out"),
    (("compare", "model_name"), lambda compare, name: compare is not None and name != "all",
     "compare names the models itself; leave model_name out"),
    (("judges", "judge_model"), lambda judges, name: judges is not None and name != JUDGE_MODEL,
     "judges and judge_model: {judge_model} exclude each other; name every judge with judges"),
    (("judge_model", "judge_language"), lambda name, _: not name.strip(), "judge_model is empty; name a model"),
    (("judge_model", "judges"), lambda name, judges: any(to_line(text) != text for text in (name, *(judges or ()))),
     "judge_model and judges: a name holds a line break or another control character; write it without"),
    (("mode", "requests_per_minute"), lambda mode, value: mode == "batch" and value is not None,
     "requests_per_minute has no effect with mode: batch; leave it out"),
    (("mode", "tokens_per_minute"), lambda mode, value: mode == "batch" and value is not None,
     "tokens_per_minute has no effect with mode: batch; leave it out"),
    (("stop", "stop"), lambda stop, _: any(not text for text in stop or []),
     "stop: an empty text would end every answer at once; leave it out"),
    (("rescore", "submission"), lambda rescore, submission: rescore and submission is not None,
     "rescore writes no submission; leave rescore out: what is answered is not answered again"),
    (("rescore", "overwrite"), lambda rescore, overwrite: rescore and overwrite,
     "rescore reads the predictions that overwrite deletes; keep one of them"),
    (("do_sample", "temperature"), lambda sample, t: sample and t is not None and t <= 0,
     "temperature: must be more than 0 with do_sample: true, got {temperature}; for greedy answers, do_sample: false"),
)  # fmt: skip


def split_names(names: list[str]) -> list[str]:
    """Names that were given as a list, or as one text with commas between them.

    >>> split_names(["a,b", "c"])
    ['a', 'b', 'c']
    """
    return [name.strip() for part in names for name in part.split(",") if name.strip()]


class Checked:
    """Arguments that refuse, when they are made, what find_faults finds in them."""

    def __post_init__(self):
        faults = find_faults(vars(self))
        if faults:
            raise ValueError("; ".join(text for _, text in faults))


@dataclass
class ScriptArguments(Checked):
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
            "help": "Column with the question or text. Unset: rows are read as `messages`, `conversations`, "
            "`prompt`/`completion` or `instruction`/`input`/`output`, whichever the columns are."
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
    mask_history: bool = field(
        default=False,
        metadata={"help": "Learn only the last answer of a conversation, and not the earlier ones that it builds on."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the run in `output_dir`, with its checkpoints, and start over."}
    )
    preflight_only: bool = field(
        default=False, metadata={"help": "Check the data, the memory and the plan, write preflight.json, and stop."}
    )
    allow: list[str] | None = field(
        default=None,
        metadata={"help": "Names of preflight checks that may fail; it is recorded that they were allowed to."},
    )
    preview_rows: int = field(default=2, metadata={"help": "Rows that preflight shows token by token."})
    clean_jamo: bool = field(
        default=False, metadata={"help": "Remove strings of bare jamo such as ㅋㅋㅋ from questions and answers."}
    )
    mask_pii: bool = field(
        default=False,
        metadata={
            "help": "Replace phone, resident registration, card, passport and car numbers, e-mail addresses, birth "
            "dates and addresses by special tokens such as #PhoneNumber#; see docs/cleaning.md for what is missed."
        },
    )
    special_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Tokens to add to the vocabulary, kept whole and shown in answers, e.g. '#Person1#'."},
    )


@dataclass
class RunArguments(Checked):
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
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run code that comes with the base model. For the run's own adapters it is run if training did so."
        },
    )
    num_prompts: int = field(default=4, metadata={"help": "Test samples on which adapter and merged model must agree."})
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest allowed difference of a logit. Unset: 0.02 times the largest logit where the base is "
            "bfloat16, 0.005 float16, 0.0001 float32, and at most a tenth of what the adapter changes."
        },
    )


@dataclass
class TestArguments(RunArguments):
    """Arguments of step 3, which lets checkpoints answer the test samples."""

    model_name: str = field(
        default="all",
        metadata={
            "help": "What answers: a checkpoint or another folder of the run that holds a model, `base`, a path, a Hub id, a "
            "glob such as 'checkpoint-*', or `all`, which is the base model and every such folder."
        },
    )
    num_samples: int = field(
        default=50,
        metadata={"help": "Number of test samples, drawn by their ids, so that 100 samples contain the first 50."},
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Prompts answered at once. Unset: as many as memory allows, at most 128."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Sample from the distribution; greedy otherwise."})
    temperature: float | None = field(default=None, metadata={"help": "Softmax temperature; needs do_sample."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of the distribution; needs do_sample."})
    top_k: int | None = field(default=None, metadata={"help": "Number of tokens to sample from; needs do_sample."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1 makes repetition less likely."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "No run of so many tokens comes twice."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams; more than one is slower, and cannot sample."})
    length_penalty: float | None = field(
        default=None, metadata={"help": "Above 0 favours long beams; needs num_beams."}
    )
    stop: list[str] | None = field(
        default=None, metadata={"help": "Strings at which an answer ends, itself without them."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype to load models in. Unset: bfloat16 on GPUs that have it, float16 on older ones, else float32.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the weights to 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the weights to 4 bits (bitsandbytes, nf4)."})
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run code that comes with models of others. That of the run's own base and checkpoints is run if training "
            "did so."
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "How layers are spread over GPUs; what does not fit there goes to memory, then to files. Unset: auto "
            "where there is a GPU, and each rank's own GPU under torchrun.",
            "choices": ["auto", "balanced", "balanced_low_0", "sequential"],
        },
    )
    engine: str = field(
        default="auto",
        metadata={
            "help": "What generates: transformers (batched, exact, needs nothing else), vllm (if it is installed), or "
            "openai (a server at base_url). auto: openai with a base_url, vllm with a GPU where it is installed, else "
            "transformers.",
            "choices": ["auto", "transformers", "vllm", "openai"],
        },
    )
    base_url: str | None = field(
        default=None,
        metadata={"help": "Address of a server that speaks the OpenAI API and serves the checkpoints by their names."},
    )
    concurrency: int | None = field(
        default=None, metadata={"help": "Requests in flight at once; needs base_url. Unset: 64."}
    )
    timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds that one reply may take, to its last byte; needs base_url. Unset: 600."},
    )
    rouge_tokenizer: str = field(
        default="auto",
        metadata={
            "help": "What ROUGE counts. auto: morphemes in Korean samples, words in all others.",
            "choices": ["auto", "words", "morphemes", "characters"],
        },
    )
    rescore: bool = field(
        default=False,
        metadata={"help": "Measure the predictions there are again, without a model, and answer nothing."},
    )
    submission: str | None = field(
        default=None,
        metadata={
            "help": "A csv to write the answers of one model to, one row for each row of the test split, with its column id, "
            "fname, idx or uid if it has one, else the row's number from 0."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Answer again, and replace the predictions there are."})


@dataclass
class JudgeArguments(RunArguments):
    """Arguments of step 4, which asks an LLM to score every prediction."""

    model_name: str = field(default="all", metadata={"help": "Predictions to judge: a name, a glob, or `all`."})
    judge_model: str = field(default=JUDGE_MODEL, metadata={"help": "Name of the judge at the endpoint."})
    judges: list[str] | None = field(
        default=None,
        metadata={"help": "Names of several judges, a jury: the mean of their scores, and how far they agree."},
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of a server that speaks the OpenAI API. Unset: OPENAI_BASE_URL, and without it OpenAI."
        },
    )
    judge_language: str = field(
        default="en", metadata={"help": "Language of the judge's instructions.", "choices": ["en", "ko"]}
    )
    rubric: str | None = field(
        default=None,
        metadata={
            "help": "Other criteria: file.py:ClassName of a class like `Evaluation` in finetuning/judge/form.py, or a YAML of "
            "`name: description` lines."
        },
    )
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Two models whose answers are compared with each other, in both orders, and not scored."},
    )
    human: str | None = field(
        default=None,
        metadata={
            "help": "A csv of scores that people gave (columns id, model, and score or criteria), to measure the judge by."
        },
    )
    expected_scores: bool = field(
        default=False,
        metadata={
            "help": "Also take the mean score under the judge's log-probabilities, where the endpoint gives them."
        },
    )
    mask_pii: bool = field(
        default=False,
        metadata={"help": "Mask personal data before it leaves this machine; see docs/cleaning.md for what is missed."},
    )
    mode: str = field(
        default="live",
        metadata={
            "help": "live: request by request. batch: the Batch API, which takes up to a day and costs half.",
            "choices": ["live", "batch"],
        },
    )
    collect: bool = field(
        default=False, metadata={"help": "With mode: batch, fetch what is ready of earlier batches, and send nothing."}
    )
    poll_seconds: float | None = field(
        default=None, metadata={"help": "Seconds between two looks at a batch; needs mode: batch. Unset: 30."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print what would be sent, what it would cost and one prompt, and send nothing."},
    )
    max_cost: float | None = field(
        default=None,
        metadata={"help": "Most US dollars that these evaluations may cost, those of earlier starts included."},
    )
    prices: str | None = field(
        default=None, metadata={"help": "Price table. Unset: finetuning/judge/prices.yaml, which you can edit."}
    )
    concurrency: int | None = field(
        default=None, metadata={"help": "Most requests in flight; fewer while the endpoint is busy. Unset: 8."}
    )
    requests_per_minute: float | None = field(default=None, metadata={"help": "Most requests to send in a minute."})
    tokens_per_minute: float | None = field(
        default=None, metadata={"help": "Most tokens to use in a minute, of prompts and replies."}
    )
    max_tokens: int = field(
        default=2048,
        metadata={
            "help": "Longest evaluation, in tokens, with any reasoning; twice as long where it was cut off or did not fit."
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of the judge. Unset: the endpoint's default; some models take no other."},
    )
    timeout: float = field(default=120.0, metadata={"help": "Seconds that one reply may take, to its last byte."})
    limit: int | None = field(
        default=None, metadata={"help": "Answers of each model that are judged: the same first ones by id. Unset: all."}
    )
    max_retries: int = field(
        default=8,
        metadata={"help": "Further attempts on 5xx, timeouts and broken connections; three times as many on 429."},
    )
    retry_failed: bool = field(
        default=True, metadata={"help": "Ask again for the judgements that failed on an earlier start."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Judge again, and replace the evaluations there are."})


OTHER_STEPS = {"2_merge_lora.py": MergeArguments, "3_test.py": TestArguments, "4_openai_test.py": JudgeArguments}
