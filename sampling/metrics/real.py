"""The real images that drawn ones are compared with: each sample of a dataset once, in the index's order."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.index import DatasetIndex, check_files, load_index
from ditmoe.data.shards.sample_table import digest_of_members, read_table, usable_members
from ditmoe.model.errors import UserError

MAX_PARTS = 16
"""Parts that the shards are cut into; what is computed of a part is kept, so a killed job repeats one part."""


class RealBatch(NamedTuple):
    """Some real images."""

    image_NHWC: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    number_N: NDArray[np.int64]
    """Their numbers in the index's order, 0 … count − 1."""


class RealImages:
    """A folder of shards, read from front to back."""

    def __init__(self, folder: Path) -> None:
        """Open the index. UserError when it, or a shard, is missing or of the wrong size, or it is of latents."""
        self.folder = folder
        self.index: DatasetIndex = load_index(folder)
        latents = self.index.latents
        if latents is not None:  # decoded latents are not the images: a figure against them is another figure
            raise UserError(
                f"{folder}: holds latents; expected the {latents.pixels}×{latents.pixels} images that they were "
                "encoded from: give their folder with --data"
            )
        problems = check_files(folder, self.index)
        if problems:
            raise UserError("\n".join(problems))
        self._members = usable_members(self.index, read_table(folder, self.index))

    @property
    def count(self) -> int:
        """Images in all, without those that the table of samples leaves out."""
        return sum(map(len, self._members))

    @property
    def fingerprint(self) -> str:
        """Of the images and labels (first 16 hex digits)."""
        if self.count == self.index.total:
            return self.index.fingerprint[:16]
        return hashlib.sha256(f"{self.index.fingerprint} {digest_of_members(self._members)}".encode()).hexdigest()[
            :16
        ]

    @property
    def parts(self) -> int:
        """Number of parts; a part is a run of shards."""
        return min(MAX_PARTS, len(self.index.shards))

    def read(self, part: int, batch: int) -> Iterator[RealBatch]:
        """The images of one part, up to `batch` at a time.

        Raises:
            UserError: a shard or sample is damaged; the message names it.
        """
        starts = np.cumsum([0, *map(len, self._members)])
        shards = len(self.index.shards)
        for number in range(shards * part // self.parts, shards * (part + 1) // self.parts):
            entry = self.index.shards[number]
            shard = Shard.at(self.folder / entry.file, entry)
            try:
                usable = self._members[number]
                for first in range(0, len(usable), batch):
                    members = usable[first : first + batch].tolist()
                    images, labels = zip(*(self._decode(shard, member) for member in members), strict=True)
                    numbers = np.arange(first, first + len(members), dtype=np.int64) + starts[number]
                    yield RealBatch(np.stack(images), np.array(labels, dtype=np.int64), numbers)
            finally:
                shard.close()

    def read_all(self, batch: int) -> Iterator[RealBatch]:
        """Every image, part by part."""
        for part in range(self.parts):
            yield from self.read(part, batch)

    def _decode(self, shard: Shard, member: int) -> tuple[NDArray[np.uint8], int]:
        try:
            sample = shard.sample(member)
            return sample.image(self.index), sample.label(self.index)
        except BadSample as error:
            raise UserError(f"{shard.where(member)}: {error}") from error
