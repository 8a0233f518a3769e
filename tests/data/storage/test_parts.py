"""Parts are made once each by processes that share a folder, whoever is killed, and damaged ones anew."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from ditmoe.data.storage import claims as claims_module
from ditmoe.data.storage import parts as parts_module
from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.parts import DamagedPart, Parts, make_parts, run_parts
from ditmoe.model.errors import UserError

FORK = multiprocessing.get_context("fork")


def squares(
    folder: Path, count: int = 12, make: Callable[[int], Arrays] | None = None
) -> Parts[Arrays, Arrays, int]:
    """Part i is i²; their sum follows."""

    def total(found: Iterable[Arrays]) -> int:
        values = [int(each["square"]) for each in found]
        assert values == [i * i for i in range(count)]  # in order, each once
        return sum(values)

    names = [f"{i:03d}.npz" for i in range(count)]
    return Parts(
        folder,
        names,
        make or (lambda i: {"square": np.array(i * i)}),
        write_arrays,
        lambda i: read_arrays(folder / names[i]),
        total,
    )


def identity(path: Path) -> tuple[int, int]:
    """Changes when a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_is_missing_is_made_and_what_follows_is_the_same(tmp_path: Path) -> None:
    parts = squares(tmp_path)
    assert parts.make_one(3) and not parts.make_one(3)
    before = identity(parts.path(3))
    told: list[int] = []
    assert run_parts(parts, on_progress=told.append) == sum(i * i for i in range(12))
    assert told[0] == 1 and told[-1] == 12 and told == sorted(told)
    assert identity(parts.path(3)) == before
    assert files(tmp_path) == list(parts.names)
    assert make_parts(parts) == 0


def test_only_some_of_them(tmp_path: Path) -> None:
    parts, told = squares(tmp_path), list[int]()
    assert make_parts(parts, only=[5, 2], on_progress=told.append) == 2
    assert files(tmp_path) == ["002.npz", "005.npz"] and told[0] == 0 and told[-1] == 2


def refused(*args: object) -> None:
    raise OSError(38, "Function not implemented")


def slow_log(folder: Path, log: Path, seconds: float) -> Parts[Arrays, Arrays, int]:
    """Writes down when a part is begun and when it is there, and by whom."""

    def write_down(text: str) -> None:
        with open(log, "a") as file:
            file.write(f"{text} {os.getpid()}\n")

    def make(part: int) -> Arrays:
        write_down(f"begin {part}")
        time.sleep(seconds)
        return {"square": np.array(part * part)}

    def write(arrays: Arrays, file: BinaryIO) -> None:
        write_arrays(arrays, file)
        file.flush()
        time.sleep(seconds / 2)

    return replace(squares(folder, 40, make), write=write)


def work(folder: Path, log: Path, rank: int, ranks: int, seconds: float) -> None:
    assert run_parts(slow_log(folder, log, seconds), rank=rank, ranks=ranks) == sum(i * i for i in range(40))


