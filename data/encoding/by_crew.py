"""An encode by a crew: what its workers are told, and the parts that they build from it."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch

from ditmoe.data.crew.making import Make, absolute, by_crew, check_same, stage_of
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.encoding.encode import Work
from ditmoe.data.encoding.plan import EncodeSettings, Encoding, prepare_encoding
from ditmoe.data.encoding.vae import read_facts
from ditmoe.model.errors import UserError

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew


def made_by(crew: "Crew", encoding: Encoding, index: Path | None, device: Literal["cpu", "cuda"]) -> Make:
    """Has the parts of an encode made by a crew.

    Args:
        index: folder of the index of the images; None: with the shards.
        device: of each worker.
    """
    return by_crew(crew, parts_of_stage, request_for(encoding, index, device))


def request_for(encoding: Encoding, index: Path | None, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """What a worker builds the same encode from, wherever it was started."""
    return {
        "source": str(encoding.source.absolute()),
        "out": str(encoding.folder.path.absolute()),
        "vae": str(encoding.vae.path.absolute()),
        "settings": asdict(replace(encoding.settings, overwrite=False)),
        "index": None if index is None else str(absolute(index)),
        "device": device,
        "encode": _identity(encoding),
    }


def parts_of_stage(request: Mapping[str, Any]) -> AnyParts:
    """The shards, or the index, in a worker.

    Args:
        request: `request_for`, and the stage.

    Raises:
        UserError: this machine sees other images, or another VAE, or has no GPU.
    """
    stage, told = stage_of(request)
    work = _work(told)
    if stage == "index":
        return work.index
    assert stage == "shards", stage
    shards = work.shards

    def encode_joined(number: int, file: BinaryIO) -> None:
        with work.folder.joined():  # whoever leads may be killed, and others begin anew here
            shards.write(number, file)

    return replace(shards, write=encode_joined)


@lru_cache(maxsize=1)
def _work(told: str) -> Work:
    """The encode that this worker is at, whose VAE it keeps from one stage to the next."""
    request = json.loads(told)
    if request["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: the machine of a worker shows no GPU; expected them for all, or cpu")
    index = None if request["index"] is None else Path(request["index"])
    facts, settings = read_facts(Path(request["vae"])), EncodeSettings(**request["settings"])
    encoding = prepare_encoding(Path(request["source"]), Path(request["out"]), facts, settings, index)
    check_same(request["source"], _identity(encoding), request["encode"])
    return Work(encoding, torch.device(request["device"]), log=_say)


def _identity(encoding: Encoding) -> dict[str, str]:
    return {"encode": encoding.folder.fingerprint}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
