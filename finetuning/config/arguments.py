"""
The arguments of steps 2 to 4, and those of step 1 about its data, each key declared once: default, help, limits, rules.

Step 1's others are in config/model_arguments.py and training/arguments.py, over those of trl. Imports without torch.
"""

from dataclasses import dataclass, field

from finetuning.config.checks import Checked, Rule, argument, needs, refuse, refuse_each
from finetuning.errors import to_line

MAX_SEED = 2**32 - 1
# checks of preflight that refuse a run
REFUSALS = (
    "terminator", "terminators_agree", "supervision", "empty_rows", "unknown_tokens", "leakage", "memory", "positions",
)  # fmt: skip
JUDGE_MODEL = "gpt-5.4-mini"
ROUNDING = ("auto", "nearest", "stochastic")
ROUNDING_HELP = (
    "How float32 weights become those of a lower dtype (docs/precision.md). auto: stochastic where rounding to nearest "
    "would keep less than 0.95 of what was learned."
)
NOT_OF_VLLM = {
    "load_in_8bit": False, "load_in_4bit": False, "device_map": None, "num_beams": 1, "no_repeat_ngram_size": 0,
    "min_new_tokens": 0, "early_stopping": False,
    "rounding": "auto",
}  # fmt: skip
NOT_OF_ENGINE = {  # keys of step 3 that an engine cannot obey, and their neutral values
    "vllm": NOT_OF_VLLM,
    "openai": {**NOT_OF_VLLM, "batch_size": None, "dtype": None},  # the server has loaded the model in its own way
}

# Rules about keys of several steps

OUTPUT_DIR: tuple[Rule, ...] = (
    refuse(lambda output_dir: output_dir is not None and not output_dir.strip(), "output_dir is empty; name a folder"),
    refuse(lambda output_dir: output_dir is not None and to_line(output_dir) != output_dir,
           "output_dir: {output_dir} holds a line break or another control character; choose another name"),
)  # fmt: skip
QUANTISED_TWICE = refuse(
    lambda load_in_8bit, load_in_4bit: load_in_8bit and load_in_4bit,
    "load_in_8bit and load_in_4bit are both true; keep one of them",
)
NO_ADDRESS = refuse(
    lambda base_url: base_url is not None and not base_url.startswith(("http://", "https://")),
    "base_url: {base_url} is no address; write it as http://localhost:8000/v1",
)


def split_names(names: list[str]) -> list[str]:
    """Names that were given as a list, or as one text with commas between them.

    >>> split_names(["a,b", "c"])
    ['a', 'b', 'c']
    """
    return [name.strip() for part in names for name in part.split(",") if name.strip()]


