"""Chunks are drawn once, whatever dies, and chunks of other settings are refused."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from ditmoe.model.errors import UserError
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages


def labels_of(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64) % 3


def images(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), dtype=np.uint8)


def store_in(folder: Path, settings: str = "a", count: int = 23, size: int = 5) -> ChunkStore:
    return ChunkStore(folder / "chunks", count, size, settings)


class Drawer:
    """Remembers what it drew, and dies at one chunk."""

    def __init__(self, dies_at: int | None = None, counts: bool = True) -> None:
        self.counts = counts
        self.drawn: list[int] = []
        self.dies_at = dies_at

    def __call__(self, numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        assert (label_N == labels_of(numbers)).all()
        if self.dies_at is not None and self.dies_at in numbers:
            raise KeyboardInterrupt
        self.drawn += numbers
        return DrawnImages(images(numbers), np.array(numbers) if self.counts else None)


def test_an_interrupted_job_draws_only_what_is_missing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first = Drawer(dies_at=12)
    with pytest.raises(KeyboardInterrupt):
        store.drawn_by(first, labels_of).draw_pending()
    assert first.drawn == list(range(10))
    assert store.pending() == [2, 3, 4]
    second = Drawer()
    assert store.drawn_by(second, labels_of).draw_pending() == 3
    assert second.drawn == list(range(10, 23))
    assert [store.read(c).label_N.tolist() for c in range(5)] == [
        labels_of(store.numbers(c)).tolist() for c in range(5)
    ]
    assert [int(i) for c in range(5) for i in store.read(c).image_NHWC[:, 0, 0, 0]] == list(range(23))
    assert Drawer().drawn == [] and store.drawn_by(Drawer(dies_at=0), labels_of).draw_pending() == 0


def test_evaluations_are_averaged_over_all_images(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.drawn_by(Drawer(), labels_of).draw_pending()
    assert store.nfe() == sum(range(23)) / 23  # the last chunk is smaller
    store.path(2).unlink()
    store.drawn_by(Drawer(counts=False), labels_of).draw_pending()
    assert store.nfe() is None
    store.path(2).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"00002\.npz: unreadable"):
        store.nfe()


def test_chunks_of_other_settings_are_refused(tmp_path: Path) -> None:
    store_in(tmp_path).drawn_by(Drawer(), labels_of).draw_pending()
    with pytest.raises(UserError, match=r"00001\.npz.*settings a.*settings b"):
        store_in(tmp_path, settings="b").read(1)
    with pytest.raises(UserError, match=r"00004\.npz: a chunk of 3 images from number 20.*expected 5"):
        store_in(tmp_path, count=25).read(4)


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.drawn_by(Drawer(), labels_of).draw_pending()
    data = bytearray(store.path(2).read_bytes())
    data[100] ^= 0xFF
    for damaged in (bytes(data), bytes(data[:50]), b""):
        store.path(2).write_bytes(damaged)
        with pytest.raises(UserError, match=r"00002\.npz.*delete the file"):
            store.read(2)


def test_a_damaged_chunk_is_drawn_anew_where_it_can_be(tmp_path: Path) -> None:
    store, drawer = store_in(tmp_path), Drawer()
    store = store.drawn_by(drawer, labels_of)
    store.draw_pending()
    whole = store.path(2).read_bytes()
    for damaged in (whole[:50], b"", None):
        if damaged is None:
            store.path(2).unlink()
        else:
            store.path(2).write_bytes(damaged)
        drawer.drawn.clear()
        assert store.read(2).label_N.tolist() == labels_of(store.numbers(2)).tolist()
        assert drawer.drawn == store.numbers(2) and store.path(2).read_bytes() == whole
    store.path(1).write_bytes(b"")
    assert store.nfe() == sum(range(23)) / 23


def test_a_chunk_that_holds_objects_is_not_unpickled(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.folder.mkdir()
    np.savez(store.path(0), images=np.array([print], dtype=object), labels=0, first=0, settings="a")
    with pytest.raises(UserError, match="unreadable"):
        store.read(0)


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    store = store_in(tmp_path)
    with pytest.raises(UserError, match=r"00000\.npz.*No space left"):
        store.drawn_by(Drawer(), labels_of).draw_pending()
    assert store.pending() == [0, 1, 2, 3, 4]
    assert not [path for path in store.folder.rglob("*") if path.is_file() and path.parent.name != "claims"]


def _work(folder: str, rank: int, log: str) -> None:
    def draw(numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        with open(log, "a") as file:
            file.write(f"{numbers[0]}\n")
        return DrawnImages(images(numbers))

    store_in(Path(folder), count=200, size=4).drawn_by(draw, labels_of).draw_pending(rank=rank, ranks=3)


def test_processes_share_the_chunks_and_none_is_drawn_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [context.Process(target=_work, args=(str(tmp_path), rank, str(log))) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(0, 200, 4))
