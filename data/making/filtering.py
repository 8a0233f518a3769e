"""Filtering: the samples of a dataset with the best scores, class by class, copied as they are into new shards."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.making.ownership import claimed
from ditmoe.data.making.preview import COLUMNS, ROWS, write_preview
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import BadSample, image_extension
from ditmoe.data.shards.index import DatasetIndex, ShardEntry, check_files, load_index, write_index
from ditmoe.data.shards.names import is_plain_key
from ditmoe.data.shards.sample_table import SampleColumns, read_table, write_table
from ditmoe.data.shards.writer import ReadySample, ShardLimits, write_shards
from ditmoe.data.storage.files import open_regular
from ditmoe.data.storage.progress import track
from ditmoe.model.errors import UserError


@dataclass(frozen=True)
class FilterSettings:
    """Which samples are kept."""

    keep: float = 1.0
    """Share of each class's samples, rounded down to a number, but at least one."""
    min_score: float | None = None
    """Samples with a lower score are not kept, though a class then keeps fewer than its share; null: any score."""
    limits: ShardLimits = field(default_factory=ShardLimits)
    name: str | None = None
    """The new dataset's name; null: that of the old one, and `-filtered`."""
    overwrite: bool = False
    """Replace a dataset that is already there."""


class ClassFigures(NamedTuple):
    """What was kept of one class."""

    samples: int
    """Samples that the class had."""
    without_score: int
    """Of them, those without a score, which are never kept."""
    kept: int
    threshold: float
    """The lowest score that was kept; NaN: none was."""


@dataclass(frozen=True)
class FilterResult:
    """What was kept."""

    index: DatasetIndex
    classes: list[ClassFigures]
    """By label."""


def choose(
    samples: SampleColumns, num_classes: int, settings: FilterSettings
) -> tuple[NDArray[np.int64], list[ClassFigures]]:
    """The numbers of the samples to keep, in order, and figures by class.

    The best scores of each class; of equal ones those that come first.
    """
    assert samples.score_N is not None
    share = Fraction(str(settings.keep))  # a float's error would round 0.29 of 100 to 28
    chosen, figures = [np.empty(0, np.int64)], []
    order = np.argsort(samples.label_N, kind="stable")
    bounds = np.searchsorted(samples.label_N[order], np.arange(num_classes + 1))
    for first, end in pairwise(bounds):
        of_class = order[first:end]
        scored = of_class[~np.isnan(samples.score_N[of_class])]
        best = scored[np.argsort(-samples.score_N[scored], kind="stable")]
        kept = best[: max(1, math.floor(share * len(of_class)))]
        if settings.min_score is not None:
            kept = kept[samples.score_N[kept] >= np.float32(settings.min_score)]
        lowest = float(samples.score_N[kept[-1]]) if len(kept) else math.nan
        figures.append(ClassFigures(len(of_class), len(of_class) - len(scored), len(kept), lowest))
        chosen.append(kept)
    return np.sort(np.concatenate(chosen)), figures


