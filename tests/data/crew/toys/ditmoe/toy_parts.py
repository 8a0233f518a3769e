"""Toy parts, for crews in tests: with this folder on the path they are a module of the package."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ditmoe.data.storage.parts import Parts
from ditmoe.data.storage.workers import in_order
from ditmoe.model.errors import UserError


def squares(request: Mapping[str, Any]) -> Parts[bytes, bytes, bytes]:
    """Part n is n², and takes `seconds`; `journal` gets a file of each attempt; `fates` says what befalls some."""
    folder, journal = Path(request["folder"]), Path(request["journal"])
    names = [f"{part}.txt" for part in range(request["count"])]

    def make(part: int) -> bytes:
        attempts = len(list(journal.glob(f"{part}-*")))
        (journal / f"{part}-{os.getpid()}-{time.monotonic_ns()}").write_text(os.environ.get("TOY_WORKER", ""))
        fate = request.get("fates", {}).get(str(part))
        if fate == "refused":
            raise UserError(f"part {part}: cannot be made")
        if fate == "fault":
            raise ZeroDivisionError(f"part {part}")
        if fate == "loses its GPU once" and not attempts:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if fate == "dies" or (fate == "dies once" and not attempts):
            os._exit(9)
        if fate == "shared":
            return b"".join(in_order(_square, [part], 1))
        if fate == "hangs once" and not attempts:
            time.sleep(3600)
        time.sleep(request.get("seconds", 0.0))
        return f"{part * part} ".encode()

    def write(made: bytes, file: BinaryIO) -> None:
        file.write(made)

    def finish(found: Iterable[bytes]) -> bytes:
        return b"".join(found)

    return Parts(folder, names, make, write, lambda part: (folder / names[part]).read_bytes(), finish)


def _square(part: int) -> bytes:
    return f"{part * part} ".encode()
