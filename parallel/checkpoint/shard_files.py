"""Safetensors files, written one tensor at a time through torch.distributed.checkpoint, and read.

torch's own writer serialises all that a rank writes in memory before the first byte is on the disk, and asks for a
second copy of the rank's share. The sizes are known beforehand, so the header can go first and each tensor follow
it; the checksum is taken on the way. Equal tensors give equal files.

torch's own reader believes what a header says, and makes objects of each of its tensors, of which a checkpoint has
millions. A checkpoint may come from a stranger, so headers are checked first, and become columns of numbers.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import leads_out, regular_file_bytes
from ditmoe.parallel.boxes import Box
from ditmoe.parallel.checkpoint.box_reading import BYTES
from ditmoe.parallel.checkpoint.box_table import FileBoxes, Numbers

SUFFIX: Final = ".safetensors"
_LARGEST_HEADER: Final = 100_000_000
"""Bytes, as the format has it."""
_LARGEST_PLACE: Final = 2**40
_PLACES: Final = "DCP_SHARDING_INFO"
"""Key of a header's metadata: where each of its tensors begins in the whole, as JSON."""


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a file per rank, `shard-00001.safetensors` and on, which any reader of the format reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.files: dict[str, dict[str, Any]] = {}
        """On the first rank, when all is written: file name → `bytes` and `sha256`."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        written: list[WriteResult] = []
        if plan.items:
            file = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            items = sorted(plan.items, key=lambda item: item.index.fqn)
            tensors = (planner.resolve_data(item) for item in items)
            facts = _write(file, _header(items), tensors)  # type: ignore[arg-type]  # no bytes are planned
            written.append(WriteResult(MetadataIndex(file.name), facts["bytes"], facts))
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: keep what the ranks say of their files."""
        self.files = {result.index.fqn: result.storage_data for rank in results for result in rank}


def _header(items: Sequence[WriteItem]) -> bytes:
    """A safetensors header of what is planned to be written."""
    boxes = {}
    for item in items:
        data = item.tensor_data
        assert data is not None and data.properties.dtype == torch.float32
        boxes[item.index.fqn] = Box(*data.chunk.offsets, *data.chunk.sizes)
    assert len(boxes) == len(items), "names are given once in a file"
    return header_of(boxes)


def header_of(boxes: Mapping[str, Box]) -> bytes:
    """A safetensors header: each tensor's place in the file, and in the metadata its place in the whole.

    Args:
        boxes: by key, in the order of the file.
    """
    entries: dict[str, Any] = {}
    end = 0
    for key, box in boxes.items():
        begin, end = end, end + box.size * BYTES
        entries[key] = {"dtype": "F32", "shape": [box.rows, box.columns], "data_offsets": [begin, end]}
    offsets = {key: {"saved_offsets": [box.row, box.column]} for key, box in boxes.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", _PLACES: json.dumps(offsets)}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header


def _write(file: Path, header: bytes, tensors: Iterator[Tensor]) -> dict[str, Any]:
    """Write a file to the disk; its size and checksum. Of tensors on a GPU one at a time is copied to the host."""
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        stream.write(header)
        digest.update(header)
        for tensor in tensors:
            content = tensor.detach().cpu().contiguous().numpy().data.cast("B")
            stream.write(content)
            digest.update(content)
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}


class _HeaderError(Exception):
    """What is wrong with a header."""


def read_header(file: Path) -> FileBoxes:
    """The boxes of a file that `ShardWriter` wrote.

    Raises:
        UserError: as `read_head`.
    """
    return read_head(file)[1]