@dataclass
class ScriptArguments(Checked):
    """What step 1 trains on."""

    dataset_name: str = field(
        metadata={
            "help": "Data: a json, jsonl, csv or parquet file, a folder of them in which `train_dataset.json` or "
            "`train.jsonl` is the split `train`, or the id of a dataset on the Hub."
        }
    )
    dataset_config: str | None = argument(None, "Configuration of a dataset on the Hub.")
    dataset_train_split: str = argument(
        "train", "Split to train on; slices as in `train[:-50]` or `train[:10%%]` work."
    )
    dataset_eval_split: str | None = argument(None, "Split whose loss is measured while training, e.g. `train[-50:]`.")
    dataset_test_split: str = argument("test", "Split that step 3 answers.")
    question_key: str | None = argument(
        None,
        "Column with the question or text. Unset: rows are read as `messages`, `conversations`, `prompt`/`completion` "
        "or `instruction`/`input`/`output`, whichever the columns are.",
    )
    answer_key: str | None = argument(
        None,
        "Column with the answer. Where it is missing, `<answer_key>1`, `<answer_key>2`, ... are several references of "
        "one sample; training uses the first.",
    )
    question_template: str | None = argument(
        None, "How a question is phrased, with columns in braces: 'summarize: {dialogue}' or '{topic}: {dialogue}'."
    )
    system_prompt: str | None = argument(None, "System message put in front of rows that have none of their own.")
    drop_leaks: bool = argument(
        False,
        "Leave out training rows whose question equals, or nearly equals, one of the test or the validation split, and "
        "validation rows that a test sample equals so. Without it preflight warns of them.",
    )
    mask_history: bool = argument(
        False, "Learn only the last answer of a conversation, and not the earlier ones that it builds on."
    )
    overwrite: bool = argument(False, "Delete the run in `output_dir`, with its checkpoints, and start over.")
    preflight_only: bool = argument(False, "Check the data, the memory and the plan, write preflight.json, and stop.")
    allow: list[str] | None = argument(
        None, "Names of preflight checks that may fail; it is recorded that they were allowed to."
    )
    preview_rows: int = argument(2, "Rows that preflight shows token by token.", at_least=0)
    clean_jamo: bool = argument(False, "Remove strings of bare jamo such as ㅋㅋㅋ from questions and answers.")
    mask_pii: bool = argument(
        False,
        "Replace phone, resident registration, card, passport and car numbers, e-mail addresses, birth dates and "
        "addresses by special tokens such as #PhoneNumber#; see docs/cleaning.md for what is missed.",
    )
    special_tokens: list[str] | None = argument(
        None, "Tokens to add to the vocabulary, kept whole and shown in answers, e.g. '#Person1#'."
    )

    RULES = (
        refuse(lambda question_key, answer_key: (question_key is None) != (answer_key is None),
               "question_key and answer_key go together: set both, or neither"),
        refuse(lambda question_key, answer_key: question_key is not None and question_key == answer_key,
               "question_key and answer_key are both {question_key}; the model would learn to repeat the question"),
        refuse(lambda question_key, question_template: question_key is None and question_template is not None,
               "question_template phrases columns; set question_key and answer_key, or leave it out"),
        refuse(lambda question_key, mask_history: question_key is not None and mask_history,
               "mask_history has no effect with question_key, whose rows have one answer; leave it out"),
        refuse(lambda special_tokens: any(not token.strip() for token in special_tokens or []),
               "special_tokens: a token must not be empty; remove it"),
        refuse(lambda dataset_eval_split, eval_strategy: dataset_eval_split is not None and eval_strategy == "no",
               "dataset_eval_split and eval_strategy go together: eval_strategy is no, so {dataset_eval_split} would "
               "not be used; set eval_strategy to steps or epoch"),
        refuse(lambda overwrite, resume_from_checkpoint: overwrite
               and resume_from_checkpoint not in (None, "false", "False"),
               "overwrite deletes the run that resume_from_checkpoint goes on with; keep one of them"),
        refuse(lambda allow: [name for name in allow or [] if name not in REFUSALS],
               "allow: {found[0]} is none of the checks that refuse: " + ", ".join(REFUSALS)),
    )  # fmt: skip


@dataclass
class RunArguments(Checked):
    """Arguments by which steps 2 to 5 find their run."""

    output_dir: str | None = argument(None, "Folder of the run. Unset: the newest run under outputs/.")

    RULES = OUTPUT_DIR


@dataclass
class MergeArguments(RunArguments):
    """Arguments of step 2, which merges a LoRA adapter into its base model."""

    model_name: str | None = argument(None, "Checkpoint of the run, or path of an adapter. Unset: the last checkpoint.")
    merged_dir: str | None = argument(
        None, "Where to write the merged model. Unset: <adapter>-merged, beside the adapter."
    )
    trust_remote_code: bool = argument(
        False, "Run code that comes with the base model. For the run's own adapters it is run if training did so."
    )
    num_prompts: int = argument(4, "Test samples on which adapter and merged model must agree.", at_least=1)
    tolerance: float | None = argument(
        None,
        "Largest allowed difference of a logit. Unset: 0.02 times the largest logit where the base is bfloat16, 0.005 "
        "float16, 0.0001 float32, and at most a tenth of what the adapter changes.",
        more_than=0,
    )
    rounding: str = argument("auto", ROUNDING_HELP, ROUNDING)


