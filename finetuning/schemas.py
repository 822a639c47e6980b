"""
What the files of a run hold. They are checked as they are read, so that a fault is named by its file and line.

Keys that a schema does not name are let through, as a step may record more than another one reads.
Imports without torch.
"""

from typing import Annotated, Any, Generic, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator, with_config
from typing_extensions import TypedDict  # Python 3.11's own tells pydantic too little

from finetuning.errors import InputError


@with_config(ConfigDict(extra="allow", strict=True, allow_inf_nan=False))
class Object(TypedDict):
    """A JSON object whose values have the types that stand here: "7" is not taken for a number, and NaN is refused."""


ANY_OBJECT = TypeAdapter(Object)


def _as_written(value, check):
    """The value itself: a whole number that is checked as a float stays one."""
    check(value)
    return value


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character, such as \\ud800 alone, is no text") from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, WrapValidator(_as_written)]
Amount = Annotated[Number, Field(ge=0, le=2**53)]
Score = Annotated[Number, Field(ge=1, le=10)]
MeanScore = Annotated[Number, Field(ge=1 - 1e-6, le=10 + 1e-6)]  # of floats


class Row(Object):
    """What every row of answers or judgements has."""

    id: Annotated[Text, Field(min_length=1)]


class Message(Object):
    role: Text
    content: Text  # a call of a tool as text, too


class PredictionRow(Row):
    """One row of step 3; `prediction` is null where `finish_reason` is error."""

    messages: list[Message]
    references: list[Text]
    prediction: Text | None
    num_prompt_tokens: Count
    num_new_tokens: Count
    finish_reason: Literal["stop", "length", "error"]
    removed_tokens: NotRequired[dict[Text, Count]]
    error: Text | None


class Judged(Object):
    explanation: Text
    score: Score


class Preferred(Object):
    explanation: Text
    better: Literal["first", "second", "tie"]


class JudgedRow(Row):
    """What a row of step 4 has, whatever was judged."""

    prediction_hash: Text
    status: Literal["ok", "refusal", "truncated", "content_filter", "invalid", "error"]
    expected: dict[str, MeanScore] | None
    usage: dict[str, Count] | None
    cost: Amount | None
    possible_cost: Amount
    replied_as: NotRequired[Text | None]
    shared_with: NotRequired[Text]
    error: Text | None


class EvaluationRow(JudgedRow):
    """One row of step 4; `evaluation` is null where `status` is not ok."""

    evaluation: dict[str, Judged] | None


class ComparisonRow(JudgedRow):
    """One row of `--compare`: a pair in one order."""

    evaluation: Preferred | None
    order: Literal["AB", "BA"]


def _check_prediction(row: dict) -> dict:
    if (row["finish_reason"] == "error") != (row["prediction"] is None):
        raise ValueError("`prediction` must be null where `finish_reason` is error, and a text elsewhere")
    return row


def _check_evaluation(row: dict) -> dict:
    if (row["status"] == "ok") != bool(row["evaluation"]):
        raise ValueError("`evaluation` must hold scores where `status` is ok, and be null elsewhere")
    return row


ROW = TypeAdapter(Row)
PREDICTION = TypeAdapter(Annotated[PredictionRow, AfterValidator(_check_prediction)])
EVALUATION = TypeAdapter(Annotated[EvaluationRow, AfterValidator(_check_evaluation)])
COMPARISON = TypeAdapter(Annotated[ComparisonRow, AfterValidator(_check_evaluation)])


# Beside rows stands how they were made


class Metrics(Object):
    """What step 3 measures; `per_sample` has a list for `id` and for each measure, in the order of the rows."""

    num_samples: Count
    num_errors: Count
    rouge_tokenizer: NotRequired[Literal["auto", "words", "morphemes", "characters"]]
    per_sample: dict[str, list]


def _is_measure(name: str, value) -> bool:
    largest = 2**53 if name == "length_ratio" else 1 + 1e-6  # the others are shares
    return type(value) in (int, float) and 0 <= value <= largest  # NaN is not, either


