"""Safetensors files written one tensor at a time, and read, through torch.distributed.checkpoint.

torch's own writer serialises all that a rank writes in memory before the first byte is on the disk, and asks for a
second copy of the rank's share. The sizes are known beforehand, so the header can go first and each tensor follow
it; the checksum is taken on the way. Equal tensors give equal files.

torch's own reader believes what a header says. A checkpoint may come from a stranger, so its headers are checked
first.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, Field, StrictInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import first_problem, leads_out, regular_file_bytes

BYTES = 4
"""Of an element: a checkpoint holds float32 only."""
_SUFFIX: Final = ".safetensors"
_PLACES: Final = "DCP_SHARDING_INFO"
"""Key of a header's metadata: where each of its tensors begins in the whole, as JSON."""


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a file per rank, `shard-00001.safetensors` and on, which HuggingFaceStorageReader reads."""

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
    """A safetensors header: each tensor's place in the file, and in the metadata its place in the whole."""
    entries: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    end = 0
    for item in items:
        data = item.tensor_data
        assert data is not None and data.properties.dtype == torch.float32
        begin, end = end, end + data.chunk.sizes.numel() * BYTES
        entries[item.index.fqn] = {
            "dtype": "F32",
            "shape": list(data.chunk.sizes),
            "data_offsets": [begin, end],
        }
        offsets[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
    assert len(entries) == len(items), "names are given once in a file"
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


class ShardReader(HuggingFaceStorageReader):
    """Reads the files that `ShardWriter` wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """What the headers of all files say; read once.

        Raises:
            UserError: the folder is not there, or a header is not one that `ShardWriter` writes.
        """
        if self._metadata is not None:
            return self._metadata
        try:
            files = sorted(file for file in self._folder.iterdir() if file.name.endswith(_SUFFIX))
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be read ({error.strerror or error})") from None
        tensors: dict[str, TensorStorageMetadata] = {}
        storage: dict[MetadataIndex, _HFStorageInfo] = {}
        for file in files:
            for key, chunk in _stored_chunks(file):
                known = tensors.setdefault(key, TensorStorageMetadata(_FLOAT32, torch.Size((0, 0)), []))
                known.chunks.append(chunk)
                ends = (offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
                known.size = torch.Size(map(max, known.size, ends))
                index = MetadataIndex(fqn=key, offset=chunk.offsets)
                storage[index] = _HFStorageInfo(str(file), chunk.sizes, torch.float32)
        self._metadata = Metadata(
            dict(tensors), storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id)
        )
        return self._metadata


_FLOAT32: Final = TensorProperties(dtype=torch.float32)
_Offset = Annotated[StrictInt, Field(ge=0, lt=2**40)]


class _Place(BaseModel):
    """Where a tensor of a file begins in the whole."""

    saved_offsets: Annotated[list[_Offset], Field(min_length=2, max_length=2)]


_places: Final = TypeAdapter(dict[str, _Place])


def _stored_chunks(file: Path) -> list[tuple[str, ChunkStorageMetadata]]:
    """Key and place of each tensor of a file. UserError where its header is not one that `ShardWriter` writes."""
    try:
        if leads_out(file, file.parent):
            raise UserError(f"{file}: is a link that leads out of its folder, expected a file")
        regular_file_bytes(file)
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            shapes = {key: stored.get_shape() for key, stored in slices.items()}
            kinds = {key: stored.get_dtype() for key, stored in slices.items()}
            places = _places.validate_json((opened.metadata() or {}).get(_PLACES, "{}"))
    except ValidationError as error:
        raise UserError(f"{file}: {_PLACES} of its header cannot be read ({first_problem(error)})") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a {_SUFFIX} file ({str(error)[:200]})") from None
    for key, shape in shapes.items():
        if key not in places or kinds[key] != "F32" or len(shape) != 2:
            found = f"{kinds[key]} of shape {shape}" if key in places else f"without its place in {_PLACES}"
            raise UserError(f"{file}: {key[:100]!r} is {found}, expected F32, a matrix and its place")
    return [
        (key, ChunkStorageMetadata(torch.Size(places[key].saved_offsets), torch.Size(shape)))
        for key, shape in shapes.items()
    ]
