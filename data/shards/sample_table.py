"""The table of samples: label and score of each, in the index's order, known without reading a shard."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.shards.index import DatasetIndex, SampleTable
from ditmoe.data.storage.arrays import UNREADABLE, named_arrays
from ditmoe.data.storage.files import open_regular, replacing
from ditmoe.model.errors import UserError

TABLE_FILE: Final = "samples.npz"


class SampleColumns(NamedTuple):
    """What is known of each sample of an index."""

    label_N: NDArray[np.int32]
    """−1: the sample cannot be used, and is left out."""
    score_N: NDArray[np.float32] | None
    """Quality, higher is better; NaN for a sample without one. Null: none has one."""


def write_table(folder: Path, samples: SampleColumns) -> SampleTable:
    """Write `folder/samples.npz`, whole or not at all; what the index says of it."""
    arrays: dict[str, Any] = {"label": samples.label_N.astype(np.int32)}
    if samples.score_N is not None:
        assert samples.score_N.shape == samples.label_N.shape
        arrays["score"] = samples.score_N.astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # numpy writes no times, so equal tables are equal bytes
    data = buffer.getvalue()
    with replacing(folder / TABLE_FILE) as file:
        file.write(data)
    return SampleTable(file=TABLE_FILE, sha256=hashlib.sha256(data).hexdigest())


def parse_table(data: bytes, index: DatasetIndex, path: str) -> SampleColumns:
    """A table's contents; `path` is for messages. UserError when they are not what the index says."""
    assert index.samples is not None
    if hashlib.sha256(data).hexdigest() != index.samples.sha256:
        raise UserError(f"{path}: checksum mismatch: not the table that index.json was written with")
    try:
        with named_arrays(io.BytesIO(data)) as stored:
            arrays = dict(stored)
    except UNREADABLE as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    label_N, score_N = arrays.get("label"), arrays.get("score")
    if label_N is None or label_N.shape != (index.total,) or label_N.dtype != np.int32:
        raise UserError(f"{path}: expected {index.total:,} labels, one of each sample of index.json")
    if score_N is not None and (score_N.shape != label_N.shape or score_N.dtype != np.float32):
        raise UserError(f"{path}: expected {index.total:,} scores, one of each sample of index.json")
    if len(label_N) and not -1 <= label_N.min() <= label_N.max() < index.num_classes:
        raise UserError(f"{path}: has labels outside the {index.num_classes} classes")
    return SampleColumns(label_N, score_N)


def read_table(folder: Path, index: DatasetIndex) -> SampleColumns | None:
    """The table of a local folder; null where the index names none. UserError when it cannot be read."""
    if index.samples is None:
        return None
    path = folder / index.samples.file
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    return parse_table(data, index, str(path))


def usable_members(index: DatasetIndex, samples: SampleColumns | None) -> tuple[NDArray[np.int64], ...]:
    """Of each shard the numbers of the samples that the table does not mark as left out, rising."""
    used_N = np.ones(index.total, dtype=bool) if samples is None else samples.label_N >= 0
    return tuple(np.flatnonzero(part) for part in np.split(used_N, np.cumsum(index.samples_per_shard)[:-1]))


def digest_of_members(members: Iterable[NDArray[np.int64]]) -> str:
    """Hex digest of which samples of each shard are used."""
    digest = hashlib.sha256()
    for shard in members:
        digest.update(len(shard).to_bytes(8, "little") + shard.astype("<i8").tobytes())
    return digest.hexdigest()
