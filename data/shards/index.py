"""The index of a folder of shards: what is in it, written last and read first."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ditmoe.data.shards.names import OTHERS_ALLOWED, is_plain_file_name
from ditmoe.data.storage.files import open_regular, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_fit_to_print
from ditmoe.model.settings import Settings, message_of

INDEX_FILE: Final = "index.json"
FORMAT_VERSION: Final = 2
"""1 knew neither label rules, cropping, latents nor the table of samples; it is read as before."""


UNFINISHED: Final = {"synthesis.json": "ditmoe data synthesize", "encoding.json": "ditmoe data encode"}
"""File of a folder that is being made → the command that makes it."""


class ShardEntry(Settings):
    """One tar file."""

    file: str
    """Its name in the index's folder; a plain name, never a path."""
    samples: int = Field(ge=1)
    """Samples in it."""
    bytes: int = Field(ge=1)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Checksum of the file."""

    @field_validator("file")
    @classmethod
    def _check_file(cls, file: str) -> str:
        return _plain_name(file, ".tar")


class LabelRule(Settings):
    """Where a sample's label stands."""

    extension: Literal["cls", "json", "txt"] = "cls"
    """The member that holds it."""
    key: str | None = None
    """Key of a JSON object, `outer.inner` for one inside another; null: the member is the label itself."""
    by_name: bool = False
    """The label is one of `class_names`, not a number."""

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if (self.key is not None) != (self.extension == "json"):
            raise ValueError("a label in json needs a key, and no other does")
        return self


