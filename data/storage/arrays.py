"""Named arrays in one file (npz), whose checksums tell when it is damaged. Nothing is unpickled."""

import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.parts import DamagedPart

Arrays = dict[str, NDArray[Any]]


def write_arrays(arrays: Mapping[str, NDArray[Any]], file: BinaryIO) -> None:
    """Write the arrays to an open file."""
    np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path, only: Collection[str] | None = None) -> Arrays:
    """Read all arrays, or only some. DamagedPart when the file is not there, or is damaged."""
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":  # numpy would advise to unpickle it
                raise ValueError("no archive of arrays")
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in only or stored.files}
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        OverflowError,
        MemoryError,
        SyntaxError,
        RuntimeError,  # of zipfile: encrypted, or packed in a way that it does not know
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DamagedPart(path, error) from error
