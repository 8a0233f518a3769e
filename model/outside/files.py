"""Files that are either whole or not there."""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from ditmoe.model.errors import UnwritableError

PARTIAL_PREFIX: Final = ".ditmoe-"
PARTIAL_SUFFIX: Final = ".partial"


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` that nothing has, and nobody else takes."""
    return path.with_name(f"{PARTIAL_PREFIX}{uuid.uuid4().hex}{PARTIAL_SUFFIX}")


@contextmanager
def replacing(path: Path, *, private: bool = False, synced: bool = True) -> Iterator[BinaryIO]:
    """Open `path` for writing under a temporary name; it takes its place only when the block ends well.

    The temporary file is new, in the same folder, under a name that nobody else has; it is locked meanwhile.

    Args:
        path: the file.
        private: nobody but the owner may read it.
        synced: after a loss of power it is either whole or as before; otherwise it may be empty.

    Raises:
        UnwritableError: the file system refuses (full, read-only, no permission).
    """
    try:
        partial = temporary_beside(path)
        try:
            with open(partial, "xb") as file:
                if private:
                    os.fchmod(file.fileno(), 0o600)
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                file.flush()
                if synced:
                    os.fsync(file.fileno())
            os.replace(partial, path)
            if synced:
                sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UnwritableError(path, error.strerror or str(error)) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
