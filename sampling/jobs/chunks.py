"""The images of a job on disk: chunks that are drawn once and written once (`data/storage/parts.py`).

Chunk c holds the images c·size … of the job.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.claims import list_folder
from ditmoe.data.storage.parts import DamagedPart, Parts, Progress, make_parts
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.sampling.settings.names import NOT_FINITE


class DrawnImages(NamedTuple):
    """What was drawn for a chunk."""

    image_NHWC: NDArray[np.uint8]
    nfe_N: NDArray[np.int64] | None = None
    """Evaluations of the denoiser that each image took; None: not counted."""
    sigma_N: NDArray[np.float32] | None = None
    """Of chains: σ of the state that was denoised."""
    trace_NT: NDArray[np.float32] | None = None
    """Of chains: σ after each step since the sample before."""
    finite_N: NDArray[np.bool_] | None = None
    """False for an image with NaN or infinity in it, which is counted and takes no part; None: all are finite."""


MOST_NOT_FINITE: Final = 0.01
"""Share of a job's images that may be not finite; one of them always may."""

DrawChunk = Callable[[list[int], NDArray[np.int64]], DrawnImages]
"""(numbers of the images, their labels) → images."""


@dataclass(frozen=True)
class Chunk:
    """The images of one chunk that are finite."""

    image_NHWC: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    number_N: NDArray[np.int64]
    """Their numbers in the job."""
    sigma_N: NDArray[np.float32] | None = None
    """As in `DrawnImages`."""
    trace_NT: NDArray[np.float32] | None = None


