"""Sharded storage of flattened tensors in safetensors files, through torch.distributed.checkpoint.

Every canonical parameter is stored flat, as runs (name, start, length) written by whoever owns them; a reader
asks for any other runs. So no rank needs more than its own share, whatever the two layouts are. The planners
below say which runs; torch.distributed.checkpoint moves the bytes, and its safetensors storage keeps all
metadata in the files' headers (its default storage would keep it in a pickle).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ditmoe.model.errors import UserError


@dataclass(frozen=True)
class Run:
    """A run of one flattened tensor, with the memory that holds it or is to be filled."""

    name: str
    size: int
    """Elements of the whole tensor."""
    start: int
    tensor: Tensor
    """`[length]`."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Place of the run, in torch.distributed.checkpoint's terms."""
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.tensor.numel()]))


def save_runs(folder: Path, runs: Sequence[Run]) -> None:
    """Write every rank's runs; a collective call when a process group exists.

    Raises:
        OSError, or torch's CheckpointException holding each failed rank's error: nothing is to be trusted then.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_without_a_word():
        save({}, storage_writer=writer, planner=_SaveRuns(runs))


def load_runs(folder: Path, runs: Sequence[Run], collective: bool = True) -> None:
    """Fill every run's memory from the files.

    Args:
        collective: all ranks call it together, and fail together; each reads the headers of all files.

    Raises:
        UserError: a run is not in the files.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with _alone_without_a_word():
        load({}, storage_reader=reader, planner=_LoadRuns(runs, folder), no_dist=not collective)


def missing_elements(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Where the files of a folder do not hold every element of every tensor exactly once, one message each.

    Reads the files' headers only.

    Args:
        sizes: elements of each tensor that should be there.
    """
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    problems = [f"{folder}: {name} is not in it" for name in sizes if name not in stored]
    problems += [f"{folder}: {name} is no parameter of the model" for name in stored if name not in sizes]
    for name, size in sizes.items():
        if name in stored:
            chunks: Sequence[ChunkStorageMetadata] = getattr(stored[name], "chunks", ())
            problems += [f"{folder}: {problem}" for problem in _tiling_problems(name, chunks, size)]
    return problems


@contextmanager
def _alone_without_a_word() -> Iterator[None]:
    """Without torch's warning that there is no process group: sampling and converting need none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SaveRuns(SavePlanner):
    """Plans to write exactly the given runs, and proves that together they are whole tensors."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = {run.name: run for run in runs}
        assert len(self._runs) == len(runs), "a rank owns at most one run of a tensor"

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to take from the (empty) state dict."""

    def create_local_plan(self) -> SavePlan:
        """One write per run."""
        return SavePlan([_write_item(run) for run in self._runs.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the runs of all ranks tile every tensor."""
        chunks: dict[str, TensorStorageMetadata] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None
            stored = chunks.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            stored.chunks.append(data.chunk)
        for name, stored in chunks.items():
            problems = [*_tiling_problems(name, stored.chunks, stored.size[0])]
            assert not problems, f"the ranks' runs do not tile a tensor: {problems}"
        return all_plans, Metadata(dict(chunks))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan is final."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The memory of a run."""
        return self._runs[write_item.index.fqn].tensor.detach()


def _write_item(run: Run) -> WriteItem:
    properties = TensorProperties(dtype=run.tensor.dtype)
    data = TensorWriteData(run.chunk, properties, torch.Size([run.size]))
    return WriteItem(MetadataIndex(run.name, torch.Size([run.start])), WriteItemType.SHARD, tensor_data=data)


def _tiling_problems(name: str, chunks: Sequence[ChunkStorageMetadata], size: int) -> Iterator[str]:
    """Where runs do not hold each of a flat tensor's `size` elements exactly once, one message each."""
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[0]):
        if chunk.offsets[0] != end:
            kind = "twice" if chunk.offsets[0] < end else "nowhere"
            first, last = sorted((chunk.offsets[0], end))
            yield f"elements {first} to {last - 1} of {name} are {kind} in it"
        end = max(end, chunk.offsets[0] + chunk.sizes[0])
    if end != size:
        yield f"{end} elements of {name} found, expected {size}"


class _LoadRuns(LoadPlanner):
    """Plans to read exactly the given runs from whatever runs are stored."""

    def __init__(self, runs: Sequence[Run], folder: Path) -> None:
        self._runs = {(run.name, run.start): run for run in runs}
        self._folder = folder

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the stored runs' places."""
        assert metadata is not None
        self._stored: Mapping[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """The stored pieces that overlap each wanted run."""
        items: list[ReadItem] = []
        for run in self._runs.values():
            stored = self._stored.get(run.name)
            found = [] if stored is None else create_read_items_for_chunk_list(run.name, stored, [run.chunk])
            read = sum(item.lengths[0] for item in found)
            if read != run.tensor.numel():
                raise UserError(
                    f"{self._folder}: holds {read} of the {run.tensor.numel()} elements of {run.name} that are "
                    "needed; expected a whole checkpoint of this model"
                )
            items.extend(found)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan is final."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never called: only tensors are stored."""
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The stretch of a run that a stored piece fills."""
        offset = read_item.dest_index.offset
        assert offset is not None
        run = self._runs[read_item.dest_index.fqn, offset[0]]
        return run.tensor.detach().narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The storage has copied into the run's memory already."""
