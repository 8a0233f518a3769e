"""The files that the page is made of, which lie in the package. Nothing of the runs is in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Final

FOLDER: Final = "static"
START: Final = "index.html"
PREFIX: Final = "/page/"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class StaticFile:
    """A file, and what a browser takes it for."""

    content: bytes
    media_type: str


@cache
def static_files() -> Mapping[str, StaticFile]:
    """Path of a request → file; `/` is where the page begins."""
    found = {}
    for entry in files(__package__).joinpath(FOLDER).iterdir():
        suffix = PurePosixPath(entry.name).suffix
        if suffix in TYPES:
            path = "/" if entry.name == START else f"{PREFIX}{entry.name}"
            found[path] = StaticFile(entry.read_bytes(), TYPES[suffix])
    assert "/" in found, "the package lacks the files of the page"
    return found
