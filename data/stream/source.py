"""An open source: where its shards lie, what its index and its table of samples say, which samples are used."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.fetcher import ShardFetcher
from ditmoe.data.places.place import LocalPlace, Place, open_place
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, file_problems, load_index, parse_index
from ditmoe.data.shards.sample_table import SampleColumns, digest_of_members, parse_table
from ditmoe.data.storage.files import open_regular
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.selection import Selection, map_classes, select
from ditmoe.model.errors import UserError


@dataclass(frozen=True)
class OpenSource:
    """One source of shards; its index is read, its shards are not."""

    config: SourceConfig
    place: Place
    index: DatasetIndex

    @property
    def folders(self) -> list[Path]:
        """Local folders that are read: of shards, and of an index elsewhere."""
        shards = [self.place.folder] if isinstance(self.place, LocalPlace) else []
        return shards + ([] if self.config.index is None else [self.config.index.parent])

    @cached_property
    def table(self) -> SampleColumns | None:
        """The table of samples, which lies beside the index; null: there is none. UserError when it is damaged."""
        if self.index.samples is None:
            return None
        file = self.index.samples.file
        if self.config.index is None:
            return parse_table(self.place.read(file), self.index, self.place.where(file))
        path = self.config.index.parent / file
        return parse_table(_read(path), self.index, str(path))

    def select(self, run_names: Sequence[str], *, seed: int, number: int) -> Selection:
        """What a run uses of it. UserError when its settings do not fit it, or leave nothing.

        Args:
            run_names: the run's classes, those of its first source.
            seed: the run's.
            number: the source's among `data.sources`.
        """
        label_of = map_classes(self.index, self.config, run_names, f"data.sources.{number}")
        return select(self.index, self.table, self.config, label_of, seed=seed, number=number)

    def file_problems(self) -> dict[int, str]:
        """Shard of a local place → why its file is not what the index says; nothing of a remote place."""
        return file_problems(self.place.folder, self.index) if isinstance(self.place, LocalPlace) else {}

    def shards(self, numbers: Sequence[int]) -> Iterator[tuple[int, Shard | ShardFault]]:
        """Some shards one after another, the next one fetched meanwhile; in place of an unreadable one, its error.

        Each is closed when the next one is asked for. UserError when this machine cannot keep it.
        """
        with closing(ShardFetcher(self.place, self.index.shards)) as fetcher:
            for position, number in enumerate(numbers):
                for ahead in numbers[position + 1 : position + 2]:
                    fetcher.prefetch(ahead)
                try:
                    entry = self.index.shards[number]
                    shard = Shard(fetcher.get(number), self.place.where(entry.file), entry)
                except ShardFault as fault:
                    yield number, fault
                    continue
                with closing(shard):
                    yield number, shard


def open_source(config: SourceConfig, cache: Path | None = None) -> OpenSource:
    """Open a source; `cache` is the folder for remote shards. UserError when its index is missing or damaged."""
    place = open_place(config.path, retries=config.retries, timeout=config.timeout, cache=cache)
    if config.index is not None:
        return OpenSource(config, place, parse_index(_read(config.index), str(config.index)))
    if isinstance(place, LocalPlace):
        return OpenSource(config, place, load_index(place.folder))
    return OpenSource(config, place, parse_index(place.read(INDEX_FILE), place.where(INDEX_FILE)))


def fingerprint_of(index: DatasetIndex, selection: Selection) -> str:
    """Hex digest of a source's shards, of what is used of them, and of its classes."""
    labels = selection.label_of.astype("<i8").tobytes().hex()
    return hashlib.sha256(f"{index.fingerprint} {used_digest(index, selection)} {labels}".encode()).hexdigest()


def used_digest(index: DatasetIndex, selection: Selection) -> str:
    """Hex digest of which samples of each shard are used."""
    whole = (np.arange(samples) for samples in index.samples_per_shard)
    return digest_of_members(
        each if used is None else used for each, used in zip(whole, selection.members, strict=True)
    )


def reading_digest(index: DatasetIndex) -> str:
    """Hex digest of how samples are made of a source's bytes: size, channels, crop, and what labels stand for.

    The same tars, indexed differently, are different samples.
    """
    reading = {
        "image_size": index.image_size,
        "channels": index.channels,
        "crop": index.crop,
        "label": index.label.model_dump(mode="json"),
        "class_names": list(index.class_names),
    }
    return hashlib.sha256(json.dumps(reading, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file, such as {path / INDEX_FILE}")
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
