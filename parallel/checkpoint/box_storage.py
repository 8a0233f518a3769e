"""Sharded storage of matrices in safetensors files.

Every canonical parameter is stored as a matrix, in boxes written by whoever owns them; a reader asks for any other
boxes. So no rank needs more than its own share, whatever the two layouts are. torch.distributed.checkpoint writes
what the planner below says, through its safetensors storage, which keeps all metadata in the files' headers (its
default storage would keep it in a pickle). Who reads needs no word with others: all is in the headers.

A file's header names a tensor once, and a rank may own several boxes of one: the further ones are `name#1` and on.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from ditmoe.model.errors import UserError
from ditmoe.parallel.boxes import Box, matrix_shape, tiling_problems, whole
from ditmoe.parallel.checkpoint.box_reading import Read, Target, read_boxes
from ditmoe.parallel.checkpoint.box_table import BoxTable, FileBoxes, Numbers
from ditmoe.parallel.checkpoint.shard_files import SUFFIX, ShardWriter, read_header


@dataclass(frozen=True)
class Piece:
    """A box of one parameter, with the memory that holds it or is to be filled."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    box: Box
    tensor: Tensor
    """`[box.rows, box.columns]`: fp32 to be written; to be filled, of any type and on any device."""
    scale: float = 1.0
    """What is read is multiplied by it; nothing that is written is."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Place of the box, in torch.distributed.checkpoint's terms."""
        box = self.box
        return ChunkStorageMetadata(torch.Size([box.row, box.column]), torch.Size([box.rows, box.columns]))


def whole_piece(name: str, tensor: Tensor) -> Piece:
    """A whole parameter in one piece, a view of it."""
    (box,) = whole(tensor.shape)
    return Piece(name, tuple(tensor.shape), box, tensor.view(box.rows, box.columns))


@dataclass(frozen=True)
class Written:
    """What all ranks have written, as the first rank knows it; elsewhere nothing."""

    files: dict[str, dict[str, Any]]
    """Name → `bytes` and `sha256`."""
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, whole."""


def save_pieces(folder: Path, pieces: Sequence[Piece], group: ProcessGroup | None = None) -> Written:
    """Write every rank's pieces; a collective call when a process group exists.

    Args:
        group: all ranks, to talk in; None: the default one.

    Raises:
        OSError, or torch's CheckpointException holding each failed rank's error: nothing is to be trusted then.
    """
    writer = ShardWriter(folder)
    alone = not dist.is_initialized()
    planner = _SavePieces(pieces)
    with _without_a_word() if alone else nullcontext():
        save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    return Written(writer.files, planner.shapes)


@dataclass(frozen=True)
class StoredBoxes:
    """What the headers of the files of one part of a checkpoint say."""

    folder: Path
    files: tuple[str, ...]
    """Their names."""
    table: BoxTable
    """Their boxes, with the numbers of their files."""

    @classmethod
    def of(cls, folder: Path) -> "StoredBoxes":
        """Read the headers of all files of a folder.

        Raises:
            UserError: the folder is not there, or a header is not one that `save_pieces` writes.
        """
        files = shard_files(folder)
        return cls(folder, files, BoxTable(read_header(folder / file) for file in files))

    def missing(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Where these boxes do not hold every element of every parameter exactly once, one message each.

        Args:
            shapes: of each parameter that should be there.
        """
        problems = [f"{name} is no parameter of the model" for name in self.table.numbers if name not in shapes]
        for name, boxes in self.table.boxes_of(self.table.untiled(shapes)).items():
            problems += tiling_problems(name, boxes, shapes[name])
        return [f"{self.folder}: {problem}" for problem in problems]

    def plan(self, pieces: Sequence[Piece]) -> list[Read]:
        """What is to be read to fill every piece, file by file, each from its beginning to its end.

        Raises:
            UserError: a piece is not in the files.
        """
        place_W4 = _places(pieces)
        found = self.table.overlaps([piece.name for piece in pieces], place_W4)
        held_W = np.bincount(found.wanted_O, found.place_O4[:, 2:].prod(1), len(pieces)).astype(np.int64)
        for number in np.flatnonzero(held_W != place_W4[:, 2:].prod(1)).tolist():
            piece = pieces[number]
            raise UserError(
                f"{self.folder}: holds {held_W[number]} of the {piece.box.size} elements of {piece.name} that are "
                "needed; expected a whole checkpoint of this model"
            )
        file_O, begin_O = self.table.file_T[found.stored_O], self.table.begin_T[found.stored_O]
        order = np.lexsort((begin_O, file_O))
        columns = (file_O, begin_O, self.table.place_T4[found.stored_O], found.wanted_O, found.place_O4)
        return [Read(*row) for row in zip(*(column[order].tolist() for column in columns), strict=True)]

    def read(self, pieces: Sequence[Piece]) -> None:
        """Fill every piece's memory.

        Raises:
            UserError: a piece is not in the files, or a file cannot be read.
        """
        for number, reads in groupby(self.plan(pieces), key=lambda read: read.file):
            read_part(self.folder / self.files[number], list(reads), pieces)


