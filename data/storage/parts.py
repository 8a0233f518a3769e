"""Work in parts: what is to be made, separate from who makes it.

`Parts` says what the work is: a file for each part, how one is made, written and read again, and what follows from
all of them. A part is a function of its number. It is written under a name that nobody else has, and renamed once
it is whole. So any process may make any part at any time (`Parts.make_one`), and making a part twice wastes time
but does no harm.

`make_parts` is one way to have them all made: processes that share a folder, on one machine or several, take parts
by claims (`claims.py`). No two live processes make the same part, another process makes what a killed one was
making, and a process counts the finished parts by listing the folder now and then.
"""

import json
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Generic, Self, TypeVar

from ditmoe.data.storage.claims import Claim, Claims, Listing, list_folder
from ditmoe.data.storage.files import make_folder
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import NO_LINKS

Made = TypeVar("Made")
Found = TypeVar("Found")
Result = TypeVar("Result")

Progress = Callable[[int], None]
"""Called with the number of parts that are there, or with what they count for."""

WAIT_SECONDS: Final = 0.2
"""Between two looks at the folder."""
FAILURE_SECONDS: Final = 10.0
"""How long a process that hears of another's failure waits for whoever started both to end it, before it ends
itself with the same message."""
CLAIMS_FOLDER: Final = "claims"
DRAFT_SUFFIX: Final = ".draft"
FAILURE_SUFFIX: Final = ".failed"


