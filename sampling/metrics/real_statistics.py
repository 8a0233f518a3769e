"""What is computed of real images in one feature network, in parts that any process may take.

It is kept in a cache folder, keyed by the data and the network. Neither the number of processes or threads, nor
the size of batches, is in it.

Shapes: N images, F features.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.crew.making import ALONE, Make
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.parts import Parts, Progress
from ditmoe.data.storage.together import together
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.model.randomness import permutation
from ditmoe.sampling.metrics.features import AT_ONCE, FeatureNetwork, describe, in_blocks
from ditmoe.sampling.metrics.floors import Floors, floors
from ditmoe.sampling.metrics.inception_score import SPLIT, SplitSums
from ditmoe.sampling.metrics.moments import Gaussian, Moments, MomentsSum
from ditmoe.sampling.metrics.reference import Images

KEPT_IMAGES: Final = 50_000
"""Real and drawn images, at most, that are compared one by one: by precision, recall and KID."""
CPU: Final = torch.device("cpu")
HALVES: Final = ("half_a", "half_b", "rest")
KINDS: Final = ("features", "spatial")
_VERSION: Final = 4
"""Raised whenever this file changes what is kept of real images."""


@dataclass(frozen=True)
class RealStatistics:
    """What is known of the real images in one feature network."""

    moments: dict[str, dict[str, Moments]]
    """Kind of feature → `half_a`, `half_b` and `rest` (the odd image of an uneven count)."""
    features_NF: NDArray[np.floating] | None
    """Features of up to KEPT_IMAGES images drawn at random, in a random order; None: of none is anything known."""
    left_out: LeftOut | None
    """Images that could not be used; None: no image was read."""
    stated: dict[str, Gaussian] = field(default_factory=dict)
    """Kind of feature → what is known of all images, where that of their halves is not."""
    missing: tuple[str, ...] = ()
    """Lines that say which figures cannot be computed, and why."""
    splits: SplitSums | None = None
    """Sums of the Inception Score of the images of `features_NF`; None: not known, or of a network without."""
    folder: Path | None = None
    """Where what is computed of `features_NF` is kept; None: nowhere."""
    numbers_N: NDArray[np.int64] | None = None
    """The image of each row of `features_NF`, by its number among the real images; None: not known."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features that are known."""
        return (*self.moments, *self.stated)

    def whole(self, kind: str) -> Moments | Gaussian:
        """The moments of all real images."""
        if kind in self.stated:
            return self.stated[kind]
        half_a, half_b, rest = (self.moments[kind][name] for name in HALVES)
        return half_a.merge(half_b).merge(rest)

    def halves(self, kind: str) -> tuple[Moments, Moments] | None:
        """The moments of two halves of the real images; None: they are not known."""
        found = self.moments.get(kind)
        return None if found is None else (found["half_a"], found["half_b"])

    def floors(self, images: int | None = None, device: torch.device = CPU) -> Floors:
        """The floors of the first `images` of `features_NF`, which must be known, or of all; computed once."""
        assert self.features_NF is not None
        return floors(self.features_NF[:images], self.folder, device)


def real_statistics(
    real: Images,
    network: FeatureNetwork,
    cache: Path,
    *,
    make: Make = ALONE,
    device: torch.device = CPU,
    on_progress: Progress = lambda done: None,
) -> RealStatistics:
    """Statistics of every real image; from the cache where they were computed before.

    Args:
        make: has what is computed of each part of them made, as the stage `real`.
        device: where sums are kept and products taken.

    Raises:
        UserError: a shard or a sample is damaged.
    """
    parts = parts_of_real(real, network, cache, device)
    make("real", parts, on_progress=on_progress)
    return parts.result()


def parts_of_real(
    real: Images, network: FeatureNetwork, cache: Path, device: torch.device
) -> Parts[Arrays, Arrays, RealStatistics]:
    """What `real_statistics` has made: a file for each part of the images."""
    folder = cache / f"real-{_VERSION}-{real.fingerprint}-{network.fingerprint}"
    names = [f"part-{part:02d}.npz" for part in range(real.parts)]
    return Parts(
        folder,
        names,
        lambda part: _part_statistics(real, part, [network], device)[0],
        write_arrays,
        lambda part: read_arrays(folder / names[part]),
        partial(_merged_statistics, real, folder),
    )


def parts_of_real_alike(
    real: Images, networks: Sequence[FeatureNetwork], cache: Path, device: torch.device
) -> AnyParts:
    """`parts_of_real` of several networks, each image of which is decoded once for all; their files stay apart."""
    digest = hashlib.sha256(" ".join(network.fingerprint for network in networks).encode()).hexdigest()[:16]
    return together(
        cache / f"together-{_VERSION}-{real.fingerprint}-{digest}",
        [parts_of_real(real, network, cache, device) for network in networks],
        lambda part, places: _part_statistics(real, part, [networks[place] for place in places], device),
    )


