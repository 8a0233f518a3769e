"""The images of an evaluation on disk: chunks that are drawn once and written once.

Chunk c holds the images c·size … of the job. A chunk exists when its file has its final name; the file is written
under another name and renamed. Whoever draws a chunk holds a lock on it (flock, which the system releases when the
holder dies), so that processes share the chunks without a coordinator and none is drawn twice.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.data.storage.sharing import Progress, make_missing
from ditmoe.model.errors import UserError


class DrawnImages(NamedTuple):
    """What was drawn for a chunk."""

    image_NHWC: NDArray[np.uint8]
    nfe_N: NDArray[np.int64] | None = None
    """Evaluations of the denoiser that each image took; None: not counted."""
    sigma_N: NDArray[np.float32] | None = None
    """Of chains: σ of the state that was denoised."""
    trace_NT: NDArray[np.float32] | None = None
    """Of chains: σ after each step since the sample before."""


DrawChunk = Callable[[list[int], NDArray[np.int64]], DrawnImages]
"""(numbers of the images, their labels) → images."""


@dataclass(frozen=True)
class Chunk:
    """The images of one chunk."""

    image_NHWC: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    sigma_N: NDArray[np.float32] | None = None
    """As in `DrawnImages`."""
    trace_NT: NDArray[np.float32] | None = None


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

    def write(self, chunk: int, drawn: DrawnImages, label_N: NDArray[np.int64]) -> None:
        """Write one finished chunk."""
        numbers, (image_NHWC, nfe_N, sigma_N, trace_NT) = self.numbers(chunk), drawn
        assert image_NHWC.dtype == np.uint8 and image_NHWC.ndim == 4, (image_NHWC.dtype, image_NHWC.shape)
        assert len(image_NHWC) == len(label_N) == len(numbers)
        arrays: dict[str, Any] = {
            "images": image_NHWC,
            "labels": label_N,
            "first": np.int64(numbers[0]),
            "settings": np.array(self.settings),
            "nfe": np.empty(0, dtype=np.int64) if nfe_N is None else nfe_N,
        }
        if sigma_N is not None and trace_NT is not None:
            arrays |= {"sigma": sigma_N, "trace": trace_NT}
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
                sigma_N, trace_NT = (stored.get(name) for name in ("sigma", "trace"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(path, error) from None
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
        return Chunk(images, labels, sigma_N, trace_NT)

    def nfe(self) -> float | None:
        """Evaluations of the denoiser per image, on average over all chunks; None: they were not counted.

        Raises:
            UserError: a file is damaged.
        """
        total = 0
        for chunk in range(self.chunks):
            try:
                with np.load(self.path(chunk), allow_pickle=False) as stored:
                    nfe_N = stored["nfe"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise _unreadable(self.path(chunk), error) from None
            if len(nfe_N) != len(self.numbers(chunk)):
                return None
            total += int(nfe_N.sum())
        return total / self.count

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


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: unreadable chunk ({error}); delete it, it is drawn again")