LabelsOf = Callable[[list[int]], NDArray[np.int64]]
"""Numbers of images → their labels."""


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
    draw: DrawChunk | None = None
    """Draws the images of a chunk; None: those that are there are read."""
    labels_of: LabelsOf | None = None
    """Goes with `draw`."""

    def drawn_by(self, draw: DrawChunk, labels_of: LabelsOf) -> "ChunkStore":
        """The same chunks, with what draws those that are missing or damaged."""
        return replace(self, draw=draw, labels_of=labels_of)

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
        there = set(list_folder(self.folder))
        return [chunk for chunk in range(self.chunks) if self.path(chunk).name not in there]

    def read(self, chunk: int) -> Chunk:
        """Read one chunk; one that is damaged is drawn anew where the store knows how.

        Raises:
            UserError: the file is damaged and cannot be drawn, or belongs to a job with other settings.
        """
        return self._read(chunk) if self.draw is None else self.parts.load(chunk)

    def not_finite(self) -> list[int]:
        """The numbers of all images that are not finite. UserError as `read`, or when there are too many."""
        found: list[int] = []
        for chunk in range(self.chunks):
            kept = set(self._finite(chunk).tolist())
            found += [number for number in self.numbers(chunk) if number not in kept]
        self.check_finite(found)
        return found

    def _finite(self, chunk: int) -> NDArray[np.int64]:
        """The numbers of a chunk's images that are finite."""
        try:
            finite_N = read_arrays(self.path(chunk), ["finite"])["finite"]
        except DamagedPart:  # or of a version that did not say
            return self.read(chunk).number_N
        return np.array(self.numbers(chunk), dtype=np.int64)[finite_N]

    def check_finite(self, numbers: Sequence[int]) -> None:
        """UserError when more images than a few are not finite: what is left would be another distribution."""
        most = max(1, int(self.count * MOST_NOT_FINITE))
        if len(numbers) > most:
            raise UserError(
                f"{len(numbers):,} of {counted(self.count, 'image')} are not finite, such as image "
                f"{numbers[0]}; expected "
                f"{most:,} at most: {NOT_FINITE}"
            )

    def nfe(self) -> float | None:
        """Evaluations of the denoiser per image, on average over all chunks; None: they were not counted.

        Raises:
            UserError: as `read`.
        """
        total = 0
        for chunk in range(self.chunks):
            try:
                stored = read_arrays(self.path(chunk), ["nfe"])
            except DamagedPart:
                self.read(chunk)
                stored = read_arrays(self.path(chunk), ["nfe"])
            if len(stored["nfe"]) != len(self.numbers(chunk)):
                return None
            total += int(stored["nfe"].sum())
        return total / self.count

    def draw_pending(
        self,
        *,
        rank: int = 0,
        ranks: int = 1,
        only: Sequence[int] | None = None,
        on_progress: Progress = lambda done: None,
    ) -> int:
        """Draw the chunks that are not there, side by side with the other processes, until all are.

        Args:
            rank: this process among `ranks`; any number of further processes may help.
            only: these chunks; None: all.
            on_progress: called with the number of chunks that are there.

        Returns:
            The number of chunks that this process drew.

        Raises:
            UserError: a chunk cannot be drawn, or written.
        """
        assert self.draw is not None
        return make_parts(self.parts, rank=rank, ranks=ranks, only=only, on_progress=on_progress)

    @cached_property
    def parts(self) -> Parts[Arrays, Chunk, None]:
        """The chunks, as what is to be made."""

        def finish(found: Iterable[Chunk]) -> None:
            """Whoever needs the chunks reads them one by one."""

        names = [self.path(chunk).name for chunk in range(self.chunks)]
        return Parts(self.folder, names, self._make, write_arrays, self._read, finish)

    def _make(self, chunk: int) -> Arrays:
        assert self.draw is not None and self.labels_of is not None
        numbers = self.numbers(chunk)
        label_N = self.labels_of(numbers)
        image_NHWC, nfe_N, sigma_N, trace_NT, finite_N = self.draw(numbers, label_N)
        finite_N = np.ones(len(numbers), dtype=bool) if finite_N is None else finite_N
        self.check_finite([number for number, finite in zip(numbers, finite_N, strict=True) if not finite])
        assert image_NHWC.dtype == np.uint8 and image_NHWC.ndim == 4, (image_NHWC.dtype, image_NHWC.shape)
        assert len(image_NHWC) == len(label_N) == len(numbers)
        arrays: Arrays = {
            "images": image_NHWC,
            "labels": label_N,
            "first": np.array(numbers[0], dtype=np.int64),
            "settings": np.array(self.settings),
            "finite": finite_N,
            "nfe": np.empty(0, dtype=np.int64) if nfe_N is None else nfe_N,
        }
        if sigma_N is not None and trace_NT is not None:
            arrays |= {"sigma": sigma_N, "trace": trace_NT}
        return arrays

    def _read(self, chunk: int) -> Chunk:
        path, numbers = self.path(chunk), self.numbers(chunk)
        stored = read_arrays(path)
        try:
            images, labels = stored["images"], stored["labels"]
            first, settings = int(stored["first"]), str(stored["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedPart(path, error) from error
        if (settings, first, len(images), len(labels)) != (self.settings, numbers[0], len(numbers), len(numbers)):
            raise UserError(
                f"{path}: a chunk of {counted(len(images), 'image')} from number {first} with settings "
                f"{settings}; "
                f"expected {len(numbers)} from {numbers[0]} with settings {self.settings}; "
                "delete it, it is drawn again"
            )
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"{path}: images are {images.dtype} of shape {images.shape}; expected uint8 [N, H, W, C]"
            )
        finite_N = stored.get("finite", np.ones(len(images), dtype=bool))
        if finite_N.dtype != np.bool_ or finite_N.shape != (len(images),):
            raise DamagedPart(path, ValueError(f"finite is {finite_N.dtype} of shape {finite_N.shape}"))
        arrays = (images, labels, np.array(numbers, dtype=np.int64), stored.get("sigma"), stored.get("trace"))
        if finite_N.all():
            return Chunk(*arrays)
        kept: list[Any] = [None if each is None else each[finite_N] for each in arrays]
        return Chunk(*kept)
