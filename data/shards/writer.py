"""Writing shards: ordinary webdataset tars whose bytes are a function of their samples alone."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from webdataset.writer import TarWriter

from ditmoe.data.shards.decode import LABEL_EXTENSION, METADATA_EXTENSION
from ditmoe.data.shards.index import ShardEntry
from ditmoe.data.shards.tar_scan import BLOCK
from ditmoe.data.storage.files import replacing

OWNER: Final = "ditmoe"
"""User and group that members of a tar belong to."""


@dataclass(frozen=True)
class ShardLimits:
    """When the next shard is begun."""

    samples: int = 1000
    """Most samples of a shard."""
    bytes: int = 256 * 2**20
    """Most bytes of a shard's members; a larger sample gets a shard of its own."""


class Sample(Protocol):
    """What a shard is written from."""

    @property
    def key(self) -> str: ...

    def members(self) -> dict[str, bytes]:
        """Extension → bytes."""
        ...


class PackedSample(NamedTuple):
    """A sample ready to be written."""

    key: str
    extension: str
    """Of the image: png, jpg or npy."""
    image: bytes
    label: int
    metadata: dict[str, Any]

    def members(self) -> dict[str, bytes]:
        """Extension → bytes."""
        return {
            self.extension: self.image,
            LABEL_EXTENSION: str(self.label).encode(),
            METADATA_EXTENSION: json.dumps(self.metadata, sort_keys=True).encode(),
        }


class ReadySample(NamedTuple):
    """A sample whose members are written as they are."""

    key: str
    contents: dict[str, bytes]

    def members(self) -> dict[str, bytes]:
        """Extension → bytes."""
        return self.contents


class _HashingFile:
    """Passes writes on, and keeps their checksum and number."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        if self._file.closed:  # an abandoned tar writes its end when it is collected
            return len(data)
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_shards(folder: Path, name: str, samples: Iterable[Sample], limits: ShardLimits) -> list[ShardEntry]:
    """Write the samples, in their order, to NAME-00000.tar, NAME-00001.tar, …; return what the index says of them.

    A shard takes its name when it is whole and on the disk. UserError when the file system refuses.
    """
    entries: list[ShardEntry] = []
    remaining = iter(samples)
    first = next(remaining, None)

    def fitting() -> Iterator[Sample]:
        """The samples of one shard; the first of the next one is left in `first`."""
        nonlocal first
        count = size = 0
        while first is not None:
            length = sum(BLOCK - (-len(data) // BLOCK) * BLOCK for data in first.members().values())
            if count and (count == limits.samples or size + length > limits.bytes):
                return
            yield first
            count += 1
            size += length
            first = next(remaining, None)

    while first is not None:
        path = folder / f"{name}-{len(entries):05d}.tar"
        with replacing(path) as file:
            entries.append(write_shard(file, path.name, fitting()))
    return entries


def write_shard(file: BinaryIO, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """Write one tar of all the samples to an open file; return what the index says of it under `name`."""
    hashing = _HashingFile(file)
    # Neither the time nor the user's name gets into the bytes.
    tar = TarWriter(hashing, encoder=False, mtime=0, user=OWNER, group=OWNER)
    count = 0
    for sample in samples:
        tar.write({"__key__": sample.key, **sample.members()})
        count += 1
    tar.close()
    return ShardEntry(file=name, samples=count, bytes=hashing.size, sha256=hashing.sha256)
