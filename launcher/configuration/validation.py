"""Every problem of a configuration's values, in our words, section by section.

Each section is validated by itself, so that what is wrong in one hides nothing in another.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ditmoe.data.places.redaction import without_secrets
from ditmoe.launcher.configuration.fields import annotation_at, choices, expected_at, section_of
from ditmoe.launcher.configuration.overrides import suggestion
from ditmoe.model.outside.nearest import meant
from ditmoe.model.outside.text import counted
from ditmoe.model.outside.yaml_reader import shortened
from ditmoe.model.settings import message_of

MOST_LINES: Final = 50
"""Problems of one section that are told one by one."""


def validate_sections(model: type[BaseModel], values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Validate a configuration: its valid sections by name, and a line for each problem of the others."""
    sections: dict[str, Any] = {}
    unknown = [key for key in values if key not in model.model_fields]
    problems = [
        f"{shortened(str(key))} = {shown(values[key])}: no such key; {suggestion(model, [str(key)], 0)}"
        for key in unknown[:MOST_LINES]
    ]
    problems += [f"… and {len(unknown) - MOST_LINES:,} more unknown keys"] if len(unknown) > MOST_LINES else []
    for name, field in model.model_fields.items():
        # A section that is empty in the file reads as null: all of its defaults.
        value = values.get(name)
        if value is None and section_of(field.annotation) is not None:
            value = {}
        elif name not in values:
            sections[name] = field.get_default(call_default_factory=True)
            continue
        misread = _truth_values(model, (name,), value)
        problems += misread
        try:
            if section := section_of(field.annotation):
                sections[name] = section.model_validate(value)
            else:
                adapter: TypeAdapter[Any] = TypeAdapter(_annotated(field))
                sections[name] = adapter.validate_python(value)
            if misread:
                del sections[name]
        except ValidationError as error:
            problems += _lines(model, name, error.errors(include_url=False))
    return sections, problems


def _annotated(field: FieldInfo) -> Any:
    """The field's type with its bounds."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _lines(model: type[BaseModel], section: str, errors: Sequence[ErrorDetails]) -> list[str]:
    """A line for each of pydantic's errors of one section."""
    first = errors[:MOST_LINES]
    paths = [(section, *error["loc"]) for error in first]
    lines = []
    for path, error in zip(paths, first, strict=True):
        # A list whose items failed is reported as too short as well: its items say more.
        if error["type"] == "too_short" and any(other[: len(path)] == path != other for other in paths):
            continue
        lines.append(_line(model, _known(model, path, error), error))
    lines = list(dict.fromkeys(lines))  # of a value with several types, each type fails
    more = len(errors) - len(first)
    return [*lines, f"… and {counted(more, 'more problem')} of {section}"] if more else lines


def _known(model: type[BaseModel], path: tuple[str | int, ...], error: ErrorDetails) -> tuple[str | int, ...]:
    """The path without pydantic's own words at its end, such as the type of a union that failed."""
    if error["type"] in ("extra_forbidden", "missing"):
        return path
    try:
        annotation_at(model, path)
    except KeyError as unknown:
        return path[: max(1, unknown.args[0])]
    return path


def _line(model: type[BaseModel], path: tuple[str | int, ...], error: ErrorDetails) -> str:
    """One of pydantic's errors in our words: key, value found, what was expected."""
    key, keys = shortened(".".join(map(str, path))), [str(part) for part in path]
    if error["type"] == "extra_forbidden":
        return f"{key} = {shown(error['input'])}: no such key; {suggestion(model, keys, len(keys) - 1)}"
    if error["type"] == "missing":
        return f"{key} is missing; expected {expected_at(model, path)}"
    if error["type"] == "value_error":
        message = message_of(error)
        if section_of(annotation_at(model, path)) is not None:
            return f"{key}: {message}"
        told = shown(error["input"]) in message
        return f"{key}: {message}" if told else f"{key} = {shown(error['input'])}: {message}"
    found = error["input"]
    near = meant(found, choices(annotation_at(model, path))) if isinstance(found, str) else ""
    return f"{key} = {shown(found)}: expected {expected_at(model, path)}{near}"


def _truth_values(model: type[BaseModel], path: tuple[str | int, ...], value: Any) -> list[str]:
    """Lines for `true` and `false` where a number is expected: pydantic would read them as 1 and 0."""
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _truth_values(model, (*path, str(key)), item)]
    if isinstance(value, list):
        return [line for at, item in enumerate(value) for line in _truth_values(model, (*path, at), item)]
    if not isinstance(value, bool):
        return []
    try:
        words = expected_at(model, path)
    except KeyError:
        return []  # an unknown key has its own line
    if words.startswith(("an integer", "a number")):
        return [f"{'.'.join(map(str, path))} = {shown(value)}: expected {words}"]
    return []


def shown(value: Any) -> str:
    """A value as it looks in the file, at most 60 characters, without secrets."""
    value = without_secrets(value)
    if isinstance(value, bool):
        text = str(value).lower()
    else:
        text = "null" if value is None else repr(value)
    return shortened(text)
