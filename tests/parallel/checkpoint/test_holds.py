"""Nobody reads a checkpoint that is let go in the same moment, and none that is read is let go."""

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe.parallel.checkpoint.folder import checkpoint_path
from ditmoe.parallel.checkpoint.holds import CheckpointGoneError, letting_go, reading
from ditmoe.parallel.checkpoint.marker import MARKER


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path, 3)
    path.mkdir(parents=True)
    (path / MARKER).write_text("{}")
    return path


@pytest.mark.parametrize("written_anew", [False, True])
def test_what_goes_between_the_opening_and_the_lock_is_gone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, written_anew: bool
) -> None:
    lock: Callable[..., Any] = fcntl.flock

    def goes_first(file: Any, operation: int) -> None:
        checkpoint.rename(checkpoint.with_name("old.partial"))
        if written_anew:
            checkpoint.mkdir()
            (checkpoint / MARKER).write_text("{}")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", goes_first)
    with pytest.raises(CheckpointGoneError, match="its run has removed it"), reading(checkpoint):
        pass


def test_a_reader_waits_for_who_lets_it_go(checkpoint: Path) -> None:
    found: list[str] = []

    def read() -> None:
        try:
            with reading(checkpoint):
                found.append("read")
        except CheckpointGoneError:
            found.append("gone")

    reader = threading.Thread(target=read, daemon=True)
    with letting_go(checkpoint) as free:
        assert free
        reader.start()
        reader.join(0.2)
        assert found == []  # it has to wait
        checkpoint.rename(checkpoint.with_name("old.partial"))
    reader.join(30)
    assert found == ["gone"]


def test_what_is_read_is_not_let_go(checkpoint: Path) -> None:
    with reading(checkpoint), letting_go(checkpoint) as free:
        assert not free
    with letting_go(checkpoint) as free:
        assert free
    (checkpoint / MARKER).unlink()  # a damaged one, which nobody can read
    with letting_go(checkpoint) as free:
        assert free
