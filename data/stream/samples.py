"""Samples by position: read, decoded, and replaced where a source's policy says so.

A position whose sample cannot be used keeps its place in the order: another sample of the source, which is a
function of the first one's address alone, stands in for it. So a skip moves nothing, and every rank, worker and
resume agrees.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.reader import Shard, ShardPool
from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.latents import draw_latents
from ditmoe.data.stream.dataset import Dataset, Located
from ditmoe.data.stream.left_out import BEFORE_A_RUN
from ditmoe.data.stream.mixture import Numbers
from ditmoe.data.stream.order import Address
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import uniform

MOST_STAND_INS: Final = 1000
"""Samples tried in place of one that cannot be used, before even `skip` stops the run."""


class Skip(NamedTuple):
    """A sample that could not be used, and whose place another took."""

    position: int
    source: int
    epoch: int
    where: str
    """`shard.tar/key`, or the shard alone where it cannot be read."""
    reason: str


class ReadSamples(NamedTuple):
    """What stands at some positions; plain arrays, as they come through a pipe."""

    image_BCHW: NDArray[np.uint8] | NDArray[np.float32]
    """uint8 images, or float32 latents as a network takes them."""
    label_B: NDArray[np.int64]
    """Labels of the run."""
    position_B: Numbers
    keys: list[str]
    """`shard.tar/key` of each sample, for messages; with several sources `source/shard.tar/key`."""
    skips: list[Skip]


class _Decoded(NamedTuple):
    arrays: tuple[NDArray[np.uint8]] | tuple[NDArray[np.float32], NDArray[np.float32]]
    """The image `[C, H, W]`, or a latent's mean and standard deviation."""
    label: int
    key: str


class SampleReader:
    """Reads positions of the global order. Files are opened in the process that reads, shard by shard."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._pools = [ShardPool(source.place, source.index) for source in dataset.sources]

    def read(self, positions: Numbers) -> ReadSamples:
        """The samples at `positions`.

        UserError naming shard and key where one cannot be used and no other may stand in.
        """
        skips: list[Skip] = []
        mirrored_B = self._mirrored(positions)
        samples = [
            self._sample(located, mirrored, skips)
            for located, mirrored in zip(self._dataset.locate(positions), mirrored_B, strict=True)
        ]
        arrays = [np.stack(each) for each in zip(*(sample.arrays for sample in samples), strict=True)]
        latents = self._dataset.index.latents
        if latents is not None:
            arrays = [draw_latents(arrays[0], arrays[1], self._dataset.seed, positions.tolist(), latents)]
        return ReadSamples(
            arrays[0],
            np.array([sample.label for sample in samples], dtype=np.int64),
            positions,
            [sample.key for sample in samples],
            skips,
        )

    def _sample(self, located: Located, mirrored: bool, skips: list[Skip]) -> _Decoded:
        """The sample at a position, or the first usable one of those that may stand in for it."""
        source = self._dataset.sources[located.source]
        pool = self._pools[located.source]
        pool.expect(located.lane, located.address.ahead)
        address = located.address
        for _ in range(MOST_STAND_INS):
            try:
                return self._decode(located.source, pool[address.shard], address, mirrored)
            except ShardFault as fault:
                where, reason, whole_shard = fault.shard, fault.reason, True
            except BadSample as fault:
                shard = pool[address.shard]
                where, reason, whole_shard = shard.where(self._member(located.source, address)), str(fault), False
            if source.config.on_error == "stop":
                raise UserError(
                    f"{where}: {reason}; data.sources.{located.source}.on_error=skip leaves out what cannot be "
                    f"used {BEFORE_A_RUN}"
                )
            skips.append(Skip(located.position, located.source, address.epoch, where, reason))
            address = source.order.instead_of(address, whole_shard)
        raise UserError(f"{where}: {reason}; neither could any of {MOST_STAND_INS} others in its place be used")

    def _decode(self, source: int, shard: Shard, address: Address, mirrored: bool) -> _Decoded:
        """One sample. BadSample when it cannot be used."""
        index, selection = self._dataset.sources[source].index, self._dataset.sources[source].selection
        member = self._member(source, address)
        sample = shard.sample(member)
        arrays: tuple[NDArray[np.uint8]] | tuple[NDArray[np.float32], NDArray[np.float32]]
        if index.latents is None:
            image_HWC = sample.image(index)
            arrays = ((image_HWC[:, ::-1] if mirrored else image_HWC).transpose(2, 0, 1),)
        else:
            arrays = sample.latent(index, mirrored)
        label = selection.run_label(sample.label(index))
        key = f"{shard.file}/{shard.keys[member]}"
        several = len(self._dataset.sources) > 1
        return _Decoded(arrays, label, f"{self._dataset.sources[source].name}/{key}" if several else key)

    def _member(self, source: int, address: Address) -> int:
        """A usable sample's number in its shard."""
        members = self._dataset.sources[source].selection.members[address.shard]
        return address.member if members is None else int(members[address.member])

    def _mirrored(self, positions: Numbers) -> list[bool]:
        if not self._dataset.config.flip:
            return [False] * len(positions)
        mirrored: list[bool] = (uniform(self._dataset.seed, "data/flip", positions.tolist()) < 0.5).tolist()
        return mirrored
