"""Where compiled code lies: a folder of this process alone, which ends with it.

torch keeps what it compiled under a name in the temporary folder that anybody can foretell, reads some of it with
pickle, and never removes any. Here each process has a new folder that only its user can enter, and removes it at
its end; those of processes that were killed are removed by the next one. `TORCHINDUCTOR_CACHE_DIR` names a folder
that stays, and whose contents its owner trusts.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
PREFIX: Final = "ditmoe-compiled-"
IN_USE: Final = "in-use"
"""A file in the folder; who uses the folder holds a lock on it."""
_YOUNG_SECONDS: Final = 60.0
"""A folder may be so old and not yet have a lock."""

_held: list[BinaryIO] = []


def compile_into_own_folder() -> Path:
    """The folder of this process, made now where it is the first time, or the one that the environment names."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    parent = Path(tempfile.gettempdir())
    remove_abandoned_folders(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    file = (folder / IN_USE).open("wb")
    with suppress(OSError):  # a file system without locks, where nobody else removes it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _held.append(file)
    os.environ[VARIABLE] = str(folder)
    atexit.register(_remove, folder, os.getpid())
    return folder


def remove_abandoned_folders(parent: Path) -> None:
    """Remove this user's folders that no living process holds."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            facts = folder.lstat()
            if facts.st_uid != os.getuid() or folder.is_symlink() or time.time() - facts.st_mtime < _YOUNG_SECONDS:
                continue
            with suppress(FileNotFoundError), (folder / IN_USE).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: it is in use
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, process: int) -> None:
    """At the end of the process that made it, and not of those that were forked from it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