class DamagedPart(UserError):
    """The file of a part is not there or cannot be read; it can be made anew."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path}: unreadable ({reason}); delete the file, it is made anew")


@dataclass(frozen=True)
class Parts(Generic[Made, Found, Result]):
    """What is to be made, and what follows from it."""

    folder: Path
    """Where the files are, made when it is needed."""
    names: Sequence[str]
    """Of the file of each part."""
    make: Callable[[int], Made]
    """Makes a part from its number, always the same. UserError ends all who are at this work."""
    write: Callable[[Made, BinaryIO], None]
    """Writes to an open file what was made."""
    read: Callable[[int], Found]
    """Reads a part. DamagedPart when it is not whole: then it is made anew."""
    finish: Callable[[Iterable[Found]], Result]
    """What follows from all parts, which come in their order, each read when it is asked for."""
    claims_folder: Path | None = None
    """Where those at work say what they are at, and keep their drafts; None: in `folder`."""
    sizes: Sequence[int] | None = None
    """What each part counts for in progress; None: 1."""

    def size(self, of: Iterable[int]) -> int:
        """What some parts count for."""
        return sum(1 if self.sizes is None else self.sizes[part] for part in of)

    @property
    def claims(self) -> Claims:
        """The claims on parts, by the names of their files."""
        return Claims(self.claims_folder or self.folder / CLAIMS_FOLDER)

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / self.names[part]

    def make_one(self, part: int, still_wanted: Callable[[], bool] = lambda: True, *, anew: bool = False) -> bool:
        """Make a part and give the file its name.

        Args:
            still_wanted: asked when the file is whole; it is thrown away where not.
            anew: take the place of a file that is there.

        Returns:
            Whether it is this one that has the name.

        Raises:
            UserError: it cannot be made, or the file system refuses.
        """
        return self.place(part, self.make(part), still_wanted, anew=anew)

    def place(
        self, part: int, made: Made, still_wanted: Callable[[], bool] = lambda: True, *, anew: bool = False
    ) -> bool:
        """Write what was made of a part, and give the file its name; as `make_one`."""
        path, drafts = self.path(part), self.claims.folder
        make_folder(self.folder)
        make_folder(drafts)
        with _writable(path):
            draft = drafts / f"{self.names[part]}.{uuid.uuid4().hex}{DRAFT_SUFFIX}"
            try:
                with open(draft, "xb") as file:
                    self.write(made, file)
                    file.flush()
                    os.fsync(file.fileno())
                return still_wanted() and _place(draft, path, anew)
            finally:
                draft.unlink(missing_ok=True)

    def load(self, part: int) -> Found:
        """Read a part; where it is damaged, make it anew. UserError when that fails."""
        try:
            return self.read(part)
        except DamagedPart as error:
            print(f"{error}: this is done now", file=sys.stderr, flush=True)
        while True:
            with self.claims.taken(self.names[part]) as claim:
                if claim is not None:
                    with suppress(DamagedPart):  # another process may have been faster
                        return self.read(part)
                    self.make_one(part, claim.held, anew=True)
                    return self.read(part)
            time.sleep(WAIT_SECONDS)

    def result(self) -> Result:
        """What follows from the parts, of which all are there."""
        return self.finish(self.load(part) for part in range(len(self.names)))


def make_parts(
    parts: Parts[Made, Found, Result],
    *,
    rank: int = 0,
    ranks: int = 1,
    only: Sequence[int] | None = None,
    on_progress: Progress = lambda done: None,
) -> int:
    """Make the parts that are not there, side by side with other processes, until all are.

    Each process begins at a different place and takes any part that nobody else is making, so a slow process does
    not hold up the others.

    Args:
        rank: this process among `ranks`; any number of further processes may help.
        only: these parts; None: all.
        on_progress: gets the size of the finished parts, at the start and whenever this process knows more.

    Returns:
        The number of parts that this process made.

    Raises:
        UserError: a part cannot be made, here or by another process; or the file system refuses.
    """
    wanted = range(len(parts.names)) if only is None else only
    claims = parts.claims
    old: frozenset[str] | None = None
    make_folder(parts.folder)
    with _Writer(parts) as writer:
        while True:
            writer.newly_written()  # the folder shows them
            there = set(list_folder(parts.folder))
            missing = {part: None for part in wanted if parts.names[part] not in there}
            done = parts.size(wanted) - parts.size(missing)
            on_progress(done)
            listing = claims.listing()
            if not missing:
                writer.wait()
                _clean(parts, wanted, listing)
                return writer.made
            # Failures of earlier starts are tried again.
            old = listing.others if old is None else old
            _end_with_others(parts, missing, listing.others - old)
            start = len(missing) * rank // ranks
            order = [*missing][start:] + [*missing][:start]
            # What is claimed is looked into when nothing else is left: its holder may be dead.
            free = [part for part in order if parts.names[part] not in listing.claims]
            begun = False
            look_again = time.monotonic() + WAIT_SECONDS
            for part in free or order:
                with ExitStack() as stack:
                    claim = stack.enter_context(claims.taken(parts.names[part], listing))
                    if claim is not None and not parts.path(part).exists():
                        _remove_of(parts, [part], listing, DRAFT_SUFFIX)
                        with _failure_told(parts, part, listing):
                            made = parts.make(part)
                        writer.write(part, made, claim, listing, stack.pop_all())
                        begun = True
                        done += parts.size(each for each in writer.newly_written() if each in missing)
                        on_progress(done)
                # Not before: one that is slow to look would never come to the end of what others hold.
                if begun and time.monotonic() >= look_again:
                    break
            else:
                waited = writer.wait()
                if not begun and not waited:
                    time.sleep(WAIT_SECONDS)


class _Writer(Generic[Made, Found, Result]):
    """Writes a part in a thread while the next one is made."""

    def __init__(self, parts: Parts[Made, Found, Result]) -> None:
        self.made = 0
        """Parts whose file is this process's."""
        self._parts = parts
        self._thread = ThreadPoolExecutor(1, "writer of parts")
        self._at_work: Future[None] | None = None
        self._new: deque[int] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What was given is written, whatever ends the body."""
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def write(self, part: int, made: Made, claim: Claim, listing: Listing, stack: ExitStack) -> None:
        """Have a part written, when the one before is: two are in memory, one made and one in the making.

        Args:
            stack: holds the claim, and is closed when the part is written.

        Raises:
            UserError: the one before could not be written.
        """
        with stack:
            self.wait()
            self._at_work = self._thread.submit(self._write, part, made, claim, listing, stack.pop_all())

    def wait(self) -> bool:
        """Wait for what is being written; False where nothing is. UserError when it could not be written."""
        at_work, self._at_work = self._at_work, None
        if at_work is not None:
            at_work.result()
        return at_work is not None

    def newly_written(self) -> list[int]:
        """Parts whose file is this process's and was not told of before."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def _write(self, part: int, made: Made, claim: Claim, listing: Listing, stack: ExitStack) -> None:
        with stack, _failure_told(self._parts, part, listing):
            if self._parts.place(part, made, claim.held):
                self.made += 1
                self._new.append(part)


