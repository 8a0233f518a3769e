"""Filtering: the samples of a dataset with the best scores, class by class, copied as they are into new shards."""

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.making.copying import SampleCopy
from ditmoe.data.making.ownership import claimed
from ditmoe.data.making.preview import write_preview
from ditmoe.data.shards.index import DatasetIndex, check_files, load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, read_table, write_table
from ditmoe.data.shards.writer import ShardLimits, write_shards
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
    copy = SampleCopy(folder, index, chosen, kept.label_N, "filtering")
    name = settings.name or f"{index.name}-filtered"
    file_name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "dataset"
    sources = [folder, index_folder, *(folder / entry.file for entry in index.shards)]  # shards may be links
    with claimed(out, file_name, settings.overwrite, copy.samples(), sources) as place:
        entries = write_shards(place.folder, file_name, place.samples, settings.limits)
        new = index.model_copy(
            update={
                "name": name,
                "samples": write_table(place.folder, kept),
                "shards": tuple(entries),
                "left_out": (),
            }
        )
        if index.latents is None:
            write_preview(place.folder, new, copy.first_of_class)
        write_index(place.folder, new)
    return FilterResult(new, figures)
