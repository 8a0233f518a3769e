"""From drawn images to files: one of all of them, or one for each; still or moving; with or without text.

Shapes: N images, F frames.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditmoe.data.shards.images import to_pillow
from ditmoe.launcher.commands.pictures.choice import ranges
from ditmoe.launcher.commands.pictures.naming import facts_of, image_name
from ditmoe.sampling.drawing.files import ARRAYS, Target, save_animation, save_arrays, save_still
from ditmoe.sampling.drawing.generate import Generated
from ditmoe.sampling.drawing.picture import image_grid
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.settings.config import SamplerConfig

USUAL_COLUMNS = 8


class Drawn(NamedTuple):
    """Images, and what they are."""

    model: LoadedModel
    weights: str
    config: SamplerConfig
    """Resolved."""
    images: Generated
    labels: list[int]
    seeds: list[int]
    numbers: list[int]


class Looks(NamedTuple):
    """How pictures are laid out."""

    columns: int | None
    """None: one for each class, or `USUAL_COLUMNS`."""
    labels: bool | None
    """Text under each image, or none at all; None: the classes over the columns."""
    seconds: float
    fps: float
    classes: int
    """How many there are; the images take them in turn."""
    seeds: list[int] | None
    """Those that all classes are drawn with; None: one."""


def file_names(
    target: Target,
    class_names: Sequence[str],
    labels: Sequence[int],
    seeds: Sequence[int],
    numbers: Sequence[int],
) -> list[Path]:
    """The files that will be written: one for each image, or one."""
    if not target.single:
        return [target.path]
    if target.extension in ARRAYS:
        return [target.path / f"images.{target.extension}"]
    return [
        target.path / image_name(label, class_names[label], seed, number, target.extension)
        for label, seed, number in zip(labels, seeds, numbers, strict=True)
    ]


def write_images(target: Target, paths: Sequence[Path], drawn: Drawn, looks: Looks, *, overwrite: bool) -> None:
    """Write all files.

    Args:
        paths: as `file_names` says.

    Raises:
        UserError: one cannot be written, or is there and not to be written over.
    """
    count = len(drawn.labels)
    if target.extension in ARRAYS:
        save_arrays(
            paths[0],
            drawn.images.image_NHWC.numpy(),
            np.array(drawn.labels, np.int64),
            np.array(drawn.seeds, np.int64),
            _facts(drawn, range(count)),
            overwrite=overwrite,
        )
        return
    rows_of = [[image] for image in range(count)] if target.single else [list(range(count))]
    for path, rows in zip(paths, rows_of, strict=True):
        shown = drawn.images.frames_NFHWC if target.moves else drawn.images.image_NHWC[:, None]
        assert shown is not None
        pictures = [
            # A file of one image has the image's own pixels.
            to_pillow(image_NHWC[0])
            if target.single and not looks.labels
            else _grid(image_NHWC, drawn, looks, rows)
            for image_NHWC in shown[rows].transpose(0, 1).numpy()
        ]
        facts = _facts(drawn, rows)
        if target.moves:
            save_animation(pictures, path, looks.seconds, looks.fps, facts, overwrite=overwrite)
        else:
            save_still(pictures[0], path, facts, overwrite=overwrite)


def _grid(image_NHWC: NDArray[np.uint8], drawn: Drawn, looks: Looks, rows: Sequence[int]) -> Image.Image:
    """Images in rows and columns, with text as asked for."""
    usual = min(looks.classes, len(rows)) if looks.classes > 1 else min(len(rows), USUAL_COLUMNS)
    columns = min(looks.columns or usual, len(rows))
    named = [drawn.model.class_names[drawn.labels[row]] for row in rows]
    if looks.labels:
        numbered = (looks.seeds is None and len(drawn.labels) > 1) or _many_of_a_seed(drawn, looks)
        places = [f"seed {drawn.seeds[row]}" + f", {drawn.numbers[row]}" * numbered for row in rows]
        captions = [f"{name}\n{place}" for name, place in zip(named, places, strict=True)]
        return image_grid(image_NHWC, columns, captions=captions)
    if looks.labels is False or looks.classes == 1:
        return image_grid(image_NHWC, columns)
    if columns != usual:
        return image_grid(image_NHWC, columns, captions=named)
    many, firsts = _many_of_a_seed(drawn, looks), rows[::columns]
    of_rows = [f"seed {drawn.seeds[row]}" + f", {drawn.numbers[row]}" * many for row in firsts]
    if looks.seeds is None or (len(looks.seeds) == 1 and not many):
        of_rows = []
    return image_grid(image_NHWC, columns, named[:columns], of_rows)


def _many_of_a_seed(drawn: Drawn, looks: Looks) -> bool:
    """Whether seeds that were asked for have several images of a class each, as chains may have."""
    return looks.seeds is not None and any(drawn.numbers)


def _facts(drawn: Drawn, images: Sequence[int]) -> dict[str, Any]:
    facts = facts_of(
        drawn.model,
        drawn.weights,
        drawn.config,
        [drawn.labels[image] for image in images],
        [drawn.seeds[image] for image in images],
        drawn.images.nfe,
    )
    numbers = [drawn.numbers[image] for image in images]
    return facts | {"image": ranges(sorted(numbers))}
