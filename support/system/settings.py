"""Settings that users write: YAML, the types of config values, and the words of errors."""

import difflib
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, BeforeValidator, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from support.system.files import UserError, reporting_os_errors, shorten

LARGEST_NUMBER = 2**63  # neither torch nor file systems count further
FILE_LIMIT_BYTES = 1 << 17  # of a config, which the YAML parser reads in a second
RANGES = {  # in words, by the kinds of bounds
    ("ge",): "{ge} or more",
    ("gt",): "above {gt}",
    ("ge", "le"): "between {ge:,} and {le:,}",
    ("ge", "lt"): "at least {ge} and below {lt}",
    ("gt", "le"): "above {gt} and at most {le:,}",
}
NO_OTHER_BASE = r"(?! [-+]?0[0-9_] | .*: )"
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


# Words


def either(words: Iterable[str]) -> str:
    """The words as "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def suggest(word: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
    """ "; did you mean ...?" or nothing."""
    close = [choice for choice in choices if choice.lower() == word.lower()]
    close += difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses aliases (they can explode) and repeated keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands here twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


# Without YAML 1.1's octal numbers (010 is 8) and base 60 (1:30 is 90).
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(NO_OTHER_BASE + pattern.pattern, re.VERBOSE))
        if tag.endswith((":int", ":float"))
        else (tag, pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}{line}: not valid YAML ({problem[:200]})") from None
    except (LookupError, AttributeError):  # for a value such as `!!int ""`
        raise UserError(f"{place}: not valid YAML (a value does not fit its tag)") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    with reporting_os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
        content = file.read(FILE_LIMIT_BYTES + 1)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if len(content) > FILE_LIMIT_BYTES:
        raise UserError(f"{path}: larger than any config ({FILE_LIMIT_BYTES} bytes)")
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: not a mapping of keys to values, such as `batch_size: 256`")
    return values


# The types of values


def _number(value: Any) -> Any:
    """The number that a text spells, if it does: YAML reads 1e-4 as a text."""
    if isinstance(value, str):
        try:
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:
            return value
    if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
        raise PydanticCustomError("uncountable", "too large to count with")
    return value


def _whole(value: Any) -> Any:
    number = _number(value)
    return int(number) if isinstance(number, float) and number == int(number) else number


def _decimal(value: Any) -> Any:
    number = _number(value)
    return float(number) if type(number) is int else number  # a bool is an int


def _name(value: Any) -> Any:
    """`value`, if it is a text that can name a file."""
    try:
        is_name = not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ValueError("has a character that names cannot have")
    return value


def tuple_of(count: int) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != count:
            raise PydanticCustomError("not_a_list", "another number of values")
        return tuple(value)

    return read


def listed(value: Any) -> tuple[Any, ...]:
    """The values of a list of any length; a single value is a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True, eq=False)  # pydantic hashes it, and tables have no hash
class Choice:
    """The type of a text that must be a name in the table of implementations."""

    table: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def read(self, value: Any) -> str:
        """`value`, if the table has it; `Triangular` means `Trig`."""
        if value == "Triangular" and "Trig" in self.table:
            return "Trig"
        if isinstance(value, str) and value in self.table:
            return value
        suggestion = suggest(value, list(self.table)) if isinstance(value, str) else ""
        raise ValueError(f"is not one of {', '.join(self.table)}{suggestion}")


Whole = Annotated[int, BeforeValidator(_whole)]
Decimal = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_decimal)]
Name = Annotated[str, BeforeValidator(_name)]


def key(
    default: Any, comment: str, or_else: str = "", may_change: bool = False, **limits: Any
) -> Any:
    """A key of a config: its default, its meaning, and the bounds of its number.

    `or_else` follows the range in descriptions and errors.
    """
    extra: JsonDict = {"may_change": may_change, "or_else": or_else}
    return Field(default, description=comment, json_schema_extra=extra, **limits)


# A key that may change when a run continues: it remains the same experiment.
changeable = partial(key, may_change=True)


def may_change(field: FieldInfo) -> bool:
    """Whether this key may change when a run continues."""
    return bool(_extra(field)["may_change"])


def _extra(field: FieldInfo) -> JsonDict:
    """The notes that `key` leaves with a field."""
    return cast(JsonDict, field.json_schema_extra)


def choices_of(field: FieldInfo) -> list[str] | None:
    """The values that this key allows, if it has a list of them."""
    tables = [list(part.table) for part in _annotations(field) if isinstance(part, Choice)]
    return tables[0] if tables else None


def _annotations(kind: Any) -> list[Any]:
    """A field or a type, its annotations, and those of the types in it."""
    is_field = isinstance(kind, FieldInfo)
    parts = [*kind.metadata, kind.annotation] if is_field else typing.get_args(kind)
    return [kind, *(one for part in parts for one in _annotations(part))]


def range_of(field: FieldInfo) -> str | None:
    """The range of this key's number or numbers, in words."""
    limits = {
        bound: getattr(part, bound)
        for bound in ("ge", "gt", "le", "lt")
        for part in _annotations(field)
        if getattr(part, bound, None) is not None
    }
    if not limits:
        return None
    words = RANGES[*limits].format(**limits) + str(_extra(field)["or_else"])
    return f"{words} each" if typing.get_origin(field.annotation) is tuple else words


def what_is_wrong(
    model: type[BaseModel], error: ErrorDetails, given: Mapping[str, Any]
) -> tuple[str, str]:
    """The key of a value that pydantic refused, and the text of the error."""
    name, *index = error["loc"]
    name, value = str(name), error["input"]
    if error["type"] == "value_error":
        return name, f"{shorten(value)} {error['ctx']['error']}"
    if error["type"].startswith(("greater_than", "less_than")):
        # For an element, show the whole list.
        shown = shorten(given[name] if index else value)
        return name, f"{shown} must be {range_of(model.model_fields[name])}"
    kind = typing.get_type_hints(model)[name]
    return name, f"{shorten(value)} is not {wanted(kind, bool(index))}"


def wanted(kind: Any, is_element: bool = False) -> str:
    """The name of a type in words; for a list's type, that of the list or of an element."""
    parts = typing.get_args(kind)
    if type(None) in parts:
        return f"{wanted(parts[0], is_element)} or null"
    if typing.get_origin(kind) is not tuple:
        return KINDS[kind]
    if is_element:
        return KINDS[parts[0]]
    kinds = {float: "numbers", int: "whole numbers", str: "texts"}[parts[0]]
    return f"a list of {kinds}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {kinds}"
