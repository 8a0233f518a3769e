"""Names of classes from a file, and what labels may be called."""

import json
import re
from pathlib import Path
from typing import Any, Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_fit_to_print, normal

MAX_CLASSES: Final = 100_000
"""Labels of more classes are taken for something else, such as captions or identifiers."""
_NUMBER: Final = re.compile(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a file, by label: a JSON list of strings, or one name per line.

    UserError when it cannot be read, is empty, or a name comes twice or cannot be printed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: expected the name of each class, one per line or as a JSON list of strings")
    names = [normal(name) for name in names]
    while names and not names[-1]:
        names.pop()
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if not name or not is_fit_to_print(name):
            raise UserError(
                f"{path}: the name of class {label} is {name!a}, expected characters that can be printed"
            )
        if first.setdefault(name, label) != label:
            raise UserError(f"{path}: the name {name} comes twice, for the classes {first[name]} and {label}")
    if not names:
        raise UserError(f"{path}: expected the name of each class, one per line or as a JSON list of strings")
    return tuple(names)


def as_number(value: Any) -> int | None:
    """The label that a number, or text of digits, stands for; null: it is no number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def as_name(value: Any) -> str | None:
    """Text that may name a class, composed as names are stored; null: it is none, as −1 and 2.5 are not."""
    if not isinstance(value, str) or not value or not is_fit_to_print(value) or _NUMBER.fullmatch(value):
        return None
    return normal(value)
