"""The base class of this package's YAML blocks: errors for unknown keys and wrong values name key and value."""

import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from axolotl_layersel.common.errors import suggest
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.config.layer_names import NAME, LayerName

LAYER_LIST = (
    "a list of whole numbers, such as [0, 1, 5], or for a model with an encoder and a decoder one such as "
    "[encoder.3, decoder.0]"
)
# Messages truncate longer values.
SHOWN = 120

B = TypeVar("B", bound="Block")


class Block(BaseModel):
    """A YAML mapping that refuses unknown keys, with a suggestion, and values of a wrong type.

    Booleans and infinities are not numbers. Text may be a number, because YAML reads 1e-3 as text.
    """

    model_config = ConfigDict(extra="forbid")
    path: ClassVar[str]
    # Keys of earlier versions and their present names.
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(
                f"{cls.path}: {quote(data)} is not a mapping. Write its keys on lines of their own below it."
            )
        settle(cls.find_key_faults(data), info)
        return {key: value for key, value in data.items() if key in cls.model_fields}

    @classmethod
    def find_key_faults(cls, data: Mapping[Any, Any]) -> Iterator[str]:
        """Yield a message for each key that is unknown or missing."""
        for key in data:
            if key in cls.renamed:
                yield f"{cls.path}.{key}: this key is now called `{cls.renamed[key]}`. Rename it."
            elif key not in cls.model_fields:
                word = key if isinstance(key, str) else quote(key)
                yield f"{cls.path}.{word} is not a setting: {suggest(word, cls.model_fields)}"
        for name, field in cls.model_fields.items():
            if field.is_required() and name not in data:
                yield f"{cls.path}.{name} is missing. {field.description}"

    @field_validator("*", mode="before")
    @classmethod
    def check_type(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "only fields are validated"
        key, field = f"{cls.path}.{info.field_name}", cls.model_fields[info.field_name]
        result = read(key, value, field.annotation, field.description)
        if isinstance(result, int | float):
            check_bounds(key, result, field)
        return result

    def find_unread(self) -> dict[str, str]:
        """Return the keys in the file that nothing reads, each with the setting that makes it so."""
        return {}

    def drop_unread(self: B) -> B:
        """Return a copy without the keys that nothing reads, here and in nested blocks."""
        update: dict[str, Any] = {name: value.drop_unread() for name, value in self if isinstance(value, Block)}
        return self.model_copy(update={**update, **dict.fromkeys(self.find_unread())})

    def list_unread(self) -> dict[str, str]:
        """Return the result of ``find_unread`` here and in nested blocks, with full paths and values as keys."""
        unread = self.find_unread()
        found = {f"{self.path}.{name}{show(getattr(self, name))}": why for name, why in unread.items()}
        for name, value in self:
            if isinstance(value, Block) and name not in unread:
                found |= value.list_unread()
        return found


def settle(faults: Iterable[str], info: ValidationInfo) -> None:
    """Raise ValueError with the first of ``faults``, or add all to the list that is the context of the validation."""
    for fault in faults:
        if info.context is None:
            raise ValueError(fault)
        info.context.append(fault)


def read_leniently(kind: type[B], data: Any) -> tuple[B | None, list[str]]:
    """Return a block without the values that are refused, and all messages about it.

    The first message is the one that a run ends with. The block is None if nothing is left of it.
    """
    told: dict[str, None] = {}
    dropped: list[str] = []
    try:
        return kind.model_validate(data), []
    except ValidationError as error:
        told[describe_problem(error.errors()[0])] = None
    while True:
        found: list[str] = []
        try:
            block: B | None = kind.model_validate(data, context=found)
            problems = []
        except ValidationError as error:
            block, problems = None, error.errors()
        # A key whose value was dropped is not missing.
        told |= dict.fromkeys(fault for fault in found if not fault.startswith(tuple(dropped)))
        for problem in problems:
            path = [part for part in problem["loc"] if isinstance(part, str)]
            if problem["type"] != "missing":  # ``find_key_faults`` has said so
                told[describe_problem(problem)] = None
            dropped += (f"{'.'.join([kind.path, *path])}{end}" for end in (":", " ", "."))
            data = drop_value(data, path)
        if block is not None or not data:
            return block, list(told)


def describe_problem(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's problems as a sentence: this package's unchanged, others with the key and the value."""
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] not in ("value_error", "missing"):
        message = f"{quote(problem['input'])} is refused. {message}"
    return clean(message if problem["type"] == "value_error" or not where else f"{where}: {message}")


def drop_value(data: Any, path: Sequence[str]) -> Any:
    """Return a copy of nested mappings without the value at ``path``, or without the mapping that lacks it."""
    if not path or not isinstance(data, Mapping):
        return None
    key, *rest = path
    inner = drop_value(data[key], rest) if rest and key in data else None
    others = {name: value for name, value in data.items() if name != key}
    if inner:
        return {**data, key: inner}
    return others if key in data else None


def show(value: Any) -> str:
    """Return a value as it follows its key in a message; nothing for a block, which is too long."""
    return "" if isinstance(value, Block) else f": {quote(value)}"


def read(key: str, value: Any, annotation: Any, description: str | None) -> Any:
    """Return the value of ``key`` converted to the type ``annotation``.

    Args:
        key: the full path of the key.
        value: the value in the YAML file.
        annotation: int, float, bool, str, a list of layer names, a block, or a union of these.
        description: the description of the key, shown if the value is blank.

    Raises:
        ValueError: if the value has another type; it names the key, the value and the expected type.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if value is None and type(None) in kinds:
        return None
    if value is None:
        raise ValueError(f"{key}: the value is blank. Write one, or remove the key. {description}")
    hint = " (YAML reads `on`, `yes` and `true` as True)" if value is True else ""
    result: Any
    if int in kinds:
        result, expected = as_whole(value), "a whole number"
    elif float in kinds and str in kinds:
        result, expected = value if isinstance(value, str) else as_number(value), "a finite number or text"
    elif float in kinds:
        result, expected = as_number(value), "a finite number"
    elif bool in kinds:
        result, expected = value if isinstance(value, bool) else None, "true or false"
    elif any(get_origin(kind) is Literal for kind in kinds):
        return check_known(key, value, [choice for kind in kinds for choice in get_args(kind)])
    elif str in kinds:
        result, expected = value if isinstance(value, str) and value else None, "some text"
    elif list[LayerName] in kinds:
        result, expected = as_layer_list(value), LAYER_LIST
    else:
        return value  # a block, which pydantic validates next
    if result is None:
        raise ValueError(f"{key}: {quote(value)}{hint} is not {expected}. Write {expected}, or remove the key.")
    return result


def check_bounds(key: str, value: float, field: FieldInfo) -> None:
    """Raise ValueError for a number outside the bounds of its field; the message gives the field's first example."""
    lowest, above, highest, below = (
        next((getattr(bound, name) for bound in field.metadata if hasattr(bound, name)), None)
        for name in ("ge", "gt", "le", "lt")
    )
    too_low = (lowest is not None and value < lowest) or (above is not None and value <= above)
    too_high = (highest is not None and value > highest) or (below is not None and value >= below)
    if not (too_low or too_high):
        return
    such = f", such as {field.examples[0]}" if field.examples else ""
    if highest is None and below is None:
        raise ValueError(f"{key}: {value} is too low. Set {lowest} or more{such}.")
    if isinstance(value, int):
        raise ValueError(f"{key}: {value} is outside {lowest} to {highest}. Set a value in this range{such}.")
    interval = f"{'[' if above is None else '('}{lowest if above is None else above}, "
    interval += f"{highest if below is None else below}{']' if below is None else ')'}"
    raise ValueError(f"{key}: {value} is outside {interval}. Set a value in this range{such}.")


def check_known(key: str, value: Any, known: Iterable[str]) -> Any:
    """Return ``value``; raise ValueError with the nearest of ``known`` if it is neither one of them nor None."""
    if value is not None and value not in known:
        word = value if isinstance(value, str) else quote(value)
        raise ValueError(f"{key}: {quote(value)} is not known: {suggest(word, known)}")
    return value


def as_number(value: Any) -> float | None:
    """Return a finite number, or text that is one, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_whole(value: Any) -> int | None:
    """Return a whole number of at most 64 bits, or text that is one; None for anything else."""
    number = as_number(value)
    if number is None or not number.is_integer() or not -(2**63) <= number < 2**63:
        return None
    return value if isinstance(value, int) else int(number)


def as_whole_list(value: Any) -> list[int] | None:
    """Return a list of whole numbers; None for anything else."""
    if not isinstance(value, list):
        return None
    numbers = [number for item in value if (number := as_whole(item)) is not None]
    return numbers if len(numbers) == len(value) else None


def as_layer_list(value: Any) -> list[LayerName] | None:
    """Return a list of layer names; None for anything else."""
    if not isinstance(value, list):
        return None
    named = [item if isinstance(item, str) and NAME.fullmatch(item) else as_whole(item) for item in value]
    found = [name for name in named if name is not None]
    return found if len(found) == len(value) else None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def quote(value: Any) -> str:
    """Return a value for use in a message, truncated if long."""
    try:
        shown = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"this {type(value).__name__}"
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


# --- Values of a YAML file that several features read -------------------------------------------------------------

# The seeds of NumPy, which the Trainer sets.
SEEDS = range(2**32)


def describe_seeds() -> str:
    """Return the end of the message for an invalid seed."""
    return f"outside {SEEDS.start} to {SEEDS.stop - 1}, the seeds that NumPy accepts. Set one of these."


def list_plugins(data: Mapping[str, Any]) -> list[str]:
    """Return the names under ``plugins``."""
    plugins = data.get("plugins")
    return [name for name in plugins if isinstance(name, str)] if isinstance(plugins, list) else []


def read_choice(data: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, which Axolotl may have turned into a member of an enumeration."""
    return getattr(data.get(key), "value", data.get(key))