def filter_shards(
    folder: Path, out: Path, settings: FilterSettings, index_folder: Path | None = None
) -> FilterResult:
    """Copy the samples with the best scores, byte for byte, into new shards with an index and a table.

    Samples stay in their order. The index may lie in another folder than the shards, `index_folder`.

    UserError when there are no scores, nothing would be kept, a shard is damaged, or
    `out` is taken.
    """
    index_folder = index_folder or folder
    index = load_index(index_folder)
    if out.resolve() in (folder.resolve(), index_folder.resolve()):
        raise UserError(f"{out}: is the folder that is filtered; choose another one for the result")
    samples = read_table(index_folder, index)
    if samples is None or samples.score_N is None:
        raise UserError(
            f"{folder}: has no quality scores; `ditmoe data synthesize --score`, `ditmoe data index --score` and "
            "`ditmoe data pack --labels` with a column `score` write them"
        )
    if not (0 < settings.keep <= 1):
        raise UserError(f"--keep is {settings.keep:g}, expected a share above 0 and up to 1")
    chosen, figures = choose(samples, index.num_classes, settings)
    if not len(chosen):
        raise UserError(
            f"{folder}: no sample would be kept: the best score is {np.nanmax(samples.score_N):g}"
            + (f", and --min-score is {settings.min_score:g}" if settings.min_score is not None else "")
        )
    problems = check_files(folder, index)
    if problems:
        raise UserError("\n".join(problems))
    kept = SampleColumns(samples.label_N[chosen], samples.score_N[chosen])
    copy = _Copy(folder, index, chosen, kept.label_N)
    name = settings.name or f"{index.name}-filtered"
    file_name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "dataset"
    sources = [folder, index_folder, *(folder / entry.file for entry in index.shards)]  # shards may be links
    with claimed(out, file_name, settings.overwrite, sources):
        entries = write_shards(out, file_name, copy.samples(), settings.limits)
        new = index.model_copy(
            update={"name": name, "samples": write_table(out, kept), "shards": tuple(entries), "left_out": ()}
        )
        if index.latents is None:
            write_preview(out, new, copy.first_of_class)
        write_index(out, new)
    return FilterResult(new, figures)


class _Copy:
    """The chosen samples on their way."""

    def __init__(
        self, folder: Path, index: DatasetIndex, chosen: NDArray[np.int64], label_N: NDArray[np.int32]
    ) -> None:
        self._folder, self._index, self._label_N = folder, index, label_N
        starts = np.concatenate([[0], np.cumsum(index.samples_per_shard)])
        places = np.searchsorted(chosen, starts)
        self._numbers = [chosen[a:b] for a, b in pairwise(places)]
        """Numbers of the chosen samples of each shard."""
        self._starts = starts
        self.first_of_class: dict[int, list[tuple[str, bytes]]] = {}
        """What the contact sheet shows."""

    def samples(self) -> Iterator[ReadySample]:
        """The chosen samples in order. UserError when a shard is damaged."""
        as_they_are = self._keys_can_stay()
        done = 0
        for number, entry in enumerate(track(self._index.shards, len(self._index.shards), "filtering", "shards")):
            if not len(self._numbers[number]):
                continue
            self._check(entry)
            shard = Shard.at(self._folder / entry.file, entry)
            try:
                for sample in self._numbers[number].tolist():
                    member = sample - int(self._starts[number])
                    contents = self._members(shard, member)
                    unwritable = [name for name in contents if not name or name.startswith("_")]
                    if unwritable:
                        raise UserError(
                            f"{shard.where(member)}: has a member with the extension {unwritable[0]!a}, "
                            "which cannot be copied"
                        )
                    self._keep_for_preview(int(self._label_N[done]), contents, shard.where(member))
                    yield ReadySample(shard.keys[member] if as_they_are else f"{sample:08d}", contents)
                    done += 1
            finally:
                shard.close()

    def _members(self, shard: Shard, member: int) -> dict[str, bytes]:
        try:
            return {name: shard.read(member, name) or b"" for name in shard.extensions(member)}
        except BadSample as error:
            raise UserError(f"{shard.where(member)}: {error}") from error

    def _keys_can_stay(self) -> bool:
        """Whether the chosen samples' keys are plain and differ; otherwise their numbers become their keys."""
        seen: set[str] = set()
        for number, entry in enumerate(self._index.shards):
            if not len(self._numbers[number]):
                continue
            shard = Shard.at(self._folder / entry.file, entry)
            shard.close()
            for sample in self._numbers[number].tolist():
                key = shard.keys[sample - int(self._starts[number])]
                if key in seen or not is_plain_key(key):
                    return False
                seen.add(key)
        return True

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

    def _keep_for_preview(self, label: int, contents: dict[str, bytes], where: str) -> None:
        kept = self.first_of_class.setdefault(label, [])
        if self._index.latents is None and label < ROWS and len(kept) < COLUMNS:
            try:
                extension = image_extension(contents)
            except BadSample as error:
                raise UserError(f"{where}: {error}") from error
            kept.append((extension, contents[extension]))