def read_head(file: Path) -> tuple[bytes, FileBoxes]:
    """The bytes of a file before its tensors, and the boxes that they tell of.

    Raises:
        UserError: its header is not one that `ShardWriter` writes, or the file is not as long as that says.
    """
    try:
        if leads_out(file, file.parent):
            raise UserError(f"{file}: is a link that leads out of its folder, expected a file")
        size = regular_file_bytes(file)
        with file.open("rb") as stream:
            begin = stream.read(8)
            length = int.from_bytes(begin, "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _HeaderError(f"cannot be read as a {SUFFIX} file (a header of {length} bytes)")
            header = stream.read(length)
        return begin + header, _boxes_of(header, size)
    except _HeaderError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read as a {SUFFIX} file ({error.strerror or error})") from None


@lru_cache(maxsize=4)  # the files of one rank have one header in all parts of a checkpoint
def _boxes_of(header: bytes, size: int) -> FileBoxes:
    """The boxes that a file's header tells of.

    Args:
        size: bytes of the file.
    """
    entries = _parsed(header, f"cannot be read as a {SUFFIX} file")
    metadata = entries.pop("__metadata__", None)
    text = metadata.get(_PLACES, "{}") if isinstance(metadata, dict) else "{}"
    unreadable = f"{_PLACES} of its header cannot be read"
    if not isinstance(text, str):
        raise _HeaderError(f"{unreadable} (it is no text)")
    places = _parsed(text, unreadable)
    for key, entry in entries.items():
        if key not in places or not _is_matrix(entry):
            shape = entry.get("shape") if isinstance(entry, dict) else entry
            kind = entry.get("dtype") if isinstance(entry, dict) else None
            found = (
                f"{str(kind)[:20]} of shape {str(shape)[:100]}"
                if key in places
                else f"without its place in {_PLACES}"
            )
            raise _HeaderError(f"{key[:100]!r} is {found}, expected F32, a matrix and its place")
    try:
        place_T2 = _pairs([places[key]["saved_offsets"] for key in entries])
    except (KeyError, TypeError, ValueError) as error:
        raise _HeaderError(f"{unreadable} ({type(error).__name__}: {str(error)[:100]})") from None
    try:
        size_T2 = _pairs([entry["shape"] for entry in entries.values()])
        bytes_T2 = _pairs([entry["data_offsets"] for entry in entries.values()])
        _check_bytes(size_T2, bytes_T2, size - 8 - len(header))
    except ValueError as error:
        raise _HeaderError(f"cannot be read as a {SUFFIX} file ({str(error)[:200]})") from None
    names = [key.partition("#")[0] for key in entries]
    return FileBoxes.of(names, np.concatenate((place_T2, size_T2), 1), bytes_T2[:, 0] + 8 + len(header))


def _parsed(text: str | bytes, problem: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _HeaderError(f"{problem} ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise _HeaderError(f"{problem} (it is a {type(value).__name__}, expected names and values)")
    return value


def _is_matrix(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("dtype") != "F32":
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return isinstance(shape, list) and len(shape) == 2 and isinstance(offsets, list) and len(offsets) == 2


def _pairs(lists: list[Any]) -> Numbers:
    """`[T, 2]` of whole numbers from 0 to below 2⁴⁰. ValueError where they are not."""
    flat = [number for pair in lists for number in _pair(pair)]
    if not set(map(type, flat)) <= {int}:
        raise ValueError("a place or a size is no whole number")
    if flat and not (min(flat) >= 0 and max(flat) < _LARGEST_PLACE):
        raise ValueError("a place or a size is below 0 or too large")
    return np.array(flat, np.int64).reshape(-1, 2)


def _pair(found: Any) -> list[Any]:
    if not isinstance(found, list) or len(found) != 2:
        raise ValueError("expected two numbers")
    return found


def _check_bytes(size_T2: Numbers, bytes_T2: Numbers, total: int) -> None:
    """ValueError unless tensors of these sizes lie behind each other, and are just so many bytes."""
    expected_T = size_T2.astype(float).prod(1) * BYTES
    if not (size_T2 > 0).all() or not (bytes_T2[:, 1] - bytes_T2[:, 0] == expected_T).all():
        raise ValueError("a tensor has other bytes than its shape says")
    order = np.argsort(bytes_T2[:, 0])
    if not np.array_equal(np.append(bytes_T2[order, 0], total), np.insert(bytes_T2[order, 1], 0, 0)):
        raise ValueError("its tensors are not all of it, one behind the other")
