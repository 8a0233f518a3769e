"""Images that others drew, without an index and labels: those in one npz file, or in a folder.

An npz file is a zip archive of arrays. Its members are read by what their headers say, a few rows at a time: no
array of images is ever in memory as a whole, no object is unpickled, and no name in the archive becomes a path.

Shapes: N images, H×W pixels, C channels.
"""

import hashlib
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ditmoe.data.shards.images import BadImage, ImageArray, describe, load_pixels, open_image, to_array
from ditmoe.data.storage.digests import sha256_of
from ditmoe.data.storage.files import open_regular
from ditmoe.data.storage.progress import show_progress
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted, printable
from ditmoe.sampling.metrics.decoding import ReferenceBatch
from ditmoe.sampling.metrics.reference import MAX_PARTS, SHOWN, Form, Images, OnError

IMAGES_KEY: Final = "arr_0"
"""The array of images in files of the ADM protocol."""
LABELS_KEY: Final = "arr_1"
"""That of their classes."""
FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""File suffix → Pillow format."""
_PART_IMAGES: Final = 256
"""Images of a part, until there are MAX_PARTS."""
_MODES: Final = {"L": 1, "RGB": 3}
"""Mode of Pillow → channels."""
LARGEST_SIDE: Final = 4096
"""Pixels; a header that claims more is taken for one that would fill the memory."""
_LOCAL_HEADER: Final = 30
"""Bytes of what stands before a member's name in a zip archive."""


