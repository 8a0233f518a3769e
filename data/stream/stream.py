"""The endless stream of training batches. Its whole state is one integer, the position in the global order.

The samples of micro-step m are the ranks × micro_batch positions from start + m · ranks × micro_batch on, whatever
the layout, and a run resumes by its position alone. `dealing.py` says which of them a rank gets.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ditmoe.data.storage.workers import Crew
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import Dataset
from ditmoe.data.stream.dealing import Dealing, deal
from ditmoe.data.stream.mixture import Numbers
from ditmoe.data.stream.samples import ReadSamples, SampleReader, Skip


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-step on one rank, in the order of their positions."""

    image_BCHW: Tensor
    """uint8 `[B, C, H, W]`; of latents float32, as a network takes them."""
    label_B: Tensor
    """int64 `[B]`, labels of the run."""
    position_B: list[int]
    """Positions in the global order: the key of everything that is drawn for a sample."""
    keys: list[str]
    """`shard.tar/key` of each sample, for messages."""
    skips: list[Skip]
    """Samples that could not be used, and whose places others took."""


def dealing_of(config: DataConfig, *, start: int, micro_batch: int, ranks: int, group: int = 1) -> Dealing:
    """How the positions from `start` on are dealt to ranks and their workers.

    Args:
        group: consecutive positions that must stay on one rank, when they fit into a micro-batch.
    """
    return deal(
        start=start, lanes=config.lanes, ranks=ranks, workers=config.workers, micro_batch=micro_batch, group=group
    )


def start_readers(dataset: Dataset) -> Crew:
    """Fork the processes that read a dataset's samples for `open_stream`: before a GPU is used, best of all."""
    return Crew(SampleReader(dataset).read, dataset.config.workers)


def open_stream(
    dataset: Dataset, dealing: Dealing, rank: int = 0, readers: Crew | None = None
) -> Generator[Batch, None, None]:
    """A rank's batches of a dealing, without end; closing it ends its workers.

    Args:
        readers: what `start_readers` gave; None: they start with the first batch.

    UserError from the iterator when a shard or sample cannot be used and its source's policy does not skip it.
    """
    assert 0 <= rank < dealing.ranks
    parts = (part for batch in dealing.batches(rank) for part in batch)
    return _batches(_read(dataset, parts, readers), dealing)


def _read(dataset: Dataset, parts: Iterator[Numbers], readers: Crew | None) -> Iterator[ReadSamples]:
    yield from (start_readers(dataset) if readers is None else readers).in_order(parts)


def _batches(samples: Iterator[ReadSamples], dealing: Dealing) -> Generator[Batch, None, None]:
    rows = dealing.rows()
    while parts := list(islice(samples, dealing.parts)):
        yield _join(parts, rows)


def _join(parts: list[ReadSamples], rows: Numbers) -> Batch:
    """A micro-batch of what the workers read of it."""
    keys = [key for part in parts for key in part.keys]
    image_BCHW, label_B, position_B = (np.concatenate([part[field] for part in parts])[rows] for field in range(3))
    return Batch(
        torch.from_numpy(image_BCHW),
        torch.from_numpy(label_B),
        position_B.tolist(),
        [keys[row] for row in rows],
        sorted(skip for part in parts for skip in part.skips),
    )
