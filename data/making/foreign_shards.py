"""One tar that others made, looked through: labels, scores and a checksum; its first image is decoded, or all."""

import hashlib
import io
import math
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.making.class_names import as_name, as_number
from ditmoe.data.shards.decode import (
    IMAGE_EXTENSIONS,
    PICTURE_FORMATS,
    BadSample,
    decode_image,
    decode_metadata,
    image_extension,
    label_value,
)
from ditmoe.data.shards.images import BadImage, open_image
from ditmoe.data.shards.index import DatasetIndex, LabelRule, ShardEntry
from ditmoe.data.shards.members import Extent
from ditmoe.data.shards.tar_scan import scan
from ditmoe.model.errors import UserError

SAMPLES_LOOKED_AT: Final = 100
"""Samples of the first shard among which one must have a label."""
DEFAULT_CHANNELS: Final = 3
_LONGEST_SHOWN: Final = 40


class SurveyRules(NamedTuple):
    """What is looked for in each sample."""

    label: LabelRule
    score_key: str | None
    """Key of the json with the quality score; null: there are no scores."""
    image_size: int | None
    """Images are brought to it when they are read; null: they are squares of one size."""
    channels: int | None
    """Channels to convert to; null: as the first image has them, with an `image_size` 3."""
    check_images: bool = False
    """Decode every image, not the first of each tar alone."""

    @property
    def crop(self) -> bool:
        """Whether images are brought to one form when they are read."""
        return self.image_size is not None


class ShardFacts(NamedTuple):
    """What was found in one tar."""

    entry: ShardEntry | None
    """What the index says of it; null: it is damaged, and cannot be read."""
    values: list[str | int]
    """The distinct labels: a number, or text that may be a name or a number."""
    code_N: NDArray[np.int32]
    """Which of `values` each sample has; −1: none that could be used."""
    score_N: NDArray[np.float32]
    """Quality, NaN where a sample has none."""
    forms: list[tuple[int, int]]
    """The distinct forms of the images that were decoded: side in pixels, channels."""
    form_N: NDArray[np.int32]
    """Which of `forms` each sample has; −1: it was not decoded, or could not be."""
    problems: list[str]
    """One line each, with shard and key."""
    others: list[str]
    """Keys of entries with neither image nor label, which are no samples."""


def survey_shard(folder: Path, rules: SurveyRules, file: str) -> ShardFacts:
    """Look through one tar. What is wrong with it is among its `problems`."""
    path = folder / file
    empty = np.empty(0, np.int32)
    nothing = ShardFacts(None, [], empty, np.empty(0, np.float32), [], empty, [], [])
    try:
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
            contents = scan(path)
            if contents.problem is not None:
                return nothing._replace(problems=[f"{path}: {contents.problem}"])
            look = _Look(path, stream, rules)
            for key, members in zip(contents.keys, contents.members, strict=True):
                look.at(key, members)
    except OSError as error:
        return nothing._replace(problems=[f"{path}: could not be read: {error.strerror or error}"])
    return ShardFacts(
        ShardEntry(file=file, samples=len(contents.keys), bytes=size, sha256=sha256),
        list(look.number_of),
        np.array(look.codes, dtype=np.int32),
        np.array(look.scores, dtype=np.float32),
        list(look.number_of_form),
        np.array(look.form_codes, dtype=np.int32),
        look.problems,
        look.others,
    )


class _NoSample(Exception):
    """There is nothing here to read."""


class _Look:
    """The samples of one tar, one after the other."""

    def __init__(self, path: Path, stream: BinaryIO, rules: SurveyRules) -> None:
        self._path, self._stream, self._rules = path, stream, rules
        self.number_of: dict[str | int, int] = {}
        self.codes: list[int] = []
        self.scores: list[float] = []
        self.number_of_form: dict[tuple[int, int], int] = {}
        self.form_codes: list[int] = []
        self.problems: list[str] = []
        self.others: list[str] = []

    def at(self, key: str, members: dict[str, Extent]) -> None:
        """Take one sample's label and score, and the form of its image where that is decoded."""
        code, form, score = -1, -1, math.nan
        try:
            if not members.keys() & {*IMAGE_EXTENSIONS, self._rules.label.extension}:
                self.others.append(key)  # such as README
                raise _NoSample
            extension = image_extension(members)
            if self._rules.check_images or not self.number_of_form:
                found = self._decode(extension, members[extension])
                form = self.number_of_form.setdefault(found, len(self.number_of_form))
            value = checked_label(label_value(self._read(members, self._rules.label.extension), self._rules.label))
            if self._rules.score_key is not None:
                score = _score(self._read(members, "json"), self._rules.score_key)
            code = self.number_of.setdefault(value, len(self.number_of))
        except BadSample as error:
            self.problems.append(f"{self._path}, sample {key}: {error}")
        except _NoSample:
            pass
        self.codes.append(code)
        self.form_codes.append(form)
        self.scores.append(score)

    def _read(self, members: dict[str, Extent], extension: str) -> bytes | None:
        extent = members.get(extension)
        if extent is None:
            return None
        self._stream.seek(extent.offset)
        return self._stream.read(extent.size)

    def _decode(self, extension: str, extent: Extent) -> tuple[int, int]:
        """Decode an image as it will be read; its side and channels. BadSample when that will not do."""
        self._stream.seek(extent.offset)
        data = self._stream.read(extent.size)
        size, channels = self._rules.image_size, self._rules.channels or DEFAULT_CHANNELS
        if size is None:
            size, channels = _form_of(extension, data)
        decode_image(extension, data, reading_rules(size, channels, self._rules.crop))
        return size, channels