@dataclass
class TestArguments(RunArguments):
    """Arguments of step 3, which lets checkpoints answer the test samples."""

    model_name: str = argument(
        "all",
        "What answers: a checkpoint or another folder of the run that holds a model, `base`, a path, a Hub id, a glob "
        "such as 'checkpoint-*', or `all`, which is the base model and every such folder.",
    )
    num_samples: int = argument(
        50, "Number of test samples, drawn by their ids, so that 100 samples contain the first 50.", at_least=1
    )
    batch_size: int | None = argument(
        None, "Prompts answered at once. Unset: as many as memory allows, at most 128.", at_least=1
    )
    max_new_tokens: int = argument(128, "Longest answer, in tokens.", at_least=1)
    do_sample: bool = argument(False, "Sample from the distribution; greedy otherwise.")
    temperature: float | None = argument(None, "Softmax temperature; needs do_sample.", at_least=0)
    top_p: float | None = argument(None, "Nucleus of the distribution; needs do_sample.", at_least=0, at_most=1)
    top_k: int | None = argument(None, "Number of tokens to sample from; needs do_sample.", at_least=0)
    repetition_penalty: float | None = argument(None, "Above 1 makes repetition less likely.", more_than=0)
    no_repeat_ngram_size: int | None = argument(None, "No run of so many tokens comes twice.", at_least=0)
    min_new_tokens: int | None = argument(None, "Shortest answer, in tokens.", at_least=0)
    num_beams: int | None = argument(None, "Beams; more than one is slower, and cannot sample.", at_least=1)
    length_penalty: float | None = argument(
        None, "Above 0 favours long beams; needs num_beams.", at_least=-10, at_most=10
    )
    early_stopping: bool | None = argument(
        None, "End a beam search as soon as num_beams answers have ended, and not when none can become better."
    )
    stop: list[str] | None = argument(None, "Strings at which an answer ends, itself without them.")
    seed: int = argument(42, "Seed of sampling.", at_least=0, at_most=MAX_SEED)
    dtype: str | None = argument(
        None,
        "dtype to load models in. Unset: bfloat16 on GPUs that have it, float16 on older ones, else float32.",
        ["bfloat16", "float16", "float32"],
    )
    rounding: str = argument("auto", ROUNDING_HELP, ROUNDING)
    load_in_8bit: bool = argument(False, "Quantise the weights to 8 bits (bitsandbytes).")
    load_in_4bit: bool = argument(False, "Quantise the weights to 4 bits (bitsandbytes, nf4).")
    trust_remote_code: bool = argument(
        False,
        "Run code that comes with models of others. That of the run's own base and checkpoints is run if training did "
        "so.",
    )
    device_map: str | None = argument(
        None,
        "How layers are spread over GPUs; what does not fit there goes to memory, then to files. Unset: auto where "
        "there is a GPU, and each rank's own GPU under torchrun.",
        ["auto", "balanced", "balanced_low_0", "sequential"],
    )
    engine: str = argument(
        "auto",
        "What generates: transformers (batched, exact, needs nothing else), vllm (if it is installed), or openai (a "
        "server at base_url). auto: openai with a base_url, vllm with a GPU where it is installed, else transformers.",
        ["auto", "transformers", "vllm", "openai"],
    )
    base_url: str | None = argument(
        None, "Address of a server that speaks the OpenAI API and serves the checkpoints by their names."
    )
    concurrency: int | None = argument(None, "Requests in flight at once; needs base_url. Unset: 64.", at_least=1)
    timeout: float | None = argument(
        None, "Seconds that one reply may take, to its last byte; needs base_url. Unset: 600.", more_than=0
    )
    rouge_tokenizer: str = argument(
        "auto",
        "What ROUGE counts. auto: morphemes in Korean samples, words in all others.",
        ["auto", "words", "morphemes", "characters"],
    )
    rescore: bool = argument(False, "Measure the predictions there are again, without a model, and answer nothing.")
    submission: str | None = argument(
        None,
        "A csv to write the answers of one model to, one row for each row of the test split, with its column id, "
        "fname, idx or uid if it has one, else the row's number from 0.",
    )
    overwrite: bool = argument(False, "Answer again, and replace the predictions there are.")

    RULES = (
        QUANTISED_TWICE, NO_ADDRESS,
        needs("do_sample: true", {"temperature": None, "top_p": None, "top_k": None}, lambda do_sample: not do_sample),
        refuse(lambda do_sample, temperature: do_sample and temperature is not None and temperature <= 0,
               "temperature: must be more than 0 with do_sample: true, got {temperature}; for greedy answers, "
               "do_sample: false"),
        refuse(lambda min_new_tokens, max_new_tokens: (min_new_tokens or 0) > max_new_tokens,
               "min_new_tokens: {min_new_tokens} is more than max_new_tokens: {max_new_tokens}"),
        refuse(lambda do_sample, num_beams: do_sample and (num_beams or 1) > 1,
               "do_sample and num_beams: {num_beams} exclude each other; keep one of them"),
        needs("num_beams of 2 or more", {"length_penalty": None, "early_stopping": None},
              lambda num_beams: (num_beams or 1) == 1),
        refuse(lambda stop: any(not text for text in stop or []),
               "stop: an empty text would end every answer at once; leave it out"),
        refuse(lambda engine, base_url: engine == "openai" and base_url is None,
               "engine: openai needs base_url, the address of the server, e.g. http://localhost:8000/v1"),
        refuse(lambda engine, base_url: engine in ("transformers", "vllm") and base_url is not None,
               "base_url is for engine: openai, not {engine}; leave one of them out"),
        needs("base_url", {"concurrency": None, "timeout": None}, lambda base_url: base_url is None),
        refuse_each(NOT_OF_ENGINE["vllm"], lambda engine, base_url: engine == "vllm" and not base_url,
                    "{key} is not known to the engine vllm; use engine: transformers, or leave it out"),
        refuse_each(NOT_OF_ENGINE["openai"], lambda engine, base_url: engine == "openai" or base_url,
                    "{key} is not known to the engine openai; use engine: transformers, or leave it out"),
        refuse_each({"rounding": "auto"}, lambda load_in_8bit, load_in_4bit: load_in_8bit or load_in_4bit,
                    "{key} has no effect with load_in_8bit or load_in_4bit, which quantise the weights; leave it out"),
        refuse_each({"submission": None, "overwrite": False}, lambda rescore: rescore,
                    "{key} contradicts rescore, which measures the answers there are; leave one of them out"),
    )  # fmt: skip


