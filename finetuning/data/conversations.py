"""
Messages of a conversation, in the form that chat templates take, from the forms that data sets have.

A message has role and content, and keeps every other key that it has (tool_calls, reasoning_content, name,
tool_call_id ...). Imports without torch.
"""

import json
from collections.abc import Callable

from finetuning.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def read_messages(messages, key: str) -> tuple[list[dict], list[bool]]:
    """A list of messages, checked.

    Args:
        messages: With `role` and `content`, or ShareGPT's `from` and `value`.
        key: The column that they stand in.

    Returns:
        The messages, and of each whether it may be learned: an assistant's that does not have the weight 0.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"`{key}` must be a list of messages, each with role and content")
    read, learnable = [], []
    for message in messages:
        if {"from", "value"} <= message.keys():
            message = _from_sharegpt(message, key)
        if "role" not in message or ("content" not in message and not message.get("tool_calls")):
            raise InputError(f"a message of `{key}` has {', '.join(message) or 'nothing'}, and needs role and content")
        role, weight = message["role"], message.get("weight", 1)
        if role not in ROLES:
            raise InputError(f"a message of `{key}` has the role {role!r}, which is none of {', '.join(ROLES)}")
        if weight not in (None, 0, 1):
            raise InputError(f"a message of `{key}` has the weight {weight!r}, and can have 0 or 1")
        # a log of requests has `tool_calls: null` and the like, which templates take for tool calls
        extra = {k: v for k, v in message.items() if k not in ("role", "content", "weight") and v not in (None, [])}
        if "tool_calls" in extra:
            extra["tool_calls"] = [_read_tool_call(call, key) for call in _as_list(extra["tool_calls"], "tool_calls")]
        read.append({"role": role, "content": _content(message.get("content"), "tool_calls" in extra), **extra})
        learnable.append(role == "assistant" and weight != 0)
    return read, learnable


def _from_sharegpt(message: dict, key: str) -> dict:
    """A message from ShareGPT's form, where `function_call` holds one or several calls, name and arguments, as JSON."""
    role, value = message["from"], message["value"]
    if role not in SHAREGPT_ROLES:
        raise InputError(f"a message of `{key}` is from {role!r}, which is none of {', '.join(SHAREGPT_ROLES)}")
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    if role != "function_call":
        return {"role": SHAREGPT_ROLES[role], "content": value, **rest}
    calls = _parse(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise InputError(f"a function_call of `{key}` must be JSON with name and arguments, not {str(value)[:40]!r}")
    return {"role": "assistant", "content": None, "tool_calls": calls, **rest}


def _parse(value):
    """The value of a text that is JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _as_list(value, key: str) -> list:
    value = _parse(value)
    if not isinstance(value, list):
        raise InputError(f"`{key}` must be a list, not {type(value).__name__}")
    return value


def _read_tool_call(call, key: str) -> dict:
    """A call in OpenAI's form, with its arguments as an object: templates write a text within quotes of its own."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"a tool call of `{key}` needs a function with name and arguments, not {str(call)[:60]}")
    around = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
    return {"type": "function", **around, "function": {**function, "arguments": _parse(function.get("arguments", {}))}}


def read_tools(tools) -> list[dict] | None:
    """The functions that a conversation may call, in OpenAI's form, from a list or its JSON; None if there are none."""
    if not tools:
        return None
    tools = _as_list(tools, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise InputError("`tools` must be a list of functions, each with name, description and parameters")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _content(content, has_tool_calls: bool) -> str | None:
    if content is None:
        if not has_tool_calls:
            raise InputError("`content` is empty")
        return None
    if not isinstance(content, str) and type(content) is not int:  # a number with a point is not as it was written
        raise InputError(f"`content` must be text, not {type(content).__name__}")
    return str(content)


def prepare_message(message: dict, prepare: Callable[[str], str]) -> dict:
    """A message with everything that is said in it prepared, the arguments of tool calls too."""

    def prepare_all(value):
        if isinstance(value, str):
            return prepare(value)
        if isinstance(value, list):
            return [prepare_all(item) for item in value]
        if isinstance(value, dict):
            return {k: v if k in ("name", "type", "id") else prepare_all(v) for k, v in value.items()}
        return value

    return {k: v if k in ("role", "name", "tool_call_id") else prepare_all(v) for k, v in message.items()}


def with_json_arguments(message: dict) -> dict:
    """A message whose tool calls have their arguments as JSON, which OpenAI's API and some chat templates want."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _to_json(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text_of(message: dict) -> str:
    """What a message says, as text: its content, and below it each tool call as a line of JSON."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    lines = [json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in calls]
    return "\n".join([*([message["content"]] if message["content"] or not lines else []), *lines])


def as_texts(messages: list[dict]) -> list[dict]:
    """Messages with their role and what they say, and nothing else."""
    return [{"role": message["role"], "content": text_of(message)} for message in messages]
