"""Claims: which process works on what, recorded in files alone, on one machine or several, without locks.

A claim on a name is a file `NAME.<number>` that says who holds it: machine, process, when that started, and a
random token. It is created whole and at once (a hard link, which exactly one process gets), and its holder touches
it at every beat. A claim is over

- when its holder has removed it,
- at once, when its holder ran on this machine and no longer runs,
- otherwise, when its holder has missed too many beats by the clock of the file server.

Whoever takes over a claim creates the next number, which again exactly one process gets, and names the token of
the claim that it takes over. So a claim that seems to be over cannot be taken twice, and a holder that only seemed
dead can tell that it has lost its claim.
"""

import errno
import hashlib
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ditmoe.data.storage.files import make_folder
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import NO_LINKS

BEAT_SECONDS: Final = 15.0
"""Between two signs of life of a holder."""
MISSED_BEATS: Final = 8
"""So many beats without a sign, and the holder is taken for dead; file systems may show a time a minute late."""
_CLAIM: Final = re.compile(r"(?P<name>.+)\.(?P<number>[0-9]{1,9})")
_DRAFT: Final = re.compile(
    r"\.(?P<machine>[0-9a-f]{8})\.(?P<pid>[0-9]{1,9})\.(?P<started>[0-9]{1,19}|None)\.[0-9a-f]{32}"
)
"""A file on its way to be a claim, or to tell the server's time: it says whose it is before it has a content."""
_LONGEST_BEAT: Final = 3600.0


class Listing(NamedTuple):
    """The contents of a folder of claims."""

    claims: dict[str, list[int]]
    """Name → numbers of the claims on it."""
    others: frozenset[str]
    """Names of all other files."""


@dataclass(frozen=True)
class _Seen:
    """A claim as it was read."""

    token: str
    after: str
    """Token of the claim that it took over; empty: none."""
    machine: str
    host: str
    pid: int
    started: int | None
    beat: float
    touched: float
    """Time of the last sign of life, by the file server's clock."""


class Claim:
    """A claim that this process holds until `release`, or until others take it for dead."""

    def __init__(self, folder: Path, name: str, number: int, token: str) -> None:
        self.name = name
        self.token = token
        self._path = folder / f"{name}.{number}"
        self._next = folder / f"{name}.{number + 1}"
        self._pid = os.getpid()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {name}", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether this process still holds it: nobody took it for dead, and nobody removed the file."""
        own, following = _read(self._path), _read(self._next)
        lost = following is not None and following.after == self.token
        return own is not None and own.token == self.token and not lost

    def release(self) -> None:
        """Give the claim up. Does nothing in a process that was forked from the holder."""
        if os.getpid() != self._pid:
            return
        self._released.set()
        own = _read(self._path)
        if own is not None and own.token == self.token:
            with suppress(OSError):  # then it is over when this process is
                _remove(self._path)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):  # the server may be away; `held` tells whether the claim is still there
                os.utime(self._path)