@dataclass
class JudgeArguments(RunArguments):
    """Arguments of step 4, which asks an LLM to score every prediction."""

    model_name: str = argument("all", "Predictions to judge: a name, a glob, or `all`.")
    judge_model: str = argument(JUDGE_MODEL, "Name of the judge at the endpoint.")
    judges: list[str] | None = argument(
        None, "Names of several judges, a jury: the mean of their scores, and how far they agree."
    )
    base_url: str | None = argument(
        None, "Address of a server that speaks the OpenAI API. Unset: OPENAI_BASE_URL, and without it OpenAI."
    )
    judge_language: str = argument("en", "Language of the judge's instructions.", ["en", "ko"])
    rubric: str | None = argument(
        None,
        "Other criteria: file.py:ClassName of a class like `Evaluation` in finetuning/judge/form.py, or a YAML of "
        "`name: description` lines.",
    )
    compare: list[str] | None = argument(
        None, "Two models whose answers are compared with each other, in both orders, and not scored."
    )
    human: str | None = argument(
        None, "A csv of scores that people gave (columns id, model, and score or criteria), to measure the judge by."
    )
    audit: bool = argument(
        False,
        "Test the judge in place of the answers: how often it scores a reference higher than another sample's, than "
        "itself with its speakers swapped, and than a half of itself.",
    )
    expected_scores: bool = argument(
        False, "Also take the mean score under the judge's log-probabilities, where the endpoint gives them."
    )
    mask_pii: bool = argument(
        False, "Mask personal data before it leaves this machine; see docs/cleaning.md for what is missed."
    )
    mode: str = argument(
        "live",
        "live: request by request. batch: the Batch API, which takes up to a day and costs half.",
        ["live", "batch"],
    )
    collect: bool = argument(False, "With mode: batch, fetch what is ready of earlier batches, and send nothing.")
    poll_seconds: float | None = argument(
        None, "Seconds between two looks at a batch; needs mode: batch. Unset: 30.", at_least=0.01, at_most=86_400
    )
    dry_run: bool = argument(False, "Print what would be sent, what it would cost and one prompt, and send nothing.")
    max_cost: float | None = argument(
        None,
        "Most US dollars that these evaluations may cost, with those of earlier starts that are kept.",
        more_than=0,
    )
    prices: str | None = argument(None, "Price table. Unset: finetuning/judge/prices.yaml, which you can edit.")
    concurrency: int | None = argument(
        None, "Most requests in flight; fewer while the endpoint is busy. Unset: 8.", at_least=1
    )
    requests_per_minute: float | None = argument(None, "Most requests to send in a minute.", at_least=0.01)
    tokens_per_minute: float | None = argument(
        None, "Most tokens to use in a minute, of prompts and replies.", at_least=1
    )
    max_tokens: int = argument(
        2048,
        "Longest evaluation, in tokens, with any reasoning; twice as long where it was cut off or did not fit.",
        at_least=1,
    )
    temperature: float | None = argument(
        None, "Temperature of the judge. Unset: the endpoint's default; some models take no other.", at_least=0
    )
    timeout: float = argument(120.0, "Seconds that one reply may take, to its last byte.", more_than=0)
    limit: int | None = argument(
        None, "Answers of each model that are judged: the same first ones by id. Unset: all.", at_least=1
    )
    max_retries: int = argument(
        8, "Further attempts on 5xx, timeouts and broken connections; three times as many on 429.", at_least=0
    )
    retry_failed: bool = argument(True, "Ask again for the judgements that failed on an earlier start.")
    overwrite: bool = argument(False, "Judge again, and replace the evaluations there are.")

    RULES = (
        NO_ADDRESS,
        refuse(lambda judge_model: not judge_model.strip(), "judge_model is empty; name a model"),
        refuse(lambda judge_model, judges: any(to_line(name) != name for name in (judge_model, *(judges or ()))),
               "judge_model and judges: a name holds a line break or another control character; write it without"),
        refuse(lambda judges, judge_model: judges is not None and judge_model != JUDGE_MODEL,
               "judges and judge_model: {judge_model} exclude each other; name every judge with judges"),
        refuse(lambda judges: judges is not None
               and len({name.lower() for name in split_names(judges)}) < len(set(split_names(judges))),
               "judges: two of the names differ in capitals only, and some file systems would give them one folder"),
        refuse(lambda judges: judges is not None and len(set(split_names(judges))) < 2,
               "judges: a jury has two or more different judges; for one, use judge_model"),
        refuse(lambda compare: compare is not None and not len(compare) == len(set(compare)) == 2,
               "compare takes two different models, as in --compare checkpoint-148 checkpoint-296"),
        refuse_each({"judges": None, "human": None, "expected_scores": False, "model_name": "all"},
                    lambda compare: compare is not None,
                    "{key} has no effect with compare, which asks one judge (judge_model); leave it out"),
        refuse_each({"compare": None, "human": None, "model_name": "all"}, lambda audit: audit,
                    "{key} has no effect with audit, which asks about references; leave one of them out"),
        refuse_each({"concurrency": None, "requests_per_minute": None, "tokens_per_minute": None},
                    lambda mode: mode == "batch", "{key} has no effect with mode: batch; leave it out"),
        needs("mode: batch", {"collect": False, "poll_seconds": None}, lambda mode: mode == "live"),
        refuse_each({"dry_run": False, "overwrite": False, "poll_seconds": None, "max_cost": None},
                    lambda collect: collect,
                    "{key} contradicts collect, which fetches what is ready and sends nothing; leave one of them out"),
    )  # fmt: skip


OTHER_STEPS = {"2_merge_lora.py": MergeArguments, "3_test.py": TestArguments, "4_openai_test.py": JudgeArguments}