class ImageSet(Images):
    """Images of one size, most often without labels."""

    def __init__(
        self, path: Path, count: int, shape_HWC: tuple[int, int, int], on_error: OnError = "stop"
    ) -> None:
        height, width, channels = shape_HWC
        if channels not in _MODES.values():
            raise UserError(f"{path}: images have {channels} channels, expected 1 (grey) or 3 (RGB)")
        if height > LARGEST_SIDE:
            raise UserError(
                f"{path}: images are of {width}×{height} pixels, expected {LARGEST_SIDE} a side at most"
            )
        if height != width:
            raise UserError(f"{path}: images are of {width}×{height} pixels, expected squares")
        self.path = path
        self._count = count
        self.channels = channels
        self._form = Form(image_size=height)
        self._on_error = on_error

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def form(self) -> Form:
        """The size alone: grey images are often kept as three equal channels."""
        return self._form

    @property
    def count(self) -> int:
        return self._count

    @property
    def parts(self) -> int:
        return min(MAX_PARTS, -(-self._count // _PART_IMAGES))

    def parts_of(self, images: int) -> int:
        return max(1, -(-self._count // images))

    def numbers(self, part: int, of: int | None) -> range:
        """Those of the images of a part."""
        parts = of or self.parts
        return range(self._count * part // parts, self._count * (part + 1) // parts)

    def new_left_out(self) -> LeftOut:
        return LeftOut(SourceConfig.model_construct(path=str(self.path), on_error=self._on_error))

    def facts(self, left_out: LeftOut | None) -> dict[str, Any]:
        lost, lines = (0, []) if left_out is None else (left_out.count, left_out.lines[:SHOWN])
        return {
            "name": self.path.stem,
            "place": self.where,
            "index": None,
            "images": self._count - lost,
            "of": self._count,
            "choice": {},
            "fingerprint": self.fingerprint,
            "left_out": {"samples": lost, "shards": [], "first": lines},
        }


class NpzImages(ImageSet):
    """`arr_0` of an npz file, uint8 `[N, H, W, C]`; its labels, if there, integers `[N]` in `arr_1`."""

    def __init__(self, path: Path) -> None:
        """Read the headers. UserError when there is no such array, or it is not of this form."""
        self._file = NpzFile(path)
        member = self._file.members.get(IMAGES_KEY)
        if member is None:
            raise UserError(f"{path}: has no {IMAGES_KEY}, the images; it has {self._file.names}")
        if member.dtype != np.uint8 or len(member.shape) != 4 or min(member.shape) < 1 or member.fortran:
            raise UserError(
                f"{path}: {IMAGES_KEY} is {member.shown}, expected images as uint8 [N, H, W, C] in C order"
            )
        self._member = member
        count, height, width, channels = member.shape
        super().__init__(path, count, (height, width, channels))
        labels = self._file.members.get(LABELS_KEY)
        self._labels = (
            labels if labels is not None and labels.shape == (count,) and labels.dtype.kind in "iu" else None
        )

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        if self._labels is None:
            return None
        blocks = list(self._file.rows(self._labels, range(self._count), 1 << 16))
        found: NDArray[np.int64] = np.concatenate(blocks).astype(np.int64)
        return found

    @property
    def fingerprint(self) -> str:
        return self._file.fingerprint

    @property
    def parts(self) -> int:
        """One where the array is compressed: it is read from its beginning only."""
        return super().parts if self._member.stored else 1

    def parts_of(self, images: int) -> int:
        """One where the array is compressed."""
        return super().parts_of(images) if self._member.stored else 1

    def read(
        self, part: int, batch: int, left_out: LeftOut | None = None, *, of: int | None = None
    ) -> Iterator[ReferenceBatch]:
        numbers = self.numbers(part, of)
        first = numbers.start
        for image_NHWC in self._file.rows(self._member, numbers, batch):
            number_N = np.arange(first, first + len(image_NHWC))
            label_N = np.full(len(image_NHWC), -1, np.int64) if self.labels is None else self.labels[number_N]
            yield ReferenceBatch(image_NHWC, label_N, number_N)
            first += len(image_NHWC)


class FolderImages(ImageSet):
    """The pictures below a folder, in the order of their names; all grey or RGB, and of one size."""

    def __init__(self, folder: Path, on_error: OnError = "stop") -> None:
        """List them.

        Args:
            on_error: what to do about those that cannot be used: they are read from the first that can be.

        Raises:
            UserError: there are none, or the first is not readable, or none.
        """
        self._files = list(_pictures(folder))
        self._folder = folder
        if not self._files:
            raise UserError(f"{folder}: has no picture ({', '.join(FORMATS)}), and no index.json of shards")
        self._like: tuple[str, tuple[int, ...]] | None = None
        for name in self._files:
            try:
                first_HWC = self._image(name)
                break
            except UserError:
                if on_error == "stop":
                    raise
        else:
            raise UserError(f"{folder}: none of its {counted(len(self._files), 'picture')} can be used")
        self._like = name, first_HWC.shape
        super().__init__(folder, len(self._files), first_HWC.shape, on_error)

    @cached_property
    def fingerprint(self) -> str:
        """Of the bytes of all files, in their order."""
        digest = hashlib.sha256()
        show = show_progress(f"pictures of {self._folder} in their checksum", len(self._files))
        for done, name in enumerate(self._files, start=1):
            try:
                with open_regular(os.path.join(self._folder, name)) as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UserError(f"{self._folder / name}: could not be read: {error.strerror or error}") from error
            show(done)
        return digest.hexdigest()[:16]

    def read(
        self, part: int, batch: int, left_out: LeftOut | None = None, *, of: int | None = None
    ) -> Iterator[ReferenceBatch]:
        left_out = self.new_left_out() if left_out is None else left_out
        numbers = self.numbers(part, of)
        for first in range(numbers.start, numbers.stop, batch):
            found = []
            for number in range(first, min(first + batch, numbers.stop)):
                try:
                    found.append((number, self._image(self._files[number])))
                except UserError as error:
                    where, _, reason = str(error).partition(": ")
                    left_out.add(where, reason)
            if found:
                number_N = np.array([number for number, _ in found])
                image_NHWC = np.stack([image_HWC for _, image_HWC in found])
                yield ReferenceBatch(image_NHWC, np.full(len(found), -1, np.int64), number_N)

    def _image(self, name: str) -> ImageArray:
        path = self._folder / name
        try:
            with open_regular(path) as file:
                picture = load_pixels(open_image(file, tuple(sorted(set(FORMATS.values())))))
        except (BadImage, OSError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        if picture.mode not in _MODES:
            raise UserError(f"{path}: a picture of mode {picture.mode}, expected L (grey) or RGB, of 8 bits")
        image_HWC = to_array(picture)
        if self._like is not None and self._like[1] != image_HWC.shape:
            raise UserError(
                f"{path}: a picture of shape {list(image_HWC.shape)}, expected {list(self._like[1])} "
                f"as {self._like[0]}"
            )
        return image_HWC


def _pictures(folder: Path) -> Iterator[str]:
    """Paths below `folder`, relative to it, of regular files that are pictures by their suffix; no link is
    followed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: could not be read: {error.strerror or error}") from error

    found = []
    for above, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = os.path.join(above, name)
            if Path(name).suffix.lower() in FORMATS and stat.S_ISREG(os.lstat(path).st_mode):
                found.append(os.path.relpath(path, folder))
    yield from sorted(found)


@dataclass(frozen=True)
class Member:
    """An array in an npz file, by its header."""

    name: str
    """In the archive."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int
    """Bytes of its header."""
    stored: bool
    """It is not compressed."""
    place: int
    """Where it is not compressed: bytes of the file before it."""

    @property
    def shown(self) -> str:
        """Its type and shape, for messages."""
        return f"{self.dtype} {list(self.shape)}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class NpzFile:
    """The arrays of an npz file, read a few rows at a time."""

    def __init__(self, path: Path) -> None:
        """Read the headers. UserError when it is no npz file, is damaged, or holds Python objects (pickles)."""
        self.path = path
        self.members: Mapping[str, Member] = {}
        with self._readable(), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            self.members = {
                info.filename.removesuffix(".npy"): self._member(file, archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }

    @property
    def names(self) -> str:
        """Those of the arrays, for messages."""
        return ", ".join(map(printable, self.members)) or "no array"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes (first 16 hex digits)."""
        with self._readable():
            return sha256_of(self.path)[:16]

    def rows(self, member: Member, numbers: range, at_once: int) -> Iterator[NDArray[Any]]:
        """Some rows of an array, up to `at_once` at a time. UserError when the file is damaged."""
        row = member.row_bytes
        start = member.start + numbers.start * row
        with (
            self._readable(),
            open_regular(self.path) as file,
            zipfile.ZipFile(file) as archive,
            archive.open(member.name) as unpacked,
        ):
            source: IO[bytes] = file if member.stored else unpacked
            source.seek(member.place + start if member.stored else start)
            for first in range(numbers.start, numbers.stop, at_once):
                count = min(at_once, numbers.stop - first)
                data = source.read(count * row)
                if len(data) != count * row:
                    raise ValueError(f"{printable(member.name)} ends early")
                yield np.frombuffer(data, member.dtype).reshape(count, *member.shape[1:])

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """An array of real numbers as float64. UserError when it is of another shape or not finite."""
        member = self.members[name]
        if member.dtype not in (np.float32, np.float64) or member.shape != shape or member.fortran:
            raise UserError(f"{self.path}: {name} is {member.shown}, expected float64 {list(shape)}")
        blocks = list(self.rows(member, range(shape[0]), 1024))
        found: NDArray[np.float64] = np.concatenate(blocks).astype(np.float64)
        if not np.isfinite(found).all():
            raise UserError(f"{self.path}: {name} has values that are not finite")
        return found

    def _member(self, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
        with archive.open(info) as unpacked:
            version = npy_format.read_magic(unpacked)
            read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
            shape, fortran, dtype = read(unpacked)
            start = unpacked.tell()
        if dtype.hasobject:
            raise UserError(
                f"{self.path}: {printable(info.filename)} holds Python objects (a pickle), which are never read"
            )
        expected = start + math.prod(shape) * dtype.itemsize
        if info.file_size != expected:
            raise ValueError(f"{printable(info.filename)} has {info.file_size:,} bytes, expected {expected:,}")
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        place = 0
        if stored:
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            place = info.header_offset + _LOCAL_HEADER
            place += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return Member(info.filename, shape, dtype, fortran and len(shape) > 1, start, stored, place)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """UserError for what readers of zip files and of numpy headers raise on odd bytes: nearly anything."""
        try:
            yield
        except (UserError, MemoryError, GeneratorExit):
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or describe(error).splitlines()[0]
            raise UserError(f"{self.path}: not a readable npz file: {reason}") from error
