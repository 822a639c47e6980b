"""
How limits of a value and contradictions between values are written at the arguments of a step, and how they are found.

    num_samples: int = argument(50, "Number of test samples.", at_least=1)
    RULES = (refuse(lambda bf16, fp16: bf16 and fp16, "bf16 and fp16 are both true; keep one of them"),)

Imports without torch.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
Fault = tuple[tuple[str, ...], str]  # the keys of a fault, and what is said of them, which names every key
Rule = Callable[[Mapping[str, Any]], Iterable[Fault]]  # the faults in any of the values of a step by key


@dataclass(frozen=True)
class Limits:
    """Which numbers a value may be: `at_least` and `at_most` are allowed themselves, `more_than` is not."""

    at_least: float = -math.inf
    at_most: float = math.inf
    more_than: float = -math.inf

    def find_fault(self, value: float) -> str | None:
        if not -math.inf < value < math.inf:  # math.isfinite takes no integer beyond the largest float
            return f"must be a finite number, got {value}"
        if value <= self.more_than:
            return f"must be more than {self.more_than}, got {value}"
        if not self.at_least <= value <= self.at_most:
            at_most = f" and at most {self.at_most}" if math.isfinite(self.at_most) else ""
            return f"must be at least {self.at_least}{at_most}, got {value}"
        return None


def argument(default: T, help: str, choices: Sequence[str] | None = None, **limits: float) -> T:
    """A field of arguments that has a default.

    Args:
        help: What `--help` says of it.
        choices: The only values that the parser takes.
        limits: Those of a number, by the names of `Limits`.
    """
    metadata = {"help": help, "choices": choices, "limits": Limits(**limits) if limits else None}
    return field(default=default, metadata={key: value for key, value in metadata.items() if value is not None})


def refuse(wrong: Callable[..., object], text: str) -> Rule:
    """A rule about values that are a fault together, or one that is a fault in another way than by its limits.

    Args:
        wrong: Takes values by its parameters' names, which are the keys, and returns something true for a fault.
        text: What is said of it. `{key}` of each key is replaced by its value, and `{found}` by what `wrong` returned.
    """
    keys = tuple(inspect.signature(wrong).parameters)

    def find(values: Mapping[str, Any]) -> Iterator[Fault]:
        if set(keys) <= values.keys() and (found := wrong(*(values[key] for key in keys))):
            yield keys, text.format(found=found, **values)

    return find


def refuse_each(neutral: Mapping[str, object], when: Callable[..., object], text: str) -> Rule:
    """A rule about keys each of which is a fault where it is set while others have certain values.

    Args:
        neutral: The keys, with the value besides None at which each of them is not set.
        when: Takes the values of the others by its parameters' names.
        text: What is said of it, in which `{key}` is replaced by the key that is set.
    """
    others = tuple(inspect.signature(when).parameters)

    def find(values: Mapping[str, Any]) -> Iterator[Fault]:
        if set(others) <= values.keys() and when(*(values[key] for key in others)):
            is_set = [key for key in neutral if values.get(key) not in (None, neutral[key])]
            yield from (((key, *others), text.format(key=key)) for key in is_set)

    return find


def needs(needed: str, neutral: Mapping[str, object], when: Callable[..., object]) -> Rule:
    """A rule about keys that have no effect without what is `needed`, a key with its value; the rest as refuse_each."""
    return refuse_each(neutral, when, f"{{key}} has no effect without {needed}; add it, or leave {{key}} out")


class Checked:
    """Arguments that are checked when they are made.

    Attributes:
        LIMITS: Limits of keys that a library declares; those of the class's own keys stand at the fields.
        RULES: Rules about keys of the class, or about one of them and keys of another class of the same step.
    """

    LIMITS: ClassVar[Mapping[str, Limits]] = {}
    RULES: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self):
        """Raises ValueError with all that find_faults finds."""
        faults = find_faults([type(self)], vars(self))
        if faults:
            raise ValueError("; ".join(text for _, text in faults))


def limits_of(kind: type) -> dict[str, Limits]:
    """The limits of the keys of a class of arguments."""
    own = {f.name: f.metadata["limits"] for f in fields(kind) if "limits" in f.metadata}
    return own | dict(getattr(kind, "LIMITS", {}))


def find_faults(kinds: Sequence[type], values: Mapping[str, Any]) -> list[Fault]:
    """What is out of its limits or contradicts something else in the arguments of a step.

    Args:
        kinds: The classes of these arguments.
        values: Any of their values by key. Rules about missing keys are left out, as are those about keys that are out
            of their limits.
    """
    limits = {key: limit for kind in kinds for key, limit in limits_of(kind).items()}
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    faulty = {k: text for k, v in numbers.items() if (text := limits.get(k, Limits()).find_fault(v)) is not None}
    sound = {key: value for key, value in values.items() if key not in faulty}
    rules = [rule for kind in kinds for base in kind.__mro__ for rule in vars(base).get("RULES", ())]
    faults: list[Fault] = [((key,), f"{key}: {text}") for key, text in faulty.items()]
    return faults + [fault for rule in rules for fault in rule(sound)]