def read_part(file: Path, reads: Sequence[Read], pieces: Sequence[Piece]) -> None:
    """`read_boxes` into pieces. UserError where the file cannot be read, or ends too early."""
    try:
        read_boxes(file, reads, targets(pieces))
    except EOFError:
        raise UserError(f"{file}: ends before what its header tells of; has it changed?") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def targets(pieces: Sequence[Piece]) -> list[Target]:
    """Pieces as memory to be filled."""
    return [Target(piece.box, piece.tensor, piece.scale) for piece in pieces]


def load_pieces(folder: Path, pieces: Sequence[Piece], stored: StoredBoxes | None = None) -> None:
    """Fill every piece's memory from the files: each file is opened once, and of it read what is needed.

    Args:
        stored: what the headers of the folder's files say; None: they are read.

    Raises:
        UserError: a piece is not in the files, or a file's header is not one that `save_pieces` writes.
    """
    (stored or StoredBoxes.of(folder)).read(pieces)


def shard_files(folder: Path) -> tuple[str, ...]:
    """The names of a folder's files of boxes. UserError: it cannot be read."""
    try:
        return tuple(sorted(file.name for file in folder.iterdir() if file.name.endswith(SUFFIX)))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None


def stored_boxes(folder: Path) -> dict[str, list[Box]]:
    """Parameter → its boxes in the files of a folder, read from the files' headers only.

    Raises:
        UserError: a header is not one that `save_pieces` writes.
    """
    return StoredBoxes.of(folder).table.boxes()


def missing_elements(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """`StoredBoxes.missing` of a folder: reads the files' headers only."""
    return StoredBoxes.of(folder).missing(shapes)


def _places(pieces: Sequence[Piece]) -> Numbers:
    boxes = (piece.box for piece in pieces)
    return np.array([(box.row, box.column, box.rows, box.columns) for box in boxes], np.int64).reshape(-1, 4)


def keyed(pieces: Sequence[Piece]) -> dict[str, Piece]:
    """Pieces by the keys that they have in a file: those of one parameter are numbered."""
    numbers: Counter[str] = Counter()
    found: dict[str, Piece] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.box)):
        number = numbers[piece.name]
        found[f"{piece.name}#{number}" if number else piece.name] = piece
        numbers[piece.name] += 1
    return found


@contextmanager
def _without_a_word() -> Iterator[None]:
    """Without torch's warning that there is no process group: converting needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SavePieces(SavePlanner):
    """Plans to write exactly the given pieces, and proves that together they are whole parameters.

    All that goes to the first rank for that is columns of numbers: plans in torch's own form are objects by the
    million there, on many ranks.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = keyed(pieces)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """On the first rank, when all have said what they write: of every parameter."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to take from the (empty) state dict."""

    def create_local_plan(self) -> SavePlan:
        """What this rank is about to write."""
        return SavePlan([], planner_data=Announced.of(list(self._pieces.values())))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the pieces of all ranks tile every parameter."""
        announced: list[Announced] = [plan.planner_data for plan in all_plans]
        problems = unsound(announced)
        self.shapes = shapes_of(announced)
        assert not problems, f"the ranks' pieces do not tile a parameter: {problems}"
        return [replace(plan, planner_data=None) for plan in all_plans], Metadata({})  # the headers hold it

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """One write per piece."""
        return replace(new_plan, items=[write_item(key, piece) for key, piece in self._pieces.items()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The memory of a piece."""
        return self._pieces[write_item.index.fqn].tensor


@dataclass(frozen=True)
class Announced:
    """What a rank is about to write."""

    boxes: FileBoxes
    shapes: dict[str, tuple[int, ...]]
    """Of their parameters, whole."""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Announced":
        """Pieces without their memory."""
        place_T4 = _places(pieces)
        boxes = FileBoxes.of([piece.name for piece in pieces], place_T4, np.zeros(len(pieces), np.int64))
        return cls(boxes, {piece.name: piece.shape for piece in pieces})


def shapes_of(announced: Sequence[Announced]) -> dict[str, tuple[int, ...]]:
    """The parameters of which any rank is about to write a part."""
    shapes: dict[str, tuple[int, ...]] = {}
    for one in announced:
        for name, shape in one.shapes.items():
            assert shapes.setdefault(name, shape) == shape, f"the ranks differ on the size of {name}"
    return shapes


def unsound(announced: Sequence[Announced]) -> list[str]:
    """Where what all ranks are about to write does not hold every element of its parameters exactly once."""
    shapes = shapes_of(announced)
    table = BoxTable(one.boxes for one in announced)
    found = table.boxes_of(table.untiled(shapes))
    return [problem for name, boxes in found.items() for problem in tiling_problems(name, boxes, shapes[name])]


def write_item(key: str, piece: Piece) -> WriteItem:
    """A piece in torch's own form."""
    properties = TensorProperties(dtype=piece.tensor.dtype)
    data = TensorWriteData(piece.chunk, properties, torch.Size(matrix_shape(piece.shape)))
    return WriteItem(MetadataIndex(key, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=data)
