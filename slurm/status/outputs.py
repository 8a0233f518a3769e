"""What a run printed: which file has it, and its end as it grows."""

import codecs
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ditmoe.data.storage.files import open_regular
from ditmoe.model.errors import UserError
from ditmoe.slurm.job_folder import training_folder

LOG: Final = "log.txt"
RANKS: Final = "ranks"
_LOG_AHEAD_SECONDS: Final = 60.0
_TAIL_BYTES: Final = 2**22
"""Read of a file's end at most."""


def output_of(run: Path, rank: int | None = None) -> Path:
    """The file with what a run printed last: its newest job's output, or its log where no job trained it later.

    Args:
        run: its folder.
        rank: of a run on one machine: that rank's own output; rank 0's is the log.

    Raises:
        UserError: there is none.
    """
    if rank:
        own = run / RANKS / f"rank-{rank}.txt"
        if not own.is_file():
            others = sorted(path.name for path in (run / RANKS).glob("rank-*.txt"))
            expected = ", ".join(others) or "a run of several local ranks"
            raise UserError(f"{own}: not found; expected {expected}")
        return own
    log = run / LOG
    outputs = [] if rank == 0 else list(training_folder(run).path.glob("output-*.txt"))
    written = {path: path.stat().st_mtime for path in (log, *outputs) if path.is_file()}
    if not written:
        raise UserError(f"{run}: no {LOG} and no output of a job found; expected a run that has begun")
    # A job prints all that the log has, and what ended it: only a run that goes on without a job leaves it behind.
    if log in written and len(written) > 1:
        written[log] -= _LOG_AHEAD_SECONDS
    return max(written, key=lambda path: written[path])


def last_lines(path: Path, lines: int) -> tuple[str, int]:
    """The last lines of a file, and how many bytes of it there are by then."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read(min(size, _TAIL_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    text = content.decode(errors="replace")
    return "".join(text.splitlines(keepends=True)[-lines:]) if lines else "", size


def followed(
    find: Callable[[], Path],
    start: tuple[Path, int],
    has_ended: Callable[[], bool],
    poll: float = 0.5,
) -> Iterator[str]:
    """What is appended to a run's output, piece by piece, until the run has ended and all is read.

    Args:
        find: the file with the newest output; when it is another than before, that is read from its beginning.
        start: the file to begin with, and how many bytes of it are known.
        has_ended: whether nothing more comes; asked only when there is nothing new.
        poll: seconds between two looks.
    """
    path, place = start
    decoder = _decoder()
    while True:
        with open_regular(path) as file:
            if file.seek(0, 2) < place:
                place = 0  # somebody has cut it
            file.seek(place)
            content = file.read(_TAIL_BYTES)
        place += len(content)
        if content:
            yield decoder(content)
            continue
        newest = find()
        if newest != path:
            path, place, decoder = newest, 0, _decoder()
            yield f"==> {path} <==\n"
        elif has_ended():
            return
        else:
            time.sleep(poll)


def _decoder() -> Callable[[bytes], str]:
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode
