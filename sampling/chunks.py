"""The images of an evaluation on disk: chunks that are drawn once and written once.

Chunk c holds the images c·size … of the job. A chunk exists when its file has its final name; the file is written
under another name and renamed. Whoever draws a chunk holds a lock on it (flock, which the system releases when the
holder dies), so that processes share the chunks without a coordinator and none is drawn twice.
"""

import errno
import fcntl
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.files import make_folder, replacing
from ditmoe.model.errors import UserError

DrawChunk = Callable[[list[int], NDArray[np.int64]], NDArray[np.uint8]]
"""(numbers of the images, their labels) → images, uint8 [n, H, W, C]."""

Progress = Callable[[int], None]
"""Called with the number of files that are there."""

_WAIT_SECONDS = 0.2
"""Pause before looking again at files that other processes are making."""


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path` (created empty) for the body; yields False when another process holds it.

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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    on_progress: Progress = lambda done: None,
) -> int:
    """Make the files that are not there, each by one process, until all are there.

    Each process starts at its own place in the list and takes any file that nobody is making, so that a slow
    process holds up no other; what a process that dies was making is free for the others at once.

    Args:
        paths: the files; each has a lock in `locks/` beside it.
        make: writes the file with the given place in `paths`, under its final name only when it is whole.
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
            with try_lock(paths[i].parent / "locks" / paths[i].name) as held:
                # Looked at again under the lock: its last holder may have finished.
                if not held or paths[i].exists():
                    continue
                make(i)
                assert paths[i].exists(), paths[i]
            took += 1
            on_progress(sum(path.exists() for path in paths))
        made += took
        if not took:
            time.sleep(_WAIT_SECONDS)
    on_progress(len(paths))
    return made


@dataclass(frozen=True)
class Chunk:
    """The images of one chunk."""

    image_NHWC: NDArray[np.uint8]
    label_N: NDArray[np.int64]


@dataclass(frozen=True)
class ChunkStore:
    """The chunks of one job in a folder."""

    folder: Path
    count: int
    """Images of the job."""
    size: int
    """Images of a chunk; the last one may have fewer."""
    settings: str
    """Fingerprint of everything the images depend on; a chunk of other settings is refused."""

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.count // self.size)

    def path(self, chunk: int) -> Path:
        """The file of one chunk."""
        return self.folder / f"{chunk:05d}.npz"

    def numbers(self, chunk: int) -> list[int]:
        """The numbers of the images of one chunk."""
        return list(range(chunk * self.size, min((chunk + 1) * self.size, self.count)))

    def pending(self) -> list[int]:
        """The chunks that are not there yet."""
        return [chunk for chunk in range(self.chunks) if not self.path(chunk).exists()]

    def write(self, chunk: int, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64]) -> None:
        """Write one finished chunk."""
        numbers = self.numbers(chunk)
        assert image_NHWC.dtype == np.uint8 and image_NHWC.ndim == 4, (image_NHWC.dtype, image_NHWC.shape)
        assert len(image_NHWC) == len(label_N) == len(numbers)
        arrays: dict[str, Any] = {
            "images": image_NHWC,
            "labels": label_N,
            "first": np.int64(numbers[0]),
            "settings": np.array(self.settings),
        }
        make_folder(self.folder)
        with replacing(self.path(chunk)) as file:
            np.savez(file, **arrays)

    def read(self, chunk: int) -> Chunk:
        """Read one chunk.

        Raises:
            UserError: the file is damaged, or belongs to a job with other settings.
        """
        path, numbers = self.path(chunk), self.numbers(chunk)
        try:
            with np.load(path, allow_pickle=False) as stored:
                images, labels = stored["images"], stored["labels"]
                first, settings = int(stored["first"]), str(stored["settings"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: unreadable chunk ({error}); delete it, it is drawn again") from None
        if (settings, first, len(images), len(labels)) != (self.settings, numbers[0], len(numbers), len(numbers)):
            raise UserError(
                f"{path}: a chunk of {len(images)} images from number {first} with settings {settings}; "
                f"expected {len(numbers)} from {numbers[0]} with settings {self.settings}; "
                "delete it, it is drawn again"
            )
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"{path}: images are {images.dtype} of shape {images.shape}; expected uint8 [N, H, W, C]"
            )
        return Chunk(images, labels)

    def draw_pending(
        self,
        draw: DrawChunk,
        labels_of: Callable[[list[int]], NDArray[np.int64]],
        *,
        rank: int = 0,
        ranks: int = 1,
        on_progress: Progress = lambda done: None,
    ) -> int:
        """Draw the chunks that are not there, side by side with the other processes, until all are.

        Args:
            draw: draws the images of a chunk.
            labels_of: the labels of the images of the given numbers.
            rank: this process among `ranks`; any number of further processes may help.
            on_progress: called with the number of chunks that are there.

        Returns:
            The number of chunks that this process drew.
        """

        def make(chunk: int) -> None:
            numbers = self.numbers(chunk)
            labels = labels_of(numbers)
            self.write(chunk, draw(numbers, labels), labels)

        paths = [self.path(chunk) for chunk in range(self.chunks)]
        return make_missing(paths, make, rank=rank, ranks=ranks, on_progress=on_progress)
