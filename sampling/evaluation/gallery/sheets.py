"""Images of each class for the gallery, and sheets of them.

Shapes: N images, F features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST_IMAGES: Final = 24
"""Images on a sheet."""
MEMORY: Final = 1 << 30
"""Bytes that the images of all sheets may take; with many classes of large images the sheets have fewer."""
GAP: Final = 2
_SMALL_COLUMNS: Final = 6
_LARGE_COLUMNS: Final = 4
_LARGE: Final = 96
"""Side in pixels from which a sheet has fewer columns: on a phone an image is then a quarter of the screen."""
_SMALLEST: Final = 48
"""Side in pixels below which images are shown enlarged, by a whole factor."""


@dataclass(frozen=True)
class Shown:
    """A drawn image, and where what networks say of it stands."""

    image_HWC: NDArray[np.uint8]
    chunk: int
    row: int
    """Among the images of the chunk."""


class Sheets:
    """The first images of each class, as they come."""

    def __init__(self, class_names: Sequence[str], image_size: int, channels: int) -> None:
        self.class_names = tuple(class_names)
        room = MEMORY // (len(class_names) * image_size * image_size * channels)
        self.per_class = max(1, min(MOST_IMAGES, room))
        self.images: list[list[Shown]] = [[] for _ in class_names]
        """By label."""

    def add(self, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64], chunk: int = 0) -> None:
        """Take what is still wanted of a chunk's images."""
        for row, (image_HWC, label) in enumerate(zip(image_NHWC, label_N, strict=True)):
            images = self.images[label]
            if len(images) < self.per_class:
                images.append(Shown(image_HWC.copy(), chunk, row))

    def sheet(self, label: int) -> Image.Image | None:
        """The images of a class side by side; None when there are none."""
        return sheet_of([shown.image_HWC for shown in self.images[label]])

    def some(self, most: int) -> list[tuple[int, Shown]]:
        """Label and image of up to `most` of them, as many of each class, or of classes spread over all."""
        there = [label for label, images in enumerate(self.images) if images]
        chosen = [there[place * len(there) // min(most, len(there))] for place in range(min(most, len(there)))]
        each = max(1, most // max(1, len(there)))
        return [(label, shown) for label in chosen for shown in self.images[label][:each]]


def sheet_of(images: Sequence[NDArray[np.uint8]], columns: int | None = None) -> Image.Image | None:
    """Images `[H, W, C]` in rows, small ones enlarged; None when there are none.

    Args:
        columns: None: as fit on the screen of a phone.
    """
    if not images:
        return None
    height, width, channels = images[0].shape
    factor = max(1, math.ceil(_SMALLEST / width))
    usual = _LARGE_COLUMNS if width >= _LARGE else _SMALL_COLUMNS
    columns = min(columns or usual, len(images))
    rows = math.ceil(len(images) / columns)
    step_y, step_x = height * factor + GAP, width * factor + GAP
    shape = (rows * step_y - GAP, columns * step_x - GAP)
    canvas = np.zeros((*shape, channels), dtype=np.uint8)
    opaque = np.zeros(shape, dtype=np.uint8)
    for i, image_HWC in enumerate(images):
        top, left = i // columns * step_y, i % columns * step_x
        cell = (slice(top, top + height * factor), slice(left, left + width * factor))
        canvas[cell] = image_HWC.repeat(factor, axis=0).repeat(factor, axis=1)
        opaque[cell] = 255
    # Nothing between the images, so that they stand on a dark page as well as on a light one.
    return Image.fromarray(np.dstack((canvas, opaque)), "LA" if channels == 1 else "RGBA")
