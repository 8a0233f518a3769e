"""Order of samples on the disk: how well it mixes classes, and the same samples dealt out anew.

Training reads stretches of neighbouring samples (`data/stream/order.py`). So where tars are sorted by class,
batches are, more or less.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.making.copying import SampleCopy
from ditmoe.data.making.ownership import claimed
from ditmoe.data.making.preview import write_preview
from ditmoe.data.shards.index import DatasetIndex, check_files, load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, read_table, usable_members, write_table
from ditmoe.data.shards.writer import ShardLimits, write_shards
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.mixture import Mixture
from ditmoe.data.stream.order import SourceOrder
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import permutation

BATCH: Final = 256
_BATCHES: Final = 16
_POOR: Final = 0.9
"""Share of a fair draw's classes below which an order is called poor."""


@dataclass(frozen=True)
class ReshuffleSettings:
    """How samples are dealt out."""

    seed: int = 0
    """Of their order."""
    limits: ShardLimits = field(default_factory=ShardLimits)
    name: str | None = None
    """The new dataset's name; null: that of the old one."""
    overwrite: bool = False
    """Replace a dataset that is already there."""


class ClassMix(NamedTuple):
    """Classes in a batch of BATCH samples, on average."""

    found: float
    """In the order in which training reads them by default."""
    fair: float
    """If each sample were drawn from all."""
    classes: int
    """Classes that have samples."""

    @property
    def poor(self) -> bool:
        """Whether the order is far from a fair draw."""
        return self.found < _POOR * self.fair

    def __str__(self) -> str:
        return (
            f"a batch of {BATCH} has {self.found:.0f} of the {self.classes:,} classes on average, "
            f"and {self.fair:.0f} in a fair draw: samples are sorted by class, or nearly"
        )


def class_mix(index: DatasetIndex, samples: SampleColumns) -> ClassMix:
    """How well batches would mix the classes of a dataset, with the default lanes and shuffle of `data`."""
    fields = DataConfig.model_fields
    lanes, shuffle = int(fields["lanes"].default), int(fields["shuffle"].default)
    members = usable_members(index, samples)
    order = SourceOrder([len(each) for each in members], Mixture([1], lanes), 0, 0, shuffle)
    starts = np.concatenate([[0], np.cumsum(index.samples_per_shard)])
    batch = min(BATCH, order.total)
    found = []
    for first in np.unique(np.linspace(0, order.total - batch, _BATCHES).astype(np.int64)).tolist():
        addresses = order.locate(np.arange(first, first + batch))
        numbers = [int(starts[each.shard] + members[each.shard][each.member]) for each in addresses]
        found.append(len(np.unique(samples.label_N[numbers])))
    count_K = np.bincount(samples.label_N[samples.label_N >= 0])
    share_K = count_K[count_K > 0] / count_K.sum()
    return ClassMix(float(np.mean(found)), float((1 - (1 - share_K) ** batch).sum()), len(share_K))


def reshuffle(folder: Path, out: Path, settings: ReshuffleSettings) -> DatasetIndex:
    """Copy all samples that can be used, byte for byte, into new shards in an order drawn by the seed.

    The same dataset and settings give the same bytes. UserError when there is no index, a shard is damaged, or
    `out` is taken. One that did not finish begins again when it is repeated.
    """
    index = load_index(folder)
    problems = check_files(folder, index)
    if problems:
        raise UserError("\n".join(problems))
    table = read_table(folder, index)
    used: NDArray[np.int64] = np.arange(index.total) if table is None else np.flatnonzero(table.label_N >= 0)
    order = used[permutation(settings.seed, "data/reshuffle", 0, len(used))]
    moved = None
    if table is not None:
        moved = SampleColumns(table.label_N[order], None if table.score_N is None else table.score_N[order])
    copy = SampleCopy(folder, index, order, None if moved is None else moved.label_N, "reshuffling")
    name = settings.name or index.name
    file_name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "dataset"
    sources = [folder, *(folder / entry.file for entry in index.shards)]  # shards may be links
    with claimed(out, file_name, settings.overwrite, copy.samples(), sources) as place:
        entries = write_shards(place.folder, file_name, place.samples, settings.limits)
        written = None if moved is None else write_table(place.folder, moved)
        new = index.model_copy(update={"name": name, "samples": written, "shards": tuple(entries), "left_out": ()})
        if moved is not None and index.latents is None:
            write_preview(place.folder, new, copy.first_of_class)
        write_index(place.folder, new)
    return new
