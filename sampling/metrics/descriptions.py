"""What networks say of drawn images: a file for each chunk of them, until the figures are written."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.parts import Parts
from ditmoe.data.storage.together import together
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.classifier import Classifier
from ditmoe.sampling.metrics.features import FeatureNetwork, describe

DescribeImages = Callable[[NDArray[np.uint8]], Arrays]
"""Images → arrays with a row for each."""


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


def described_alike(
    each: Sequence[ChunkDescriptions], describe_chunk: Callable[[int, Sequence[int]], Sequence[Arrays]]
) -> AnyParts:
    """What networks say of the same images, made in one pass over these; each as it would have been made alone.

    Args:
        each: of as many chunks.
        describe_chunk: number of a chunk, and places in `each` → what is said of the chunk, for each of these.
    """
    return together(_folder_of_marks(each), [found.parts for found in each], describe_chunk)


def remove_alike(each: Sequence[ChunkDescriptions]) -> None:
    """Delete the files of all, and the marks of their pass."""
    shutil.rmtree(_folder_of_marks(each), ignore_errors=True)
    for found in each:
        found.remove()


def _folder_of_marks(each: Sequence[ChunkDescriptions]) -> Path:
    names = "\n".join(found.parts.folder.name for found in each)
    above = each[0].parts.folder.parent
    return above / f"together-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def described_of_store(
    store: ChunkStore, networks: Sequence[tuple[str, DescribeImages]]
) -> tuple[list[ChunkDescriptions], AnyParts]:
    """What networks say of drawn images, each chunk of which is read once for all.

    Args:
        networks: fingerprint, and what the network says of images.

    Returns:
        The descriptions by each, and the parts that make them.
    """
    names = [store.path(chunk).name for chunk in range(store.chunks)]

    def describe_chunk(chunk: int, places: Sequence[int]) -> list[Arrays]:
        image_NHWC = store.read(chunk).image_NHWC
        # Nothing where a chunk has no images, because none is finite.
        return [networks[place][1](image_NHWC) if len(image_NHWC) else {} for place in places]

    def alone(place: int) -> Callable[[int], Arrays]:
        return lambda chunk: describe_chunk(chunk, [place])[0]

    above = store.folder.parent / "features"
    each = [
        ChunkDescriptions(above / fingerprint, names, alone(place))
        for place, (fingerprint, _) in enumerate(networks)
    ]
    return each, described_alike(each, describe_chunk)


def describe_with(network: FeatureNetwork) -> DescribeImages:
    """A chunk's images → everything the network gives."""
    return lambda image_NHWC: dict(describe(network, image_NHWC))


def recognise_with(recogniser: Classifier) -> DescribeImages:
    """A chunk's images → the class that the recogniser takes each for."""
    return lambda image_NHWC: {"predicted": recogniser.predict(image_NHWC)}
