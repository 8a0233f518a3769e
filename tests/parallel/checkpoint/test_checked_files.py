"""A checkpoint's files are read once: for what is wanted of them, and for their checksums."""

import threading
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe.model.errors import UserError
from ditmoe.parallel.boxes import boxes_of_run, matrix_shape, whole
from ditmoe.parallel.checkpoint import box_reading, shard_files
from ditmoe.parallel.checkpoint.box_storage import Piece, StoredBoxes, keyed, save_pieces
from ditmoe.parallel.checkpoint.box_table import FileBoxes
from ditmoe.parallel.checkpoint.checked_files import CheckedFiles, Readers, damage
from ditmoe.parallel.checkpoint.shard_files import header_of
from tests.parallel.checkpoint.together import Together, counted
from tests.parallel.test_boxes import Shares, facts_of, moves, part, pieces_of

PARTS = ("weights", "ema")
SHAPES = {"a": (24, 6), "b": (5, 7), "c": (16,)}


@settings(max_examples=100, deadline=None)
@given(moves(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 60))
def test_all_of_a_file_is_read_and_what_is_wanted_of_it_put_in_place(
    move: tuple[tuple[int, ...], Shares, Shares], dtype: torch.dtype, at_once: int
) -> None:
    """Whatever is wanted, of any layout, of any type, in whatever portions."""
    shape, source, target = move
    rows, columns = matrix_shape(shape)
    matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) % 256
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_reading, "AT_ONCE", at_once)
        (file,) = save_pieces(Path(name) / "weights", pieces_of(shape, source, matrix)).files
        facts = facts_of(Path(name) / "weights" / file)
        stored = StoredBoxes.of(Path(name) / "weights")
        wanted = [
            Piece(p.name, p.shape, p.box, p.tensor.to(dtype))
            for number, p in enumerate(pieces_of(shape, target))
            if number % 3 != 1
        ]
        for head in (b"", (Path(name) / "weights" / file).read_bytes()[:9]):
            for piece in wanted:
                piece.tensor.fill_(-1)
            plan = stored.plan(wanted)
            assert damage(Path(name), f"weights/{file}", facts, head, plan, wanted) is None
            for piece in wanted:
                assert torch.equal(piece.tensor.float(), part(matrix, piece.box))


