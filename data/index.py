"""The index of a folder of shards: what is in it, written last and read first."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ditmoe.data.files import replacing
from ditmoe.model.errors import UserError
from ditmoe.model.settings import Settings

INDEX_FILE: Final = "index.json"
FORMAT_VERSION: Final = 1


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
        if not file.endswith(".tar") or Path(file).name != file or "\0" in file:
            raise ValueError(f"must be the plain name of a .tar file, not {file!r}")
        return file


class DatasetIndex(Settings):
    """Everything about a packed dataset that is known without opening a shard."""

    format: Literal["ditmoe-shards"] = "ditmoe-shards"
    """Tells this file from any other index.json."""
    version: Literal[1] = FORMAT_VERSION
    """Version of this file's form."""
    name: str = Field(min_length=1)
    """The dataset's name."""
    image_size: int = Field(ge=1)
    """Side of each image in pixels."""
    channels: int = Field(ge=1)
    """Channels of each image: 1 grey, 3 RGB."""
    num_classes: int = Field(ge=1)
    """Classes; labels are 0 … num_classes − 1."""
    class_names: tuple[str, ...]
    """Name of each class, by label."""
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    """The tar files, in the order in which they were written."""

    @field_validator("name", "class_names")
    @classmethod
    def _check_printable(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not name.isprintable():  # names reach terminals, pages and log files
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
        return {
            "name": self.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
        }

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
        raise UserError(f"{folder}: no such folder; `ditmoe data pack SOURCE {folder}` makes one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: has no {INDEX_FILE}, so it was never packed or the packing did not finish; "
            f"repeat `ditmoe data pack SOURCE {folder}`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != "ditmoe-shards":
        raise UserError(f'{path}: is not an index of shards (it lacks "format": "ditmoe-shards")')
    if values.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: version is {values.get('version')!r}, and this program reads version {FORMAT_VERSION}"
        )
    try:
        return DatasetIndex.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'index'}: {problem['msg']}" for problem in error.errors()
        ]
        raise UserError(f"{path}: " + "; ".join(problems)) from error


def write_index(folder: Path, index: DatasetIndex) -> None:
    """Write `folder/index.json`, whole or not at all."""
    with replacing(folder / INDEX_FILE) as file:
        file.write(index.model_dump_json(indent=1).encode() + b"\n")


def check_files(folder: Path, index: DatasetIndex) -> list[str]:
    """Shards that are missing or of another size than the index says, one line each. Reads no contents."""
    problems = []
    for shard in index.shards:
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}, but {INDEX_FILE} lists it")
            continue
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "too long"
            problems.append(f"{path}: {kind}: {size:,} bytes, and {INDEX_FILE} says {shard.bytes:,}")
    return problems
