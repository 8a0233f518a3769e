"""Readers of one checkpoint as threads of this process, and what they read of its files."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.checked_files import Readers


class Together:
    """Readers in threads of this process."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._told: dict[int, Any] = {}
        self._barrier = threading.Barrier(ranks, timeout=30)

    def run(self, read: Any) -> list[Any]:
        found: dict[int, Any] = {}

        def one(rank: int) -> None:
            def gather(told: Any) -> list[Any]:
                self._told[rank] = told
                self._barrier.wait()
                every = [self._told[other] for other in range(self.ranks)]
                self._barrier.wait()
                return every

            try:
                found[rank] = read(Readers(rank, self.ranks, gather))
            except UserError as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), name=f"reader {rank}") for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.ranks)]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """File → bytes that are read of it, by whomever."""
    with counted_by(lambda file: file) as found:
        yield found


@contextmanager
def counted_by(key_of: Callable[[str], Any]) -> Iterator[Counter[Any]]:
    """As `counted`, summed by a key of the file, which is asked for in the thread that opens it."""
    found: Counter[Any] = Counter()
    opened: Any = Path.open

    def open_counted(self: Path, *arguments: Any, **named: Any) -> Any:
        stream = opened(self, *arguments, **named)
        key = key_of(f"{self.parent.name}/{self.name}")

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                stream.close()

            def read(self, size: int) -> bytes:
                content: bytes = stream.read(size)
                found[key] += len(content)
                return content

            def readinto(self, memory: Any) -> int:
                count: int = stream.readinto(memory)
                found[key] += count
                return count

            def fileno(self) -> int:
                number: int = stream.fileno()
                return number

            def seek(self, place: int) -> None:
                stream.seek(place)

        return Counted()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_counted)
        yield found
