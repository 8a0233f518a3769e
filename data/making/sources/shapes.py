"""Procedural colour images: one shape in one colour on a soft dark ground, drawn from a seed.

A class is a kind of shape in a colour: class c has kind c mod 10 and colour (c mod 10 + c div 10) mod 6, which
makes 60 classes, and gives the first ten different kinds in all colours. Image i is a function of (seed, i,
classes, size) alone.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.shards.images import to_array
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import generator

Polygon = NDArray[np.float64]
"""Corners `[P, 2]` (x right, y down) in units of the shape's radius."""


def _circle(radius: float = 1.0, x: float = 0.0) -> Polygon:
    angle_P = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return np.stack([x + radius * np.cos(angle_P), radius * np.sin(angle_P)], axis=1)


def _spokes(*radii: float) -> Polygon:
    """An outline whose corners have these radii in turn, clockwise, the first at the top."""
    angle_P = np.arange(len(radii)) * (2 * np.pi / len(radii)) - np.pi / 2
    radius_P = np.asarray(radii, dtype=np.float64)
    return np.stack([radius_P * np.cos(angle_P), radius_P * np.sin(angle_P)], axis=1)


def _corners(*points: tuple[float, float]) -> Polygon:
    return np.asarray(points, dtype=np.float64)


def _plus(arm: float) -> Polygon:
    quarter_P2 = _corners((arm, -1), (arm, -arm), (1, -arm))
    quarter_turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    return np.concatenate([quarter_P2 @ np.linalg.matrix_power(quarter_turn, turns).T for turns in range(4)])


def _heart() -> Polygon:
    t_P = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    y_P = 13 * np.cos(t_P) - 5 * np.cos(2 * t_P) - 2 * np.cos(3 * t_P) - np.cos(4 * t_P)
    return np.stack([np.sin(t_P) ** 3, -(y_P + 2.5) / 16], axis=1)


KINDS: Final[dict[str, tuple[Polygon, ...]]] = {
    "disc": (_circle(),),
    "square": (_corners((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),),
    "triangle": (_spokes(1, 1, 1),),
    "star": (_spokes(*(1.05, 0.42) * 5),),
    "plus": (_plus(0.34),),
    "ring": (_circle(), _circle(0.55)),
    "bar": (_corners((-1.05, -0.3), (1.05, -0.3), (1.05, 0.3), (-1.05, 0.3)),),
    "crescent": (_circle(), _circle(0.85, 0.5)),
    "heart": (_heart(),),
    "arrow": (_corners((-1, -0.27), (0, -0.27), (0, -0.8), (1.05, 0), (0, 0.8), (0, 0.27), (-1, 0.27)),),
}
"""Kind → its outline, and the outlines that are cut out of it."""

COLOURS: Final = {
    "red": (228, 38, 44),
    "green": (40, 190, 70),
    "blue": (60, 100, 250),
    "yellow": (245, 215, 50),
    "magenta": (225, 60, 215),
    "cyan": (60, 215, 225),
}
MOST_CLASSES: Final = len(KINDS) * len(COLOURS)
MIN_SIZE: Final = 8
SUPERSAMPLING: Final = 4
"""Outlines are drawn at this many times the size and averaged down, which smooths their edges."""


def class_parts(label: int) -> tuple[str, str]:
    """Colour and kind of a class."""
    kind = label % len(KINDS)
    return list(COLOURS)[(kind + label // len(KINDS)) % len(COLOURS)], list(KINDS)[kind]


class Shapes:
    """`count` RGB images, label i mod `classes`."""

    name = "shapes"
    channels: int | None = None

    def __init__(self, count: int, classes: int, image_size: int, seed: int) -> None:
        """UserError when the classes or the size cannot be drawn."""
        if not 1 <= classes <= MOST_CLASSES:
            raise UserError(f"--classes is {classes}, and `shapes` has 1 to {MOST_CLASSES}")
        if image_size < MIN_SIZE:
            raise UserError(f"--image-size is {image_size}, and `shapes` needs at least {MIN_SIZE}")
        if count < classes:
            raise UserError(f"--count is {count}, and {classes} classes need at least one image each")
        self.class_names = tuple(" ".join(class_parts(label)) for label in range(classes))
        self._count = count
        self._size = image_size
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> SourceImage:
        """Draw image `number`, uint8 `[size, size, 3]`."""
        label = number % len(self.class_names)
        colour, kind = class_parts(label)
        random = generator(self._seed, f"data/shapes/{len(self.class_names)}/{self._size}", number)
        radius = self._size * random.uniform(0.24, 0.36)
        centre_2 = self._size / 2 + (self._size / 2 - 1.1 * radius) * random.uniform(-0.9, 0.9, 2)
        angle = np.radians(random.uniform(-20, 20))
        rgb_3 = np.clip(np.asarray(COLOURS[colour]) * random.uniform(0.85, 1) + random.uniform(-10, 10, 3), 0, 255)

        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        outline, *holes = [(polygon_P2 * radius) @ turn.T + centre_2 for polygon_P2 in KINDS[kind]]
        cover_HW1 = self._coverage(outline, holes)
        image_HW3 = cover_HW1 * rgb_3 + (1 - cover_HW1) * self._ground(random)
        metadata = {"source": "shapes", "seed": self._seed, "number": number, "kind": kind, "colour": colour}
        return SourceImage(np.rint(image_HW3).astype(np.uint8), label, metadata)

    def _coverage(self, outline: Polygon, holes: list[Polygon]) -> NDArray[np.float64]:
        """Share of each pixel that the shape covers, `[size, size, 1]`."""
        large = self._size * SUPERSAMPLING
        mask = Image.new("L", (large, large))
        draw = ImageDraw.Draw(mask)
        for polygon_P2, value in [(outline, 255), *((hole, 0) for hole in holes)]:
            draw.polygon([(x, y) for x, y in (polygon_P2 * SUPERSAMPLING).tolist()], fill=value)
        return to_array(mask.resize((self._size, self._size), Image.Resampling.BOX)) / 255.0

    def _ground(self, random: np.random.Generator) -> NDArray[np.float64]:
        """A dark, nearly grey gradient in any direction, `[size, size, 3]`."""
        ends_23 = random.uniform(15, 95, (2, 1)) + random.uniform(-12, 12, (2, 3))
        direction = random.uniform(0, 2 * np.pi)
        axis = np.linspace(-0.5, 0.5, self._size)
        along_HW1 = (axis[None, :] * np.cos(direction) + axis[:, None] * np.sin(direction))[:, :, None]
        share_HW1 = along_HW1 / np.sqrt(2) + 0.5
        return np.asarray(ends_23[0] * (1 - share_HW1) + ends_23[1] * share_HW1)

    def remarks(self) -> list[str]:
        """None."""
        return []
