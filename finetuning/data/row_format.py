"""
How the rows of a split are read: which columns hold what, and what is done to their text. Imports without torch.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, Json

from finetuning.data.jamo import clean_jamo
from finetuning.data.pii import mask_pii
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
    question_template: str | None = None
    template_keys: tuple[tuple[str, str], ...] = ()  # its fields, and the columns that they stand for
    unused: tuple[str, ...] = ()  # columns that are not read

    def describe(self) -> str:
        references = "" if self.kind == "messages" else f" -> {', '.join(self.reference_keys)}"
        preparation = {
            f"as {self.question_template!r}": self.question_template,
            "with a system prompt": self.system_prompt,
            "without bare jamo": self.clean_jamo,
            "with personal data masked": self.mask_pii,
        }
        added = ", ".join(text for text, given in preparation.items() if given)
        unused = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.question_key}{references} {added}".strip() + unused

    @property
    def unphrased(self) -> "RowFormat":
        """The same without the words that a run puts around a question, which are no part of the data."""
        return replace(self, system_prompt=None, question_template=None)

    def prepare(self, text: str) -> str:
        """The text as training and testing see it."""
        text = clean_jamo(text) if self.clean_jamo else text
        return mask_pii(text) if self.mask_pii else text


FORMAT_KEYS = (
    "question_key", "answer_key", "question_template", "system_prompt", "clean_jamo", "mask_pii", "mask_history",
)  # fmt: skip
Form = tuple[str, str, tuple[str, ...], str]  # kind, column of the question, those of the answer, one that may be there
FORMS: list[Form] = [
    ("messages", "messages", ("messages",), "tools"),
    ("messages", "conversations", ("conversations",), "tools"),
    ("prompt", "prompt", ("completion",), "tools"),
    ("instruction", "instruction", ("output",), "input"),
]
FORMS_WITHOUT_ANSWERS: list[Form] = [(kind, question, (), other) for kind, question, _, other in FORMS]


def find_template_keys(template: str, question_key: str, column_names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The fields of a question template and their columns: of that name, or `<name>1` as in DialogSum's test split.

    Raises:
        InputError: It cannot be read as a template, a field is no column, or the question is not in it.
    """
    try:
        fields = [field for _, field, *_ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise InputError(f"question_template: {template!r} is no template: {error}") from None
    if question_key not in fields:
        raise InputError(f"question_template: {template!r} does not hold {{{question_key}}}, the question itself")
    columns = {field: next((c for c in (field, f"{field}1") if c in column_names), None) for field in fields}
    missing = [field for field, column in columns.items() if column is None]
    if missing:
        raise InputError(
            f"question_template: {{{missing[0]}}} is no column; the columns are {', '.join(column_names)}. A brace "
            "of the text itself is written twice"
        )
    return tuple((field, str(column)) for field, column in columns.items())


def find_row_format(
    column_names: list[str],
    question_key: str | None = None,
    answer_key: str | None = None,
    question_template: str | None = None,
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

    def unused(*used: str) -> tuple[str, ...]:
        return tuple(column for column in column_names if column not in used)

    if question_key is not None and answer_key is not None:
        numbered = [c for c in column_names if re.fullmatch(rf"{re.escape(answer_key)}\d+", c)]
        numbered.sort(key=lambda column: int(column.removeprefix(answer_key)))
        references = (answer_key,) if answer_key in column_names else tuple(numbered)
        if question_key not in column_names or (needs_answer and not references):
            missing = question_key if question_key not in column_names else answer_key
            raise InputError(f"no column `{missing}`; the columns are {', '.join(column_names)}")
        keys: tuple[tuple[str, str], ...] = ()
        if question_template is not None:
            keys = find_template_keys(question_template, question_key, column_names)
            preparation |= {"question_template": question_template, "template_keys": keys}
        rest = unused(question_key, *references, *(column for _, column in keys))
        return RowFormat("columns", question_key, references, **preparation, unused=rest)
    for kind, question, answer, other in FORMS if needs_answer else FORMS + FORMS_WITHOUT_ANSWERS:
        if {question, *answer} <= set(column_names):
            if mask_history and kind == "instruction":
                raise InputError("mask_history has no effect on instruction and output; leave it out")
            rest = unused(question, *answer, other)
            return RowFormat(kind, question, answer, **preparation, mask_history=mask_history, unused=rest)
    raise InputError(
        f"the columns {', '.join(column_names)} are neither messages, nor prompt and completion, nor instruction and "
        "output, nor conversations; set question_key and answer_key to the columns with the question and its answer"
    )


def format_of(dataset: Dataset, where: str, given: dict) -> RowFormat:
    """How the rows of a split are read.

    Args:
        where: What the split is called in messages.
        given: What is asked for, under FORMAT_KEYS.

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
                kind = getattr(feature, "dtype", "JSON")
                raise InputError(
                    f"{where}: `datasets` has read the column `{column}` of JSON files as {kind}, "
                    "and what is written there may be something else; download the files, and name their folder"
                )
    return row_format