@pytest.mark.parametrize("locks", ["refused", "of no effect"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_no_part_is_lost_and_none_made_twice_beyond_theirs(
    tmp_path: Path, seed: int, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refused if locks == "refused" else lambda *args: None)
    monkeypatch.setattr(parts_module, "WAIT_SECONDS", 0.01)
    dice, log = random.Random(seed), tmp_path / "log"
    log.touch()
    folder = tmp_path / "parts"
    workers = {}

    def start(rank: int) -> None:
        workers[rank] = FORK.Process(target=work, args=(folder, log, rank, 3, 0.03))
        workers[rank].start()

    for rank in range(3):
        start(rank)
    killed = []
    while len(killed) < 8:
        time.sleep(dice.uniform(0.005, 0.06))
        rank = dice.randrange(3)
        if not workers[rank].is_alive():
            break
        os.kill(workers[rank].pid, signal.SIGKILL)
        workers[rank].join(30)
        killed.append(workers[rank].pid)
        start(rank)
    for worker in workers.values():
        worker.join(60)
        assert worker.exitcode == 0
    assert len(killed) >= 3
    begun: dict[int, list[int]] = {}
    for line in log.read_text().splitlines():
        _, part, pid = line.split()
        begun.setdefault(int(part), []).append(int(pid))
    assert sorted(begun) == list(range(40))
    for part, pids in begun.items():
        assert all(pid in killed for pid in pids[:-1]), (part, pids, killed)
    assert files(folder) == [f"{i:03d}.npz" for i in range(40)]  # neither drafts nor claims are left


def test_the_others_go_on_at_once_when_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the time that a holder on another machine would be given."""
    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 1000.0)
    log, folder = tmp_path / "log", tmp_path / "parts"
    log.touch()
    stuck = FORK.Process(target=work, args=(folder, log, 0, 1, 1000.0))
    stuck.start()
    while not log.read_text():
        time.sleep(0.01)
    stuck.kill()  # not waited for: it stays as a zombie
    other = FORK.Process(target=work, args=(folder, log, 0, 1, 0.0))
    other.start()
    other.join(60)
    assert other.exitcode == 0
    stuck.join(30)


def test_looks_do_not_grow_with_the_parts_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the folder for each look at it, and a fixed number of questions for each part that is made."""
    count = 400
    parts = squares(tmp_path, count)
    for part in range(count - 10):
        parts.path(part).touch()
    monkeypatch.setattr(parts_module, "WAIT_SECONDS", 1000.0)  # one look at the start, and one at the end
    calls = {"scandir": 0, "stat": 0}

    def counted(name: str, function: Callable[..., Any], of: Path | None = None) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += of is None or Path(path) == of
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "scandir", counted("scandir", os.scandir, tmp_path))
    monkeypatch.setattr(os, "stat", counted("stat", os.stat))
    monkeypatch.setattr(os.path, "exists", counted("stat", os.path.exists))
    monkeypatch.setattr(parts_module.time, "sleep", lambda seconds: pytest.fail("waits for nothing"))
    assert make_parts(parts) == 10
    assert calls["scandir"] == 2
    assert calls["stat"] <= 10 * 10
    calls["stat"] = 0
    assert make_parts(parts) == 0 and calls["stat"] <= 2


def test_damaged_parts_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = squares(tmp_path)
    expected = run_parts(parts)
    whole = parts.path(4).read_bytes()
    middle = len(whole) // 2
    for damage in (b"", b"x", whole[:-30], whole[:40], whole[:middle] + b"\xff\xff" + whole[middle + 2 :]):
        parts.path(4).write_bytes(damage)
        assert run_parts(parts) == expected
        assert parts.path(4).read_bytes() == whole
        assert "004.npz: unreadable" in capsys.readouterr().err
    parts.path(4).unlink()
    assert parts.result() == expected
    hopeless = replace(parts, write=lambda arrays, file: None)
    parts.path(4).write_bytes(b"")
    with pytest.raises(DamagedPart, match=r"004\.npz: unreadable"):
        run_parts(hopeless)


def test_one_that_lost_its_claim_throws_its_work_away(tmp_path: Path) -> None:
    def make(part: int) -> Arrays:
        if part == 3 and not lost:
            lost.append(part)
            (tmp_path / "claims" / "003.npz.0").unlink()  # as if taken for dead
            squares(tmp_path).make_one(3)  # and made by another
            before.append(identity(squares(tmp_path).path(3)))
        return {"square": np.array(part * part)}

    lost: list[int] = []
    before: list[tuple[int, int]] = []
    assert run_parts(squares(tmp_path, make=make)) == sum(i * i for i in range(12))
    assert identity(squares(tmp_path).path(3)) == before[0]
    assert files(tmp_path) == list(squares(tmp_path).names)


def fail_at(part: int, message: str) -> Callable[[int], Arrays]:
    def make(number: int) -> Arrays:
        if number == part:
            raise UserError(message)
        time.sleep(0.05)
        return {"square": np.array(number * number)}

    return make


def run_and_tell(folder: Path, rank: int, told: Any, make: Callable[[int], Arrays]) -> None:
    try:
        run_parts(squares(folder, 40, make), rank=rank, ranks=2)
    except UserError as error:
        told[rank] = str(error)


def test_a_part_that_cannot_be_made_ends_all_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "FAILURE_SECONDS", 0.0)
    manager = FORK.Manager()
    told = manager.dict()
    makes: Sequence[Callable[[int], Arrays]] = (
        fail_at(5, "shard x, sample 7: no picture"),
        fail_at(-1, ""),
    )
    workers = [
        FORK.Process(target=run_and_tell, args=(tmp_path, rank, told, make)) for rank, make in enumerate(makes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert dict(told) == dict.fromkeys(range(2), "shard x, sample 7: no picture")
    (note,) = (tmp_path / "claims").glob("005.npz.*.failed")
    assert json.loads(note.read_text()) == told[0]
    # A later start tries again, and does not hear of what was.
    assert run_parts(squares(tmp_path, 40)) == sum(i * i for i in range(40))
    assert files(tmp_path) == [f"{i:03d}.npz" for i in range(40)]
    manager.shutdown()


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"000\.npz: could not be written: No space left on device"):
        make_parts(squares(tmp_path))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".failed"]