class LatentFacts(Settings):
    """How the latents of a dataset came about: what it takes to decode them."""

    vae: str = Field(min_length=1)
    """Local path of the AutoencoderKL that encoded them."""
    vae_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Checksum of its configuration and weights."""
    scale: float = Field(gt=0)
    """Factor on (latent − shift) before training (Stable Diffusion's VAE: 0.18215)."""
    shift: float = 0.0
    """Subtracted from a latent before the scale."""
    pixels: int = Field(ge=1)
    """Side in pixels of the images that were encoded."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number type of the stored moments."""
    flips: Literal["none", "both", "drawn"] = "none"
    """Mirror images: not stored, stored beside each image, or one of the two drawn when encoding."""


class SampleTable(Settings):
    """The file with the label, and the score where there is one, of every sample."""

    file: str = "samples.npz"
    """Its name in the index's folder."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Its checksum."""

    @field_validator("file")
    @classmethod
    def _check_file(cls, file: str) -> str:
        return _plain_name(file, ".npz")


class DatasetIndex(Settings):
    """Everything about a packed dataset that is known without opening a shard."""

    format: Literal["ditmoe-shards"] = "ditmoe-shards"
    """Tells this file from any other index.json."""
    version: Literal[1, 2] = FORMAT_VERSION
    """Version of this file's form."""
    name: str = Field(min_length=1)
    """The dataset's name."""
    image_size: int = Field(ge=1)
    """Side of each image in pixels, or of each latent."""
    channels: int = Field(ge=1)
    """Channels of each image: 1 grey, 3 RGB; or of each latent."""
    num_classes: int = Field(ge=1)
    """Classes; labels are 0 … num_classes − 1."""
    class_names: tuple[str, ...]
    """Name of each class, by label."""
    label: LabelRule = LabelRule()
    """Where a sample's label stands."""
    crop: bool = False
    """Images are of any size, and brought to `image_size` and `channels` when they are read."""
    latents: LatentFacts | None = None
    """How the latents came about; null: these are images."""
    samples: SampleTable | None = None
    """Labels and scores by sample; null: not known without reading the shards."""
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    """The tar files, in the order in which they were written."""
    left_out: tuple[str, ...] = ()
    """Damaged tars of the folder that are no part of the dataset."""

    @field_validator("name", "class_names")
    @classmethod
    def _check_printable(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not is_fit_to_print(name):  # names reach terminals, pages and log files
                raise ValueError(f"{name!a} cannot be printed")
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for num_classes = {self.num_classes}")
        files = [shard.file for shard in self.shards]
        if len(set(files)) != len(files):
            raise ValueError("a shard is listed twice")
        return self

    @property
    def total(self) -> int:
        """Samples of all shards: the length of an epoch."""
        return sum(self.samples_per_shard)

    @property
    def samples_per_shard(self) -> tuple[int, ...]:
        """Samples of each shard, in the index's order."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def facts(self) -> dict[str, Any]:
        """What a network and a checkpoint need to know of the data, as plain data."""
        facts = {
            "name": self.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
        }
        return facts if self.latents is None else {**facts, "latents": self.latents.model_dump(mode="json")}

    @property
    def fingerprint(self) -> str:
        """Hex digest of the samples and their order of writing: equal for equal shards, wherever they lie."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.sha256} {shard.samples}\n".encode())
        return digest.hexdigest()


def load_index(folder: str | Path) -> DatasetIndex:
    """The index of a packed folder. UserError when it is missing, not finished, or not one of ours."""
    folder = Path(folder)
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; `ditmoe data pack SOURCE {folder}` makes one of images, and"
            f" `ditmoe data encode SHARDS {folder} --vae VAE` one of latents"
        )
    try:
        with open_regular(path) as file:
            text = file.read()
    except FileNotFoundError:
        for plan, command in UNFINISHED.items():
            if (folder / plan).exists():
                raise UserError(
                    f"{folder}: has no {INDEX_FILE} yet: repeat `{command}`, which did not finish"
                ) from None
        raise UserError(
            f"{folder}: has no {INDEX_FILE}, so it was never packed or the packing did not finish: "
            f"repeat `ditmoe data pack SOURCE {folder}`, or for latents `ditmoe data encode SHARDS {folder}"
            f" --vae VAE`; shards from elsewhere: `ditmoe data index {folder}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    return parse_index(text, str(path))


def parse_index(text: bytes, path: str) -> DatasetIndex:
    """An index.json's contents; `path` is for messages. UserError when it is not one of ours."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != "ditmoe-shards":
        raise UserError(f'{path}: is not an index of shards (it lacks "format": "ditmoe-shards")')
    if values.get("version") not in (1, FORMAT_VERSION):
        raise UserError(
            f"{path}: version is {values.get('version')!r}, and this program reads versions 1 and {FORMAT_VERSION}"
        )
    try:
        return DatasetIndex.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'index'}: {message_of(problem)}" for problem in error.errors()
        ]
        raise UserError(f"{path}: " + "; ".join(problems)) from error


def write_index(folder: Path, index: DatasetIndex) -> None:
    """Write `folder/index.json`, whole or not at all."""
    with replacing(folder / INDEX_FILE) as file:
        put_index(index, file)


def put_index(index: DatasetIndex, file: BinaryIO) -> None:
    """Write an index to an open file."""
    file.write(index.model_dump_json(indent=1).encode() + b"\n")


def _plain_name(file: str, suffix: str) -> str:
    """The name itself, when any place may be asked for it. ValueError otherwise."""
    if not is_plain_file_name(file, suffix):
        raise ValueError(
            f"must be the plain name of a {suffix} file (letters, digits and {OTHERS_ALLOWED}, a letter or digit "
            f"first), not {file!a}"
        )
    return file


def check_files(folder: Path, index: DatasetIndex) -> list[str]:
    """Shards that are missing or of another size than the index says, one line each. Reads no contents."""
    return list(file_problems(folder, index).values())


def file_problems(folder: Path, index: DatasetIndex) -> dict[int, str]:
    """As `check_files`, by the number of the shard."""
    problems = {}
    for number, shard in enumerate(index.shards):
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            problems[number] = f"{path}: {error.strerror or error}, but {INDEX_FILE} lists it"
            continue
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "too long"
            problems[number] = f"{path}: {kind}: {size:,} bytes, and {INDEX_FILE} says {shard.bytes:,}"
    return problems
