"""Real images for the gallery: some of each class, and those that are nearest to drawn ones.

Shapes: N images, F features, K neighbours.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.storage.arrays import read_arrays, write_arrays
from ditmoe.data.storage.files import replacing
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.gallery.sheets import Sheets
from ditmoe.sampling.metrics.decoding import ReferenceBatch, decode_samples, read_undecoded
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions
from ditmoe.sampling.metrics.features import AT_ONCE
from ditmoe.sampling.metrics.neighbours import nearest
from ditmoe.sampling.metrics.real_statistics import RealStatistics
from ditmoe.sampling.metrics.reference import Images, Reference, ReferenceImages
from ditmoe.sampling.metrics.references.image_sets import ImageSet
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics

OF_CLASS: Final = 12
"""Real images of a class beside the drawn ones."""
MOST_UNSORTED: Final = 24
"""Real images that are shown where they have no classes, or others."""
NEIGHBOURS: Final = 3
"""Real images that are shown for a drawn one."""
COMPARED: Final = 24
"""Drawn images whose neighbours are shown."""
NEIGHBOURS_FILE: Final = "neighbours.json"
_MOST_READ: Final = 4096
_BYTES: Final = 256 << 20
"""Real images that are looked at for some of each class, and the bytes that they may take."""
_FORM: Final = 1
"""Of the file that keeps them; raised when it changes."""


class Neighbour(NamedTuple):
    """A real image near a drawn one."""

    number: int
    """Among the real images."""
    distance: float
    """Euclidean, in the features of the network."""
    own: float
    """The distance of this real image to its own nearest other real image."""


class Compared(NamedTuple):
    """A drawn image and its nearest real ones, the nearest first."""

    label: int
    drawn_HWC: NDArray[np.uint8]
    neighbours: tuple[Neighbour, ...]


class RealSide(NamedTuple):
    """What the gallery shows of the real images."""

    of_class: dict[int, list[NDArray[np.uint8]]]
    """By label; under −1 images that have no class of the drawn ones."""
    compared: list[Compared]
    pictures: dict[int, tuple[NDArray[np.uint8], int]]
    """Number of each neighbour → image, and its label or −1."""
    told: str | None
    """Why there are none; None: there are."""


def real_side(
    real: Reference, statistics: RealStatistics, descriptions: ChunkDescriptions, sheets: Sheets
) -> RealSide:
    """What is shown of the real images; an image that cannot be read is not.

    Args:
        statistics: of them, in the network of `descriptions`.
    """
    images = real.images if isinstance(real, ReferenceStatistics) else real
    if not isinstance(images, Images) or statistics.features_NF is None or statistics.numbers_N is None:
        return _none("It was compared with statistics of real images; the images themselves are not there.")
    if isinstance(images, ReferenceImages) and images.source.place.remote:
        return _none("The real images lie elsewhere, and whole shards would have to be fetched for a few of them.")
    if not _same_size(images, sheets):
        return _none("The real images are of another size.")
    try:
        compared = _compared(statistics.features_NF, statistics.numbers_N, descriptions, sheets)
        numbers = sorted({each.number for one in compared for each in one.neighbours})
        found = pick(images, numbers)
        of_class = _some_of_each_class(images, statistics, sheets)
    except UserError as error:
        return _none(f"The real images could not be read: {error}")
    classes = images.form.class_names == sheets.class_names
    pictures = {number: (image_HWC, label if classes else -1) for number, (image_HWC, label) in found.items()}
    return RealSide(of_class, compared, pictures, None)


def _none(told: str) -> RealSide:
    return RealSide({}, [], {}, told)


def _same_size(images: Images, sheets: Sheets) -> bool:
    shown = next((each[0] for each in sheets.images if each), None)
    return shown is not None and images.form.image_size in (None, shown.image_HWC.shape[0])


def _compared(
    features_NF: NDArray[np.floating],
    number_N: NDArray[np.int64],
    descriptions: ChunkDescriptions,
    sheets: Sheets,
) -> list[Compared]:
    """The neighbours of some of the drawn images."""
    chosen = sheets.some(COMPARED)
    k = min(NEIGHBOURS, len(features_NF))
    if not chosen or not k:
        return []
    said = {chunk: descriptions.read(chunk)["features"] for chunk in {shown.chunk for _, shown in chosen}}
    drawn_MF = np.stack([said[shown.chunk][shown.row] for _, shown in chosen])
    distance_MK, row_MK = nearest(drawn_MF, features_NF, k)
    rows = np.unique(row_MK)
    # Of each real one its nearest, but for itself.
    own_RK, other_RK = nearest(features_NF[rows], features_NF, min(2, len(features_NF)))
    own_of = {
        int(row): float(own_K[other_K != row][0]) if (other_K != row).any() else float("inf")
        for row, own_K, other_K in zip(rows, own_RK, other_RK, strict=True)
    }
    return [
        Compared(
            label,
            shown.image_HWC,
            tuple(
                Neighbour(int(number_N[row]), float(distance), own_of[int(row)])
                for distance, row in zip(distance_K, row_K, strict=True)
            ),
        )
        for (label, shown), distance_K, row_K in zip(chosen, distance_MK, row_MK, strict=True)
    ]


def _some_of_each_class(
    images: Images, statistics: RealStatistics, sheets: Sheets
) -> dict[int, list[NDArray[np.uint8]]]:
    """Up to `OF_CLASS` of each class at random, kept with the statistics; under −1 where they have no class."""
    assert statistics.numbers_N is not None
    classes = len(sheets.class_names) if images.form.class_names == sheets.class_names else 1
    path = None if statistics.folder is None else statistics.folder / f"gallery-{_FORM}-{classes}.npz"
    if path is None or not path.exists():
        size = next(each[0] for each in sheets.images if each).image_HWC.size
        wanted = min(3 * OF_CLASS * classes if classes > 1 else MOST_UNSORTED, _MOST_READ, _BYTES // size)
        found = pick(images, sorted(statistics.numbers_N[:wanted].tolist()))
        kept: dict[int, list[NDArray[np.uint8]]] = {}
        for image_HWC, label in found.values():
            of_class = kept.setdefault(label if classes > 1 else -1, [])
            if len(of_class) < (OF_CLASS if classes > 1 else MOST_UNSORTED):
                of_class.append(image_HWC)
        if path is None or not kept:
            return kept
        labels = [label for label, of_class in kept.items() for _ in of_class]
        stacked = np.stack([image_HWC for of_class in kept.values() for image_HWC in of_class])
        with replacing(path) as file:
            write_arrays({"images": stacked, "labels": np.array(labels, np.int64)}, file)
    arrays = read_arrays(path)
    by_label: dict[int, list[NDArray[np.uint8]]] = {}
    for image_HWC, label in zip(arrays["images"], arrays["labels"].tolist(), strict=True):
        by_label.setdefault(label, []).append(image_HWC)
    return by_label


def pick(images: Images, numbers: Sequence[int]) -> dict[int, tuple[NDArray[np.uint8], int]]:
    """Some real images by their numbers, each with its label: only what they lie in is read.

    Images that cannot be read are not among them.
    """
    wanted = set(numbers)
    found = {}
    for batch in _batches(images, wanted):
        for image_HWC, label, number in zip(batch.image_NHWC, batch.label_N, batch.number_N, strict=True):
            if int(number) in wanted:
                found[int(number)] = (image_HWC.copy(), int(label))
        if len(found) == len(wanted):
            break
    return found


def _batches(images: Images, wanted: set[int]) -> Iterator[ReferenceBatch]:
    """Images among which are those that are wanted."""
    if isinstance(images, ReferenceImages):
        yield from _of_shards(images, wanted)
        return
    parts = images.parts_of(AT_ONCE)
    for part in range(parts):
        if not isinstance(images, ImageSet) or not wanted.isdisjoint(images.numbers(part, parts)):
            yield from images.read(part, AT_ONCE, of=parts)


def _of_shards(images: ReferenceImages, wanted: set[int]) -> Iterator[ReferenceBatch]:
    """Those that are wanted, and no others, shard by shard."""
    starts = np.cumsum([0, *map(len, images.members)])
    rows_of: dict[int, list[int]] = {}
    for number in sorted(wanted):
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        rows_of.setdefault(shard, []).append(number)
    for place, opened in images.source.shards(list(rows_of)):
        if isinstance(opened, ShardFault):
            continue
        samples = [
            read_undecoded(opened, int(images.members[place][number - int(starts[place])]), images.index, number)
            for number in rows_of[place]
        ]
        batch, _ = decode_samples(images.index, images.selection, samples)
        if batch is not None:
            yield batch


def write_neighbours(folder: Path, compared: Sequence[Compared], network: str) -> None:
    """What the pictures show, as JSON."""
    told: list[dict[str, Any]] = [
        {
            "class": one.label,
            "nearest": [
                {"real": each.number, "distance": each.distance, "its_own_nearest": _finite(each.own)}
                for each in one.neighbours
            ],
        }
        for one in compared
    ]
    with replacing(folder / NEIGHBOURS_FILE) as file:
        file.write(json.dumps({"network": network, "drawn": told}, indent=1).encode() + b"\n")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
