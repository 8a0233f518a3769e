"""Safetensors files written one tensor at a time, through torch.distributed.checkpoint.

torch's own writer serialises all that a rank writes in memory before the first byte is on the disk, and asks for a
second copy of the rank's share. The sizes are known beforehand, so the header can go first and each tensor follow
it; the checksum is taken on the way. Equal tensors give equal files.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

BYTES = 4
"""Of an element: a checkpoint holds float32 only."""


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
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
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