def _check_metrics(metrics: dict) -> dict:
    ids = metrics["per_sample"].get("id")
    if ids is None or not all(isinstance(sample_id, str) for sample_id in ids):
        raise ValueError("`per_sample` has no list of ids")
    if len(set(ids)) < len(ids):
        raise ValueError("`per_sample.id` names a sample twice")
    if any(len(column) != len(ids) for column in metrics["per_sample"].values()):
        raise ValueError("the lists of `per_sample` are not equally long")
    for name, column in metrics["per_sample"].items():
        if name != "id" and not all(value is None or _is_measure(name, value) for value in column):
            raise ValueError(f"`per_sample.{name}` holds something else than numbers that this measure can have")
    return metrics


class PredictionInfo(Object):
    identity: dict[str, Any]
    kept: NotRequired[dict[Text, Number]]
    seconds: Amount
    metrics: NotRequired[Annotated[Metrics, AfterValidator(_check_metrics)] | None]  # null until all is answered


class Criteria(Object):
    criteria: list[Text]


class Judges(Object):
    judge_model: Text | list[Text]  # several are a jury


class Compared(Object):
    judge_model: Text
    models: Annotated[list[Text], Field(min_length=2, max_length=2)]


Identity = TypeVar("Identity")


class Judgements(Object, Generic[Identity]):
    """Beside rows of step 4: who judged, what, by which criteria."""

    identity: Identity


class Share(Object):
    value: Number
    low: Number
    high: Number
    num_samples: Count


class Audit(Object):
    """Beside a judge's scores of references: how often these are the higher ones, by the kind of the other text."""

    identity: dict[str, Any]
    preferred: NotRequired[dict[Text, dict[Text, Share]]]  # by score and by expected score


class HumanRow(Object):
    id: Text
    model: Text
    measure: Text
    score: Score
    prediction_hash: Text


class HumanAgreement(Object):
    """What people gave to answers; only what `--human` has written lately has the scores."""

    scores: NotRequired[list[HumanRow]]


class Info(Object):
    identity: dict[str, Any]
    seconds: NotRequired[Amount]


class Batch(Object):
    """How far a batch of requests is; what names it at the endpoint is there from some status on."""

    status: Literal["written", "uploaded", "submitted", "downloaded", "collected", "failed", "given up"]
    identity: dict
    attempt: Count
    num_requests: Count
    most_cost: Amount
    created: Amount
    endpoint: NotRequired[Text]
    input_file_id: NotRequired[Text]
    batch_id: NotRequired[Text]
    ended: NotRequired[Text]
    files: NotRequired[list[Text | None]]


KEYS_OF_BATCH = {
    "uploaded": ("endpoint", "input_file_id"), "submitted": ("endpoint", "batch_id"),
    "downloaded": ("endpoint", "batch_id", "ended"),
}  # fmt: skip


def _check_batch(batch: dict) -> dict:
    for key in KEYS_OF_BATCH.get(batch["status"], ()):
        if key not in batch:
            raise ValueError(f"it is {batch['status']} and has no `{key}`")
    return batch


class Asked(Object):
    id: Text
    prediction_hash: Text


class BatchItem(Object):
    """What a request of a batch is about."""

    custom_id: Text
    row: Asked
    worst_cost: NotRequired[Amount]  # US dollars


BATCH, BATCH_ITEM = TypeAdapter(Annotated[Batch, AfterValidator(_check_batch)]), TypeAdapter(BatchItem)
INFO, PREDICTION_INFO = TypeAdapter(Info), TypeAdapter(PredictionInfo)
EVALUATION_INFO, JUDGES_INFO = TypeAdapter(Judgements[Criteria]), TypeAdapter(Judgements[Judges])
COMPARISON_INFO, AUDIT_INFO = TypeAdapter(Judgements[Compared]), TypeAdapter(Audit)
HUMAN_AGREEMENT = TypeAdapter(HumanAgreement)


# What comes with a model


class Precision(Object):
    """precision.json: in which form the weights beside it are, and what rounding to nearest keeps of their update."""

    dtype: Text
    rounding: Text | None
    kept: dict[Text, Number]
    left_out: list[Text]


