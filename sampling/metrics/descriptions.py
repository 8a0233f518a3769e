"""What networks say of drawn images: a file for each chunk of them, until the figures are written."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.parts import Parts
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.features import FeatureNetwork, describe


class ChunkDescriptions:
    """What a network says of each chunk of some images: one file per chunk, kept until `remove`."""

    def __init__(self, folder: Path, names: Sequence[str], describe_chunk: Callable[[int], Arrays]) -> None:
        """Of any images.

        Args:
            folder: of the files.
            names: of the file of each chunk.
            describe_chunk: number of a chunk → arrays with a row for each of its images; none where it has none.
        """
        self.parts: Final[Parts[Arrays, Arrays, None]] = Parts(
            folder,
            names,
            describe_chunk,
            write_arrays,
            lambda chunk: read_arrays(folder / names[chunk]),
            lambda found: None,
        )

    @classmethod
    def of_store(
        cls, store: ChunkStore, fingerprint: str, describe_images: Callable[[NDArray[np.uint8]], Arrays]
    ) -> Self:
        """Of drawn images; the network has this fingerprint."""
        return cls(
            store.folder.parent / "features" / fingerprint,
            [store.path(chunk).name for chunk in range(store.chunks)],
            lambda chunk: _described(store.read(chunk).image_NHWC, describe_images),
        )

    def read(self, chunk: int) -> Arrays:
        """What was said of one chunk."""
        return self.parts.load(chunk)

    def read_all(self) -> Iterator[Arrays]:
        """What was said of each chunk that has images, in their order."""
        return filter(None, map(self.read, range(len(self.parts.names))))

    def remove(self) -> None:
        """Delete the files: they are large, and made again from the chunks."""
        shutil.rmtree(self.parts.folder)
        if not any(self.parts.folder.parent.iterdir()):
            self.parts.folder.parent.rmdir()


def _described(image_NHWC: NDArray[np.uint8], describe_images: Callable[[NDArray[np.uint8]], Arrays]) -> Arrays:
    """Nothing where a chunk has no images, because none is finite."""
    return describe_images(image_NHWC) if len(image_NHWC) else {}


def describe_with(network: FeatureNetwork) -> Callable[[NDArray[np.uint8]], Arrays]:
    """A chunk's images → everything the network gives."""
    return lambda image_NHWC: dict(describe(network, image_NHWC))