def written(folder: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """A checkpoint of two parts, a file of each rank in each: the facts of its files."""
    files = {}
    for number, name in enumerate(PARTS):
        for rank in range(ranks):
            (folder / name).mkdir(exist_ok=True)
            file = folder / name / f"shard-{rank + 1:05d}.safetensors"
            pieces = keyed(cut(ranks, rank, number))
            header = header_of({key: piece.box for key, piece in pieces.items()})
            file.write_bytes(header + b"".join(piece.tensor.numpy().tobytes() for piece in pieces.values()))
            files[f"{name}/{file.name}"] = facts_of(file)
    return files


def cut(ranks: int, rank: int, part: int | None) -> list[Piece]:
    """A rank's pieces of all parameters, each cut flat; filled with the values of a part, or of None."""
    pieces = []
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        first, last = size * rank // ranks, size * (rank + 1) // ranks
        for _, box in boxes_of_run(whole(shape), first, last - first):
            memory = torch.full((box.rows, box.columns), -1.0)
            if part is not None:
                memory = value(name, part)[box.row : box.row + box.rows, box.column : box.column + box.columns]
            pieces.append(Piece(name, shape, box, memory.contiguous()))
    return pieces


def value(name: str, part: int) -> torch.Tensor:
    rows, columns = matrix_shape(SHAPES[name])
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + 1000 * part + ord(name)


@pytest.mark.parametrize(("ranks", "readers"), [(1, 1), (5, 5), (6, 3), (3, 1), (2, 5), (5, 3)])
def test_each_byte_is_read_once_where_a_reader_wants_whole_files(tmp_path: Path, ranks: int, readers: int) -> None:
    """And each header, of which all parts of one number are one reader's. Where a file is wanted by several, each
    reads besides what it wants."""
    files = written(tmp_path, ranks)

    def read(among: Readers) -> Any:
        checked = CheckedFiles(tmp_path, files, among)
        assert checked.look() == []
        assert len({id(stored.table) for stored in checked.stored.values()}) == 1
        wanted = {name: cut(readers, among.rank, None) for name in PARTS}
        assert checked.fill(wanted) == []
        return checked.own, wanted

    with counted() as sizes, pytest.MonkeyPatch.context() as patch:
        # The parts have one header, which is parsed once; here by threads that do not wait for each other.
        patch.setattr(shard_files, "_boxes_of", parsed_once())
        found = Together(readers).run(read)
    assert sorted(name for own, _ in found for name in own) == sorted(files)
    for own, _ in found:
        assert set(Counter(name.partition("/")[2] for name in own).values()) <= {len(PARTS)}
    for rank, (_, wanted) in enumerate(found):
        for number, name in enumerate(PARTS):
            for piece, expected in zip(wanted[name], cut(readers, rank, number), strict=True):
                assert torch.equal(piece.tensor, expected.tensor)
    total, once = sizes.total(), sum(facts["bytes"] for facts in files.values())
    if ranks % readers == 0:
        assert sizes == {name: facts["bytes"] for name, facts in files.items()}
    assert once <= total <= once + len(PARTS) * 4 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def parsed_once() -> Any:
    """Parses headers, each once."""
    lock, parsed, parse = threading.Lock(), {}, shard_files._boxes_of.__wrapped__

    def once(header: bytes, size: int) -> FileBoxes:
        with lock:
            if (header, size) not in parsed:
                parsed[header, size] = parse(header, size)
            return parsed[header, size]

    return once


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("kind", ["number", "header", "short", "missing", "not listed"])
def test_damage_is_told_to_all_readers_by_file(tmp_path: Path, readers: int, kind: str) -> None:
    """Also to those who want nothing of the file, and all that there is of it."""
    files = written(tmp_path, 4)
    hurt = [tmp_path / "weights" / "shard-00002.safetensors", tmp_path / "ema" / "shard-00004.safetensors"]
    words = "its contents have changed (checksum differs from the one in checkpoint.json)"
    for file in hurt:
        if kind == "number":
            flip(file, -3)
        elif kind == "header":
            flip(file, 40)
        elif kind == "short":
            file.write_bytes(file.read_bytes()[:-4])
            words = "bytes found, expected"
        elif kind == "missing":
            file.unlink()
            words = "missing; expected"
        else:
            del files[f"{file.parent.name}/{file.name}"]
            words = "is not in the list of checkpoint.json"

    def read(among: Readers) -> list[str]:
        checked = CheckedFiles(tmp_path, files, among)
        return checked.look() or checked.fill({name: cut(readers, among.rank, None) for name in PARTS})

    first, *others = Together(readers).run(read)
    assert all(found == first for found in others)
    assert len(first) == len(hurt) and all(words in problem for problem in first)
    assert {problem.split(": ")[0] for problem in first} == {str(file) for file in hurt}


@pytest.mark.parametrize("readers", [1, 2])
def test_what_is_not_there_is_told_to_all_and_damage_before_it(tmp_path: Path, readers: int) -> None:
    files = written(tmp_path, 2)
    beyond = Piece("a", (25, 6), next(iter(whole((25, 6)))), torch.zeros(25, 6))

    def read(among: Readers) -> list[str]:
        checked = CheckedFiles(tmp_path, files, among)
        assert checked.look() == []
        return checked.fill({"weights": [beyond] if among.rank == 0 else []})

    for found in Together(readers).run(read):
        assert isinstance(found, UserError) and "holds 144 of the 150 elements of a" in str(found)
    flip(tmp_path / "ema" / "shard-00001.safetensors", -1)
    for found in Together(readers).run(read):
        assert len(found) == 1 and "its contents have changed" in found[0]
