"""Work shared between processes, on one machine or several, through files and locks alone.

What is to be made is a list of files. Whoever makes one holds a lock on it (flock, which the system releases when
the holder dies), so that processes share the work without a coordinator and nothing is made twice.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ditmoe.data.storage.files import make_folder
from ditmoe.model.errors import UserError

Progress = Callable[[int], None]
"""Called with the number of files that are there."""

WAIT_SECONDS: Final = 0.2
"""Pause before looking again at files that other processes are making."""


@contextmanager
def try_lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock on `path` (created empty) for the body; yields False when another process is in the way.

    Args:
        shared: any number of processes may hold it so, but not beside one that holds it for itself.

    Raises:
        UserError: the file system has no locks, or refuses the file.
    """
    make_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: could not be opened for writing: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{path}: this file system does not support locks ({error.strerror}); "
                    "expected a local disk, or a network file system mounted with flock"
                ) from None
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def make_missing(
    paths: Sequence[Path],
    make: Callable[[int], None],
    *,
    rank: int = 0,
    ranks: int = 1,
    locks: Path | None = None,
    on_progress: Progress = lambda done: None,
) -> int:
    """Make the files that are not there, each by one process, until all are there.

    Each process starts at its own place in the list and takes any file that nobody is making, so that a slow
    process holds up no other; what a process that dies was making is free for the others at once.

    Args:
        paths: the files.
        make: writes the file with the given place in `paths`, under its final name only when it is whole.
        locks: folder of a lock for each file; None: `locks/` beside it.
        on_progress: called with the number of files that are there, at the start, after each and while waiting.

    Returns:
        The number of files that this process made.
    """
    made = 0
    while missing := [i for i, path in enumerate(paths) if not path.exists()]:
        on_progress(len(paths) - len(missing))
        start = len(missing) * rank // ranks
        took = 0
        for i in missing[start:] + missing[:start]:
            if paths[i].exists():
                continue
            with try_lock((locks or paths[i].parent / "locks") / paths[i].name) as held:
                # Looked at again under the lock: its last holder may have finished.
                if not held or paths[i].exists():
                    continue
                make(i)
                assert paths[i].exists(), paths[i]
            took += 1
            on_progress(sum(path.exists() for path in paths))
        made += took
        if not took:
            time.sleep(WAIT_SECONDS)
    on_progress(len(paths))
    return made
