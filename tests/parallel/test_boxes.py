"""Boxes: any cut of a matrix over tensor and data ranks tiles it, and any other cut reads it back."""

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.parallel.boxes import (
    Box,
    Placement,
    boxes_of_run,
    column_slice,
    matrix_shape,
    row_slices,
    tiling_problems,
    whole,
)
from ditmoe.parallel.checkpoint.box_storage import (
    Announced,
    Piece,
    StoredBoxes,
    load_pieces,
    missing_elements,
    save_pieces,
    stored_boxes,
)
from ditmoe.parallel.checkpoint.box_table import BoxTable

Shares = list[tuple[Placement, int, int]]
"""Of each rank: the placement of its tensor, and its run of it."""


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Shares:
    """A parameter dealt to 1 to 4 tensor ranks by rows, columns or three parts, each cut flat over 1 to 4 more."""
    rows, columns = matrix_shape(shape)
    kinds = ["row", "qkv"] + ["column"] * (len(shape) > 1)
    kind, tensor = draw(st.sampled_from(kinds)), draw(st.integers(1, 4))
    placements = [whole(shape)]
    if kind == "column" and columns % tensor == 0:
        placements = [column_slice(shape, rank, tensor) for rank in range(tensor)]
    elif kind == "row" and rows % tensor == 0:
        placements = [row_slices(shape, rank, tensor) for rank in range(tensor)]
    elif kind == "qkv" and rows % (3 * tensor) == 0:
        placements = [row_slices(shape, rank, tensor, parts=3) for rank in range(tensor)]
    shares = []
    for placement in placements:
        size = sum(box.size for box in placement)
        cuts = draw(st.lists(st.integers(0, size), max_size=3).map(sorted))
        for first, last in zip([0, *cuts], [*cuts, size], strict=True):
            shares.append((placement, first, last - first))
    return shares


@st.composite
def moves(draw: st.DrawFn) -> tuple[tuple[int, ...], Shares, Shares]:
    """A shape, and two layouts of it."""
    rows = draw(st.sampled_from([1, 2, 5, 6, 12, 24]))
    rest = draw(st.sampled_from([(), (1,), (4,), (7,), (12,), (2, 3, 2)]))
    shape = (rows, *rest)
    return shape, draw(layouts(shape)), draw(layouts(shape))


def pieces_of(shape: tuple[int, ...], shares: Shares, matrix: Tensor | None = None) -> list[Piece]:
    """Every rank's pieces, each a view of the rank's own flat memory, as an optimiser holds it."""
    pieces = []
    for placement, start, length in shares:
        memory = torch.full((length,), -1.0)
        if matrix is not None:
            local = torch.cat([part(matrix, slab) for slab in placement])
            memory = local.flatten()[start : start + length].clone()
        for offset, box in boxes_of_run(placement, start, length):
            view = memory[offset : offset + box.size].view(box.rows, box.columns)
            pieces.append(Piece("w", shape, box, view))
    return pieces


def facts_of(file: Path) -> dict[str, Any]:
    """As a marker lists them."""
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def part(matrix: Tensor, box: Box) -> Tensor:
    return matrix[box.row : box.row + box.rows, box.column : box.column + box.columns]


@settings(max_examples=150, deadline=None)
@given(moves())
def test_any_layout_tiles_and_any_other_reads_it(move: tuple[tuple[int, ...], Shares, Shares]) -> None:
    shape, source, target = move
    rows, columns = matrix_shape(shape)
    matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    written = pieces_of(shape, source, matrix)
    assert list(tiling_problems("w", [piece.box for piece in written], shape)) == []
    for piece in written:
        assert piece.tensor.is_contiguous() and torch.equal(piece.tensor, part(matrix, piece.box))
    with TemporaryDirectory() as name:
        folder = Path(name)
        facts = save_pieces(folder, written).files
        assert facts == {file.name: facts_of(file) for file in folder.iterdir()}
        assert missing_elements(folder, {"w": shape}) == []
        assert sorted(stored_boxes(folder)["w"]) == sorted(piece.box for piece in written)
        read = pieces_of(shape, target)
        load_pieces(folder, read)
    for piece in read:
        assert torch.equal(piece.tensor, part(matrix, piece.box))


@settings(max_examples=200, deadline=None)
@given(moves(), st.data())
def test_a_tiling_that_is_spoilt_is_seen(move: tuple[tuple[int, ...], Shares, Shares], data: Any) -> None:
    """A box less, one twice, or one that is moved by a row or column: compared with counting every element."""
    shape, source, _ = move
    boxes = [piece.box for piece in pieces_of(shape, source)]
    chosen = data.draw(st.integers(0, len(boxes) - 1))
    box = boxes[chosen]
    spoilt = data.draw(
        st.sampled_from(
            [
                boxes[:chosen] + boxes[chosen + 1 :],
                [*boxes, box],
                [*boxes[:chosen], Box(box.row + 1, box.column, box.rows, box.columns), *boxes[chosen + 1 :]],
                [*boxes[:chosen], Box(box.row, box.column + 1, box.rows, box.columns), *boxes[chosen + 1 :]],
            ]
        )
    )
    rows, columns = matrix_shape(shape)
    counts = torch.zeros(rows + 1, columns + 1)
    for one in spoilt:
        part(counts, one).add_(1)
    assert not (counts[:rows, :columns] == 1).all() or counts.sum() != rows * columns
    problems = list(tiling_problems("w", spoilt, shape))
    assert problems and all("w" in problem for problem in problems)
    assert table_of({"v": boxes, "w": spoilt}).untiled({"v": shape, "w": shape, "x": (1,)}) == ["w", "x"]
    assert table_of({"v": boxes, "w": boxes, "x": spoilt}).untiled({"v": shape, "w": shape}) == []
    gap = bool((counts[:rows, :columns] == 0).any())
    assert not spoilt or any("nowhere" in problem for problem in problems) == gap
    assert any("twice" in problem for problem in problems) == bool((counts > 1).any())


