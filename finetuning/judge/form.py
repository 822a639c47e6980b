"""
What an LLM is asked as the judge of an answer, and as which request. Imports without torch.

To judge something else as well, add a field to `Evaluation` with a description: the prompt, the rows, the tables and
the plots follow from the fields. A whole other rubric is a class like it in a file of yours, or a YAML of names and
descriptions (`--rubric`, read by rubric.py). The words around the criteria are in instructions.yaml.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, Field

NUM_TOP_LOGPROBS = 20  # the most that the API gives
INSTRUCTIONS = Path(__file__).with_name("instructions.yaml")


class Criterion(BaseModel, extra="forbid"):
    """The judgement of one answer under one criterion."""

    explanation: str = Field(description="One or two sentences that justify the score, written before it.")
    score: int = Field(ge=1, le=10, description="From 1, very poor, to 10, excellent.")


class Evaluation(BaseModel, extra="forbid"):
    """The judgement of one answer. Each field is a criterion; its description is what the judge is told."""

    relevance: Criterion = Field(description="The answer addresses what was asked, and only that.")
    accuracy: Criterion = Field(
        description="Everything the answer says is supported by the question; nothing is invented."
    )
    completeness: Criterion = Field(description="Nothing important that the reference has is missing.")
    clarity: Criterion = Field(description="The answer is well-formed, fluent and easy to understand.")
    similarity: Criterion = Field(description="The answer says the same as the reference, in whatever words.")
    completion_quality: Criterion = Field(
        description="The answer ends where it should: not cut off, no repetition, nothing appended after its end."
    )


class Preference(BaseModel, extra="forbid"):
    """Which of two answers is better; they have no names, so that the judge knows nothing of where they come from."""

    explanation: str = Field(description="One or two sentences that justify the choice, written before it.")
    better: Literal["first", "second", "tie"] = Field(description="The better answer, or tie if neither is.")


# What begins a control token in the chat templates of open models: <|im_end|>, <start_of_turn>, </s>, [INST], [|user|]
MARKUP = re.compile(r"<|\[(?=[/|]?[A-Za-z_]+\|?\])")


def to_data(material: dict) -> str:
    """JSON in which no text can end the string that it stands in, nor be read as a control token by a server.

    `json.loads` gives the material back, character for character.
    """
    text = json.dumps(material, ensure_ascii=False).encode("utf-8", "replace").decode()
    return MARKUP.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def build_schema(reply: type[BaseModel]) -> dict:
    """JSON schema of a reply as strict structured outputs take it: all keys required, no others, no references."""

    def inline(node, definitions):
        if isinstance(node, list):
            return [inline(item, definitions) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = definitions[node["$ref"].split("/")[-1]]
            return inline({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
        properties = node.get("properties")
        found = {k: inline(v, definitions) for k, v in node.items() if k not in ("$defs", "default", "properties")}
        if isinstance(properties, dict):  # whose keys are names of fields, and may be any
            found["properties"] = {name: inline(field, definitions) for name, field in properties.items()}
            found |= {"required": list(properties), "additionalProperties": False}
        return found

    schema = reply.model_json_schema()
    return inline(schema, schema.get("$defs", {}))


@dataclass(frozen=True)
class Form:
    """What the judge is asked of each item, and the class that its reply must fit."""

    instructions: str
    criteria: tuple[str, ...]
    reply: type[BaseModel]

    @cached_property
    def schema(self) -> dict:
        return build_schema(self.reply)

    @cached_property
    def hash(self) -> str:
        """Of all that the judge is told, so that evaluations under other words are never mixed with these."""
        schema = json.dumps(self.schema, sort_keys=True)
        return hashlib.sha256((self.instructions + schema).encode()).hexdigest()[:16]

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of what every request has: the instructions and the schema."""
        return len(self.instructions.encode()) + len(json.dumps(self.schema, ensure_ascii=False).encode())

    def count_bytes(self, data: str) -> int:
        """UTF-8 bytes of a request about some data that are paid for as a prompt: its messages and its schema."""
        return self.num_bytes + len(data.encode())

    def build_messages(self, data: str) -> list[dict]:
        """The messages of one request; what is judged is one JSON object in the last of them."""
        return [{"role": "system", "content": self.instructions}, {"role": "user", "content": data}]


def build_form(rubric: type[BaseModel], language: str, compares: bool = False) -> Form:
    """What is asked about a single answer or, if it `compares`, about two."""
    texts = yaml.safe_load(INSTRUCTIONS.read_text(encoding="utf-8"))
    shape = ", ".join(f'"{name}": {{"explanation": "...", "score": <1 to 10>}}' for name in rubric.model_fields)
    instructions = texts["compare" if compares else "score"][language].format(
        data=texts["data"][language],
        criteria="\n".join(f"- {name}: {field.description}" for name, field in rubric.model_fields.items()),
        form='{"explanation": "...", "better": "first" | "second" | "tie"}' if compares else f"{{{shape}}}",
    )
    return Form(instructions, tuple(rubric.model_fields), Preference if compares else rubric)


@dataclass(frozen=True)
class RequestSettings:
    """How a judge is asked, whatever it is asked."""

    max_tokens: int  # of a first reply; a second one, where that was cut off or does not fit, may have twice as many
    temperature: float | None = None  # None leaves it to the endpoint
    expected_scores: bool = False  # log-probabilities are asked for, and the mean scores under them are taken
    max_retries: int = 0  # further attempts at a request that may succeed later

    def build_request(self, model: str, form: Form, data: str, max_tokens: int, structured: bool = True) -> dict:
        """The body of a request about some data; `structured` where the endpoint takes a JSON schema."""
        body = {"model": model, "messages": form.build_messages(data), "max_completion_tokens": max_tokens}
        if structured:
            json_schema = {"name": "evaluation", "strict": True, "schema": form.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.expected_scores:
            body |= {"logprobs": True, "top_logprobs": NUM_TOP_LOGPROBS}
        return body