def _part_statistics(
    real: Images, part: int, networks: Sequence[FeatureNetwork], device: torch.device
) -> list[Arrays]:
    """What is known of a part's images in each of some networks."""
    place = np.empty(real.count, dtype=np.int64)
    place[permutation(0, "evaluate/halves", 0, real.count)] = np.arange(real.count)
    half = real.count // 2
    sums = [_PartSums(network, device) for network in networks]
    left_out = real.new_left_out()
    images = ((batch.image_NHWC, batch.number_N) for batch in real.read(part, AT_ONCE, left_out))
    for image_NHWC, number_N in in_blocks(images, AT_ONCE):
        place_N = place[number_N]
        half_N = np.minimum(place_N // max(half, 1), 2)
        for each in sums:
            each.add(image_NHWC, place_N, half_N)
    told = {"left_out": np.array(left_out.lines, dtype=np.str_), "left_out_count": np.array(left_out.count)}
    return [each.arrays() | told for each in sums]


class _PartSums:
    """Moments of a part's images by half, and the features of those among the first in the random order."""

    def __init__(self, network: FeatureNetwork, device: torch.device) -> None:
        self._network, self._device = network, device
        self._sums: dict[str, MomentsSum] = {}
        self._kept = [np.empty((0, network.dimension), dtype=np.float32)]
        self._kept_place = [np.empty(0, dtype=np.int64)]
        self._splits: SplitSums | None = None

    def add(self, image_NHWC: NDArray[np.uint8], place_N: NDArray[np.int64], half_N: NDArray[np.int64]) -> None:
        """Take some images, their places in the random order, and their halves."""
        described = describe(self._network, image_NHWC)
        for kind in KINDS:
            if kind not in described:
                continue
            for number, name in enumerate(HALVES):
                rows_NF = described[kind][half_N == number]
                key = f"{kind}/{name}"
                self._sums.setdefault(key, MomentsSum(rows_NF.shape[1], self._device)).add(rows_NF)
        is_kept_N = place_N < KEPT_IMAGES
        self._kept.append(described["features"][is_kept_N].astype(np.float32))
        self._kept_place.append(place_N[is_kept_N])
        if "probabilities" in described:
            split_N = place_N[is_kept_N] // SPLIT
            found = SplitSums.of(described["probabilities"][is_kept_N], split_N, KEPT_IMAGES // SPLIT)
            self._splits = found if self._splits is None else self._splits.merge(found)

    def arrays(self) -> Arrays:
        """What is kept of them."""
        arrays: Arrays = {"kept": np.concatenate(self._kept), "kept_place": np.concatenate(self._kept_place)}
        if self._splits is not None:
            arrays |= {f"splits/{name}": value for name, value in vars(self._splits).items()}
        for key, total in self._sums.items():
            value = total.moments()
            arrays |= {f"{key}/mean": value.mean_F, f"{key}/scatter": value.scatter_FF}
            arrays[f"{key}/count"] = np.array(value.count)
        return arrays


def _merged_statistics(real: Images, folder: Path, parts: Iterable[Arrays]) -> RealStatistics:
    """Merged in the order of the parts. UserError when too many images cannot be used."""
    left_out = real.new_left_out()
    moments: dict[str, dict[str, Moments]] = {}
    kept: list[NDArray[np.floating]] = []
    places: list[NDArray[np.int64]] = []
    splits: SplitSums | None = None
    for part in parts:
        kept.append(part["kept"])
        places.append(part["kept_place"])
        if "splits/count_S" in part:
            found_splits = SplitSums(**{name: part[f"splits/{name}"] for name in SplitSums.__annotations__})
            splits = found_splits if splits is None else splits.merge(found_splits)
        left_out.add_lines(int(part["left_out_count"]), part["left_out"].tolist())
        for kind in KINDS:
            for half in HALVES:
                key = f"{kind}/{half}"
                if f"{key}/mean" not in part:
                    continue
                found = Moments(int(part[f"{key}/count"]), part[f"{key}/mean"], part[f"{key}/scatter"])
                halves = moments.setdefault(kind, {})
                halves[half] = halves[half].merge(found) if half in halves else found
    if not moments:
        raise UserError(
            f"{real.where}: none of its {counted(real.count, 'image')} can be used; {left_out.lines[-1]}"
        )
    numbers_N = permutation(0, "evaluate/halves", 0, real.count)[np.sort(np.concatenate(places))]
    features_NF = _in_order(kept, places)
    return RealStatistics(moments, features_NF, left_out, splits=splits, folder=folder, numbers_N=numbers_N)


def _in_order(kept: list[NDArray[np.floating]], places: list[NDArray[np.int64]]) -> NDArray[np.floating]:
    """The features of all parts, by their places in the random order; the parts are let go one by one."""
    row_N = np.argsort(np.argsort(np.concatenate(places)))
    features_NF = np.empty((len(row_N), kept[0].shape[1]), dtype=np.float32)
    first = 0
    while kept:
        part_NF = kept.pop(0)
        features_NF[row_N[first : first + len(part_NF)]] = part_NF
        first += len(part_NF)
    return features_NF
