"""A rank's micro-batches, made ready one step ahead while the step before is computed.

To a GPU they go through pinned memory, in a stream of their own: neither the host nor what the GPU computes waits
for a copy. What is random in them is drawn by the host, and not on the GPU. For numpy draws normal numbers by
rejection, which no operation on a whole tensor repeats; a transformation by logarithm and cosine would round
differently on each device, so that the loss curve would depend on it.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from ditmoe.data.shards.images import network_input
from ditmoe.data.storage.workers import Crew
from ditmoe.data.stream.dataset import Dataset
from ditmoe.data.stream.samples import Skip
from ditmoe.data.stream.stream import Batch, dealing_of, open_stream
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.model.objective import Draws, Objective
from ditmoe.parallel.copies import Arrival, DeviceCopies
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.processes import gather_objects


class StepBatch(NamedTuple):
    """What this rank trains on in one step."""

    micro_batches: list[MicroBatch]
    """None on a pipeline stage between the first and the last, which sees no samples."""
    positions: list[int]
    """Of each sample in the global order."""
    keys: list[str]
    """`shard.tar/key` of each sample."""
    skips: list[Skip]
    """Samples that could not be used, and whose places others took."""


class Feed:
    """Reads the stream from a position on, draws what is random in each sample, and brings it to the device.

    A context manager: leaving it ends the stream's workers.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        objective: Objective,
        layout: Layout,
        device: torch.device,
        rank: int,
        start: int,
        readers: Crew | None = None,
    ) -> None:
        """Take what reads the samples, if it is there already."""
        self._seed, self._model, self._data = config.seed, config.model, config.data
        self._objective, self._layout, self._device = objective, layout, device
        self.dealing = dealing_of(
            config.data,
            start=start,
            micro_batch=layout.micro_batch,
            ranks=layout.data,
            group=max(config.model.balance_group, 1) if config.model.experts else 1,
        )
        sees_samples = layout.stage(rank) in (0, layout.pipe - 1)
        data_rank = layout.data_rank(rank)
        self._stream = open_stream(dataset, self.dealing, data_rank, readers) if sees_samples else None
        if readers is not None and not sees_samples:
            readers.close()
        self._copies = DeviceCopies(device)
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ahead: Future[tuple[StepBatch, Arrival]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.close()

    def next_step(self) -> StepBatch:
        """The next step's batches; those of the step after are begun.

        Raises:
            UserError: a sample cannot be used; names shard and key.
        """
        if self._stream is None:
            return StepBatch([], [], [], [])
        # The first are made here: the stream starts its processes then, and a fork belongs in the main thread.
        batch, arrival = self._prepare(self._stream) if self._ahead is None else self._ahead.result()
        self._ahead = self._thread.submit(self._prepare, self._stream)
        arrival.precede()
        return batch

    def crowding(self) -> str | None:
        """A line that says so where shards are read by more processes than need be."""
        lanes, workers = self._data.lanes, self._data.workers
        readers = self.dealing.readers_per_lane(lanes, workers)
        if readers <= 1:
            return None
        return (
            f"each shard is read by up to {readers} processes; it is one where data.lanes = {lanes} is a multiple"
            f" of data ranks × workers = {self._layout.data} × {max(workers, 1)}, and the micro-batch one of the"
            " workers"
        )

    def _prepare(self, stream: Iterator[Batch]) -> tuple[StepBatch, Arrival]:
        batches = list(islice(stream, self._layout.accumulation))
        with self._copies.begin() as arrival:
            micro_batches = [self._micro_batch(batch, arrival) for batch in batches]
        step = StepBatch(
            micro_batches,
            [position for batch in batches for position in batch.position_B],
            [key for batch in batches for key in batch.keys],
            [skip for batch in batches for skip in batch.skips],
        )
        return step, arrival

    def _micro_batch(self, batch: Batch, arrival: Arrival) -> MicroBatch:
        shape = tuple(batch.image_BCHW.shape[1:])
        draws = self._objective.draw(self._seed, batch.position_B, shape, self._model.label_dropout)
        label_B = torch.where(draws.drop_B, torch.tensor(self._model.num_classes), batch.label_B)
        return MicroBatch(
            arrival.bring(network_input(batch.image_BCHW)),
            arrival.bring(label_B),
            Draws(*map(arrival.bring, (draws.noise_BCHW, draws.timestep_B, draws.drop_B))),
        )


def keys_of_all_ranks(batch: StepBatch, layout: Layout) -> list[str]:
    """The keys of all ranks' samples of a step, in the order of positions; a collective call."""
    rank = dist.get_rank()
    # Stages and tensor ranks read the same samples; one of them tells of them.
    tells = layout.stage(rank) == layout.tensor_rank(rank) == 0
    mine = list(zip(batch.positions, batch.keys, strict=True)) if tells else []
    return [key for _, key in sorted(pair for part in gather_objects(mine) for pair in part)]