class Claims:
    """The claims in one folder. Names are file names; the folder is made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def listing(self) -> Listing:
        """List the folder once. UserError when it cannot be read."""
        claims: dict[str, list[int]] = {}
        others: set[str] = set()
        for file in list_folder(self.folder):
            match = _CLAIM.fullmatch(file)
            if match is None:
                others.add(file)
            else:
                claims.setdefault(match["name"], []).append(int(match["number"]))
        return Listing(claims, frozenset(others))

    @contextmanager
    def taken(self, name: str, seen: Listing | None = None) -> Iterator[Claim | None]:
        """Hold the claim on `name` for the body; None where a process that lives holds it.

        Args:
            name: of what is claimed.
            seen: what a look at the folder a moment ago showed; None: look now.

        UserError when the file system refuses.
        """
        make_folder(self.folder)
        claim = self._take(name, seen or self.listing())
        try:
            yield claim
        finally:
            if claim is not None:
                claim.release()

    def _take(self, name: str, listing: Listing) -> Claim | None:
        numbers = listing.claims.get(name, [])
        number, judged = 0, ""
        if numbers:
            last = _read(self.folder / f"{name}.{max(numbers)}")
            if last is None or self._lives(last):
                return None
            number, judged = max(numbers) + 1, last.token
        token = uuid.uuid4().hex
        path = self.folder / f"{name}.{number}"
        try:
            if not self._create(path, token, judged):
                return None
            # What was judged may be long over: then others have come and gone, or hold another number. Where a
            # process died while it took the claim over, more than one that is over is left.
            listing = self.listing()
            numbers = listing.claims.get(name, [])
            before = {each: _read(self.folder / f"{name}.{each}") for each in numbers if each < number}
            if max(numbers, default=-1) != number or any(
                seen and seen.token != judged and self._lives(seen) for seen in before.values()
            ):
                _remove(path)
                return None
            for each in before:
                _remove(self.folder / f"{name}.{each}")
            self.remove_drafts(listing)
            return Claim(self.folder, name, number, token)
        except BaseException:  # a signal may come at any time
            own = _read(path)
            if own is not None and own.token == token:
                _remove(path)
            raise

    def any_held(self, prefix: str) -> bool:
        """Whether a process that lives holds a claim on any name that begins so."""
        names = [name for name in self.listing().claims if name.startswith(prefix)]
        return any(self.holder(name) is not None for name in names)

    def holder(self, name: str) -> str | None:
        """Who holds the claim on `name`, for people to read; None: no process that lives."""
        numbers = self.listing().claims.get(name)
        seen = _read(self.folder / f"{name}.{max(numbers)}") if numbers else None
        return f"process {seen.pid} on {seen.host}" if seen is not None and self._lives(seen) else None

    def is_held_here(self, name: str) -> bool:
        """Whether a process of this machine holds the claim on `name`: it is known to live, whatever its beats."""
        numbers = self.listing().claims.get(name)
        seen = _read(self.folder / f"{name}.{max(numbers)}") if numbers else None
        return seen is not None and seen.machine == _here().machine and self._lives(seen)

    def who(self, name: str) -> str:
        """The holder in brackets, to append to a message; empty where it has just gone."""
        holder = self.holder(name)
        return "" if holder is None else f" ({holder})"

    def _create(self, path: Path, token: str, after: str) -> bool:
        """Create a claim, whole and at once; False where another process has created it before."""
        here, draft = _here(), self._draft(token)
        content = json.dumps(
            {
                "token": token,
                "after": after,
                "machine": here.machine,
                "host": here.host,
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "beat": BEAT_SECONDS,
            }
        ).encode()
        try:
            try:
                try:
                    draft.write_bytes(content)
                except FileNotFoundError:  # somebody has removed the folder, which held nothing
                    make_folder(self.folder)
                    draft.write_bytes(content)
                os.link(draft, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # Without hard links somebody may see it before its content is there, and lets it be until it is
                # old.
                try:
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                except FileExistsError:
                    return False
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
            finally:
                _remove(draft)
        except OSError as error:
            raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
        return True

    def remove_drafts(self, listing: Listing) -> None:
        """Remove what killed processes left on its way. Removes nothing of a process that may live."""
        for draft in filter(None, map(_DRAFT.fullmatch, listing.others)):
            path = self.folder / draft[0]
            if draft["machine"] == _machine_digest():
                started = None if draft["started"] == "None" else int(draft["started"])
                over = not _runs(int(draft["pid"]), started)
            else:
                seen = _read(path)
                over = seen is not None and self._now() - seen.touched > MISSED_BEATS * BEAT_SECONDS
            if over:
                _remove(path)

    def _draft(self, token: str) -> Path:
        return self.folder / f".{_machine_digest()}.{os.getpid()}.{_started(os.getpid())}.{token}"

    def _lives(self, seen: _Seen) -> bool:
        if seen.machine == _here().machine and seen.pid > 0:
            return _runs(seen.pid, seen.started)
        return self._now() - seen.touched <= MISSED_BEATS * seen.beat

    def _now(self) -> float:
        """The time by the clock of the file server, which need not be this machine's."""
        draft = self._draft(uuid.uuid4().hex)
        try:
            draft.touch()
            return draft.stat().st_mtime
        except OSError as error:
            raise UserError(f"{draft}: could not be written: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                _remove(draft)


def list_folder(folder: Path) -> list[str]:
    """The names in a folder, by one pass over it; none where it is not there. UserError when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: could not be read: {error.strerror or error}") from error


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


class _Machine(NamedTuple):
    """Where numbers of processes mean the same."""

    machine: str
    host: str


def _here() -> _Machine:
    """This machine since it was booted, and this container in it."""
    host = socket.gethostname()
    facts = [host]
    with suppress(OSError):  # only Linux has them
        facts = [
            host,
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    # Without them a process is not looked for: the beats of its claims decide.
    return _Machine(" ".join(facts) if len(facts) == 3 else f"{host} {uuid.uuid4().hex}", host)


def _machine_digest() -> str:
    """Of this machine's name, as drafts have it: eight hexadecimal digits."""
    return hashlib.sha256(_here().machine.encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine booted; None: it has ended, or nothing says."""
    try:
        # The name, in brackets, may have spaces and brackets in it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _runs(pid: int, started: int | None) -> bool:
    """Whether a process of that number runs, and is the one that started then."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    if not Path(f"/proc/{pid}").exists():  # hidden from this user
        return True
    return _started(pid) == started


def _read(path: Path) -> _Seen | None:
    """A claim; None: it is not there. One that cannot be read has a holder too: its beats decide."""
    try:
        # Opened, not only looked at: network file systems then ask the server for its time.
        with path.open("rb") as file:
            content, touched = file.read(4096), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # removed on another machine
            return None
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    try:
        values = json.loads(content)
        started = values["started"]
        return _Seen(
            str(values["token"]),
            str(values["after"]),
            str(values["machine"]),
            str(values["host"]),
            int(values["pid"]),
            None if started is None else int(started),
            min(max(float(values["beat"]), 0.0), _LONGEST_BEAT),
            touched,
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return _Seen("", "", "", "an unknown machine", 0, None, BEAT_SECONDS, touched)
