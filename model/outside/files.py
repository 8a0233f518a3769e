"""Files that are either whole or not there."""

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from ditmoe.model.errors import UnwritableError, UserError

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


NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer to one."""


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing under a temporary name, as `replacing`; what has the name by then stays.

    Raises:
        UserError: something has the name.
        UnwritableError: the file system refuses.
    """
    taken = UserError(f"{path}: exists already; remove it or choose another name")
    if os.path.lexists(path):
        raise taken
    try:
        partial = temporary_beside(path)
        try:
            with open(partial, "xb") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(partial, path)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # the name is ours then
                os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except FileExistsError as error:
        raise taken from error
    except OSError as error:
        raise UnwritableError(path, error.strerror or str(error)) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
