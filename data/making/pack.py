"""Packing: a source's images, shuffled, cropped, encoded and written to shards, and the index last."""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from ditmoe.data.making.ownership import claimed, refuse_holding
from ditmoe.data.making.preview import COLUMNS, ROWS, write_preview
from ditmoe.data.making.sources.base import Source
from ditmoe.data.making.sources.opening import BUILT_IN
from ditmoe.data.shards.images import BadImage, ImageArray, prepare, to_pillow
from ditmoe.data.shards.index import DatasetIndex, write_index
from ditmoe.data.shards.sample_table import SampleColumns, write_table
from ditmoe.data.shards.writer import PackedSample, ShardLimits, write_shards
from ditmoe.data.storage.progress import track
from ditmoe.data.storage.workers import in_order
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_fit_to_print, printable
from ditmoe.model.randomness import permutation

JPEG_QUALITY: Final = 95
ImageFormat = Literal["png", "jpg", "npy"]


@dataclass(frozen=True)
class PackSettings:
    """How a source is packed."""

    image_size: int | None = None
    """Side in pixels to crop and resize to; null: as the images are, which must then be squares of one size."""
    channels: int | None = None
    """1 (grey) or 3 (RGB); null: as the source has them."""
    count: int | None = None
    """Only this many, the first of the shuffled order; null: all."""
    seed: int = 0
    """Of the order in which samples are written."""
    format: ImageFormat = "png"
    """Encoding: png and npy keep every pixel, jpg (quality 95, full colour resolution) does not."""
    limits: ShardLimits = field(default_factory=ShardLimits)
    workers: int = 0
    """Processes that read, crop and encode; 0: this one. The shards are the same."""
    overwrite: bool = False
    """Replace a dataset that is already there."""
    skip_unreadable: bool = False
    """Leave out images that cannot be used, and say which, instead of stopping at the first."""


@dataclass(frozen=True)
class PackResult:
    """What was packed."""

    index: DatasetIndex
    preview: Path
    """The contact sheet."""
    skipped: list[str]
    """Why each image that was left out could not be used."""


class _Encoded(NamedTuple):
    sample: PackedSample
    shape: tuple[int, ...]
    """Height, width, channels."""


def encode(image_HWC: ImageArray, format: ImageFormat) -> bytes:
    """An image, uint8 `[H, W, C]`, in a file's bytes. BadImage when the format has no such channels."""
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, np.ascontiguousarray(image_HWC), allow_pickle=False)
    elif format == "png":
        to_pillow(image_HWC).save(buffer, format="PNG")
    else:
        to_pillow(image_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def pack(source: Source, out: Path, settings: PackSettings) -> PackResult:
    """Pack a source into a folder. The same source and settings give the same bytes.

    UserError when the folder is taken, an image cannot be used, or the file system refuses. A dataset that was to
    be replaced is then still there; otherwise there is no index, so nothing reads the folder. Repeating the
    command begins again.
    """
    order = permutation(settings.seed, "data/pack", 0, len(source))[: settings.count].tolist()
    if not order:
        raise UserError(f"--count is {settings.count}: there is nothing to pack")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", source.name).strip("-")[:60] or "dataset"
    packing = _Packing(source, settings, order)
    with claimed(out, name, settings.overwrite, packing.samples()) as place:
        entries = write_shards(place.folder, name, place.samples, settings.limits)
        height, _, channels = packing.shape
        index = DatasetIndex(
            name=source.name if is_fit_to_print(source.name) and source.name else name,
            image_size=height,
            channels=channels,
            num_classes=len(source.class_names),
            class_names=source.class_names,
            samples=write_table(place.folder, packing.table()),
            shards=tuple(entries),
        )
        shown = {
            label: [(sample.extension, sample.image) for sample in samples]
            for label, samples in packing.first_of_class.items()
        }
        preview = out / write_preview(place.folder, index, shown).name
        write_index(place.folder, index)
    return PackResult(index, preview, packing.skipped)


def refuse_overlap(source: str, out: Path, *lists: Path | None) -> None:
    """UserError when shards would be written into the image folder that they are made from, or around a source.

    `lists`: further files that are read.
    """
    folder = Path(source)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out}: lies in the source {source}; choose a folder outside it")
    read = [*([] if source in BUILT_IN else [folder]), *(each for each in lists if each is not None)]
    refuse_holding(out, read)


class _Packing:
    """One pack under way."""

    def __init__(self, source: Source, settings: PackSettings, order: list[int]) -> None:
        self._source = source
        self._settings = settings
        self._order = order
        self.shape: tuple[int, ...] = ()
        """Height, width and channels of every image; known after the first."""
        self.first_of_class: dict[int, list[PackedSample]] = {}
        """What the contact sheet shows."""
        self.skipped: list[str] = []
        self._labels: list[int] = []
        self._scores: list[float] = []
        """NaN where a sample has none."""

    def table(self) -> SampleColumns:
        """Label and score of every sample, in the order of writing."""
        scores = np.array(self._scores, dtype=np.float32)
        return SampleColumns(np.array(self._labels, dtype=np.int32), None if np.isnan(scores).all() else scores)

    def samples(self) -> Iterator[PackedSample]:
        """The samples in the order of writing, all of one shape. UserError when there is none."""
        encode_one = partial(_read_and_encode, self._source, self._settings)
        results = in_order(encode_one, self._order, self._settings.workers, prefetch=16)
        for result in track(results, len(self._order), "packing", "images"):
            problem = result if isinstance(result, str) else self._shape_problem(result)
            if problem is None:
                assert isinstance(result, _Encoded)
                self._keep_for_preview(result.sample)
                self._labels.append(result.sample.label)
                self._scores.append(result.sample.metadata.get("score", math.nan))
                yield result.sample
            elif self._settings.skip_unreadable:
                self.skipped.append(problem)
            else:
                raise UserError(f"{problem} (--skip-unreadable leaves such images out)")
        if not self._labels:
            raise UserError(f"none of the {len(self._order):,} images could be used; {self.skipped[0]}")

    def _shape_problem(self, result: _Encoded) -> str | None:
        self.shape = self.shape or result.shape
        if result.shape == self.shape:
            return None
        found, expected = ("×".join(map(str, shape)) for shape in (result.shape, self.shape))
        return (
            f"{_origin(result.sample.metadata)}: is {found} (height, width, channels) where the first image was "
            f"{expected}; give --image-size to bring all to one size"
        )

    def _keep_for_preview(self, sample: PackedSample) -> None:
        kept = self.first_of_class.setdefault(sample.label, [])
        if sample.label < ROWS and len(kept) < COLUMNS:
            kept.append(sample)


def _read_and_encode(source: Source, settings: PackSettings, number: int) -> _Encoded | str:
    """One sample, or why it cannot be used."""
    try:
        found = source.read(number)
    except UserError as error:
        return str(error)
    channels = source.channels if settings.channels is None else settings.channels
    try:
        image_HWC = prepare(found.image_HWC, settings.image_size, channels)
        data = encode(image_HWC, settings.format)
    except BadImage as error:
        return f"{_origin(found.metadata)}: {error}"
    # The key is the number in the source, so that a sample can be traced back whatever the order.
    sample = PackedSample(f"{number:08d}", settings.format, data, found.label, found.metadata)
    return _Encoded(sample, image_HWC.shape)


def _origin(metadata: dict[str, Any]) -> str:
    number = f", number {metadata['number']}" if "number" in metadata else ""
    return printable(f"{metadata['source']}{number}")
