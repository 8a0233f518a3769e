"""Files that are either whole or not there, and what writers that were killed leave of them."""

import errno
import fcntl
import io
import json
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import PARTIAL_PREFIX, PARTIAL_SUFFIX, new_file, replacing
from ditmoe.model.outside.text import is_address

__all__ = [
    "is_partial",
    "make_folder",
    "new_file",
    "open_appending",
    "open_regular",
    "read_settings",
    "remove_abandoned",
    "replacing",
]

ABANDONED_SECONDS: Final = 600.0
"""How long nothing must have been written to a temporary file that nobody has locked."""


def is_partial(name: str) -> bool:
    """Whether `replacing` gives such names to files that it has not finished; nobody else does."""
    return re.fullmatch(rf"{re.escape(PARTIAL_PREFIX)}[0-9a-f]{{32}}{re.escape(PARTIAL_SUFFIX)}", name) is not None


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in `folder` of writers that were killed.

    Those that somebody has locked stay, and so do new ones: locks do not reach across every file system.
    """
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if is_partial(entry.name):
                with suppress(OSError), open(entry.path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a file for reading. OSError, and at once, when it is a pipe, a device, or anything else but a file."""
    return open(regular_descriptor(path), "rb")


def regular_descriptor(path: str | Path) -> int:
    """A descriptor of a file for reading, which the caller closes. OSError as `open_regular`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def open_appending(path: Path) -> io.BufferedWriter:
    """Open a file to append to, made where it is not there. UserError, at once, when it is a pipe or a device."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # of a pipe that nobody reads
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return open(descriptor, "ab")
        os.close(descriptor)
    raise UserError(f"{path}: is a pipe or a device; expected a file, or nothing there")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    UserError when it is an address, or the file system refuses.
    """
    if is_address(folder):
        raise UserError(f"{folder}: is an address; expected a folder of this machine")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be made: {error.strerror or error}") from error


def read_settings(path: Path) -> dict[str, Any] | None:
    """What a folder was begun with, a JSON object; null: it never was. UserError when the file is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: could not be read ({error}); choose another folder, or delete this one"
        ) from None
    return values if isinstance(values, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that this program wrote and can make anew. UserError when it is not there or is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: could not be read ({error}); delete the file, it is made anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected an object; delete the file")
    return values
