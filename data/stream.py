"""The endless stream of training batches. Its whole state is one integer, the position in the global order.

Micro-step m of rank r reads positions start + (m·ranks + r)·micro_batch … + micro_batch, so that the samples of
a global batch are consecutive positions whatever the layout, and a run resumes by its position alone.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditmoe.data.config import DataConfig
from ditmoe.data.decode import BadSample, decode_image, decode_label, image_extension
from ditmoe.data.index import DatasetIndex, check_files, load_index
from ditmoe.data.order import EpochOrder
from ditmoe.data.reader import ShardPool
from ditmoe.data.workers import in_order
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import uniform


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-step on one rank."""

    image_BCHW: Tensor
    """uint8 `[B, C, H, W]`."""
    label_B: Tensor
    """int64 `[B]`."""
    position_B: list[int]
    """Positions in the global order: the key of everything that is drawn for a sample."""
    keys: list[str]
    """`shard.tar/key` of each sample, for messages."""


class _Arrays(NamedTuple):
    """A batch on its way from a worker."""

    image_BCHW: NDArray[np.uint8]
    label_B: NDArray[np.int64]
    position_B: list[int]
    keys: list[str]


class SampleReader:
    """Reads and decodes positions of the global order. Files are opened in the process that reads."""

    def __init__(self, folder: Path, index: DatasetIndex, config: DataConfig, seed: int) -> None:
        self._index = index
        self._order = EpochOrder(index.samples_per_shard, seed, 8)
        self._pool = ShardPool(folder, index, 8)
        self._flip = config.flip
        self._seed = seed

    def read(self, positions: range) -> _Arrays:
        """The samples at `positions`. UserError naming shard and key when one cannot be used."""
        size = self._index.image_size
        image_BCHW = np.empty((len(positions), self._index.channels, size, size), dtype=np.uint8)
        label_B = np.empty(len(positions), dtype=np.int64)
        keys = []
        flipped_B = self._flipped(positions)
        for row, position in enumerate(positions):
            _, number, member = self._order.locate(position)
            shard = self._pool[number]
            try:
                extension = image_extension(shard.extensions(member))
                image_HWC = decode_image(extension, shard.read(member, extension) or b"", self._index)
                label_B[row] = decode_label(shard.read(member, self._index.label.extension), self._index)
            except BadSample as error:
                raise UserError(f"{shard.where(member)}: {error}") from error
            if flipped_B[row]:
                image_HWC = image_HWC[:, ::-1]
            image_BCHW[row] = image_HWC.transpose(2, 0, 1)
            keys.append(f"{shard.path.name}/{shard.keys[member]}")
        return _Arrays(image_BCHW, label_B, list(positions), keys)

    def _flipped(self, positions: range) -> list[bool]:
        if not self._flip:
            return [False] * len(positions)
        flipped: list[bool] = (uniform(self._seed, "data/flip", positions) < 0.5).tolist()
        return flipped


def open_stream(
    config: DataConfig, seed: int, *, start: int, micro_batch: int, rank: int, ranks: int
) -> Generator[Batch, None, None]:
    """This rank's batches from position `start` of the global order on, without end; closing it ends its workers.

    UserError at once when the index is missing or a shard is missing or truncated; UserError from the iterator
    when a sample is damaged, has no label or one outside the classes, or is of another size.
    """
    assert start >= 0 and micro_batch > 0 and 0 <= rank < ranks
    folder = Path(config.sources[0].path)
    index = load_index(folder)
    problems = check_files(folder, index)
    if problems:
        raise UserError("\n".join(problems))
    reader = SampleReader(folder, index, config, seed)
    first = count(start + rank * micro_batch, ranks * micro_batch)
    positions = (range(begin, begin + micro_batch) for begin in first)
    return _batches(in_order(reader.read, positions, config.workers))


def _batches(arrays: Iterator[_Arrays]) -> Generator[Batch, None, None]:
    for image_BCHW, label_B, position_B, keys in arrays:
        yield Batch(torch.from_numpy(image_BCHW), torch.from_numpy(label_B), position_B, keys)