def checked_label(value: object) -> str | int:
    """A label as it may be counted. BadSample when it is neither a number nor a name."""
    name = as_name(value)
    if as_number(value) is None and name is None:
        raise BadSample(f"label is {str(value)[:_LONGEST_SHOWN]!a}, expected an integer from 0 on, or a name")
    assert isinstance(value, str | int)
    return name or value


def reading_rules(image_size: int, channels: int, crop: bool) -> DatasetIndex:
    """An index that says how an image is decoded, and nothing else."""
    entry = ShardEntry(file="x.tar", samples=1, bytes=1, sha256="0" * 64)
    return DatasetIndex(
        name="x",
        image_size=image_size,
        channels=channels,
        num_classes=1,
        class_names=("x",),
        crop=crop,
        shards=(entry,),
    )


def _form_of(extension: str, data: bytes) -> tuple[int, int]:
    """Side and channels of a square image, from its header. BadSample when it is none."""
    if extension == "npy":
        raise BadSample("an npy image: give --image-size and --channels")
    try:
        image = open_image(io.BytesIO(data), (PICTURE_FORMATS[extension],))
    except BadImage as error:
        raise BadSample(
            f"{error}; with --image-size images may be in another format than their name says"
        ) from error
    if image.width != image.height:
        raise BadSample(f"{image.width}×{image.height} pixels is not square; give --image-size to crop and resize")
    channels = {"L": 1, "RGB": 3}.get(image.mode)
    if channels is None:
        raise BadSample(f"mode {image.mode}, expected grey or RGB; give --image-size, and images are converted")
    return image.width, channels


def _score(data: bytes | None, key: str) -> float:
    """The number under the key, NaN where there is none. BadSample when it is something else."""
    value = None if data is None else decode_metadata(data)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSample(f"score {key} is {str(value)[:_LONGEST_SHOWN]!a}, expected a finite number")
    return float(value)


def parse_key(option: str, text: str) -> str:
    """The key of `json:KEY`. UserError when it is nothing of the kind."""
    kind, _, key = text.partition(":")
    if kind != "json" or not all(key.split(".")):
        raise UserError(f"{option} is {text!r}, expected json:KEY, or json:OUTER.INNER for a key inside another")
    return key


def find_label_rule(path: Path, wanted: str | None) -> LabelRule:
    """Where the labels of a good tar stand: `wanted` (cls, txt or json:KEY), or cls where its samples have it.

    UserError that lists what the first sample has, when there are no such labels in it.
    """
    rule = LabelRule()
    if wanted == "txt":
        rule = LabelRule(extension="txt")
    elif wanted not in (None, "cls"):
        assert wanted is not None
        if wanted.partition(":")[0] != "json":
            raise UserError(f"--label is {wanted!r}, expected cls, txt or json:KEY")
        rule = LabelRule(extension="json", key=parse_key("--label", wanted))
    contents = scan(path)
    with open(path, "rb") as stream:

        def read(members: dict[str, Extent], extension: str) -> bytes | None:
            if extension not in members:
                return None
            stream.seek(members[extension].offset)
            return stream.read(members[extension].size)

        for members in contents.members[:SAMPLES_LOOKED_AT]:
            try:
                label_value(read(members, rule.extension), rule)
                return rule
            except BadSample:
                continue
        # What has an image is a sample; README and the like come before the first.
        looked_at = contents.members[:SAMPLES_LOOKED_AT]
        first = next((n for n, each in enumerate(looked_at) if any(e in each for e in IMAGE_EXTENSIONS)), 0)
        listed = _describe(looked_at[first], partial(read, looked_at[first]))
    key, has = contents.keys[first], f"has {listed}"
    if wanted is None:
        raise UserError(
            f"{path}, sample {key}: {has}, and no .cls with a label; say with --label where labels stand"
        )
    raise UserError(f"{path}, sample {key}: {has}, and no label as --label {wanted} says")


def _describe(members: dict[str, Extent], read: "partial[bytes | None]") -> str:
    """The members of a sample, of a json its keys too."""
    parts = []
    for extension in sorted(members):
        part = extension if extension.isprintable() and extension else repr(extension)
        if extension == "json":
            try:
                keys = ", ".join(ascii(key)[1:-1] for key in list(decode_metadata(read(extension) or b""))[:20])
                part += f" (keys: {keys})"
            except BadSample as error:
                part += f" ({error})"
        parts.append(part)
    return ", ".join(parts)
