"""Real images for the gallery: some of each class, and those that are nearest to drawn ones.

Shapes: N images, F features, K neighbours.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
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
MOST_FETCHED: Final = 512 << 20
"""Bytes of shards that are fetched for the gallery from where the real images lie, at most."""
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
    """Why there are none, or not all; None: there are."""


def real_side(
    real: Reference, statistics: RealStatistics, descriptions: ChunkDescriptions, sheets: Sheets
) -> RealSide:
    """What is shown of the real images; an image that cannot be read is not.

    Args:
        statistics: of them, in the network of `descriptions`.
    """
    images = real.images if isinstance(real, ReferenceStatistics) else real
    if not isinstance(images, Images) or statistics.features_NF is None or statistics.numbers_N is None:
        return _none(
            "The reference is a file of statistics without the images that it is of: neither they nor those that "
            "are nearest to drawn images can be shown."
        )
    if not _same_size(images, sheets):
        return _none("The real images are of another size.")
    try:
        compared = _compared(statistics.features_NF, statistics.numbers_N, descriptions, sheets)
        near, told = _within_reach(images, compared)
        numbers = {each.number for one in near for each in one.neighbours}
        several = _Classes(images, statistics, sheets)
        found = pick(images, sorted(numbers | several.wanted(numbers)))
        of_class = several.of_class(found)
    except UserError as error:
        return _none(f"The real images could not be read: {error}")
    classes = images.form.class_names == sheets.class_names
    pictures = {number: (image_HWC, label if classes else -1) for number, (image_HWC, label) in found.items()}
    return RealSide(of_class, near, pictures, told)


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


def _within_reach(images: Images, compared: list[Compared]) -> tuple[list[Compared], str | None]:
    """Those whose neighbours may be read, and why not all; of shards elsewhere few are fetched."""
    if not (isinstance(images, ReferenceImages) and images.source.place.remote):
        return compared, None
    fetched: set[int] = set()
    near = []
    for one in compared:
        together = fetched | set(_shards_of(images, [each.number for each in one.neighbours]).tolist())
        if sum(images.index.shards[shard].bytes for shard in together) <= MOST_FETCHED:
            fetched = together
            near.append(one)
    if len(near) == len(compared):
        return near, None
    most = f"{MOST_FETCHED >> 20} MiB of their shards are fetched for this page"
    if not near:
        return [], f"The real images lie elsewhere, and at most {most}: too little for any."
    return near, (
        f"The real images lie elsewhere, and at most {most}: the nearest ones are shown for {len(near)} of "
        f"{len(compared)} drawn images."
    )


class _Classes:
    """Up to `OF_CLASS` of each class at random, kept with the statistics; under −1 where they have no class."""

    def __init__(self, images: Images, statistics: RealStatistics, sheets: Sheets) -> None:
        assert statistics.numbers_N is not None
        self._images, self._sheets, self._number_N = images, sheets, statistics.numbers_N
        self._classes = len(sheets.class_names) if images.form.class_names == sheets.class_names else 1
        folder = statistics.folder
        self._path = None if folder is None else folder / f"gallery-{_FORM}-{self._classes}.npz"
        self._wanted: list[int] = []

    def wanted(self, beside: set[int]) -> set[int]:
        """Numbers of the images that must be read for them; none where they are kept.

        Args:
            beside: images that are read anyway; of images elsewhere none but those of the same shards are read.
        """
        if self._path is not None and self._path.exists():
            return set()
        images, classes = self._images, self._classes
        number_N = self._number_N
        if isinstance(images, ReferenceImages) and images.source.place.remote:
            fetched = np.unique(_shards_of(images, sorted(beside)))
            number_N = number_N[np.isin(_shards_of(images, number_N), fetched)]
        size = next(each[0] for each in self._sheets.images if each).image_HWC.size
        most = min(3 * OF_CLASS * classes if classes > 1 else MOST_UNSORTED, _MOST_READ, _BYTES // size)
        self._wanted = sorted(number_N[:most].tolist())
        return set(self._wanted)

    def of_class(self, found: Mapping[int, tuple[NDArray[np.uint8], int]]) -> dict[int, list[NDArray[np.uint8]]]:
        """By label, from the images that were read, or kept."""
        if self._path is not None and self._path.exists():
            return self._read(self._path)
        kept: dict[int, list[NDArray[np.uint8]]] = {}
        for number in self._wanted:
            if number in found:
                image_HWC, label = found[number]
                of_class = kept.setdefault(label if self._classes > 1 else -1, [])
                if len(of_class) < (OF_CLASS if self._classes > 1 else MOST_UNSORTED):
                    of_class.append(image_HWC)
        if self._path is not None and kept:
            labels = [label for label, of_class in kept.items() for _ in of_class]
            stacked = np.stack([image_HWC for of_class in kept.values() for image_HWC in of_class])
            with replacing(self._path) as file:
                write_arrays({"images": stacked, "labels": np.array(labels, np.int64)}, file)
        return kept

    @staticmethod
    def _read(path: Path) -> dict[int, list[NDArray[np.uint8]]]:
        arrays = read_arrays(path)
        by_label: dict[int, list[NDArray[np.uint8]]] = {}
        for image_HWC, label in zip(arrays["images"], arrays["labels"].tolist(), strict=True):
            by_label.setdefault(label, []).append(image_HWC)
        return by_label


def _shards_of(images: ReferenceImages, numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The shard that each image lies in."""
    return np.searchsorted(np.cumsum([0, *map(len, images.members)]), numbers, side="right") - 1


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
    numbers = sorted(wanted)
    for number, shard in zip(numbers, _shards_of(images, numbers).tolist(), strict=True):
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
