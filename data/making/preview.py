"""The contact sheet of a dataset: the first images of each class, a row per class, named."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from ditmoe.data.shards.decode import decode_image
from ditmoe.data.shards.images import ImageArray, to_pillow
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.storage.files import replacing

PREVIEW_FILE: Final = "preview.png"
ROWS: Final = 20
COLUMNS: Final = 8
CELL: Final = 64
"""Side of an image on the sheet in pixels; larger and smaller ones are scaled to it."""
GAP: Final = 4
TEXT: Final = 12
BACKGROUND: Final = (24, 24, 27)


def draw_contact_sheet(class_names: tuple[str, ...], images: dict[int, list[ImageArray]]) -> Image.Image:
    """The first COLUMNS `images` of each of the first ROWS classes.

    `images`: label → images, uint8 `[H, W, C]`; of one with other than 1 or 3 channels the first is shown.
    """
    names = [" ".join(name.split()) for name in class_names[:ROWS]]
    font = ImageFont.load_default(size=TEXT)
    label_width = min(max(int(font.getlength(name)) for name in names) + 2 * GAP, 3 * CELL)
    pitch = CELL + GAP
    sheet = Image.new("RGB", (label_width + COLUMNS * pitch + GAP, _height(len(names))), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(names):
        top = GAP + label * pitch
        draw.text((GAP, top + CELL // 2), name, fill=(230, 230, 230), font=font, anchor="lm")
        for column, image_HWC in enumerate(images.get(label, [])[:COLUMNS]):
            picture = to_pillow(image_HWC if image_HWC.shape[2] in (1, 3) else image_HWC[:, :, :1])
            # Small images show their pixels, large ones are scaled smoothly.
            small = picture.width <= CELL
            kernel = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((CELL, CELL), kernel), (label_width + column * pitch, top))
    return sheet


def _height(rows: int) -> int:
    return rows * (CELL + GAP) + GAP


def is_contact_sheet(path: Path, class_names: Sequence[str]) -> bool:
    """Whether a file is the contact sheet of a dataset with these classes, by its size and margin."""
    try:
        with Image.open(path, formats=("PNG",)) as sheet:
            if sheet.mode != "RGB" or sheet.height != _height(min(ROWS, len(class_names))):
                return False
            margin = sheet.crop((0, 0, sheet.width, GAP))
            return margin.getcolors(1) == [(GAP * sheet.width, BACKGROUND)]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def write_preview(folder: Path, index: DatasetIndex, images: Mapping[int, Sequence[tuple[str, bytes]]]) -> Path:
    """Draw the contact sheet of a packed folder; its path.

    `images`: label → (extension, bytes) of images that the index describes. BadSample when one cannot be decoded.
    """
    decoded = {
        label: [decode_image(extension, data, index) for extension, data in some] for label, some in images.items()
    }
    write_png(draw_contact_sheet(index.class_names, decoded), folder / PREVIEW_FILE)
    return folder / PREVIEW_FILE


def write_png(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    with replacing(path) as file:
        file.write(buffer.getvalue())