def test_a_part_is_written_while_the_next_one_is_made(tmp_path: Path) -> None:
    begun = [threading.Event() for _ in range(12)]
    made: list[int] = []

    def make(part: int) -> Arrays:
        begun[part].set()
        made.append(part)
        assert len(made) <= len(files(tmp_path / "claims")) + len(list(tmp_path.glob("*.npz"))) + 1
        return {"square": np.array(part * part)}

    def write(arrays: Arrays, file: BinaryIO) -> None:
        part = round(float(arrays["square"]) ** 0.5)
        assert part == 11 or begun[part + 1].wait(30), "the next one waits for this one"
        assert part >= 10 or not begun[part + 2].is_set(), "more than one waits to be written"
        write_arrays(arrays, file)

    told: list[int] = []
    parts = replace(squares(tmp_path, make=make), write=write)
    assert make_parts(parts, on_progress=told.append) == 12
    assert made == list(range(12)) and told == sorted(told) and told[-1] == 12
    assert files(tmp_path) == list(parts.names)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("of the program")])
def test_what_fails_in_the_writing_thread_ends_the_work_with_its_own_message(
    tmp_path: Path, error: Exception
) -> None:
    made: list[int] = []

    def make(part: int) -> Arrays:
        made.append(part)
        return {"square": np.array(part * part)}

    def write(arrays: Arrays, file: BinaryIO) -> None:
        if int(arrays["square"]) == 9:
            raise error
        write_arrays(arrays, file)

    message = r"003\.npz: could not be written: No space left" if isinstance(error, OSError) else "of the program"
    with pytest.raises(UserError if isinstance(error, OSError) else ValueError, match=message):
        make_parts(replace(squares(tmp_path, make=make), write=write))
    assert made == [0, 1, 2, 3, 4]
    left = [name for name in files(tmp_path) if not name.endswith(".failed")]
    assert left == ["000.npz", "001.npz", "002.npz"]  # neither drafts nor claims
    assert run_parts(squares(tmp_path)) == sum(i * i for i in range(12))


def test_what_is_made_is_written_when_the_next_one_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard x"):
        make_parts(squares(tmp_path, make=fail_at(2, "shard x")))
    assert [name for name in files(tmp_path) if not name.endswith(".failed")] == ["000.npz", "001.npz"]


def test_without_hard_links_parts_are_made_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert run_parts(squares(tmp_path)) == sum(i * i for i in range(12))
    assert files(tmp_path) == list(squares(tmp_path).names)
