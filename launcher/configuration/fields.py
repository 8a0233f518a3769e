"""What the configuration's models say about their fields: dotted keys, and expected values in words."""

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ditmoe.model.settings import Unit

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    Path: "a path",
}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation holds directly, if it is one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def item_section(annotation: Any) -> type[BaseModel] | None:
    """The model of a list's items, if the annotation is a list of sections."""
    return section_of(_item_type(annotation, 0))


def list_position(key: str | int) -> int | None:
    """The place in a list that a part of a dotted key stands for; None where it stands for none."""
    text = str(key)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a model and of its sections, dotted; a list of sections counts with the key `name.0`."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        section = section_of(field.annotation)
        if section is not None:
            yield from walk(section, f"{key}.")
        elif (item := item_section(field.annotation)) is not None:
            yield from walk(item, f"{key}.0.")


def annotation_at(model: type[BaseModel], path: Sequence[str | int]) -> Any:
    """The annotation of the value at a path of keys and list positions.

    Raises:
        KeyError: the configuration has no such path; its argument is the number of keys that exist.
    """
    annotation: Any = model
    for depth, key in enumerate(path):
        section, annotation = section_of(annotation), _without_null(annotation)
        if section is not None and key in section.model_fields:
            annotation = section.model_fields[str(key)].annotation
        elif section is None and _is_free(annotation):
            annotation = (get_args(annotation) or (str, Any))[1]
            if annotation is Any:
                return Any
        elif section is None and (item := _item_type(annotation, list_position(key))) is not None:
            annotation = item
        else:
            raise KeyError(depth)
    return annotation


def expected_at(model: type[BaseModel], path: Sequence[str | int]) -> str:
    """What is expected at a path, in words: `an integer >= 1, or null`; a section: `a section of keys`."""
    parent = annotation_at(model, path[:-1])
    section = section_of(parent)
    if section is not None:
        return expected(section.model_fields[str(path[-1])])
    return _words(annotation_at(model, path))


def unit_of(field: FieldInfo) -> Unit | None:
    """The unit that a field's number has; None where nothing is said of it."""
    return next((each for each in field.metadata if isinstance(each, Unit)), None)


def is_number(annotation: Any) -> bool:
    """Whether an annotation is that of a number, or of a list of numbers, or null; names are none."""
    if get_origin(annotation) in (Union, types.UnionType, tuple, list):
        inner = [each for each in get_args(annotation) if each not in (type(None), Ellipsis)]
        return all(is_number(each) for each in inner)
    return annotation in (int, float)


def choices(annotation: Any) -> tuple[str, ...]:
    """The values that an annotation names, `null` among them where it may be; none where it has no names."""
    if annotation is bool:
        return ("true", "false")
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return tuple(str(each) for each in arguments)
    if get_origin(annotation) in (Union, types.UnionType):
        found = tuple(name for each in arguments if each is not type(None) for name in choices(each))
        return (*found, "null") if found and type(None) in arguments else found
    return ()


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: type, bounds and choices."""
    bounds = []
    for rule in field.metadata:
        if isinstance(rule, annotated_types.MultipleOf):
            bounds.append(f"that is a multiple of {rule.multiple_of}")
        for name, sign in _SIGNS.items():
            if hasattr(rule, name):
                bounds.append(f"{sign} {getattr(rule, name)}")
    lengths = {type(rule): rule for rule in field.metadata}
    least, most = lengths.get(annotated_types.MinLen), lengths.get(annotated_types.MaxLen)
    words = _words(field.annotation)
    if least is not None and most is not None and least.min_length == most.max_length:
        words = words.replace("a list", f"a list of {least.min_length}", 1).replace("1 of", "one", 1)
    if not bounds:
        return words
    words, separator, null = words.partition(", or null")
    return f"{words} {' and '.join(bounds)}{separator}{null}"


def _words(annotation: Any) -> str:
    """An annotation in words."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    if section_of(annotation) is not None:
        return "a section of keys"
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        inner = " or ".join(_words(a) for a in arguments if a is not type(None))
        return f"{inner}, or null" if type(None) in arguments else inner
    if get_origin(annotation) is Literal:
        choices = " or ".join(str(a) for a in arguments)
        return choices if len(arguments) < 3 else "one of " + ", ".join(str(a) for a in arguments)
    if get_origin(annotation) in (tuple, list):
        if (len(arguments) == 2 and arguments[1] is Ellipsis) or get_origin(annotation) is list:
            section = section_of(arguments[0])
            if section is None:
                return "a list"
            needed = [name for name, field in section.model_fields.items() if field.is_required()]
            return f"a list of {{{', '.join(needed)}: …}}"
        return f"a list of {len(arguments)} values, each {_words(arguments[0])}"
    return "a section of free keys" if _is_free(annotation) else "another value"


def is_list(annotation: Any) -> bool:
    """Whether an annotation is a list, or null."""
    return get_origin(_without_null(annotation)) in (tuple, list)


def _item_type(annotation: Any, position: int | None) -> Any:
    """Type of a list's item, or None where there is no list, a shorter one, or no position."""
    if position is None:
        return None
    arguments = get_args(annotation)
    if get_origin(annotation) is list or (get_origin(annotation) is tuple and arguments[-1] is Ellipsis):
        return arguments[0]
    if get_origin(annotation) is tuple and position < len(arguments):
        return arguments[position]
    return None


def _without_null(annotation: Any) -> Any:
    """What an annotation is where it is not null."""
    arguments = [each for each in get_args(annotation) if each is not type(None)]
    union = get_origin(annotation) in (Union, types.UnionType)
    return arguments[0] if union and len(arguments) == 1 else annotation


def _is_free(annotation: Any) -> bool:
    """Whether any keys may stand there: a plain dict."""
    return annotation in (dict, Any) or get_origin(annotation) is dict
