"""Writing shards: ordinary webdataset tars whose bytes are a function of their samples alone."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from webdataset.writer import TarWriter

from ditmoe.data.shards.decode import LABEL_EXTENSION, METADATA_EXTENSION
from ditmoe.data.shards.index import INDEX_FILE, ShardEntry, load_index
from ditmoe.data.shards.tar_scan import BLOCK
from ditmoe.data.storage.files import PARTIAL_SUFFIX, replacing
from ditmoe.model.errors import UserError

MARKER_FILE: Final = "packing.lock"
"""Lies in a folder while it is being packed, and after a pack that did not finish."""
PLAN_FILE: Final = "synthesis.json"
"""Lies in a folder of synthetic images: what they depend on. Without an index beside it they are not finished."""
WORK_FOLDER: Final = "work"
"""What a synthesis needs to go on, until it is finished."""


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
    tar = TarWriter(hashing, encoder=False, mtime=0, user="ditmoe", group="ditmoe")
    count = 0
    for sample in samples:
        tar.write({"__key__": sample.key, **sample.members()})
        count += 1
    tar.close()
    return ShardEntry(file=name, samples=count, bytes=hashing.size, sha256=hashing.sha256)


@contextmanager
def claim_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """Make `folder` an empty place for shards, for this process alone; the block writes them and the index.

    What an unfinished pack left is removed, and a finished one with `overwrite`. UserError when the folder holds
    a finished pack and not `overwrite`, tars that no pack of ours wrote, or another process packs into it.
    """
    index, marker = folder / INDEX_FILE, folder / MARKER_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = any(path.exists() for path in (index, marker, folder / PLAN_FILE))
        _refuse_packed(folder, overwrite)
        if (folder / PLAN_FILE).exists() and not index.exists() and not overwrite:
            raise UserError(f"{folder}: holds a synthesis that is not finished; --overwrite replaces it")
        strangers = sorted(path.name for path in folder.glob("*.tar"))
        if strangers and not ours:
            raise UserError(
                f"{folder}: holds tars that `ditmoe data pack` did not write, such as {strangers[0]}; "
                "choose another folder"
            )
        with open(marker, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another process is packing into it") from None
            _refuse_packed(folder, overwrite)  # another pack may have ended since
            index.unlink(missing_ok=True)  # first: from here on there is no dataset here
            shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
            for pattern in ("*.tar", "samples.npz", PLAN_FILE, f"*{PARTIAL_SUFFIX}"):
                for path in folder.glob(pattern):
                    path.unlink()
            yield
            marker.unlink()
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from error


def _refuse_packed(folder: Path, overwrite: bool) -> None:
    """UserError when a finished pack is there and shall stay, or an index.json that is not ours to replace."""
    if not (folder / INDEX_FILE).exists():
        return
    if not overwrite:
        raise UserError(f"{folder}: already holds a packed dataset; --overwrite replaces it")
    try:
        load_index(folder)
    except UserError as error:
        raise UserError(f"{error}; --overwrite replaces datasets of ours only: choose another folder") from error
