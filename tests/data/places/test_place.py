"""Shards that come from a folder, a command, or a file system of fsspec's; and their fetching ahead."""

import hashlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.fetcher import ShardFetcher
from ditmoe.data.places.place import Place, RemotePlace, open_place
from ditmoe.data.places.reader import Shard
from ditmoe.data.places.transports.base import Ended, Refused, Reply, Stop
from ditmoe.data.shards.index import ShardEntry, load_index
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.source import open_source
from ditmoe.model.errors import UserError

DATA = bytes(range(256)) * 2000
NAME = "it's a $(name)-00000.tar"
# No index may hold such a name; a place copes with it all the same.
ENTRY = ShardEntry.model_construct(file=NAME, samples=1, bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


def place_at(path: str, retries: int = 2, timeout: float = 20) -> tuple[Place, list[float]]:
    waits: list[float] = []
    return open_place(path, retries=retries, timeout=timeout, cache=None, sleep=waits.append), waits


def contents(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 10**7, 0)
    finally:
        os.close(descriptor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME).write_bytes(DATA)
    (tmp_path / "index.json").write_bytes(b"{}")
    return tmp_path


def test_a_local_shard_is_opened_where_it_is(folder: Path) -> None:
    place, _ = place_at(str(folder))
    descriptor = place.open(ENTRY)
    assert os.fstat(descriptor).st_ino == (folder / NAME).stat().st_ino
    assert contents(descriptor) == DATA
    assert place.read("index.json") == b"{}" and not place.remote
    (folder / NAME).write_bytes(DATA[:-1])
    with pytest.raises(ShardFault, match="truncated: 511,999 bytes, and the index says 512,000"):
        place.open(ENTRY)
    (folder / NAME).unlink()
    with pytest.raises(ShardFault, match=r"00000\.tar: could not be opened: No such file") as raised:
        place.open(ENTRY)
    assert raised.value.shard == place.where(NAME) == str(folder / NAME)
    with pytest.raises(UserError, match=r"other\.json: could not be read: No such file"):
        place.read("other.json")


def test_a_pipe_by_the_name_of_a_file_does_not_hang(tmp_path: Path) -> None:
    for name in ("a.tar", "index.json"):
        os.mkfifo(tmp_path / name)
    place, _ = place_at(str(tmp_path))
    with pytest.raises(ShardFault, match=r"a\.tar: could not be opened: not a regular file"):
        place.open(ENTRY.model_copy(update={"file": "a.tar"}))
    with pytest.raises(UserError, match=r"index\.json: could not be read: not a regular file"):
        place.read("index.json")
    with pytest.raises(UserError, match=r"index\.json: could not be read: not a regular file"):
        open_source(SourceConfig(path=str(tmp_path), index=tmp_path / "index.json"))


def test_every_place_gives_the_same_shard(digits: Path, rewrite: Callable[..., str]) -> None:
    entry = load_index(digits).shards[1]
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/same/{entry.file}", (digits / entry.file).read_bytes())
    found = []
    for path in (str(digits), f"pipe:cat {digits}/{{}}", f"file://{digits}", "memory://same"):
        place, waits = place_at(path)
        shard = Shard(place.open(entry), place.where(entry.file), entry)
        found.append([shard.read(member, "png") for member in range(entry.samples)])
        shard.close()
        assert not waits
    assert found == found[:1] * 4 and len(found[0]) == 25


def test_a_command_gets_the_name_quoted(folder: Path) -> None:
    place, waits = place_at(f"pipe:cat {shlex.quote(str(folder))}/{{}}")
    assert contents(place.open(ENTRY)) == DATA
    assert place.read("index.json") == b"{}"
    assert not waits


@pytest.mark.parametrize(
    ("command", "tries", "message"),
    [
        ("cat {}; echo Bad https://u:secret@h/x?key=secret >&2; exit 1", 3, "code 1: Bad https://h/x\\?… .try 3"),
        ("head -c 1000 {}", 3, "broke off after 1,000 of 512,000 bytes .try 3"),
        ("cat {}; kill -9 $$", 3, "code 137"),
        ("cat {}; sleep 60", 3, "no byte for 0.3 seconds"),
        ("sleep 60; cat {}", 3, "no byte for 0.3 seconds"),
        ("cat {} {}", 2, "more than the 512,000 bytes that the index says, 2 times"),
        ("tr '\\000' x < {}", 2, "checksum mismatch"),
        ("no-such-command {}", 1, "ended with code 127"),
        ("cat 'unbalanced {}", 3, "ended with code 2"),
    ],
)
def test_a_command_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, tries: int, message: str
) -> None:
    monkeypatch.chdir(folder)
    place, waits = place_at(f"pipe:{command}", timeout=0.3 if "no byte" in message else 20)
    with pytest.raises(ShardFault, match=message) as raised:
        place.open(ENTRY)
    assert len(waits) == tries - 1
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_command_that_fails_at_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    place, waits = place_at("pipe:test -e tried && exec cat {}; touch tried; cat {}; exit 3")
    assert contents(place.open(ENTRY)) == DATA
    assert waits == [1.0]


