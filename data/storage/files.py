"""Files that are either whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ditmoe.model.errors import UserError

PARTIAL_SUFFIX = ".partial"


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Open `path` for writing under a temporary name; it takes its place only when the block ends well.

    Args:
        path: the file.
        private: nobody but the owner may read it.

    UserError when the file system refuses (full, read-only, no permission).
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        try:
            with open(partial, "wb") as file:
                if private:
                    os.fchmod(file.fileno(), 0o600)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet. UserError when the file system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be made: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
