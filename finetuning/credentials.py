"""
What is a secret, and how it is kept out of files, pages and the terminal. Imports without torch.

A secret is known by the name that it stands under (`hub_token`, `OPENAI_API_KEY`), by its form (`hf_...`, `sk-...`),
or because this process was given it: in its environment, on its command line, or in the address of a server.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import TypeVar

NAMES = re.compile(
    r"(^|_)(token|(api|access|private|secret)_?key|password|passwd|passphrase|secret|credentials?|authorization)$"
    r"|^(hf|wandb|openai)_?(token|key)$"
)
# tokens of a vocabulary, and limits
NOT_SECRET = re.compile(
    r"^(bos|eos|pad|unk|sep|cls|mask|image|audio|video|start|end|stop|boi|eoi)_token$|^(max|min|num)_"
)
# what looks like a key of Hugging Face, OpenAI or another of the `sk-` kind, or W&B, wherever it stands
VALUES = re.compile(r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|wandb_v1_[A-Za-z0-9_]{20,})")
WANDB_KEY = re.compile(r"[0-9a-f]{40}")  # also the form of a commit, which is what a `..._revision` holds
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@\"'<>]+@")
MIN_LENGTH = 8  # shorter ones are placeholders ("none", "x"), and parts of ordinary words
MASK = "***"
Node = TypeVar("Node")
_given: set[str] = set()  # secrets that this process was given otherwise than by its environment


@functools.lru_cache(maxsize=4096)  # the names of the environment are looked at for every reply of a judge
def is_secret(name: str) -> bool:
    """Whether a value under this name is a credential, which belongs in no file.

    >>> is_secret("hub_token"), is_secret("OPENAI_API_KEY"), is_secret("eos_token"), is_secret("max_new_tokens")
    (True, True, False, False)
    """
    name = re.sub(r"[-.\s]", "_", name).lower()
    return NOT_SECRET.search(name) is None and NAMES.search(name) is not None


def holds_secret(name: str, value) -> bool:
    """Whether a value is a credential, by its name or by its form, or holds one."""
    if isinstance(value, dict):
        return any(VALUES.search(str(k)) or holds_secret(str(k), v) for k, v in value.items())
    if isinstance(value, (list, set, tuple)):
        return any(holds_secret(name, v) for v in value)
    if value is None or value == "":
        return False
    is_commit = name.endswith("revision")
    looks_like_one = VALUES.search(str(value)) or (not is_commit and WANDB_KEY.fullmatch(str(value)))
    return is_secret(name) or bool(looks_like_one)


def remember(secret: str | None) -> None:
    """Let `hide` know a secret that this process was given."""
    if secret is not None and len(secret) >= MIN_LENGTH:
        _given.add(secret)


def hide(node: Node) -> Node:
    """A text without any secret that is known or looks like one, and without user and password of an address in it.

    Of lists and dicts every text, and every key, becomes one.
    """
    found = {value.strip() for name, value in os.environ.items() if is_secret(name)}
    known = _given | {value for value in found if len(value) >= MIN_LENGTH}
    return _hide(node, sorted(known, key=len, reverse=True))  # one may be a part of another


def _hide(node, secrets: list[str]):
    if isinstance(node, str):
        for secret in secrets:
            node = node.replace(secret, MASK)
        if "_" in node or "-" in node:  # else no pattern can fit; this is done for every text of every reply of a judge
            node = VALUES.sub(MASK, node)
        return PASSWORD_IN_URL.sub(f"{MASK}@", node) if "://" in node else node
    if isinstance(node, (list, tuple)):
        return [_hide(item, secrets) for item in node]
    if isinstance(node, dict):
        return {_hide(key, secrets): _hide(value, secrets) for key, value in node.items()}
    return node


def without_secrets(values: dict) -> dict:
    """The values that are set, without those that are credentials, and with those within others masked."""
    return {key: hide(value) for key, value in values.items() if value is not None and not holds_secret(key, value)}


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Words of a command line without the values of keys that name a secret.

    >>> mask_arguments(["--hub_token", "hf_x", "--api_key=sk-x", "--seed", "1"])
    ['--hub_token', '***', '--api_key=***', '--seed', '1']
    """
    masked = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, _ = argument.partition("=")
        if equals and key.startswith("--") and is_secret(key[2:]):
            masked.append(f"{key}={MASK}")
        elif re.match("--[^=]*$", previous) and is_secret(previous[2:]) and not argument.startswith("--"):
            masked.append(MASK)
        else:
            masked.append(hide(argument))
    return masked