def run_parts(
    parts: Parts[Made, Found, Result],
    *,
    rank: int = 0,
    ranks: int = 1,
    on_progress: Progress = lambda done: None,
) -> Result:
    """Make what is missing as `make_parts` does; every process returns the result of all parts."""
    make_parts(parts, rank=rank, ranks=ranks, on_progress=on_progress)
    return parts.result()


def _place(draft: Path, path: Path, anew: bool) -> bool:
    """Give a finished file its name; False where another file has it, which stays."""
    if anew:
        os.replace(draft, path)
    else:
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if draft.exists():
                raise
            return False  # this process was taken for dead, and another cleaned up
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # A file system without hard links: what might be replaced here has the same bytes.
            os.replace(draft, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # so that a loss of power leaves it its name
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error


@contextmanager
def _failure_told(parts: Parts[Made, Found, Result], part: int, listing: Listing) -> Iterator[None]:
    """Tell the other processes when a part cannot be made; earlier failures are forgotten."""
    try:
        yield
    except UserError as error:
        with suppress(OSError):  # what is wrong may be the disk; this process tells of it in any case
            draft = parts.claims.folder / f".{uuid.uuid4().hex}"
            draft.write_text(json.dumps(str(error)), encoding="utf-8")
            os.replace(draft, parts.claims.folder / f"{parts.names[part]}.{uuid.uuid4().hex}{FAILURE_SUFFIX}")
        raise
    finally:
        _remove_of(parts, [part], listing, FAILURE_SUFFIX)


def _end_with_others(parts: Parts[Made, Found, Result], missing: Mapping[int, None], new: frozenset[str]) -> None:
    """UserError when another process could not make one of the parts since this one began."""
    for file in _files_of(parts, missing, new, FAILURE_SUFFIX):
        time.sleep(FAILURE_SECONDS)
        try:
            message = json.loads(file.read_bytes())
        except (OSError, ValueError):  # made by now
            continue
        raise UserError(str(message))


def _files_of(
    parts: Parts[Made, Found, Result], of: Iterable[int], names: frozenset[str], suffix: str
) -> Iterator[Path]:
    """The files NAME.<32 hexadecimal digits><suffix> of some parts among those in the folder of claims."""
    wanted = {parts.names[part] for part in of}
    for name in names:
        if name.endswith(suffix) and name.removesuffix(suffix).rpartition(".")[0] in wanted:
            yield parts.claims.folder / name


def _remove_of(parts: Parts[Made, Found, Result], of: Iterable[int], listing: Listing, suffix: str) -> None:
    for path in _files_of(parts, of, listing.others, suffix):
        with suppress(OSError):
            path.unlink()


def _clean(parts: Parts[Made, Found, Result], of: Sequence[int], listing: Listing) -> None:
    """Remove what killed processes left behind of finished parts."""
    _remove_of(parts, of, listing, DRAFT_SUFFIX)
    _remove_of(parts, of, listing, FAILURE_SUFFIX)
    parts.claims.remove_drafts(listing)
    for part in of:
        if parts.names[part] in listing.claims:
            with parts.claims.taken(parts.names[part], listing):
                pass  # takes it over where its holder is dead, and lets go of it
