"""How a started process tells the starting one why it failed, so that the first cause is shown.

When one rank fails, the others fail after it with broken connections. Each writes what happened, and when, to
a file of its own; the starting process shows the earliest.
"""

import errno
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import replacing
from ditmoe.model.outside.text import message_lines

FAILURE_VARIABLE: Final = "DITMOE_FAILURE_FILE"
"""Environment variable of a started process: the file it writes its failure to."""

REFUSALS: Final = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE),
    }
)
"""What the system says when a place or a limit of the user's does not allow what the program is asked for."""


_TORCH_WANTS_MEMORY: Final = "DefaultCPUAllocator: can't allocate memory"
"""Of a RuntimeError, which is all that torch raises where the CPU's memory is short."""


def refusal(error: Exception) -> str | None:
    """The message for what the system refused, a file or memory; None where the program is at fault."""
    if isinstance(error, MemoryError) or _TORCH_WANTS_MEMORY in str(error):
        wanted = str(error).rpartition(": ")[2] or "of this process"
        return f"not enough memory on this machine: {wanted}"
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    if error.filename is None:
        return f"{error.strerror}: a file could not be written or opened"
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


@dataclass(frozen=True)
class Failure:
    """Why a process failed."""

    message: str
    """A user error's text, or a traceback."""
    code: int
    """Exit code."""
    seconds: float
    """When, on the machine's monotonic clock."""


def record_failure(message: str, code: int) -> bool:
    """Write this process's failure for the one that started it; False if it was not started by one of ours.

    The message goes to standard error as well where that is a rank's own file, but not on the terminal.
    """
    path = os.environ.get(FAILURE_VARIABLE)
    if path is None:
        return False
    failure = Failure(message, code, time.monotonic())
    try:
        with replacing(Path(path)) as file:
            file.write(json.dumps(asdict(failure)).encode())
    except UserError:
        return False  # as on a full disk, which may be why it failed: then it says so itself
    if os.environ.get("RANK") != "0":
        print(message_lines(message) if code == 2 else message, file=sys.stderr)
    return True


def read_failure(path: Path) -> Failure | None:
    """The failure that a process wrote, or None if it wrote none."""
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
