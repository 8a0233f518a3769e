"""Named arrays in one file (npz), whose checksums tell when it is damaged. Nothing is unpickled."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.parts import DamagedPart

Arrays = dict[str, NDArray[Any]]

UNREADABLE: Final = (OSError, ValueError, MemoryError)
"""What `named_arrays` and its arrays raise where a file is no npz, or damaged."""


def write_arrays(arrays: Mapping[str, NDArray[Any]], file: BinaryIO) -> None:
    """Write the arrays to an open file."""
    np.savez(file, **arrays)  # type: ignore[arg-type]


@contextmanager
def named_arrays(file: BinaryIO) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The arrays of an npz file, each read when it is asked for. What is wrong with it is one of UNREADABLE."""
    magic = file.read(6)
    if magic == b"\x93NUMPY":
        raise ValueError("one array without a name (npy), expected several with names (npz)")
    if not magic.startswith(b"PK"):  # numpy would advise to unpickle it
        raise ValueError("no archive of arrays")
    file.seek(0)
    with _plain_errors():
        stored = np.load(file, allow_pickle=False)
    with stored:
        yield _Arrays(stored)


class _Arrays(Mapping[str, NDArray[Any]]):
    """An npz file's members, of which numpy gives the bytes where they are no arrays."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __contains__(self, name: object) -> bool:
        return name in self._stored.files

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._stored.files:
            raise KeyError(name)
        with _plain_errors():
            array = self._stored[name]
            if not isinstance(array, np.ndarray):
                raise ValueError(f"the member {name} is no array")
            return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.files)

    def __len__(self) -> int:
        return len(self._stored.files)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """ValueError for what readers of zip files and of numpy headers raise on damaged bytes: nearly anything."""
    try:
        yield
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def read_arrays(path: Path, only: Collection[str] | None = None) -> Arrays:
    """Read all arrays, or only some. DamagedPart when the file is not there, or is damaged."""
    try:
        with path.open("rb") as file, named_arrays(file) as stored:
            return {key: stored[key] for key in only or stored}
    except (*UNREADABLE, KeyError) as error:
        raise DamagedPart(path, error) from error
