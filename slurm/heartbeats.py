"""Signs of life of the ranks: one small file each, where `DITMOE_HEARTBEATS` names a folder for them.

A rank says what it is in (a phase) and counts how often it has got further (beats). A thread of its own writes
that down every few seconds, and at once when the phase is another, so that training never waits for the folder.
Two kinds of silence are told apart: a rank whose beats stand still waits for something; one whose file does is
stopped, gone, or cut off from the folder.

Where a rank stays in one phase for most of its limit, it prints the stacks of all its threads, as long as it is
able to: who kills it later cannot ask any more.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, get_args

from ditmoe.data.storage.files import open_regular

FOLDER_VARIABLE: Final = "DITMOE_HEARTBEATS"
TERMS: Final = "terms.json"
"""In the folder, written before the ranks start: the attempt, the limits, and how often ranks write."""
_STDERR: Final = 2
"""The descriptor: sys.stderr may have been replaced, and its file let go."""
DUMP_SHARE: Final = 0.8
"""Of a phase's limit, after which a rank prints its stacks."""
LAST_WRITE_SECONDS: Final = 10.0
"""How long the end of a rank waits for its last file to be written; a folder that hangs does not hold it up."""

Phase = Literal["start", "step", "save", "evaluation", "ended"]
"""What a rank is in. Until its first step is done it starts; `evaluation` is drawing and scoring, previews too."""

DEFAULT_LIMITS: Final[Mapping[str, float]] = {"start": 1800, "step": 600, "save": 1800, "evaluation": 7200}
"""Seconds without a beat after which a rank counts as hung."""


@dataclass(frozen=True)
class Terms:
    """What the ranks of an attempt are watched by."""

    attempt: int = 0
    limits: Mapping[str, float] = field(default_factory=lambda: DEFAULT_LIMITS)
    interval: float = 10.0
    """Seconds between two writes of a rank."""

    def write(self, folder: Path) -> None:
        """Make the folder, clear it of an earlier attempt, and store the terms."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*.json*"):
            old.unlink(missing_ok=True)
        _replace(folder / TERMS, asdict(self))


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last wrote."""

    rank: int
    ranks: int
    """Of the whole run."""
    host: str
    pid: int
    attempt: int
    phase: Phase
    step: int | None
    doing: str
    """Within the phase, such as `reads data`."""
    beats: int
    """How often it has got further; ranks that work in step with one another have the same number."""
    since: float
    """When it last got further, seconds since 1970 by its own clock."""
    time: float
    """When it wrote this, by its own clock."""


class Heart:
    """A rank's signs of life; a context manager. Without a folder it does nothing.

    Args:
        folder: where the file goes; None: nobody watches.
        rank: of this process.
        ranks: of the run.
    """

    def __init__(self, folder: Path | None, rank: int, ranks: int) -> None:
        self._folder = folder
        self._terms = Terms()
        self._rank, self._ranks = rank, ranks
        self._now: tuple[Phase, int | None, str, int, float] = ("start", None, "", 0, time.time())
        self._lock = threading.Lock()
        """Held while `_now` is replaced, as several threads of a rank beat."""
        self._end = threading.Event()
        self._wake = threading.Event()
        """The thread is to write now."""
        self._thread: threading.Thread | None = None

    @classmethod
    def of_this_process(cls, rank: int, ranks: int, environment: Mapping[str, str] = os.environ) -> Self:
        """The heart of a rank, which beats where the environment names a folder."""
        folder = environment.get(FOLDER_VARIABLE)
        return cls(Path(folder) if folder else None, rank, ranks)

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._terms = read_terms(self._folder)
            self._arm("start")
            self._thread = threading.Thread(target=self._write_on, name="heartbeats", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            with self._lock:
                if kind is None:
                    self._say("ended", None, "")
                self._end.set()
                faulthandler.cancel_dump_traceback_later()
            self._wake.set()
            self._thread.join(LAST_WRITE_SECONDS)

    def beat(self, phase: Phase, step: int | None = None, doing: str = "") -> None:
        """Say that the rank has got further, and what it is in now. Never waits for the folder.

        After the end it does nothing: a thread that is late does not bring an earlier phase back.
        """
        with self._lock:
            if self._thread is not None and not self._end.is_set():
                self._say(phase, step, doing)

    def _say(self, phase: Phase, step: int | None, doing: str) -> None:
        is_another = phase != self._now[0]
        # One assignment: the thread that writes reads all of it or none.
        self._now = (phase, step, doing, self._now[3] + 1, time.time())
        if is_another:
            # A process that is stopped now is held to the limit of the phase that its file shows.
            self._wake.set()
        self._arm(phase)

    def _arm(self, phase: Phase) -> None:
        """Print the stacks when the phase takes most of its limit."""
        limit = self._terms.limits.get(phase)
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(DUMP_SHARE * limit, file=_STDERR)

    def _write_on(self) -> None:
        """Write the file again and again. Where the folder refuses, the watcher notices that it stands still."""
        assert self._folder is not None
        ended = False
        while not ended:
            self._wake.clear()
            ended = self._end.is_set()
            phase, step, doing, beats, since = self._now
            heartbeat = Heartbeat(
                rank=self._rank,
                ranks=self._ranks,
                host=socket.gethostname(),
                pid=os.getpid(),
                attempt=self._terms.attempt,
                phase=phase,
                step=step,
                doing=doing,
                beats=beats,
                since=since,
                time=time.time(),
            )
            with suppress(OSError):
                _replace(self._folder / f"rank-{self._rank}.json", asdict(heartbeat))
            if not ended:
                self._wake.wait(self._terms.interval)


def read_terms(folder: Path) -> Terms:
    """The terms that were stored in a folder; the defaults, where none were."""
    try:
        with open_regular(folder / TERMS) as file:
            values = json.loads(file.read())
        limits = {str(phase): float(limit) for phase, limit in values["limits"].items()}
        return Terms(int(values["attempt"]), limits, float(values["interval"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Terms()


def read_heartbeats(folder: Path, attempt: int) -> dict[int, Heartbeat]:
    """The heartbeats of an attempt by rank; without those that cannot be read.

    OSError where the folder itself cannot be.
    """
    found: dict[int, Heartbeat] = {}
    for name in os.listdir(folder):
        if not (name.startswith("rank-") and name.endswith(".json")):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            with open_regular(folder / name) as file:
                heartbeat = _heartbeat(json.loads(file.read()))
            if heartbeat.attempt == attempt:
                found[heartbeat.rank] = heartbeat
    return found


def _heartbeat(values: Any) -> Heartbeat:
    phase = values["phase"]
    if phase not in get_args(Phase):
        raise ValueError(phase)
    step = values["step"]
    return Heartbeat(
        rank=int(values["rank"]),
        ranks=int(values["ranks"]),
        host=str(values["host"]),
        pid=int(values["pid"]),
        attempt=int(values["attempt"]),
        phase=phase,
        step=None if step is None else int(step),
        doing=str(values["doing"]),
        beats=int(values["beats"]),
        since=float(values["since"]),
        time=float(values["time"]),
    )


def _replace(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file that is whole whenever it is read; after a loss of power it may be empty."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)
