"""What networks say of images that others drew, part by part, until the figures are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.storage.arrays import Arrays
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.results import recognised
from ditmoe.sampling.metrics.classifier import Classifier
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions, described_alike, remove_alike
from ditmoe.sampling.metrics.features import AT_ONCE, FeatureNetwork, Features, describe, in_blocks
from ditmoe.sampling.metrics.reference import Images

DESCRIBED_TOGETHER: Final = 4096
"""Images of a part, at most: so many of their features are in memory at once."""


class DescribedImages(NamedTuple):
    """What is said of each part of the images."""

    of_features: list[ChunkDescriptions]
    judged: ChunkDescriptions | None
    """`label` and `predicted`; None: nobody was asked."""
    lost: ChunkDescriptions
    """`count` and `lines`: of images that cannot be used."""
    parts: AnyParts
    """Make all of it, in one pass over the images."""

    def remove(self) -> None:
        """Delete the files."""
        remove_alike([*self.of_features, *([] if self.judged is None else [self.judged]), self.lost])


def described_images(
    images: Images,
    folder: Path,
    channels: int | None,
    networks: Sequence[FeatureNetwork],
    recogniser: Classifier | None,
) -> DescribedImages:
    """What networks say of each part of some images.

    Args:
        folder: of the folders of the files.
        channels: that classifiers take.
    """
    parts = max(images.parts, images.parts_of(DESCRIBED_TOGETHER))
    names = [network.fingerprint for network in networks]
    names += [] if recogniser is None else [f"{recogniser.fingerprint}-labels"]
    names.append("left-out")

    def describe_part(part: int, places: Sequence[int]) -> list[Arrays]:
        asked = [networks[place] if place < len(networks) else None for place in places]
        found = _describe_part(
            images,
            part,
            parts,
            channels,
            [network for network in asked if network is not None],
            recogniser if recogniser is not None and len(networks) in places else None,
        )
        of_networks, judged, lost = iter(found[0]), found[1], found[2]
        last = len(names) - 1
        return [
            lost if place == last else next(of_networks) if place < len(networks) else judged for place in places
        ]

    def described_by(place: int) -> ChunkDescriptions:
        return ChunkDescriptions(
            folder / f"{images.fingerprint}-{names[place]}-{parts}",
            [f"part-{part:05d}.npz" for part in range(parts)],
            lambda part: describe_part(part, [place])[0],
        )

    each = [described_by(place) for place in range(len(names))]
    judged = None if recogniser is None else each[len(networks)]
    return DescribedImages(each[: len(networks)], judged, each[-1], described_alike(each, describe_part))


def left_out_of(images: Images, lost: ChunkDescriptions) -> LeftOut:
    """Which images cannot be used. UserError when these are too many, or all."""
    left_out = images.new_left_out()
    for part in lost.read_all():
        left_out.add_lines(int(part["count"]), part["lines"].tolist())
    if left_out.count >= images.count:
        raise UserError(f"{images.where}: none of its images can be used; {left_out.lines[-1]}")
    return left_out


def share_recognised(described: DescribedImages, recogniser: Classifier) -> dict[str, Any]:
    """`recognised` of images with labels."""
    assert described.judged is not None
    classes = int(recogniser.state()["head.weight"].shape[0])
    right_K, of_class_K = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for part in described.judged.read_all():
        label_N = part["label"]
        of_class_K += np.bincount(label_N, minlength=classes)
        right_K += np.bincount(label_N[part["predicted"] == label_N], minlength=classes)
    return recognised(right_K, of_class_K, recogniser)


def _describe_part(
    images: Images,
    part: int,
    parts: int,
    channels: int | None,
    networks: Sequence[FeatureNetwork],
    recogniser: Classifier | None,
) -> tuple[list[Arrays], Arrays, Arrays]:
    """What each network and the recogniser say of a part's images, which are read once; and what is lost."""
    found: list[list[Features]] = [[] for _ in networks]
    judged: list[Arrays] = []
    left_out = images.new_left_out()
    batches = images.read(part, AT_ONCE, left_out, of=parts)
    for image_NHWC, label_N in in_blocks(((each.image_NHWC, each.label_N) for each in batches), AT_ONCE):
        # A classifier takes the channels that it was trained on; Inception takes grey and RGB.
        for described, network in zip(found, networks, strict=True):
            fit = channels if isinstance(network, Classifier) else None
            described.append(describe(network, _of_channels(image_NHWC, fit, images)))
        if recogniser is not None:
            predicted_N = recogniser.predict(_of_channels(image_NHWC, channels, images))
            judged.append({"label": label_N, "predicted": predicted_N})
    lost: Arrays = {"count": np.array(left_out.count), "lines": np.array(left_out.lines, dtype=np.str_)}
    return [_joined(described) for described in found], _joined(judged), lost


def _joined(found: Sequence[Arrays]) -> Arrays:
    """Nothing where there is no image."""
    return {key: np.concatenate([some[key] for some in found]) for key in found[0]} if found else {}


def _of_channels(image_NHWC: NDArray[np.uint8], channels: int | None, images: Images) -> NDArray[np.uint8]:
    """Grey images as three equal channels, or the other way. UserError where colour would be lost."""
    if channels in (None, image_NHWC.shape[3]):
        return image_NHWC
    if channels == 3:
        return np.repeat(image_NHWC, 3, axis=3)
    if (image_NHWC != image_NHWC[..., :1]).any():
        raise UserError(f"{images.where}: has images in colour; expected grey ones, as the real images are")
    return np.ascontiguousarray(image_NHWC[..., :1])
