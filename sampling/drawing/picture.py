"""A picture of many images: a grid with captions, small images enlarged so that a person can see them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ditmoe.data.shards.images import BadImage, to_pillow
from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.model.errors import UserError

SEEN_SIZE: Final = 64
"""Images are enlarged by whole factors to at least this many pixels."""
CAPTION_WIDTH: Final = 96
"""The same for images with a caption of their own, so that it has room."""
_GAP: Final = 2
_FONT_SIZE: Final = 12
_CAPTION_HEIGHT: Final = 18
_LINE_HEIGHT: Final = 15
_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def image_grid(
    images_NHWC: NDArray[np.uint8],
    columns: int,
    column_captions: Sequence[str] = (),
    row_captions: Sequence[str] = (),
    scale: int | None = None,
    *,
    captions: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Lay images out row by row.

    Args:
        images_NHWC: at least one image of 1 (grey) or 3 (RGB) channels.
        columns: images in a row; cells after the last image stay empty.
        column_captions: a caption over each column, cut to its width; or none.
        row_captions: a caption left of each row; or none.
        scale: whole factor of enlargement (nearest neighbour); None: up to `SEEN_SIZE` pixels or more, or up to
            `CAPTION_WIDTH` where images have captions.
        captions: a caption under each image, of as many lines as it has, each cut to the image's width; or none.
        title: a line over everything, cut to the picture's width; or none.

    Raises:
        UserError: the images have another number of channels.
    """
    count, height, width, _ = images_NHWC.shape
    rows = math.ceil(count / columns)
    assert count > 0 and len(column_captions) in (0, columns) and len(row_captions) in (0, rows)
    assert len(captions) in (0, count)
    seen = CAPTION_WIDTH if captions else SEEN_SIZE
    scale = max(1, math.ceil(seen / min(height, width))) if scale is None else scale
    below = _LINE_HEIGHT * max((len(caption.splitlines()) for caption in captions), default=0)
    cell_width, cell_height = width * scale + _GAP, height * scale + _GAP + (below + _GAP if below else 0)
    font = ImageFont.load_default(_FONT_SIZE)
    left = _GAP + (math.ceil(max(map(font.getlength, row_captions))) + 2 * _GAP if row_captions else 0)
    over = _CAPTION_HEIGHT if title else 0
    top = _GAP + over + (_CAPTION_HEIGHT if column_captions else 0)
    picture = Image.new("RGB", (left + columns * cell_width, top + rows * cell_height), _PAPER)
    pen = ImageDraw.Draw(picture)
    for number, image_HWC in enumerate(images_NHWC):
        row, column = divmod(number, columns)
        try:
            cell = to_pillow(image_HWC).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        except BadImage as error:
            raise UserError(f"no picture can be made of these samples: {error}") from error
        x, y = left + column * cell_width, top + row * cell_height
        picture.paste(cell, (x, y))
        for line, text in enumerate(captions[number].splitlines() if captions else ()):
            middle = (x + width * scale / 2, y + height * scale + _GAP + (line + 0.5) * _LINE_HEIGHT)
            pen.text(middle, _fit(text, font, width * scale), _INK, font, anchor="mm")
    if title:
        pen.text((_GAP, over / 2), _fit(title, font, picture.width - 2 * _GAP), _INK, font, anchor="lm")
    for column, caption in enumerate(column_captions):
        middle = (left + column * cell_width + (cell_width - _GAP) / 2, over + (top - over) / 2)
        pen.text(middle, _fit(caption, font, cell_width - _GAP), _INK, font, anchor="mm")
    for row, caption in enumerate(row_captions):
        pen.text((_GAP, top + (row + 0.5) * cell_height), caption, _INK, font, anchor="lm")
    return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; the folder is made.

    Raises:
        UserError: the file cannot be written.
    """
    make_folder(path.parent)
    with replacing(path) as file:
        picture.save(file, format="PNG")


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
