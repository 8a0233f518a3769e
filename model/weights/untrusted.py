"""JSON and files that others made: read with limits, before anything is built from them."""

import errno
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from ditmoe.model.errors import UserError
from ditmoe.model.settings import message_of

MOST_NESTING: Final = 32
"""Levels of lists and mappings within each other; a run's configuration has about six."""
_SHOWN: Final = 60
"""Characters shown of a value that is refused."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, is nested deeper than `MOST_NESTING`, or holds half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_NESTING} levels") from None
    level = [value]
    for _ in range(MOST_NESTING):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MOST_NESTING} levels")


def _inside(value: Any) -> Iterator[Any]:
    """What a list or a mapping holds; names and texts are checked on the way."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def first_problem(error: ValidationError) -> str:
    """The first thing that a schema found wrong: where, what was found, and what was expected."""
    found = error.errors(include_url=False)[0]
    where = ".".join(_shown(str(part)) for part in found["loc"])
    text = _shown(message_of(found), 4 * _SHOWN)
    if found["type"] in ("value_error", "missing"):
        return f"{where}: {text}" if where else text
    return f"{where} = {_shown(repr(found['input']))}: {text}"


def _shown(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else text[:most] + "…"


def read_file(path: Path, most_bytes: int) -> bytes:
    """The contents of a regular file.

    Raises:
        UserError: it is no regular file, is larger than `most_bytes`, or cannot be read.
        FileNotFoundError: there is none.
    """
    size = regular_file_bytes(path)
    if size > most_bytes:
        raise UserError(f"{path}: {size:,} bytes found, expected at most {most_bytes:,}")
    try:
        with path.open("rb") as file:
            return file.read(most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def regular_file_bytes(path: Path) -> int:
    """Size of a regular file. To open a pipe or a device might wait for ever.

    Raises:
        UserError: it is something else, or cannot be looked at.
        FileNotFoundError: there is none.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "neither a file nor a folder"
        raise UserError(f"{path}: is {kind}, expected a file")
    return found.st_size


def leads_out(path: Path, *folders: Path) -> bool:
    """Whether links in a path lead to a place outside all of these folders, or in a circle."""
    try:
        real = path.resolve(strict=True)
        return not any(real.is_relative_to(folder.resolve()) for folder in folders)
    except RuntimeError:
        return True  # links in a circle
    except OSError as error:
        return error.errno == errno.ELOOP  # whatever else there is, who reads it is told
