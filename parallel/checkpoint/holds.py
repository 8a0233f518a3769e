"""Checkpoints that are being read, or scored, while the run that wrote them lets old ones go.

Who reads one holds a shared lock on its marker; who lets one go takes the lock alone, for as long as its folder
gets another name. A run needs a file system with locks anyway. Where a checkpoint lies on one without, only its
settings can keep it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.marker import MARKER


class CheckpointGoneError(UserError):
    """A checkpoint was let go before it could be held."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep a checkpoint from being let go while its files are read: a run in progress removes old ones.

    Raises:
        CheckpointGoneError: it is gone already.
    """
    try:
        marker = (path / MARKER).open()
    except FileNotFoundError:
        raise _gone(path) from None
    with marker:
        with suppress(OSError):  # a file system without locks: then it has to be kept by its settings
            fcntl.flock(marker, fcntl.LOCK_SH)
        # Between the opening and the lock it may have been let go, and even written anew.
        try:
            still_there = os.path.samestat(os.fstat(marker.fileno()), os.stat(path / MARKER))
        except FileNotFoundError:
            still_there = False
        if not still_there:
            raise _gone(path)
        yield


def _gone(path: Path) -> CheckpointGoneError:
    return CheckpointGoneError(f"{path}: its run has removed it meanwhile; checkpoint.keep_every keeps more")


@contextmanager
def letting_go(path: Path) -> Iterator[bool]:
    """Keep everybody from beginning to read a checkpoint while it is given another name.

    Yields:
        Whether it may be: false while any process of this machine, or of the file system where its locks reach so
        far, is `reading` it.
    """
    try:
        marker = (path / MARKER).open("r+")
    except OSError:
        yield True  # a marker that cannot be written
        return
    free = True
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # no locks here
            pass
        yield free
