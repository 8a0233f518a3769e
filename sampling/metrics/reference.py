"""What drawn images are compared with: real images, which they are, how they are read and where they lie.

The code that reads them is that of training: the same place, index, label rule and choice of samples, so that a
run is compared with what it was trained on. Statistics of them are kept under their fingerprint, which covers all
of it. Images without an index, and statistics that stand in a file, are in `references/`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.storage.workers import in_order
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.dataset import changed_facts
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.data.stream.remembered import index_file, remembered_data
from ditmoe.data.stream.selection import Selection
from ditmoe.data.stream.source import OpenSource, fingerprint_of, open_source, reading_digest, used_digest
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.metrics.decoding import (
    LostSamples,
    ReferenceBatch,
    UndecodedSample,
    decode_samples,
    decoding_processes,
    read_undecoded,
)

MAX_PARTS: Final = 16
"""Parts that the shards are cut into; what is computed of a part is kept, so a killed job repeats one part."""
SHOWN: Final = 20
"""Samples that were left out and are named in results."""
FORM: Final = 1
"""Raised whenever equal settings give other images."""
OnError = Literal["stop", "skip"]
_CHOICE: Final = ("classes", "min_score", "max_samples", "max_per_class")
"""Keys of a source that choose among its samples."""


class Form(NamedTuple):
    """What is known of the form of images; None: it is not."""

    image_size: int | None = None
    channels: int | None = None
    class_names: tuple[str, ...] | None = None


class Reference(ABC):
    """What drawn images are compared with: images, or statistics of them."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Its place, without secrets."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of all that figures depend on (first 16 hex digits of SHA-256)."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """That of the images."""

    @property
    @abstractmethod
    def parts(self) -> int:
        """Number of parts that are computed one by one, and kept, so that a killed job repeats one part."""

    @abstractmethod
    def facts(self, left_out: LeftOut | None) -> dict[str, Any]:
        """What results record of it, as plain data.

        Args:
            left_out: what was passed over when all images were read; None: no image was read.
        """


class Images(Reference):
    """Images that can be read, each once, in an order of their own."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of images, including those that turn out to be unusable when they are read."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Those of all images, where they stand together; None: they come with the images, or not at all."""
        return None

    @abstractmethod
    def new_left_out(self) -> LeftOut:
        """An empty record of what is passed over while images are read."""

    @abstractmethod
    def parts_of(self, images: int) -> int:
        """So many parts that each has about that many images, as far as they can be read in such parts."""

    @abstractmethod
    def read(
        self, part: int, batch: int, left_out: LeftOut | None = None, *, of: int | None = None
    ) -> Iterator[ReferenceBatch]:
        """The images of one part, up to `batch` at a time.

        Args:
            left_out: takes those that cannot be used.
            of: how many parts there are, as `parts_of` says; None: `parts`.

        Raises:
            UserError: a file or an image is damaged, and the policy is to stop or the budget is spent.
        """

    def read_all(self, batch: int, left_out: LeftOut | None = None) -> Iterator[ReferenceBatch]:
        """Every image, part by part."""
        left_out = self.new_left_out() if left_out is None else left_out
        for part in range(self.parts):
            yield from self.read(part, batch, left_out)


@dataclass(frozen=True)
class ReferenceImages(Images):
    """Images of a source, each once, in the index's order."""

    source: OpenSource
    selection: Selection
    """Which of them, and what their labels stand for."""
    lost: Mapping[int, str]
    """Shard → what is wrong with its file; such shards are left out, where the policy lets them be."""

    @property
    def index(self) -> DatasetIndex:
        """The index of the images."""
        return self.source.index

    @property
    def where(self) -> str:
        """Their place, without secrets."""
        return self.source.config.shown

    @property
    def form(self) -> Form:
        """As its index says."""
        return Form(self.index.image_size, self.index.channels, self.index.class_names)

    @cached_property
    def members(self) -> tuple[NDArray[np.int64], ...]:
        """Of each shard the numbers of the samples that are read, rising."""
        chosen = zip(self.index.samples_per_shard, self.selection.members, strict=True)
        return tuple(
            np.empty(0, np.int64) if number in self.lost else np.arange(samples) if used is None else used
            for number, (samples, used) in enumerate(chosen)
        )

    @property
    def count(self) -> int:
        """Number of images, including those that turn out to be unusable when they are read."""
        return sum(map(len, self.members))

    @cached_property
    def fingerprint(self) -> str:
        """Of the images and labels (first 16 hex digits): bytes, table, reading and choice."""
        covered = {
            "form": FORM,
            "shards": self.index.fingerprint,
            "samples": None if self.index.samples is None else self.index.samples.sha256,
            "reading": reading_digest(self.index),
            "labels": self.selection.label_of.tolist(),
            "used": used_digest(self.index, self.selection),
            "lost": sorted(self.lost),
        }
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parts(self) -> int:
        """Number of parts; a part is a run of shards."""
        return min(MAX_PARTS, len(self.index.shards))

    def parts_of(self, images: int) -> int:
        """As `Images`; a shard is read as a whole."""
        return max(1, min(len(self.index.shards), -(-self.count // images)))

    def new_left_out(self) -> LeftOut:
        """An empty record of what is passed over while images are read."""
        return LeftOut(self.source.config)

    def read(
        self, part: int, batch: int, left_out: LeftOut | None = None, *, of: int | None = None
    ) -> Iterator[ReferenceBatch]:
        """The images of one part, up to `batch` at a time.

        Args:
            left_out: takes those that cannot be used.
            of: as of `Images`.

        Raises:
            UserError: a shard or sample is damaged, and the policy is to stop or the budget is spent; a remote
                shard cannot be fetched, whatever the policy: what is kept of the images does not depend on that.
        """
        left_out = self.new_left_out() if left_out is None else left_out
        shards, parts = len(self.index.shards), of or self.parts
        numbers = range(shards * part // parts, shards * (part + 1) // parts)
        used = [number for number in numbers if len(self.members[number])]
        processes = decoding_processes(sum(len(self.members[number]) for number in used))
        decode = partial(decode_samples, self.index, self.selection)
        # What cannot be used is told of here, in the order of the samples, however far the processes are ahead.
        with (
            closing(self._undecoded(used, batch)) as undecoded,
            closing(in_order(decode, undecoded, processes)) as decoded,
        ):
            for found, problems in decoded:
                for where, problem, samples in problems:
                    left_out.add(where, problem, samples)
                if found is not None:
                    yield found

    def _undecoded(
        self, shards: Sequence[int], batch: int
    ) -> Generator[list[UndecodedSample] | LostSamples, None, None]:
        """The samples of some shards as their bytes, up to `batch` at a time; of a damaged shard what is lost."""
        starts = np.cumsum([0, *map(len, self.members)])
        for number, shard in self.source.shards(shards):
            members = self.members[number]
            if isinstance(shard, ShardFault):
                if self.source.place.remote:
                    raise shard
                yield LostSamples(shard.shard, shard.reason, len(members))
                continue
            for first in range(0, len(members), batch):
                yield [
                    read_undecoded(shard, member, self.index, row)
                    for row, member in enumerate(
                        members[first : first + batch].tolist(), start=int(starts[number]) + first
                    )
                ]

    def facts(self, left_out: LeftOut | None) -> dict[str, Any]:
        """As `Reference`."""
        assert left_out is not None
        config = self.source.config
        lost = [f"{self.source.place.where(self.index.shards[number].file)}" for number in self.lost]
        lines = [*self.lost.values(), *left_out.lines]
        of_lost = sum(self.selection.counts[number] for number in self.lost)
        return {
            "name": self.index.name,
            "place": self.where,
            "index": None if config.index is None else str(config.index),
            "images": self.count - left_out.count,
            "of": self.index.total,
            "choice": config.model_dump(mode="json", include=set(_CHOICE), exclude_defaults=True),
            "fingerprint": self.fingerprint,
            "left_out": {"samples": of_lost + left_out.count, "shards": lost, "first": lines[:SHOWN]},
        }


def open_reference(
    config: SourceConfig, *, seed: int = 0, cache: Path | None = None, option: str = "--reference"
) -> ReferenceImages:
    """The images of a source that its settings choose.

    Args:
        seed: that of the run whose source it is; decides which samples caps leave.
        cache: folder for remote shards.
        option: names the images, for messages.

    Raises:
        UserError: its index is missing or does not fit its settings; shards are missing, and the policy is to
            stop; it holds latents.
    """
    return _reference(open_source(config, cache), seed, option)


def reference_of_run(
    info: CheckpointInfo,
    named: str | Path | None = None,
    index: Path | None = None,
    on_error: OnError | None = None,
    option: str = "--reference",
) -> ReferenceImages:
    """The images that a run is compared with: those of its first source that it was trained on, or others.

    Args:
        named: where the user says that they lie; None: where the checkpoint says. The run's own shards are chosen
            from as the run chose; of others all are taken.
        index: folder of the index, where it is not with the shards.
        on_error: what to do about samples that cannot be used; None: what the run did.
        option: names the images, for messages.

    Raises:
        UserError: the run does not say what it was trained on, or its place is not opened unasked, and none is
            named; other data is there now; or as `open_reference`.
    """
    remembered = remembered_data(info.config, str(info.path), option)
    if remembered is not None:
        config = remembered.source(0, None if named is None else str(named), index)
        cache = remembered.cache
    elif named is not None:
        config, cache = SourceConfig.model_construct(path=str(named), index=index_file(index)), None
    else:
        raise UserError(
            f"{info.path}: does not say what it was trained on; give the folder of real images with {option}"
        )
    if on_error is not None:
        config = config.model_copy(update={"on_error": on_error})
    source = open_source(config, cache)
    own = named is None or _first(info, "shards") == source.index.fingerprint
    if not own:
        source = replace(source, config=config.model_copy(update=dict.fromkeys(_CHOICE) | {"classes": {}}))
    reference = _reference(source, int(info.config.get("seed") or 0), option)
    if named is None:
        _check_unchanged(info, reference, option)
    return reference


def _reference(source: OpenSource, seed: int, option: str) -> ReferenceImages:
    latents = source.index.latents
    if latents is not None:  # decoded latents are not the images: a figure against them is another figure
        raise UserError(
            f"{source.config.shown}: holds latents; expected the {latents.pixels}×{latents.pixels} images that "
            f"they were encoded from: give their folder with {option}"
        )
    lost = source.file_problems()
    if lost and source.config.on_error == "stop":
        raise UserError("\n".join(lost.values()))
    selection = source.select(source.index.class_names, seed=seed, number=0)
    budget = LeftOut(source.config)
    for number, problem in lost.items():
        budget.add_lines(selection.counts[number], [problem])
    reference = ReferenceImages(source, selection, lost)
    if not reference.count:
        raise UserError(f"{source.config.shown}: none of its images can be used; {next(iter(lost.values()))}")
    return reference


def _check_unchanged(info: CheckpointInfo, reference: ReferenceImages, option: str) -> None:
    """UserError when other data lies now where the run was trained from."""
    now = {
        "fingerprint": fingerprint_of(reference.index, reference.selection),
        "shards": reference.index.fingerprint,
        "reading": reading_digest(reference.index),
    }
    before = {key: _first(info, key) for key in now if key in info.dataset}
    changed = changed_facts(before, {key: now[key] for key in before})
    if changed:
        raise UserError(
            f"{reference.where}: is other data than {info.path} was trained on (another {', '.join(changed)}); "
            f"name the images to compare with by {option}"
        )


def _first(info: CheckpointInfo, key: str) -> Any:
    """A fact about the first of a run's sources."""
    values = info.dataset.get(key)
    return values[0] if isinstance(values, list) and values else None
