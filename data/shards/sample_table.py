"""The table of samples: label and score of each, in the index's order, known without reading a shard."""

import hashlib
import io
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, SampleTable, parse_index, put_index
from ditmoe.data.storage.arrays import UNREADABLE, named_arrays
from ditmoe.data.storage.files import is_partial, open_regular, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted

TABLE_FILE: Final = "samples.npz"
_INDEX_BEGINS: Final = b"{"
"""Of what a killed writer may leave, shards are large, and none of them begins like an index."""


class SampleColumns(NamedTuple):
    """What is known of each sample of an index."""

    label_N: NDArray[np.int32]
    """−1: the sample cannot be used, and is left out."""
    score_N: NDArray[np.float32] | None
    """Quality, higher is better; NaN for a sample without one. Null: none has one."""


def write_table(folder: Path, samples: SampleColumns) -> SampleTable:
    """Write `folder/samples.npz`, whole or not at all; what the index says of it."""
    data = _table_of(samples)
    with replacing(folder / TABLE_FILE) as file:
        file.write(data)
    return _facts_of(data)


def write_table_and_index(folder: Path, samples: SampleColumns, index: DatasetIndex) -> DatasetIndex:
    """Write `folder/samples.npz` and an `index.json` that names it; the index as it was written.

    The index lies on the disk under a temporary name before the table takes its own. So a table whose index a kill
    has prevented is known by its checksum (`tables_of_unfinished`).
    """
    data = _table_of(samples)
    index = index.model_copy(update={"samples": _facts_of(data)})
    with replacing(folder / INDEX_FILE) as file:
        put_index(index, file)
        file.flush()
        os.fsync(file.fileno())
        with replacing(folder / TABLE_FILE) as table:
            table.write(data)
    return index


def tables_of_unfinished(folder: Path) -> frozenset[str]:
    """Checksums of the tables that were written into a folder, or nearly, when their writer was killed."""
    found = set()
    for path in folder.iterdir():
        if is_partial(path.name) and not path.is_symlink():
            with suppress(OSError, UserError), open_regular(path) as file:
                if file.read(len(_INDEX_BEGINS)) == _INDEX_BEGINS:
                    index = parse_index(_INDEX_BEGINS + file.read(), str(path))
                    found |= set() if index.samples is None else {index.samples.sha256}
    return frozenset(found)


def _table_of(samples: SampleColumns) -> bytes:
    arrays: dict[str, Any] = {"label": samples.label_N.astype(np.int32)}
    if samples.score_N is not None:
        assert samples.score_N.shape == samples.label_N.shape
        arrays["score"] = samples.score_N.astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # numpy writes no times, so equal tables are equal bytes
    return buffer.getvalue()


def _facts_of(data: bytes) -> SampleTable:
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
        raise UserError(f"{path}: has labels outside the {counted(index.num_classes, 'class')}")
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