def test_a_pipe_needs_a_place_for_the_name() -> None:
    with pytest.raises(UserError, match=r"pipe:cat … has no \{\}: expected") as raised:
        place_at("pipe:TOKEN=secret cat secret.tar")
    assert "secret" not in str(raised.value)
    assert place_at("pipe:PASSWORD='the secret' s3 get --key secret {}")[0].where("a.tar") == "pipe:s3 … a.tar"


def test_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/bucket/data/{NAME}", DATA)
    place, waits = place_at("memory://bucket/data/")
    assert contents(place.open(ENTRY)) == DATA
    with pytest.raises(ShardFault, match=r"memory://bucket/data/b\.tar: no such file"):
        place.open(ENTRY.model_copy(update={"file": "b.tar"}))
    with pytest.raises(UserError, match="no such file"):
        place.read("index.json")
    assert not waits
    reads = []

    class Flaky:
        """Breaks off at every third read, and goes on from the middle."""

        def __init__(self, file: object) -> None:
            self._file = file

        def __enter__(self) -> "Flaky":
            return self

        def __exit__(self, *_: object) -> None: ...

        def seek(self, position: int) -> None:
            self._file.seek(position)  # type: ignore[attr-defined]

        def read(self, size: int) -> bytes:
            reads.append(size)
            if len(reads) % 3 == 2:
                raise RuntimeError("https://key:secret@store broke")
            return self._file.read(100_000)  # type: ignore[attr-defined, no-any-return]

    real = type(memory).open
    monkeypatch.setattr(type(memory), "open", lambda self, path, mode: Flaky(real(self, path, mode)))
    place, waits = place_at("memory://bucket/data", retries=9)
    assert contents(place.open(ENTRY)) == DATA
    assert waits == [1.0, 2.0, 4.0][: len(waits)] and len(waits) > 1
    place, _ = place_at("memory://bucket/data", retries=0)
    reads[:] = [1]
    with pytest.raises(ShardFault, match=r"RuntimeError: https://store broke \(try 1, the last"):
        place.open(ENTRY)


def test_an_object_store_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", lambda *_: ended.wait(20))
    place, waits = place_at("memory://bucket", retries=1, timeout=0.1)
    with pytest.raises(ShardFault, match=r"no byte for 0\.1 seconds"):
        place.open(ENTRY)
    ended.set()
    assert waits == [1.0]


def test_file_systems_that_are_not_there() -> None:
    with pytest.raises(UserError, match="fsspec knows no nonsense://"):
        place_at("nonsense://bucket")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(UserError, match=r"s3:// needs a package that is not installed: .*s3fs"):
            place_at("s3://bucket")


def alive(pattern: str) -> list[str]:
    """Processes that have the text among their arguments, and are no zombies."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            try:
                line = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if pattern in line:
                found.append(line)
    return found


def gone(pattern: str) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not alive(pattern):
            return True
        time.sleep(0.02)
    return False


def test_nothing_of_a_command_outlives_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    place, _ = place_at("pipe:sleep 61.25 & cat {}; true", timeout=0.3)
    with pytest.raises(ShardFault, match="no byte for"):  # the output stays open in the background
        place.open(ENTRY)
    assert gone("sleep 61.25")
    place, _ = place_at("pipe:sleep 61.5 >&2 & cat {}; true")
    assert contents(place.open(ENTRY)) == DATA
    assert gone("sleep 61.5")


@pytest.fixture
def reader(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that fetches a shard, takes it, and prefetches one from a command that stalls."""
    (folder / "cache").mkdir()
    (folder / "whole").write_bytes(DATA)
    program = f"""
        import json, sys, time
        from pathlib import Path
        from ditmoe.data.places.fetcher import ShardFetcher
        from ditmoe.data.shards.index import ShardEntry
        from ditmoe.data.places.place import open_place
        entry = ShardEntry.model_construct(**json.loads({ENTRY.model_dump_json()!r}))
        other = entry.model_copy(update={{"file": "b.tar"}})
        command = "pipe:head -c 300000 whole; test {{}} = b.tar && sleep 62.75; tail -c +300001 whole"
        place = open_place(command, retries=0, timeout=60, cache=Path("cache"))
        fetcher = ShardFetcher(place, [entry, other])
        fetcher.get(0)
        fetcher.prefetch(1)
        print("ready", flush=True)
        sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while not alive("sleep 62.75"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_kill_9_leaves_no_file_and_no_process(reader: subprocess.Popen[str], folder: Path) -> None:
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    assert gone("sleep 62.75")
    assert not list((folder / "cache").iterdir())


def test_a_stall_does_not_hold_the_program_at_its_end(reader: subprocess.Popen[str]) -> None:
    assert reader.stdin is not None
    reader.stdin.write("\n")
    reader.stdin.flush()
    assert reader.wait(timeout=60) == 0  # before the command ends by itself
    assert gone("sleep 62.75")


class Numbered:
    """A transport of shards that are their number, as many as are asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.missing: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def where(self, name: str) -> str:
        return name

    def open(self, name: str, start: int, tag: str | None, stop: Stop) -> "Numbered.Reply":
        self.asked.append(name)
        return Numbered.Reply(self, name, stop)

    class Reply:
        def __init__(self, transport: "Numbered", name: str, stop: Stop) -> None:
            self._transport, self._name, self._stop = transport, name, stop

        def __enter__(self) -> Reply:
            while not self._transport.gate.wait(0.01):
                self._stop.check()
            if self._name in self._transport.missing:
                raise Refused("gone")
            return Reply(0, None, None, iter([self._name.encode()]))

        def __exit__(self, *_: object) -> None: ...


