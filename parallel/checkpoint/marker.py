"""The marker of a checkpoint: its form, its limits, and its checksum of itself.

A checkpoint may be damaged, or come from a stranger. So the marker is checked against a schema before anything is
built from it: names lead nowhere, and the sizes that it states are bounded by those of the files that it lists.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from ditmoe.data.shards.index import LatentFacts
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.model.weights.untrusted import first_problem, leads_out, parse_json, read_file

FORMAT: Final = 2
"""1 stored each parameter flattened, in runs."""
MARKER: Final = "checkpoint.json"
CHECKSUM: Final = "marker_sha256"
"""Key of the marker's checksum of all its other keys; markers of earlier versions have none."""
MOST_BYTES: Final = 32 * 2**20
"""Of a marker. 4,096 ranks' files and the names of 100,000 classes take less than a quarter."""
ELEMENT_BYTES: Final = 4
"""A checkpoint holds float32 only."""

Part = Literal["weights", "ema", "exp_avg", "exp_avg_sq"]
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
_Size = Annotated[StrictInt, Field(ge=1, lt=2**40)]
_Sha256 = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
_File = Annotated[
    StrictStr,
    Field(pattern=r"^(weights|ema|exp_avg|exp_avg_sq)/[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors$"),
]
_Parameter = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,20}$", max_length=200)]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileFacts(_Facts):
    """What a marker says of a file."""

    bytes: Count
    sha256: _Sha256


class DatasetFacts(BaseModel):
    """What a marker says of the training data; other keys are of those who compare them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: StrictStr = ""
    image_size: _Size | None = None
    channels: _Size | None = None
    num_classes: _Size | None = None
    class_names: list[StrictStr] = Field(default=[], max_length=1_000_000)
    fingerprint: list[_Sha256] = Field(default=[], max_length=100_000)
    latents: LatentFacts = LatentFacts(vae="-", vae_sha256="0" * 64, scale=1.0, pixels=1)
    """Left out where the network draws pixels."""


class LayoutFacts(BaseModel):
    """What a marker says of the layout that wrote it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    pipe: _Size
    data: _Size
    expert: _Size
    tensor: _Size
    zero: Count


class StartFacts(BaseModel):
    """What a marker says of the weights that its run was started from; a run that began anew has none."""

    model_config = ConfigDict(extra="allow", frozen=True)

    path: StrictStr
    set: Literal["weights", "ema"]


class ConfigFacts(BaseModel):
    """What a marker says of the configuration; a run's has all of its sections."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: ModelConfig
    objective: ObjectiveConfig


class Marker(_Facts):
    """All of a marker but its checksum."""

    format: Literal[2]
    step: Count
    images: Count
    sums: dict[StrictStr, Any]
    config: ConfigFacts
    dataset: DatasetFacts
    layout: LayoutFacts | None = None
    started_from: StartFacts | None = None
    parts: list[Part] = Field(min_length=1)
    shapes: dict[_Parameter, Annotated[list[_Size], Field(min_length=1, max_length=8)]] = Field(min_length=1)
    files: dict[_File, FileFacts]

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        """The network that the configuration describes has no more tensors than the checkpoint."""
        model, names = self.config.model, self.dataset.class_names
        if not model.complete:
            raise ValueError("config.model: image_size, channels or num_classes is missing")
        assert model.num_classes is not None
        if names and len(names) != model.num_classes:
            raise ValueError(
                f"dataset.class_names has {len(names)}, and config.model {counted(model.num_classes, 'class')}"
            )
        if model.depth * max(1, model.experts) > len(self.shapes):
            raise ValueError(
                f"config.model has depth {model.depth} and {counted(model.experts, 'expert')}, and shapes has"
                f" {len(self.shapes)} parameters"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        """Every part has files, and these are large enough for all parameters."""
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts = {self.parts}: one is given twice")
        held = dict.fromkeys(self.parts, 0)
        for name, facts in self.files.items():
            part: Any = name.partition("/")[0]
            if part not in held:
                raise ValueError(f"files has {name}, and parts is {self.parts}")
            held[part] += facts.bytes
        needed = ELEMENT_BYTES * sum(map(math.prod, self.shapes.values()))
        for part, size in held.items():
            if size < needed:
                raise ValueError(
                    f"the parameters of shapes take {needed} bytes, and the files of {part} have {size}"
                )
        return self


def marker_text(facts: Mapping[str, Any]) -> str:
    """The text of a marker with these facts, and its checksum."""
    return json.dumps({**facts, CHECKSUM: _checksum(facts)}, indent=1) + "\n"


def read_marker(path: Path) -> tuple[Marker, dict[str, Any]]:
    """Read and check the marker of the checkpoint in a folder.

    Returns:
        What the schema knows of it, and all of it as plain data.

    Raises:
        UserError: there is none, or it cannot be trusted; names the file and what is wrong.
    """
    file = path / MARKER
    try:
        if leads_out(file, path):
            raise UserError(f"{file}: is a link that leads out of its folder, expected a file")
        return parse_marker(read_file(file, MOST_BYTES), file)
    except FileNotFoundError:
        raise UserError(f"{path}: no {MARKER} found; expected the folder of a complete checkpoint") from None


def parse_marker(content: bytes, file: Path) -> tuple[Marker, dict[str, Any]]:
    """Check a marker's contents, as `read_marker` does.

    Args:
        file: where they are from, for messages.
    """
    try:
        facts = parse_json(content)
        if not isinstance(facts, dict):
            raise ValueError(f"it is a {type(facts).__name__}, expected names and values")
        if "format" in facts and (facts["format"] != FORMAT or isinstance(facts["format"], bool)):
            raise UserError(_other_format(file, facts["format"]))
        checksum = facts.pop(CHECKSUM, None)
        if checksum is not None and checksum != _checksum(facts):
            raise ValueError("its contents have changed: its checksum of itself differs")
        return Marker.model_validate(facts), facts
    except ValidationError as error:
        raise UserError(f"{file}: not a checkpoint's marker ({first_problem(error)})") from None
    except ValueError as error:
        raise UserError(f"{file}: not a checkpoint's marker ({error})") from None


def _checksum(facts: Mapping[str, Any]) -> str:
    """Of the facts, in whatever order and layout of the text."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _other_format(file: Path, found: Any) -> str:
    text = repr(found)[:60]
    advice = "; export it with the version that wrote it, and convert that, or train anew" if text == "1" else ""
    return f"{file}: format {text} found, expected {FORMAT}{advice}"
