"""The base of every section of a run's configuration."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import ErrorDetails

LONGEST_NAME: Final = 255
"""Bytes of a file's name, on all common file systems."""
LONGEST_PATH: Final = 2000
"""Bytes of a path of the configuration: half of what Linux takes, which leaves room for what lies below it."""
LARGEST_SEED: Final = 2**63 - 1
MOST_IMAGES: Final = 2**24
"""Images of a step, or of anything that is held at once."""
MOST_STEPS: Final = 10**11
"""Steps of anything: times the images of a step they are still a number of 63 bits."""


@dataclass(frozen=True)
class Unit:
    """What a number of the configuration counts or measures: `Annotated[float, Unit("seconds")]`."""

    name: str


NO_UNIT: Final = Unit("")
"""Of a plain number: a factor, a weight, a seed."""


_WORDS: Final = {"extra_forbidden": "no such key", "missing": "it is missing"}
"""What pydantic says in words of its own of keys that nobody knows, or that are not there."""


def message_of(problem: ErrorDetails) -> str:
    """What one of pydantic's problems says: of our own checks their words alone."""
    return _WORDS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")


class Settings(BaseModel):
    """A section of the configuration: unknown keys are errors, values do not change after loading.

    The docstring under each field is its documentation: range, and what null means; numbers have a `Unit`. They
    are finite unless a field says otherwise, and paths are such as a file system takes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_paths(cls, value: Any, info: Any) -> Any:
        """An empty path would be the current directory, and one that is too long fails wherever it is used."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and (annotation is Path or annotation == Path | None):
            check_path(value)
        return value


def check_path(text: str) -> None:
    """Check that a text can be the path of a file or folder.

    Raises:
        ValueError: it is empty, too long, or has a character that no path has.
    """
    if not text.strip():
        raise ValueError("expected a path; `.` is the current directory")
    encoded = os.fsencode(text)
    if "\0" in text or len(encoded) > LONGEST_PATH or any(len(n) > LONGEST_NAME for n in encoded.split(b"/")):
        raise ValueError(
            f"expected a path of at most {LONGEST_PATH} bytes, its names of at most {LONGEST_NAME}, without \\0"
        )