def entry(number: int) -> ShardEntry:
    name = f"{number}.tar"
    return ShardEntry(file=name, samples=1, bytes=len(name), sha256=hashlib.sha256(name.encode()).hexdigest())


ENTRIES = [entry(number) for number in range(20)]


def settle(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_fetching_ahead_is_bounded_and_each_shard_comes_once() -> None:
    transport = Numbered()
    fetcher = ShardFetcher(RemotePlace(transport, 0, None), ENTRIES, ahead=3)
    assert not [each for each in threading.enumerate() if each.name == "shard-fetcher"]
    for number in [*range(8), 2, 2]:
        fetcher.prefetch(number)
    settle(lambda: len(transport.asked) == 3)
    time.sleep(0.05)
    assert transport.asked == ["0.tar", "1.tar", "2.tar"]
    assert contents(fetcher.get(7)) == b"7.tar"  # not begun, so it does not wait for its turn
    for number in range(7):
        assert contents(fetcher.get(number)) == b"%d.tar" % number
    assert sorted(transport.asked) == [f"{number}.tar" for number in range(8)]
    fetcher.close()
    assert contents(fetcher.get(3)) == b"3.tar"
    fetcher.close()


def test_a_failure_is_remembered_for_a_while() -> None:
    transport = Numbered()
    transport.missing = {"1.tar", "2.tar"}
    now = [0.0]
    fetcher = ShardFetcher(RemotePlace(transport, 0, None), ENTRIES, clock=lambda: now[0])
    fetcher.prefetch(1)
    settle(lambda: len(transport.asked) == 1)
    for _ in range(1000):
        for number in (1, 2):
            with pytest.raises(ShardFault, match=f"{number}.tar: gone"):
                fetcher.get(number)
            fetcher.prefetch(number)
    assert transport.asked == ["1.tar", "2.tar"]
    transport.missing.clear()
    now[0] = 601.0
    assert contents(fetcher.get(1)) == b"1.tar"
    fetcher.close()


def test_closing_ends_a_fetch_that_stalls_and_gives_everything_back() -> None:
    transport = Numbered()
    before = len(os.listdir("/proc/self/fd"))
    fetcher = ShardFetcher(RemotePlace(transport, 0, None), ENTRIES, ahead=2)
    fetcher.prefetch(0)
    settle(lambda: len(transport.asked) == 1)
    transport.gate.clear()
    fetcher.prefetch(1)
    settle(lambda: len(transport.asked) == 2)
    fetcher.close()  # the transport would never answer
    assert not [each for each in threading.enumerate() if each.name == "shard-fetcher"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_works_on_after_a_fork() -> None:
    fetcher = ShardFetcher(RemotePlace(Numbered(), 0, None), ENTRIES, ahead=2)
    fetcher.prefetch(0)
    assert contents(fetcher.get(0)) == b"0.tar"
    fetcher.prefetch(1)
    fetcher.prefetch(2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)
            fetcher.prefetch(5)
            good = [contents(fetcher.get(number)) for number in (5, 1, 2)] == [b"5.tar", b"1.tar", b"2.tar"]
            fetcher.close()
            code = 0 if good else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(fetcher.get(1)) == b"1.tar"
    fetcher.close()


def test_a_shard_under_way_is_waited_for() -> None:
    transport = Numbered()
    transport.gate.clear()
    fetcher = ShardFetcher(RemotePlace(transport, 0, None), ENTRIES)
    fetcher.prefetch(4)
    settle(lambda: len(transport.asked) == 1)
    threading.Timer(0.1, transport.gate.set).start()
    assert contents(fetcher.get(4)) == b"4.tar"
    assert transport.asked == ["4.tar"]
    fetcher.close()


def test_a_pause_ends_when_it_is_asked() -> None:
    stop = Stop()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Ended):
        stop.wait(30)
    with pytest.raises(Ended), stop.calling(lambda: None):
        pass
