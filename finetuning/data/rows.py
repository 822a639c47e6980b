"""
Data rows and how a row is phrased: the one place where training, testing and judging get prompts and answers from.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, Features, Json, Value

from finetuning.config.arguments import ScriptArguments
from finetuning.data.conversations import as_texts, prepare_message, read_messages, read_tools, text_of
from finetuning.data.files import load_split
from finetuning.data.fingerprints import fingerprint_of_result
from finetuning.data.jamo import clean_jamo
from finetuning.data.pii import PII_TOKENS, mask_pii
from finetuning.errors import InputError


@dataclass(frozen=True)
class RowFormat:
    """Which columns hold what, and how their text is prepared. `kind` is messages, prompt, instruction or columns.

    Only the rows of a test split can be without `reference_keys`, which is without answers.
    """

    kind: str
    question_key: str
    reference_keys: tuple[str, ...]
    system_prompt: str | None = None
    clean_jamo: bool = False
    mask_pii: bool = False
    mask_history: bool = False
    unused: tuple[str, ...] = ()  # columns that are not read

    def describe(self) -> str:
        references = "" if self.kind == "messages" else f" -> {', '.join(self.reference_keys)}"
        added = [
            text
            for text, given in (
                ("with a system prompt", self.system_prompt),
                ("without bare jamo", self.clean_jamo),
                ("with personal data masked", self.mask_pii),
            )
            if given
        ]
        unused = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return " ".join([f"{self.question_key}{references}", ", ".join(added)]).strip() + unused

    def prepare(self, text: str) -> str:
        """The text as training and testing see it."""
        text = clean_jamo(text) if self.clean_jamo else text
        return mask_pii(text) if self.mask_pii else text


ASKING = ("user", "human", "tool", "observation", "function_response")  # roles of messages that an assistant answers
FORMAT_KEYS = ("question_key", "answer_key", "system_prompt", "clean_jamo", "mask_pii", "mask_history")


def tokens_to_add(args: ScriptArguments) -> list[str]:
    """Tokens that the vocabulary needs for these rows: `special_tokens`, and those that stand for personal data."""
    return list(dict.fromkeys([*(args.special_tokens or []), *(PII_TOKENS.values() if args.mask_pii else [])]))


def find_row_format(
    column_names: list[str],
    question_key: str | None = None,
    answer_key: str | None = None,
    mask_history: bool = False,
    needs_answer: bool = True,
    **preparation,
) -> RowFormat:
    """Decide how rows with these columns are read.

    Args:
        needs_answer: Whether columns with questions alone are refused.
        preparation: system_prompt, clean_jamo and mask_pii.

    >>> find_row_format(["dialogue", "summary1", "summary2"], "dialogue", "summary").reference_keys
    ('summary1', 'summary2')
    """
    columns = set(column_names)

    def unused(*used: str) -> tuple[str, ...]:
        return tuple(column for column in column_names if column not in used)

    if question_key is not None:
        numbered = [c for c in column_names if re.fullmatch(rf"{re.escape(answer_key)}\d+", c)]
        references = (
            [answer_key] if answer_key in columns else sorted(numbered, key=lambda c: int(c[len(answer_key) :]))
        )
        missing = [
            key
            for key, found in ((question_key, question_key in columns), (answer_key, references or not needs_answer))
            if not found
        ]
        if missing:
            raise InputError(f"no column `{missing[0]}`; the columns are {', '.join(column_names)}")
        kind, keys = "columns", (question_key, tuple(references))
        return RowFormat(kind, *keys, **preparation, unused=unused(question_key, *references))
    forms = (
        ("messages", "messages", ("messages",), ["tools"]),
        ("messages", "conversations", ("conversations",), ["tools"]),
        ("prompt", "prompt", ("completion",), ["tools"]),
        ("instruction", "instruction", ("output",), ["input"]),
    )
    without_answers = tuple((kind, question, (), others) for kind, question, _, others in forms)
    for kind, question, answer, others in forms if needs_answer else forms + without_answers:
        if {question, *answer} <= columns:
            if mask_history and kind == "instruction":
                raise InputError("mask_history has no effect on instruction and output; leave it out")
            rest = unused(question, *answer, *others)
            return RowFormat(kind, question, answer, **preparation, mask_history=mask_history, unused=rest)
    raise InputError(
        f"the columns {', '.join(column_names)} are neither messages, nor prompt and completion, nor instruction and "
        "output, nor conversations; set question_key and answer_key to the columns with the question and its answer"
    )


def _text(row: dict, key: str) -> str:
    value = row[key]
    if value is None or value != value:  # NaN
        raise InputError(f"`{key}` is empty")
    if isinstance(value, (dict, list, bytes)):
        raise InputError(f"`{key}` must be text, not {type(value).__name__}")
    return str(value)


def _read_row(row: dict, row_format: RowFormat) -> tuple[list[dict], list[int], list[str]]:
    """One data row.

    Returns:
        Its messages, the last being the answer if it has one; places of the messages to learn; references, of which the
        first is the answer.

    Raises:
        InputError: The row has no question or no answer.
    """
    kind, key, has_answer = row_format.kind, row_format.question_key, bool(row_format.reference_keys)
    if kind == "messages" or (kind == "prompt" and isinstance(row["prompt"], list)):
        keys, (messages, learnable) = f"`{key}`", read_messages(row[key], key)
        if kind == "prompt" and has_answer:
            keys, completion = "`prompt` with `completion`", row["completion"]
            if not isinstance(completion, list):
                completion = [{"role": "assistant", "content": _text(row, "completion")}]
            completion, learnable_of_it = read_messages(completion, "completion")
            messages, learnable = messages + completion, [False] * len(messages) + learnable_of_it
        if not has_answer and (not messages or messages[-1]["role"] not in ("user", "tool")):
            raise InputError(f"{keys} must end with a user's message, as in the first row, which has no answer either")
        if has_answer and [message["role"] for message in messages[-2:]] not in (
            ["user", "assistant"],
            ["tool", "assistant"],
        ):
            raise InputError(f"{keys} must end with an assistant's message that answers a user's")
        # what an assistant says before anybody has asked, as a greeting, answers nothing
        question = next(place for place, message in enumerate(messages) if message["role"] in ("user", "tool"))
        learned = [place for place, is_learnable in enumerate(learnable) if is_learnable and place > question]
        learned = [place for place in learned if not row_format.mask_history or place == len(messages) - 1]
        further_references = []
    else:
        question = _text(row, key)
        if kind == "instruction" and row.get("input"):
            question = f"{question}\n\n{_text(row, 'input')}"
        answer = [_text(row, key) for key in row_format.reference_keys[:1]]
        further_references = [_text(row, key) for key in row_format.reference_keys[1:]]
        messages = [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in answer)]
        learned = [1]
    messages = [m if m["role"] == "system" else prepare_message(m, row_format.prepare) for m in messages]
    if row_format.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row_format.system_prompt}, *messages]
        learned = [place + 1 for place in learned]
    references = [text_of(messages[-1]), *map(row_format.prepare, further_references)] if has_answer else []
    return messages, learned, references


def _tools_of(row: dict, row_format: RowFormat) -> list[dict] | None:
    return read_tools(row.get("tools")) if row_format.kind in ("messages", "prompt") else None


def to_sample(row: dict, row_format: RowFormat) -> dict:
    """Phrase one data row.

    Returns:
        {"prompt": [{"role", "content", ...}, ...], "references": [str, ...]}, and "tools" if the row has some. The prompt
        ends with the user's message, or a tool's; of several turns the last answer is the reference, as text, and the
        earlier ones are part of the prompt. There are no references where the split has no answers.

    Raises:
        InputError: The row has no question or no answer.
    """
    messages, _, references = _read_row(row, row_format)
    tools = _tools_of(row, row_format)
    prompt = messages[:-1] if row_format.reference_keys else messages
    return {"prompt": prompt, "references": references, **({"tools": tools} if tools else {})}


TRAINING_FEATURES = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "completion": [{"role": Value("string"), "content": Value("string")}],
        "learned": [Value("int32")],
        "conversation": Value("string"),
    }
)


def to_training_row(row: dict, row_format: RowFormat) -> dict:
    """One data row as RowPreparation takes it.

    Returns:
        Prompt and completion as texts; in `learned` the places, in both together, of the messages that the loss is on; in
        `conversation` messages and tools with all that they hold, as JSON, where that is more than texts: in a column of
        objects Arrow gives all of them the same keys.
    """
    messages, learned, _ = _read_row(row, row_format)
    tools, texts = _tools_of(row, row_format), as_texts(messages)
    whole = json.dumps({"messages": messages, "tools": tools}) if tools or messages != texts else None
    return {"prompt": texts[:-1], "completion": texts[-1:], "learned": learned, "conversation": whole}


def format_of(dataset: Dataset, where: str, given: dict) -> RowFormat:
    """How the rows of a split are read.

    Raises:
        InputError: Columns are missing, or do not hold what was written in the files.
    """
    try:
        row_format = find_row_format(dataset.column_names, **given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if dataset.info.builder_name == "json":  # files of the Hub, which `datasets` reads; local ones we read ourselves
        for column in {row_format.question_key, *row_format.reference_keys}:
            feature = dataset.features[column]
            if isinstance(feature, Json) or str(getattr(feature, "dtype", "")).startswith(("float", "timestamp")):
                raise InputError(
                    f"{where}: `datasets` has read the column `{column}` of JSON files as {getattr(feature, 'dtype', 'JSON')}, "
                    "and what is written there may be something else; download the files, and name their folder"
                )
    return row_format


def _load_prompts_and_completions(args: ScriptArguments, split: str) -> tuple[Dataset, RowFormat]:
    """Load a split as training rows, with the format in which its rows were read.

    `datasets` caches the result on disk.
    """
    dataset = load_split(args.dataset_name, split, args.dataset_config)
    given = {key: getattr(args, key) for key in FORMAT_KEYS}
    row_format = format_of(dataset, f"{args.dataset_name} ({split})", given)
    try:
        rows = dataset.map(
            to_training_row,
            fn_kwargs={"row_format": row_format},
            remove_columns=dataset.column_names,
            features=TRAINING_FEATURES,
            new_fingerprint=fingerprint_of_result(dataset._fingerprint, row_format),
            desc=f"Reading {split}",
        )
    except InputError:
        raise InputError(describe_bad_rows(dataset, row_format, f"{args.dataset_name} ({split})")) from None
    return rows.with_format(None), row_format


def describe_bad_rows(dataset: Dataset, row_format: RowFormat, where: str) -> str:
    """Every row that cannot be read, by what is wrong with it."""
    bad: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        try:
            to_sample(row, row_format)
        except InputError as error:
            bad.setdefault(str(error), []).append(index)
    faults = []
    for fault, rows in bad.items():
        shown = ", ".join(str(row) for row in rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        faults.append(f"row{'s' if len(rows) > 1 else ''} {shown}: {fault}")
    return f"{where}, {'; '.join(faults)}. Correct or delete them (the first row is 0)"


def load_training_rows(args: ScriptArguments) -> tuple[Dataset, Dataset | None, RowFormat]:
    """Load the training split, and the validation split if there is one, as prompts and completions."""
    train_rows, row_format = _load_prompts_and_completions(args, args.dataset_train_split)
    eval_rows = None
    if args.dataset_eval_split is not None:
        eval_rows, _ = _load_prompts_and_completions(args, args.dataset_eval_split)
    return train_rows, eval_rows, row_format


class TestSamples(Sequence):
    """Samples of a test split, {"id", "prompt", "references"}, ordered by `id` and read from the data when asked for."""

    __test__ = False  # no test of pytest's

    def __init__(self, dataset: Dataset, row_format: RowFormat, rows: list[tuple[str, list[int]]]):
        self.dataset, self.row_format = dataset, row_format
        self._rows = rows  # id, and the rows that ask the same
        self._places = {sample_id: place for place, (sample_id, _) in enumerate(rows)}

    @property
    def ids(self) -> list[str]:
        return [sample_id for sample_id, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return TestSamples(self.dataset, self.row_format, self._rows[place])
        sample_id, rows = self._rows[place]
        return {"id": sample_id, **_join_rows(self.dataset, self.row_format, rows)}

    @property
    def have_references(self) -> bool:
        return bool(self.row_format.reference_keys)

    def rows_of(self, place: int) -> list[int]:
        """The rows of the split that a sample is made of."""
        return self._rows[place][1]

    def by_id(self, sample_id: str) -> dict:
        return self[self._places[sample_id]]


def _join_rows(dataset: Dataset, row_format: RowFormat, rows: list[int]) -> dict:
    """Rows that ask the same, as one sample."""
    samples = [to_sample(dataset[row], row_format) for row in rows]
    references = dict.fromkeys(reference for sample in samples for reference in sample["references"])
    return {**samples[0], "references": list(references)}


def load_test_samples(config: dict) -> TestSamples:
    """Load the test split as samples, ordered by `id`.

    Rows that ask the same are one sample with several references, as in DialogSum's test split on the Hub. An id is a
    hash of the sample's content, so it stays the same wherever the sample stands in the file, and the first N samples
    are a random choice that contains the first N - 1.

    Args:
        config: The keys of ScriptArguments, as `run.json` has them.
    """
    name, split = config["dataset_name"], config["dataset_test_split"]
    dataset = load_split(name, split, config.get("dataset_config"))
    given = {key: config[key] for key in FORMAT_KEYS if config.get(key) is not None}
    row_format = _format_of_test(dataset, f"{name} ({split})", given)
    by_prompt: dict[bytes, list[int]] = {}
    ids: dict[bytes, str] = {}  # of the first row of each prompt, by itself
    for index, row in enumerate(dataset):
        try:
            sample = to_sample(row, row_format)
        except InputError:
            raise InputError(describe_bad_rows(dataset, row_format, f"{name} ({split})")) from None
        prompt = hashlib.sha256(json.dumps(_question_of(sample)).encode()).digest()
        by_prompt.setdefault(prompt, []).append(index)
        ids.setdefault(prompt, _id_of(sample))
    samples = [
        (_id_of(_join_rows(dataset, row_format, rows)) if len(rows) > 1 else ids[prompt], rows)
        for prompt, rows in by_prompt.items()
    ]
    return TestSamples(dataset, row_format, sorted(samples))


def _format_of_test(dataset: Dataset, where: str, given: dict) -> RowFormat:
    """How the rows of a test split are read, which may have no answers; whether conversations end in one, the first shows."""
    row_format = format_of(dataset, where, {**given, "needs_answer": False})
    if row_format.kind == "messages" and len(dataset) and _ends_in_a_question(dataset[0][row_format.question_key]):
        return replace(row_format, reference_keys=())
    return row_format


def _ends_in_a_question(messages) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role", last.get("from")) in ASKING


def _question_of(sample: dict) -> list:
    return [sample["prompt"], *([sample["tools"]] if "tools" in sample else [])]


def _id_of(sample: dict) -> str:
    references = sorted(set(sample["references"]))
    content = json.dumps([*_question_of(sample), references], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
