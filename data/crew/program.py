"""Which program a process runs: workers make the bits of whoever leads them only where it is the same."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import distributed
import numpy
import torch

_FLOORS: Final = ("model", "data", "parallel", "sampling")
"""The subpackages that decide what a part is."""


@cache
def program_digest() -> str:
    """Of the code that makes parts, and of the versions of what it computes and speaks with."""
    digest = hashlib.sha256()
    for name, library in (("torch", torch), ("numpy", numpy), ("distributed", distributed)):
        digest.update(f"{name} {library.__version__}\0".encode())
    for floor in _FLOORS:
        spec = find_spec(f"ditmoe.{floor}")
        assert spec is not None and spec.submodule_search_locations, floor
        folder = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(folder.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{floor}/{file.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
