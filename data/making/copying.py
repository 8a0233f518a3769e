"""Copying samples between shards, in any order: members stay as they are, byte for byte."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.making.preview import COLUMNS, ROWS
from ditmoe.data.shards.decode import BadSample, image_extension
from ditmoe.data.shards.index import DatasetIndex, ShardEntry
from ditmoe.data.shards.members import Contents, Extent
from ditmoe.data.shards.names import is_plain_key
from ditmoe.data.shards.tar_scan import scan
from ditmoe.data.shards.writer import ReadySample
from ditmoe.data.storage.files import open_regular
from ditmoe.data.storage.progress import track
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted

_MOST_OPEN: Final = 128
"""Tars that are open at a time."""


class SampleCopy:
    """Samples of a dataset on their way into other shards.

    Where the members of all samples of a shard lie is kept from its first sample to its last, about 200 bytes for
    each; of their contents one sample's at a time.

    Args:
        folder: of the shards.
        index: of the dataset.
        order: numbers of samples in the index, in the order of writing.
        label_N: their labels, which the contact sheet goes by; null: there is none.
        title: of the progress.
    """

    def __init__(
        self,
        folder: Path,
        index: DatasetIndex,
        order: NDArray[np.int64],
        label_N: NDArray[np.int32] | None,
        title: str,
    ) -> None:
        self._folder, self._index, self._order, self._label_N, self._title = folder, index, order, label_N, title
        self._starts = np.concatenate([[0], np.cumsum(index.samples_per_shard)])
        self._shard_N = np.searchsorted(self._starts, order, side="right") - 1
        self._contents: dict[int, Contents] = {}
        self._open: OrderedDict[int, int] = OrderedDict()
        """Shard → descriptor; the one that was used last comes last."""
        self.first_of_class: dict[int, list[tuple[str, bytes]]] = {}
        """What the contact sheet shows."""

    def samples(self) -> Iterator[ReadySample]:
        """The samples in their order. UserError when a shard is damaged, or is not what the index says."""
        shards = self._index.shards
        for number in track(
            np.unique(self._shard_N).tolist(), len(np.unique(self._shard_N)), "checking", "shards"
        ):
            self._check(shards[number])
        as_they_are = self._keys_can_stay()
        last_use = np.zeros(len(shards), dtype=np.int64)
        last_use[self._shard_N] = np.arange(len(self._order))
        pairs = zip(self._order.tolist(), self._shard_N.tolist(), strict=True)
        try:
            for place, (sample, number) in enumerate(track(pairs, len(self._order), self._title, "samples")):
                contents = self._contents.setdefault(number, self._scan(number))
                member = sample - int(self._starts[number])
                key = contents.keys[member]
                where = f"{self._folder / shards[number].file}, sample {key}"
                members = {
                    name: self._read(number, extent, where) for name, extent in contents.members[member].items()
                }
                unwritable = [name for name in members if not name or name.startswith("_")]
                if unwritable:
                    raise UserError(
                        f"{where}: has a member with the extension {unwritable[0]!a}, which cannot be copied"
                    )
                if self._label_N is not None:
                    self._keep_for_preview(int(self._label_N[place]), members, where)
                yield ReadySample(key if as_they_are else f"{sample:08d}", members)
                if last_use[number] == place:
                    del self._contents[number]
        finally:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _keys_can_stay(self) -> bool:
        """Whether the chosen samples' keys are plain and differ; otherwise their numbers become their keys."""
        seen: set[str] = set()
        for number in np.unique(self._shard_N).tolist():
            keys = self._scan(number).keys
            for sample in self._order[self._shard_N == number].tolist():
                key = keys[sample - int(self._starts[number])]
                if key in seen or not is_plain_key(key):
                    return False
                seen.add(key)
        return True

    def _scan(self, number: int) -> Contents:
        if number in self._contents:
            return self._contents[number]
        entry = self._index.shards[number]
        contents = scan(self._descriptor(number))
        if contents.problem is not None or len(contents.keys) != entry.samples:
            found = (
                contents.problem
                or f"{counted(len(contents.keys), 'sample')}, and index.json says {entry.samples:,}"
            )
            raise UserError(f"{self._folder / entry.file}: {found}")
        return contents

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            path = self._folder / self._index.shards[number].file
            try:
                self._open[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
            if len(self._open) > _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        return self._open[number]

    def _read(self, number: int, extent: Extent, where: str) -> bytes:
        data = b""
        try:
            while len(data) < extent.size:  # a network file system may return less than asked for
                more = os.pread(self._descriptor(number), extent.size - len(data), extent.offset + len(data))
                if not more:
                    raise UserError(f"{where}: truncated tar")
                data += more
        except OSError as error:
            raise UserError(f"{where}: could not be read: {error.strerror or error}") from error
        return data

    def _check(self, entry: ShardEntry) -> None:
        """UserError when a shard's bytes changed: the copies would get a good checksum."""
        path = self._folder / entry.file
        try:
            with open_regular(path) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
        if sha256 != entry.sha256:
            raise UserError(
                f"{path}: checksum mismatch: sha256 {sha256[:12]}…, and index.json says {entry.sha256[:12]}…"
            )

    def _keep_for_preview(self, label: int, members: dict[str, bytes], where: str) -> None:
        kept = self.first_of_class.setdefault(label, [])
        if self._index.latents is None and label < ROWS and len(kept) < COLUMNS:
            try:
                extension = image_extension(members)
            except BadSample as error:
                raise UserError(f"{where}: {error}") from error
            kept.append((extension, members[extension]))
