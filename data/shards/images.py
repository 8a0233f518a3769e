"""Images as arrays: opening files from strangers, the ADM centre crop, and the network's range of values."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageArray = NDArray[np.uint8]
"""uint8 `[H, W, C]`."""

MAX_PIXELS: Final = 89_478_485
"""An image that claims more pixels (a quarter of a GiB as RGB) is taken for a decompression bomb."""


class BadImage(ValueError):
    """An image that cannot be used; the text says why, and the caller adds where it lies."""


def open_image(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    """Read the header of an image in one of Pillow's `formats`. The pixels are not decoded yet.

    BadImage when it is in no such format, or claims more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"too many pixels, taken for a decompression bomb (limit {MAX_PIXELS:,})") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"not a readable {' or '.join(formats)} image") from error
    except MemoryError:  # says nothing of the image
        raise
    except Exception as error:  # Pillow's parsers raise many types on bytes that are not an image
        raise BadImage(f"not a readable {' or '.join(formats)} image ({describe(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(
            f"{image.width}×{image.height} pixels, taken for a decompression bomb (limit {MAX_PIXELS:,})"
        )
    return image


def load_pixels(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened image. BadImage when the bytes are damaged or end early."""
    with blaming_bytes(BadImage, "undecodable image"):
        image.load()
    return image


@contextmanager
def blaming_bytes(wrong: type[Exception], what: str) -> Iterator[None]:
    """Raise `wrong` for what a parser raises on odd bytes: nearly anything; short memory is another thing."""
    try:
        yield
    except (wrong, MemoryError):
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise wrong(f"{what}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """An exception's text, or its type where it has none."""
    return str(error) or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says. BadImage when that cannot be read, so that how it lies is not known."""
    with blaming_bytes(BadImage, "damaged EXIF data"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(image)


def photograph_to_rgb(image: Image.Image) -> Image.Image:
    """Bring any 8-bit picture to RGB: turned as its EXIF says, transparency laid over white.

    BadImage when it has more than 8 bits, or its EXIF data cannot be read, so that how it lies is not known.
    """
    if image.mode.startswith(("I", "F")):
        raise BadImage(f"mode {image.mode}: more than 8 bits per channel; convert it to 8 bits first")
    turned = upright(image)
    if turned.has_transparency_data:
        with_alpha = turned.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return turned.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square centre of an image at `size` pixels, as ADM prepares ImageNet.

    Halve with a box filter while the short side is at least twice `size`, bring the short side to `size` with
    a bicubic filter, cut the centre (Dhariwal & Nichol, "Diffusion models beat GANs", 2021, released data
    preparation). BadImage when a thin image would pass MAX_PIXELS on the way.
    """
    if size * size * (max(image.size) / min(image.size)) > MAX_PIXELS:
        raise BadImage(
            f"{image.width}×{image.height} pixels are too thin to bring the short side to {size} "
            f"(limit {MAX_PIXELS:,} pixels)"
        )
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pillow(image_HWC: ImageArray) -> Image.Image:
    """A Pillow image of 1 (grey) or 3 (RGB) channels."""
    channels = image_HWC.shape[2]
    if channels not in (1, 3):
        raise BadImage(f"{channels} channels, and only 1 (grey) or 3 (RGB) make a picture")
    return Image.fromarray(image_HWC[:, :, 0] if channels == 1 else image_HWC)


def to_array(image: Image.Image) -> ImageArray:
    """uint8 `[H, W, C]` of a grey or RGB Pillow image."""
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def prepare(image_HWC: ImageArray, image_size: int | None, channels: int | None) -> ImageArray:
    """Bring an image to `image_size` (centre crop) and `channels` (1 or 3); null leaves either as it is.

    BadImage when it is not square and no size is asked for.
    """
    height, width, found = image_HWC.shape
    if image_size is None and height != width:
        raise BadImage(f"{width}×{height} pixels is not square; give --image-size to crop and resize")
    same_size = image_size is None or (height, width) == (image_size, image_size)
    if same_size and channels in (None, found):
        return image_HWC
    image = to_pillow(image_HWC)
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    return to_array(image if image_size is None else centre_crop(image, image_size))


def to_network_range(image_BCHW: Tensor) -> Tensor:
    """uint8 0 … 255 → float32 −1 … 1, any shape."""
    return image_BCHW.to(torch.float32) / 127.5 - 1


def network_input(image_BCHW: Tensor) -> Tensor:
    """What a network takes: uint8 images in its range, float32 latents as they are."""
    return to_network_range(image_BCHW) if image_BCHW.dtype == torch.uint8 else image_BCHW


def to_uint8(image_BCHW: Tensor) -> Tensor:
    """Float −1 … 1 → uint8 0 … 255, rounded to nearest, values outside clipped: undoes `to_network_range`."""
    return ((image_BCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
