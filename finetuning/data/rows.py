"""
How a data row is phrased: the one place where training, testing and judging get prompts and answers from.

Imports without torch.
"""

import json

from datasets import Dataset

from finetuning.data.conversations import as_texts, prepare_message, read_messages, read_tools, text_of
from finetuning.data.row_format import RowFormat
from finetuning.errors import InputError


def _text(row: dict, key: str) -> str:
    value = row[key]
    if value is None or value != value:  # NaN
        raise InputError(f"`{key}` is empty")
    if isinstance(value, (dict, list, bytes)):
        raise InputError(f"`{key}` must be text, not {type(value).__name__}")
    return str(value)


def _read_conversation(row: dict, row_format: RowFormat) -> tuple[list[dict], list[int]]:
    """The messages of a row that holds some, and the places of those to learn."""
    key, has_answer = row_format.question_key, bool(row_format.reference_keys)
    keys, (messages, learnable) = f"`{key}`", read_messages(row[key], key)
    if row_format.kind == "prompt" and has_answer:
        keys, completion = "`prompt` with `completion`", row["completion"]
        if not isinstance(completion, list):
            completion = [{"role": "assistant", "content": _text(row, "completion")}]
        completion, learnable_of_it = read_messages(completion, "completion")
        messages, learnable = messages + completion, [False] * len(messages) + learnable_of_it
    last_roles = [message["role"] for message in messages[-2:]]
    if not has_answer and last_roles[-1:] not in (["user"], ["tool"]):
        raise InputError(f"{keys} must end with a user's message, as in the first row, which has no answer either")
    if has_answer and last_roles not in (["user", "assistant"], ["tool", "assistant"]):
        raise InputError(f"{keys} must end with an assistant's message that answers a user's")
    # what an assistant says before anybody has asked, as a greeting, answers nothing
    question = next(place for place, message in enumerate(messages) if message["role"] in ("user", "tool"))
    learned = [place for place, is_learnable in enumerate(learnable) if is_learnable and place > question]
    return messages, [place for place in learned if not row_format.mask_history or place == len(messages) - 1]


def _read_pair(row: dict, row_format: RowFormat) -> list[dict]:
    """The question and the answer, if it has one, of a row that holds them in columns of text, as messages."""
    question = _text(row, row_format.question_key)
    if row_format.question_template is not None:
        values = {field: _text(row, column) for field, column in row_format.template_keys}
        question = row_format.question_template.format(**values)
    if row_format.kind == "instruction" and row.get("input"):
        question = f"{question}\n\n{_text(row, 'input')}"
    answers = [{"role": "assistant", "content": _text(row, key)} for key in row_format.reference_keys[:1]]
    return [{"role": "user", "content": question}, *answers]


def _read_row(row: dict, row_format: RowFormat) -> tuple[list[dict], list[int], list[str]]:
    """One data row.

    Returns:
        Its messages, the last being the answer if it has one; places of the messages to learn; references, of which the
        first is the answer.

    Raises:
        InputError: The row has no question or no answer.
    """
    if row_format.kind == "messages" or (row_format.kind == "prompt" and isinstance(row["prompt"], list)):
        messages, learned = _read_conversation(row, row_format)
        further_references = []
    else:
        messages, learned = _read_pair(row, row_format), [1]
        further_references = [row_format.prepare(_text(row, key)) for key in row_format.reference_keys[1:]]
    messages = [m if m["role"] == "system" else prepare_message(m, row_format.prepare) for m in messages]
    if row_format.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row_format.system_prompt}, *messages]
        learned = [place + 1 for place in learned]
    return messages, learned, [text_of(messages[-1]), *further_references] if row_format.reference_keys else []


def _tools_of(row: dict, row_format: RowFormat) -> list[dict] | None:
    return read_tools(row.get("tools")) if row_format.kind in ("messages", "prompt") else None


def to_sample(row: dict, row_format: RowFormat) -> dict:
    """Phrase one data row.

    Returns:
        {"prompt": [{"role", "content", ...}, ...], "references": [str, ...]}, and "tools" if the row has some. The
        prompt ends with the user's message, or a tool's; of several turns the last answer is the reference, as text,
        and the earlier ones are part of the prompt. There are no references where the split has no answers.

    Raises:
        InputError: The row has no question or no answer.
    """
    messages, _, references = _read_row(row, row_format)
    tools = _tools_of(row, row_format)
    prompt = messages[:-1] if row_format.reference_keys else messages
    return {"prompt": prompt, "references": references, **({"tools": tools} if tools else {})}


def to_training_row(row: dict, row_format: RowFormat) -> dict:
    """One data row as RowPreparation takes it.

    Returns:
        Prompt and completion as texts; in `learned` the places, in both together, of the messages that the loss is on;
        in `conversation` messages and tools with all that they hold, as JSON, where that is more than texts: in a
        column of objects Arrow gives all of them the same keys.
    """
    messages, learned, _ = _read_row(row, row_format)
    tools, texts = _tools_of(row, row_format), as_texts(messages)
    whole = json.dumps({"messages": messages, "tools": tools}) if tools or messages != texts else None
    return {"prompt": texts[:-1], "completion": texts[-1:], "learned": learned, "conversation": whole}


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
