"""The data of a run: its sources opened, their samples chosen, and the order that they come in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from ditmoe.data.places.place import Place
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.data.stream.mixture import Mixture, Numbers, quotas
from ditmoe.data.stream.order import Address, SourceOrder
from ditmoe.data.stream.selection import Selection
from ditmoe.data.stream.source import OpenSource, fingerprint_of, open_source, reading_digest
from ditmoe.model.errors import UserError


@dataclass(frozen=True)
class StreamSource:
    """One of a run's sources."""

    name: str
    """Unique among the run's sources; for reports."""
    opened: OpenSource
    selection: Selection
    order: SourceOrder

    @property
    def config(self) -> SourceConfig:
        """Its section of the configuration."""
        return self.opened.config

    @property
    def place(self) -> Place:
        """Where its shards lie."""
        return self.opened.place

    @property
    def index(self) -> DatasetIndex:
        """What is in them."""
        return self.opened.index

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
            if source.config.on_error == "stop"
            for problem in source.opened.file_problems().values()
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
    return open_source(config).index


def open_dataset(config: DataConfig, seed: int) -> Dataset:
    """Open every source and check that they fit together. Reads indices and tables of samples, no shards.

    UserError when an index is missing, the sources do not fit together, or settings leave nothing of one.
    """
    quota = quotas([source.weight for source in config.sources], config.window)
    mixture = Mixture(quota, config.lanes)
    opened = [open_source(source, config.cache) for source in config.sources]
    _check_alike(config, [source.index for source in opened])
    names = _unique([source.index.name for source in opened])
    run_names = opened[0].index.class_names
    sources = []
    for number, source in enumerate(opened):
        selection = source.select(run_names, seed=seed, number=number)
        order = SourceOrder(selection.counts, mixture, number, seed, config.shuffle)
        sources.append(StreamSource(names[number], source, selection, order))
    return Dataset(config, seed, tuple(sources), mixture, _facts(config, sources, mixture))


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


FACTS: Final = {
    "name": "name",
    "image_size": "image size",
    "channels": "number of channels",
    "num_classes": "number of classes",
    "class_names": "list of classes",
    "latents": "encoding of latents",
    "lanes": "data.lanes",
    "shuffle": "data.shuffle",
    "mixture": "mixture of sources",
    "fingerprint": "choice of samples",
    "shards": "shards",
    "reading": "reading of them (size, channels, crop or label rule of the index)",
}
"""Fact about a run's data → what it is called in messages."""
_LATER_FACTS: Final = ("shards", "reading")
"""Those that checkpoints of earlier versions do not have."""


def changed_facts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes other samples, or another order, of a run's data than a checkpoint was trained on, in words.

    Where the shards and the VAE of latents lie makes no difference.
    """
    return [
        words
        for key, words in FACTS.items()
        if (key in before or key not in _LATER_FACTS) and _fact(before, key) != _fact(now, key)
    ]


def _fact(facts: Mapping[str, Any], key: str) -> Any:
    value = facts.get(key)
    return {name: each for name, each in value.items() if name != "vae"} if key == "latents" and value else value


def _facts(config: DataConfig, sources: list[StreamSource], mixture: Mixture) -> dict[str, Any]:
    """What a checkpoint keeps: with another order, its position would stand for other samples."""
    return {
        **sources[0].index.facts,
        "lanes": config.lanes,
        "shuffle": config.shuffle,
        "mixture": list(mixture.quotas),
        "fingerprint": [fingerprint_of(source.index, source.selection) for source in sources],
        "shards": [source.index.fingerprint for source in sources],
        "reading": [reading_digest(source.index) for source in sources],
    }
