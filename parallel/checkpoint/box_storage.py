"""Sharded storage of matrices in safetensors files, through torch.distributed.checkpoint.

Every canonical parameter is stored as a matrix, in boxes written by whoever owns them; a reader asks for any other
boxes. So no rank needs more than its own share, whatever the two layouts are. The planners below say which boxes;
torch.distributed.checkpoint moves the bytes, and its safetensors storage keeps all metadata in the files' headers
(its default storage would keep it in a pickle).

A file's header names a tensor once, and a rank may own several boxes of one: the further ones are `name#1` and on.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
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
from ditmoe.parallel.boxes import Box, matrix_shape, tiling_problems, whole
from ditmoe.parallel.checkpoint.shard_files import ShardReader, ShardWriter


@dataclass(frozen=True)
class Piece:
    """A box of one parameter, with the memory that holds it or is to be filled."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    box: Box
    tensor: Tensor
    """`[box.rows, box.columns]`: fp32 to be written; to be filled, of any type and on any device."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Place of the box, in torch.distributed.checkpoint's terms."""
        box = self.box
        return ChunkStorageMetadata(torch.Size([box.row, box.column]), torch.Size([box.rows, box.columns]))


def whole_piece(name: str, tensor: Tensor) -> Piece:
    """A whole parameter in one piece, a view of it."""
    (box,) = whole(tensor.shape)
    return Piece(name, tuple(tensor.shape), box, tensor.view(box.rows, box.columns))


def save_pieces(
    folder: Path, pieces: Sequence[Piece], group: ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Write every rank's pieces; a collective call when a process group exists.

    Args:
        group: all ranks, to talk in; None: the default one.

    Returns:
        On the first rank the files' facts: file name → `bytes` and `sha256`. Elsewhere nothing.

    Raises:
        OSError, or torch's CheckpointException holding each failed rank's error: nothing is to be trusted then.
    """
    writer = ShardWriter(folder)
    alone = not dist.is_initialized()
    with _without_a_word() if alone else nullcontext():
        save({}, storage_writer=writer, planner=_SavePieces(pieces), process_group=group, no_dist=alone)
    return writer.files


def load_pieces(
    folder: Path, pieces: Sequence[Piece], collective: bool = True, reader: ShardReader | None = None
) -> None:
    """Fill every piece's memory from the files.

    Args:
        collective: all ranks call it together, and fail together; each reads the headers of all files.
        reader: of the folder, which has read the headers already if it was used before.

    Raises:
        UserError: a piece is not in the files, or a file's header is not one that `save_pieces` writes.
    """
    reader = reader or ShardReader(folder)
    try:
        with nullcontext() if collective and dist.is_initialized() else _without_a_word():
            load({}, storage_reader=reader, planner=_LoadPieces(pieces, folder), no_dist=not collective)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, UserError)), error) from None


def stored_boxes(folder: Path) -> dict[str, list[Box]]:
    """Parameter → its boxes in the files of a folder, read from the files' headers only.

    Raises:
        UserError: a header is not one that `save_pieces` writes.
    """
    boxes: dict[str, list[Box]] = {}
    for key, stored in ShardReader(folder).read_metadata().state_dict_metadata.items():
        chunks: Sequence[ChunkStorageMetadata] = getattr(stored, "chunks", ())
        boxes.setdefault(_name(key), []).extend(map(_box, chunks))
    return boxes


def missing_elements(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Where the files of a folder do not hold every element of every parameter exactly once, one message each.

    Reads the files' headers only.

    Args:
        shapes: of each parameter that should be there.
    """
    stored = stored_boxes(folder)
    problems = [f"{name} is no parameter of the model" for name in stored if name not in shapes]
    for name, shape in shapes.items():
        problems += tiling_problems(name, stored.get(name, ()), shape)
    return [f"{folder}: {problem}" for problem in problems]


def _key(name: str, number: int) -> str:
    """Key of the box of a parameter with this number (from 0) among those in one file."""
    return f"{name}#{number}" if number else name


def _name(key: str) -> str:
    return key.partition("#")[0]


def _box(chunk: ChunkStorageMetadata) -> Box:
    (row, column), (rows, columns) = chunk.offsets, chunk.sizes
    return Box(row, column, rows, columns)


@contextmanager
def _without_a_word() -> Iterator[None]:
    """Without torch's warning that there is no process group: sampling and converting need none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SavePieces(SavePlanner):
    """Plans to write exactly the given pieces, and proves that together they are whole parameters."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        numbers: Counter[str] = Counter()
        self._pieces: dict[str, Piece] = {}
        for piece in sorted(pieces, key=lambda piece: (piece.name, piece.box)):
            self._pieces[_key(piece.name, numbers[piece.name])] = piece
            numbers[piece.name] += 1

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to take from the (empty) state dict."""

    def create_local_plan(self) -> SavePlan:
        """One write per piece."""
        return SavePlan([_write_item(key, piece) for key, piece in self._pieces.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the pieces of all ranks tile every parameter."""
        boxes: dict[str, list[Box]] = {}
        sizes: dict[str, torch.Size] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None
            name = _name(item.index.fqn)
            boxes.setdefault(name, []).append(_box(data.chunk))
            assert sizes.setdefault(name, data.size) == data.size, f"the ranks differ on the size of {name}"
        for name, found in boxes.items():
            problems = list(tiling_problems(name, found, sizes[name]))
            assert not problems, f"the ranks' pieces do not tile a parameter: {problems}"
        return all_plans, Metadata({})  # the headers hold it

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan is final."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The memory of a piece."""
        return self._pieces[write_item.index.fqn].tensor


def _write_item(key: str, piece: Piece) -> WriteItem:
    properties = TensorProperties(dtype=piece.tensor.dtype)
    data = TensorWriteData(piece.chunk, properties, torch.Size(matrix_shape(piece.shape)))
    return WriteItem(MetadataIndex(key, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _LoadPieces(LoadPlanner):
    """Plans to read exactly the given pieces from whatever boxes are stored."""

    def __init__(self, pieces: Sequence[Piece], folder: Path) -> None:
        self._pieces = {(piece.name, piece.chunk.offsets): piece for piece in pieces}
        assert len(self._pieces) == len(pieces), "a rank holds an element of a parameter at most once"
        self._folder = folder

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the stored boxes' places: parameter → key in the files → boxes."""
        assert metadata is not None
        self._stored: dict[str, dict[str, Any]] = {}
        for key, stored in metadata.state_dict_metadata.items():
            self._stored.setdefault(_name(key), {})[key] = stored

    def create_local_plan(self) -> LoadPlan:
        """The stored boxes that overlap each wanted one."""
        items: list[ReadItem] = []
        for piece in self._pieces.values():
            found = [
                item
                for key, stored in self._stored.get(piece.name, {}).items()
                for item in create_read_items_for_chunk_list(key, stored, [piece.chunk])
            ]
            read = sum(item.lengths.numel() for item in found)
            if read != piece.box.size:
                raise UserError(
                    f"{self._folder}: holds {read} of the {piece.box.size} elements of {piece.name} that are "
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
        """The rectangle of a piece that a stored box fills."""
        index = read_item.dest_index
        assert index.offset is not None
        tensor = self._pieces[_name(index.fqn), index.offset].tensor.detach()
        (row, column), (rows, columns) = read_item.dest_offsets, read_item.lengths
        return tensor[row : row + rows, column : column + columns]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The storage has copied into the piece's memory already."""
