"""
Tokenizers and chat templates: how messages become tokens, which tokens end an answer, which are text and which control.
"""

from pathlib import Path

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from finetuning.data.conversations import with_json_arguments
from finetuning.errors import InputError
from finetuning.models.config import describe_failure, load_model_config
from finetuning.models.files import check_model_files

# For base models without a chat template: plain words, and the end token that every tokenizer has.
PLAIN_TEMPLATE = (Path(__file__).parent / "plain_chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")
# For encoder-decoder models without one: their encoder reads system message and question as one text.
ENCODER_TEMPLATE = (Path(__file__).parent / "encoder_chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")

EXAMPLE = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]

# A chat template is code, which may raise these beside jinja's own; OverflowError for a range that would take for ever.
TEMPLATE_ERRORS = (
    TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError,
)  # fmt: skip


def load_tokenizer(name_or_path: str, chat_template: str | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can phrase messages, padded on the left for generation.

    Args:
        name_or_path: Folder or Hub id.
        chat_template: Text of the template to use instead of the tokenizer's own. Without either one,
            finetuning/data/plain_chat_template.jinja, which needs no special token but the end token; for
            encoder-decoder models encoder_chat_template.jinja, with what the tokenizer puts around a text.

    Raises:
        InputError: There is no such model, or its tokenizer has no end token.
    """
    check_model_files(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # the library raises many kinds, plain ones too, for files that do not belong to it
        raise InputError(f"could not load the tokenizer of {name_or_path}: {describe_failure(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{name_or_path}: the tokenizer has no eos_token, so no answer could ever end; use a tokenizer that has one"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif tokenizer.chat_template is None and load_model_config(name_or_path, **kwargs).is_encoder_decoder:
        tokenizer.chat_template = write_encoder_template(tokenizer, name_or_path)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    try:
        end_of_turn_id(tokenizer)
    except TEMPLATE_ERRORS as error:
        why = str(error) or type(error).__name__
        raise InputError(f"{name_or_path}: the chat template cannot phrase a question and its answer: {why}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked by position, never by its id, so the end stays trained
    tokenizer.padding_side = "left"  # generation continues from the last token, which must not be padding
    return tokenizer


def write_encoder_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> str:
    """The chat template of an encoder-decoder model: a question as its tokenizer encodes a text for the encoder.

    Raises:
        InputError: The tokenizer does not read the control tokens that it writes itself, such as the end token.
    """
    whole, text = (tokenizer(EXAMPLE[0]["content"], add_special_tokens=add)["input_ids"] for add in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    before, after = whole[:start], whole[start + len(text) :]
    template = ENCODER_TEMPLATE
    for place, ids in (("BEFORE", before), ("AFTER", after)):
        template = template.replace(place, repr("".join(tokenizer.convert_ids_to_tokens(ids))))
    if tokenizer.apply_chat_template(EXAMPLE[:1], chat_template=template)["input_ids"] != whole:
        raise InputError(
            f"{name_or_path}: its tokenizer encodes control tokens such as {tokenizer.eos_token} as text; give the "
            "model a tokenizer that knows them"
        )
    return template


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Add tokens that stay whole and are shown in answers; gives the ids of those that were not there before."""
    known = tokenizer.get_vocab()
    whole = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(whole, special_tokens=True)
    return tokenizer.convert_tokens_to_ids([token for token in tokens if token not in known])


def fit_to_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs) -> list[dict]:
    """Messages in the form in which the chat template can write their tool calls.

    Templates differ in what they expect of a message that calls tools: that its content is empty, or that it has none,
    and that the arguments are an object, or JSON. What they do not expect they leave out, write as Python shows it, or
    refuse.

    Args:
        kwargs: Of apply_chat_template.
    """
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    if not calls:
        return messages
    objects = [str(call["arguments"]) for call in calls if isinstance(call["arguments"], dict) and call["arguments"]]
    problems: list[Exception] = []
    readable = None
    for content, in_json in (("", False), ("", True), (None, False), (None, True)):
        fitted = [{**message, "content": message["content"] or content} for message in messages]
        fitted = [with_json_arguments(message) for message in fitted] if in_json else fitted
        try:
            text = tokenizer.apply_chat_template(fitted, tokenize=False, **kwargs)
        except (TemplateError, TypeError) as error:
            problems.append(error)
            continue
        if not in_json and any(shown in text for shown in objects):
            continue
        if "tool_calls" not in hidden_keys(tokenizer, fitted, **kwargs):
            return fitted
        readable = readable or fitted
    if readable is None:
        raise problems[0]
    return readable


def hidden_keys(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None = None, **kwargs
) -> list[str]:
    """What of a conversation the chat template leaves out: tools, or keys of messages.

    A key is left out where the text stays the same without it, in any of the messages.
    """

    def write(changed: list[dict], changed_tools: list[dict] | None = tools) -> str | None:
        try:
            return tokenizer.apply_chat_template(changed, tools=changed_tools, tokenize=False, **kwargs)
        except (TemplateError, TypeError):
            return None  # it needs what was taken away

    text = write(messages)
    hidden = ["tools"] if tools and write(messages, None) == text else []
    for key in ("tool_calls", "reasoning_content", "reasoning", "thinking", "name"):
        for place, message in enumerate(messages):
            if key not in message:
                continue
            changes = [{k: v for k, v in message.items() if k != key}]
            if key == "tool_calls":
                calls = message[key]
                nothing: dict | str = {} if type(calls[0]["function"]["arguments"]) is dict else ""
                changes = [
                    {**message, key: [{**c, "function": {**c["function"], part: other}} for c in calls]}
                    for part, other in (("name", "?"), ("arguments", nothing))
                    if any(c["function"][part] not in (other, {}, "{}") for c in calls)
                ]
            if any(write([*messages[:place], change, *messages[place + 1 :]]) == text for change in changes):
                hidden.append(key)
                break
    return hidden


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer, or None where it ends in plain text."""
    _, found, tail = tokenizer.apply_chat_template(EXAMPLE, tokenize=False).rpartition(EXAMPLE[1]["content"])
    if not found:
        raise ValueError("it leaves out what the assistant says")
    tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token_id for token_id in tail_ids if token_id in tokenizer.added_tokens_decoder), None)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> list[int]:
    """Every token at which generation must stop: the template's end of turn, the tokenizer's and the model's own."""
    declared = generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    candidates = [end_of_turn_id(tokenizer), tokenizer.eos_token_id, *declared]
    return list(dict.fromkeys(token_id for token_id in candidates if token_id is not None))


def control_token_ids(tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> set[int]:
    """Tokens that steer generation and are no text: ends, padding, beginning, and what stands around messages.

    Every other special token, such as a speaker tag that was added for the task, is part of the answer.
    """
    text = tokenizer.apply_chat_template(EXAMPLE, tokenize=False, add_generation_prompt=True)
    special = set(tokenizer.all_special_ids)
    template_ids = set(tokenizer(text, add_special_tokens=False)["input_ids"]) & special
    named_ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return template_ids | named_ids | set(end_ids)


def control_tokens(tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> list[str]:
    """Control tokens by name, of those that the tokenizer makes of their name in a text."""
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in sorted(control_token_ids(tokenizer, end_ids))}
    return [name for i, name in names.items() if i in tokenizer(name, add_special_tokens=False)["input_ids"]]


def decode_answer(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], control_ids: set[int]) -> str:
    """The text of an answer as it was generated, without control tokens and with every token of the task."""
    kept = [token_id for token_id in token_ids if token_id not in control_ids]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