def table_of(boxes: dict[str, list[Box]]) -> BoxTable:
    """Boxes of several parameters, each box in a file of its own."""
    pieces = [Piece(name, (1,), box, torch.empty(0)) for name, found in boxes.items() for box in found]
    return BoxTable([Announced.of([piece]).boxes for piece in pieces])


@settings(max_examples=100, deadline=None)
@given(st.lists(moves(), min_size=1, max_size=3))
def test_overlaps_are_those_of_each_box_with_each(many: list[tuple[tuple[int, ...], Shares, Shares]]) -> None:
    """Of several parameters, beside wanted ones that are not stored."""
    stored = {
        str(number): [p.box for p in pieces_of(shape, source)] for number, (shape, source, _) in enumerate(many)
    }
    wanted = [
        (str(number), p.box) for number, (shape, _, target) in enumerate(many) for p in pieces_of(shape, target)
    ]
    wanted.append(("not there", Box(0, 0, 1, 1)))
    place_W4 = np.array([(box.row, box.column, box.rows, box.columns) for _, box in wanted])
    table = table_of(stored)
    found = table.overlaps([name for name, _ in wanted], place_W4)
    every = [box for boxes in stored.values() for box in boxes]
    names = [name for name, boxes in stored.items() for _ in boxes]
    expected = set()
    for number, (name, one) in enumerate(wanted):
        for other_number, (other_name, other) in enumerate(zip(names, every, strict=True)):
            top, left = max(one.row, other.row), max(one.column, other.column)
            rows = min(one.row + one.rows, other.row + other.rows) - top
            columns = min(one.column + one.columns, other.column + other.columns) - left
            if name == other_name and rows > 0 and columns > 0:
                expected.add((number, other_number, top, left, rows, columns))
    rows = zip(found.wanted_O.tolist(), found.stored_O.tolist(), found.place_O4.tolist(), strict=True)
    assert sorted((wanted, stored, *place) for wanted, stored, place in rows) == sorted(expected)


def test_a_header_is_read_once_and_a_file_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many boxes of it are wanted."""
    shape = (64, 8)
    matrix = torch.arange(512.0).view(shape)
    runs: Shares = [(whole(shape), 3 * number, 3 if number < 170 else 2) for number in range(171)]
    save_pieces(tmp_path, pieces_of(shape, runs, matrix))
    opened: list[str] = []
    kept: Any = Path.open

    def counted(self: Path, *arguments: Any, **named: Any) -> Any:
        opened.append(self.name)
        return kept(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", counted)
    stored = StoredBoxes.of(tmp_path)
    assert len(opened) == 1
    for first in (0, 5):
        wanted = pieces_of(shape, [(whole(shape), first, 500)])
        stored.read(wanted)
        found = torch.cat([piece.tensor.flatten() for piece in wanted])
        assert torch.equal(found, matrix.flatten()[first : first + 500])
    assert len(opened) == 3


def test_a_file_that_ends_early_while_it_is_read(tmp_path: Path) -> None:
    save_pieces(tmp_path, [Piece("w", (4, 3), Box(0, 0, 4, 3), torch.zeros(4, 3))])
    stored, (file,) = StoredBoxes.of(tmp_path), tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(UserError, match="ends before what its header tells of"):
        stored.read([Piece("w", (4, 3), Box(0, 0, 4, 3), torch.zeros(4, 3))])


def test_a_run_is_at_most_three_boxes_of_a_matrix() -> None:
    """The picture in the module's docstring."""
    (slab,) = row_slices((6, 4), 1, 2)
    assert list(boxes_of_run((slab,), 5, 7)) == [(0, Box(4, 1, 1, 3)), (3, Box(5, 0, 1, 4))]
    assert list(boxes_of_run(whole((6, 4)), 3, 14)) == [
        (0, Box(0, 3, 1, 1)),
        (1, Box(1, 0, 3, 4)),
        (13, Box(4, 0, 1, 1)),
    ]
    queries, keys, values = row_slices((12, 5), 1, 2, parts=3)
    assert (queries.row, keys.row, values.row) == (2, 6, 10)


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    """Whatever the order of the pieces; and other tools read them."""
    tensors = {name: torch.randn(4, 3) for name in "cab"}
    facts = []
    for number, names in enumerate(("abc", "cba")):
        pieces = [Piece(name, (4, 3), Box(0, 0, 4, 3), tensors[name]) for name in names]
        facts.append(save_pieces(tmp_path / str(number), pieces).files)
    assert facts[0] == facts[1]
    with safe_open(tmp_path / "0" / "shard-00001.safetensors", "pt") as file:
        assert list(file.keys()) == ["a", "b", "c"]
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in "abc")


def test_a_box_that_is_not_stored(tmp_path: Path) -> None:
    save_pieces(tmp_path, [Piece("w", (4, 3), Box(0, 0, 4, 3), torch.zeros(4, 3))])
    missing = Piece("w", (5, 3), Box(3, 0, 2, 3), torch.zeros(2, 3))
    with pytest.raises(UserError, match="holds 3 of the 6 elements of w that are needed"):
        load_pieces(tmp_path, [missing])
