"""The data of a run: its sources opened, their samples chosen, and the order that they come in."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditmoe.data.places.place import LocalPlace, Place, open_place
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, check_files, load_index, parse_index
from ditmoe.data.shards.sample_table import SampleColumns, digest_of_members, parse_table
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.data.stream.mixture import Mixture, Numbers, quotas
from ditmoe.data.stream.order import Address, SourceOrder
from ditmoe.data.stream.selection import Selection, map_classes, select
from ditmoe.model.errors import UserError


@dataclass(frozen=True)
class StreamSource:
    """One of a run's sources."""

    name: str
    """Unique among the run's sources; for reports."""
    config: SourceConfig
    place: Place
    index: DatasetIndex
    selection: Selection
    order: SourceOrder

    @property
    def total(self) -> int:
        """Samples that are used: the length of its epoch."""
        return self.order.total


class Located(NamedTuple):
    """Where the sample at a position lies."""

    position: int
    source: int
    lane: int
    address: Address


class SourceProgress(NamedTuple):
    """How far a source has been read."""

    images: int
    epoch: float


class Dataset:
    """All sources of a run in their order."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        sources: tuple[StreamSource, ...],
        mixture: Mixture,
        facts: dict[str, Any],
    ) -> None:
        self.config = config
        self.seed = seed
        self.sources = sources
        self.mixture = mixture
        self.facts = facts
        """Plain data for checkpoints: the network's input, the classes, and what decides the order of samples."""

    @property
    def index(self) -> DatasetIndex:
        """Of the first source, whose classes are the run's, and whose kind and size of images all share."""
        return self.sources[0].index

    def check_files(self) -> None:
        """Look at the local shards of sources that no shard may be missing of; reads no contents.

        UserError when one is missing or of another size than the index says, a line each.
        """
        problems = [
            problem
            for source in self.sources
            if source.config.on_error == "stop" and isinstance(source.place, LocalPlace)
            for problem in check_files(source.place.folder, source.index)
        ]
        if problems:
            raise UserError("\n".join(problems))

    def locate(self, positions: Numbers) -> list[Located]:
        """Where the samples of some positions of the global order lie."""
        source_P, number_P = self.mixture.split(positions)
        located: list[Located | None] = [None] * len(positions)
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(source_P == number)
            for row, address in zip(rows.tolist(), source.order.locate(number_P[rows]), strict=True):
                position = int(positions[row])
                located[row] = Located(position, number, position % self.mixture.lanes, address)
        return [each for each in located if each is not None]

    def progress(self, position: int) -> dict[str, SourceProgress]:
        """Of each source, by name, what was read before a position."""
        seen = [self.mixture.seen(number, position) for number in range(len(self.sources))]
        return {
            source.name: SourceProgress(images, images / source.total)
            for source, images in zip(self.sources, seen, strict=True)
        }


def open_index(config: SourceConfig) -> DatasetIndex:
    """A source's index. UserError when there is none, or it is damaged."""
    return _open_index(config, _place_of(config, None))


def open_dataset(config: DataConfig, seed: int) -> Dataset:
    """Open every source and check that they fit together. Reads indices and tables of samples, no shards.

    UserError when an index is missing, the sources do not fit together, or settings leave nothing of one.
    """
    quota = quotas([source.weight for source in config.sources], config.window)
    mixture = Mixture(quota, config.lanes)
    places = [_place_of(source, config.cache) for source in config.sources]
    indices = [_open_index(source, place) for source, place in zip(config.sources, places, strict=True)]
    _check_alike(config, indices)
    names = _unique([index.name for index in indices])
    sources = []
    for number, (source, place, index) in enumerate(zip(config.sources, places, indices, strict=True)):
        label_of = map_classes(index, source, indices[0].class_names, f"data.sources.{number}")
        table = _open_table(source, place, index)
        selection = select(index, table, source, label_of, seed=seed, number=number)
        order = SourceOrder(selection.counts, mixture, number, seed, config.shuffle)
        sources.append(StreamSource(names[number], source, place, index, selection, order))
    return Dataset(config, seed, tuple(sources), mixture, _facts(config, sources, mixture))


def _place_of(config: SourceConfig, cache: Path | None) -> Place:
    return open_place(config.path, retries=config.retries, timeout=config.timeout, cache=cache)


def _open_index(config: SourceConfig, place: Place) -> DatasetIndex:
    if config.index is not None:
        return parse_index(_read(config.index), str(config.index))
    if isinstance(place, LocalPlace):
        return load_index(place.folder)
    return parse_index(place.read(INDEX_FILE), place.where(INDEX_FILE))


def _open_table(config: SourceConfig, place: Place, index: DatasetIndex) -> SampleColumns | None:
    """The table of samples, which lies beside the index."""
    if index.samples is None:
        return None
    if config.index is None:
        return parse_table(place.read(index.samples.file), index, place.where(index.samples.file))
    path = config.index.parent / index.samples.file
    return parse_table(_read(path), index, str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error


def _check_alike(config: DataConfig, indices: list[DatasetIndex]) -> None:
    """UserError when the sources are not of one kind and size, or cannot be mirrored as asked."""
    first = indices[0]
    problems = []
    for number, index in enumerate(indices):
        for key, value, expected in _kind(index, first):
            if value != expected:
                problems.append(
                    f"data.sources.{number}: {key} is {value}, and that of the first source,"
                    f" {config.sources[0].shown}, is {expected}; expected the same"
                )
        if config.flip and index.latents is not None and index.latents.flips != "both":
            problems.append(
                f"data.flip = true with data.sources.{number}: the latents of {config.sources[number].shown} were"
                f" encoded with --flips {index.latents.flips}; expected --flips both, or data.flip = false"
            )
    if problems:
        raise UserError("\n".join(problems))


def _kind(index: DatasetIndex, first: DatasetIndex) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = [
        (key, getattr(index, key), getattr(first, key)) for key in ("image_size", "channels")
    ]
    found, expected = ("images" if each.latents is None else "latents" for each in (index, first))
    pairs.append(("the kind of its samples", found, expected))
    if index.latents is not None and first.latents is not None:
        pairs += [
            (f"latents.{key}", getattr(index.latents, key), getattr(first.latents, key))
            for key in ("vae_sha256", "scale", "shift")
        ]
    return pairs


def _unique(names: list[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [f"{name} {number}" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _facts(config: DataConfig, sources: list[StreamSource], mixture: Mixture) -> dict[str, Any]:
    """What a checkpoint keeps: with another order, its position would stand for other samples."""
    return {
        **sources[0].index.facts,
        "lanes": config.lanes,
        "shuffle": config.shuffle,
        "mixture": list(mixture.quotas),
        "fingerprint": [_fingerprint(source.index, source.selection) for source in sources],
    }


def _fingerprint(index: DatasetIndex, selection: Selection) -> str:
    """Hex digest of a source's shards, of what is used of them, and of its classes."""
    whole = (np.arange(samples) for samples in index.samples_per_shard)
    members = (each if used is None else used for each, used in zip(whole, selection.members, strict=True))
    labels = selection.label_of.astype("<i8").tobytes().hex()
    return hashlib.sha256(f"{index.fingerprint} {digest_of_members(members)} {labels}".encode()).hexdigest()
