"""Decoders of a sample's members: pictures, npy arrays, labels and JSON; nothing is ever unpickled.

A member is decoded because its extension is in a table here. Members of any other kind (text, pickles) are
left alone.
"""

import io
import json
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy_format
from PIL import Image

from ditmoe.data.shards.images import (
    BadImage,
    ImageArray,
    blaming_bytes,
    describe,
    load_pixels,
    open_image,
    photograph_to_rgb,
    prepare,
    to_array,
    upright,
)
from ditmoe.data.shards.index import DatasetIndex, LabelRule
from ditmoe.model.outside.text import counted, normal

PICTURE_FORMATS: Final = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Extension → the one Pillow format that its bytes may be in."""
IMAGE_EXTENSIONS: Final = (*PICTURE_FORMATS, "npy")
LABEL_EXTENSION: Final = "cls"
METADATA_EXTENSION: Final = "json"


class BadSample(ValueError):
    """A sample's member that cannot be used; the caller adds shard and key."""


def image_extension(extensions: Iterable[str]) -> str:
    """The extension of a sample's one image. BadSample when it has none, or several."""
    present = list(extensions)
    images = [extension for extension in present if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        found = "no image" if not images else counted(len(images), "image")
        raise BadSample(
            f"{found}: expected one of {', '.join(IMAGE_EXTENSIONS)}, found {', '.join(present) or 'nothing'}"
        )
    return images[0]


def decode_image(extension: str, data: bytes, index: DatasetIndex) -> ImageArray:
    """The pixels, uint8 `[H, W, C]`, of the size and channels of the index.

    BadSample when they are damaged, of another size, or so many that they are taken for a decompression bomb; the
    size is read from the header, before any pixels. Where the index says `crop`, any size is brought to its own.
    """
    try:
        if extension == "npy":
            return _decode_npy(data, index)
        if index.crop:  # photographs of others are often of another format than their name says
            image = load_pixels(open_image(io.BytesIO(data), tuple(sorted(set(PICTURE_FORMATS.values())))))
            return prepare(to_array(photograph_to_rgb(image)), index.image_size, index.channels)
        image = open_image(io.BytesIO(data), (PICTURE_FORMATS[extension],))
        _check_picture(image, index)
        return to_array(upright(load_pixels(image)))
    except BadImage as error:
        raise BadSample(str(error)) from error


def _check_picture(image: Image.Image, index: DatasetIndex) -> None:
    if image.size != (index.image_size, index.image_size):
        raise BadSample(
            f"wrong size: {image.width}×{image.height} pixels, expected {index.image_size}×{index.image_size}"
        )
    channels = {"L": 1, "RGB": 3}.get(image.mode)
    if channels != index.channels:
        found = f"mode {image.mode}" if channels is None else f"{channels}"
        raise BadSample(f"wrong channels: {found}, expected {index.channels}")


def _decode_npy(data: bytes, index: DatasetIndex) -> ImageArray:
    expected = (index.image_size, index.image_size, index.channels)
    # The header, a Python literal, first: an array of objects is a pickle, and a huge claimed shape must not be
    # allocated.
    with blaming_bytes(BadSample, "undecodable npy"):
        file = io.BytesIO(data)
        version = npy_format.read_magic(file)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise BadSample("npy array of Python objects (a pickle), which is never read; expected uint8")
    if dtype != np.uint8:
        raise BadSample(f"npy array of {dtype}, expected uint8")
    if shape != expected:
        raise BadSample(f"wrong size or channels: npy of shape {list(shape)}, expected {list(expected)}")
    try:
        array: ImageArray = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadSample(f"undecodable npy: {describe(error)}") from error
    return np.ascontiguousarray(array)


def decode_label(data: bytes | None, index: DatasetIndex) -> int:
    """The label in the member that the index's rule names. BadSample when missing or outside the classes."""
    value = label_value(data, index.label)
    if index.label.by_name:
        name = value if value in index.class_names or not isinstance(value, str) else normal(value)
        if name not in index.class_names:
            raise BadSample(f"label is {str(value)[:40]!r}, expected one of the {index.num_classes} class names")
        return index.class_names.index(str(name))
    text = str(value)
    if isinstance(value, bool | float) or not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadSample(f"label is {text[:40]!r}, expected an integer from 0 to {index.num_classes - 1}")
    label = int(text)
    if label >= index.num_classes:
        raise BadSample(
            f"label {label} is outside the {counted(index.num_classes, 'class')} (0 to {index.num_classes - 1})"
        )
    return label


def label_value(data: bytes | None, rule: LabelRule) -> Any:
    """What stands where the rule says: text, or any value of a json. BadSample when nothing does."""
    if data is None:
        raise BadSample(f"no label: expected a .{rule.extension} member")
    return _json_value(data, rule.key) if rule.key is not None else data.decode(errors="replace").strip()


def _json_value(data: bytes, key: str) -> Any:
    """What stands under `outer.inner` in a JSON object. BadSample when nothing does."""
    value: Any = decode_metadata(data)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadSample(f"no label: the json has no key {key}")
        value = value[part]
    return value


def decode_metadata(data: bytes) -> dict[str, Any]:
    """The object of a `json` member. BadSample when it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"undecodable json: {describe(error)}") from error
    if not isinstance(value, dict):
        raise BadSample(f"json is a {type(value).__name__}, expected an object")
    return value