class GenerationSettings(Object):
    """Of generation_config.json, what answers are generated by."""

    do_sample: NotRequired[bool | None]
    temperature: NotRequired[Amount | None]
    top_p: NotRequired[Annotated[Number, Field(gt=0, le=1)] | None]
    top_k: NotRequired[Count | None]
    num_beams: NotRequired[Annotated[Count, Field(ge=1)] | None]
    length_penalty: NotRequired[Annotated[Number, Field(ge=-10, le=10)] | None]
    repetition_penalty: NotRequired[Annotated[Number, Field(gt=0)] | None]
    no_repeat_ngram_size: NotRequired[Count | None]
    min_new_tokens: NotRequired[Count | None]
    early_stopping: NotRequired[bool | Text | None]
    decoder_start_token_id: NotRequired[Count | None]
    forced_bos_token_id: NotRequired[Count | None]


PRECISION, GENERATION_CONFIG = TypeAdapter(Precision), TypeAdapter(GenerationSettings)


# What step 1 writes


class RunConfig(Object):
    model_name_or_path: Text
    model_revision: NotRequired[Text | None]
    trust_remote_code: NotRequired[bool]
    dataset_name: Text
    dataset_config: NotRequired[Text | None]
    dataset_test_split: Text
    question_key: NotRequired[Text | None]
    answer_key: NotRequired[Text | None]
    system_prompt: NotRequired[Text | None]
    clean_jamo: NotRequired[bool]
    mask_pii: NotRequired[bool]
    mask_history: NotRequired[bool]


def _check_columns(config: dict) -> dict:
    if (config.get("question_key") is None) != (config.get("answer_key") is None):
        raise ValueError("it has one of `question_key` and `answer_key` without the other")
    return config


class Split(Object):
    rows: int
    hash: Text


class Data(Object):
    train: Split


class Hardware(Object):
    devices: list[Text]


class Parallelism(Object):
    kind: Text
    world_size: int


class RunRecord(Object):
    """Of run.json, what is read: the model and the data of tests, what the page shows, what training goes on by."""

    command: list[Text]
    finished: Text | None
    config: Annotated[RunConfig, AfterValidator(_check_columns)]
    global_batch_size: int
    data: Data
    chat_template: Text | None
    libraries: dict[Text, Text]
    git_commit: Text | None
    hardware: Hardware
    parallelism: Parallelism


class Finding(Object):
    level: Text
    check: Text
    text: Text
    rows: list[int]


class PreviewedRow(Object):
    row: int
    tokens: list[Annotated[list, Field(min_length=3, max_length=3)]]  # text, learned, special
    left_out: int


class Preflight(Object):
    findings: list[Finding]
    preview: list[PreviewedRow]


@with_config(ConfigDict(extra="allow", strict=True))
class LogEntry(Object):
    """Figures of one step; the loss of a training that has diverged is NaN or infinite."""

    step: Count
    loss: NotRequired[float | None]
    grad_norm: NotRequired[float | None]
    eval_loss: NotRequired[float | None]
    num_tokens: NotRequired[Number]


class TrainingLog(Object):
    """trainer_state.json of a checkpoint, as far as its log is shown."""

    log_history: list[LogEntry]


class TrainerState(TrainingLog):
    """The same file, as far as training goes on from it."""

    global_step: Annotated[int, Field(ge=1)]


RUN_RECORD, PREFLIGHT = TypeAdapter(RunRecord), TypeAdapter(Preflight)
TRAINING_LOG, TRAINER_STATE = TypeAdapter(TrainingLog), TypeAdapter(TrainerState)


def check(content, schema: TypeAdapter, where: str, remedy: str):
    """The content, if it fits the schema.

    Args:
        where: The file, and the line if the content is one.
        remedy: What to do if it does not fit.

    Raises:
        InputError: It does not; names the first key that is wrong.
    """
    try:
        return schema.validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "missing":
            text = f"has no `{key}`"
        else:
            text = f"cannot be read: {key and f'`{key}`: '}{fault['msg'].removeprefix('Value error, ')}"
        raise InputError(f"{where} {text}; {remedy}") from None
