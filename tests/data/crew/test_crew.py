"""A crew makes parts whatever befalls its workers, and lets nobody else in; on toy parts."""

import os
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from distributed.security import Security

from ditmoe import toy_parts  # type: ignore[attr-defined]
from ditmoe.data.crew.leader import Crew, lead_crew
from ditmoe.data.crew.tasks import Task
from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError

STALLED = 5.0


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Two workers on this machine."""
    workers = [{"OMP_NUM_THREADS": "3", "TOY_WORKER": str(number)} for number in range(2)]
    folder = tmp_path_factory.mktemp("leads") / "crew"
    with lead_crew(folder, workers, stalled_seconds=STALLED, part_seconds=15) as crew:
        yield crew


@pytest.fixture
def toys(tmp_path: Path, journal: Path) -> Callable[..., Any]:
    """(count, …) → the task of some squares."""

    def make(count: int, **more: Any) -> Task:
        request = {"folder": str(tmp_path / "out"), "journal": str(journal), "count": count, **more}
        return Task.of(toy_parts.squares, request)

    return make


def squares(count: int) -> bytes:
    return "".join(f"{part * part} " for part in range(count)).encode()


def eventually(what: Callable[[], Any], seconds: float = 60) -> Any:
    """What is true at last."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never was"
        time.sleep(0.05)
    return found


def attempts(journal: Path, part: object = "*") -> list[int]:
    """The processes that began to make a part, in their order."""
    names = [path.name.split("-") for path in journal.glob(f"{part}-*")]
    return [int(pid) for _, pid, when in sorted(names, key=lambda name: int(name[2]))]


def test_both_make_parts_and_none_twice(
    crew: Crew, toys: Callable[..., Any], tmp_path: Path, journal: Path
) -> None:
    task, told = toys(8, seconds=0.6), list[int]()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "3.txt").write_bytes(b"9 ")
    assert crew.make(task, task.parts(), on_progress=told.append) == 7
    assert told == list(range(1, 9)) and task.parts().result() == squares(8)
    assert len(attempts(journal)) == 7 and not attempts(journal, 3) and os.getpid() not in attempts(journal)
    assert {path.read_text() for path in journal.iterdir()} == {"0", "1"}
    assert crew.make(task, task.parts()) == 0
    assert [path.name for path in (tmp_path / "out" / "claims").iterdir()] == []


def test_mistakes_and_faults_end_the_work_with_their_message(crew: Crew, toys: Callable[..., Any]) -> None:
    task = toys(4, fates={"2": "refused"})
    with pytest.raises(UserError, match=r"^part 2: cannot be made$"):
        crew.make(task, task.parts())
    task = toys(4, fates={"2": "fault"})
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process, at .*2\.txt:.*ZeroDivisionError: part 2"):
        crew.make(task, task.parts())
    task = toys(4)
    crew.make(task, task.parts())
    assert task.parts().result() == squares(4)


def test_a_worker_may_start_processes_of_its_own(crew: Crew, toys: Callable[..., Any]) -> None:
    """As those that decode images."""
    task = toys(4, fates={"1": "shared", "3": "shared"})
    crew.make(task, task.parts())
    assert task.parts().result() == squares(4)


def test_only_functions_of_the_package_are_called() -> None:
    with pytest.raises(AssertionError):
        Task("os:system", '"true"').parts()


def test_nobody_without_the_certificate_is_let_in(crew: Crew) -> None:
    address = read_object(crew.folder / "scheduler.json")["address"]
    with pytest.raises(OSError, match="TLS certificate does not match"):
        Client(address, security=Security.temporary(), timeout=10, set_as_default=False)
    own = psutil.Process()
    eventually(lambda: crew.members() == 2)
    listening = {
        connection.laddr
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    # Scheduler, nannies, workers; no web server.
    assert len(listening) == 5 and {place.ip for place in listening} == {"127.0.0.1"}
    stranger = ssl.create_default_context()
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    for place in listening:
        with socket.create_connection(place, timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with suppress(ConnectionResetError):
                assert plain.recv(1) == b""
        connection = socket.create_connection(place, timeout=10)
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"), connection:
            stranger.wrap_socket(connection).recv(1)


def test_a_second_leader_is_refused(crew: Crew) -> None:
    second = lead_crew(crew.folder, [])
    with pytest.raises(UserError, match=rf"another process leads this crew \(process {os.getpid()} on"), second:
        pass


def test_killed_workers_are_replaced_and_their_parts_made_again(
    crew: Crew, toys: Callable[..., Any], journal: Path
) -> None:
    fates = {"4": "dies once", "5": "loses its GPU once"}
    task, ends = toys(6, seconds=1.0, fates=fates), list[int]()

    def kill() -> None:
        ends.append(eventually(lambda: attempts(journal, 1))[0])
        os.kill(ends[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    crew.make(task, task.parts())
    killer.join()
    assert task.parts().result() == squares(6)
    again = attempts(journal, 1)
    assert again[0] == ends[0] != again[1] and len(attempts(journal, 4)) == len(attempts(journal, 5)) == 2
    eventually(lambda: crew.members() == 2)


def test_a_stopped_worker_is_noticed_and_its_part_made_elsewhere(
    crew: Crew, toys: Callable[..., Any], journal: Path
) -> None:
    eventually(lambda: crew.members() == 2)
    task, stopped = toys(4, seconds=1.0), list[int]()

    def stop() -> None:
        stopped.append(eventually(lambda: attempts(journal, 1))[0])
        os.kill(stopped[0], signal.SIGSTOP)

    stopper = threading.Thread(target=stop)
    stopper.start()
    crew.make(task, task.parts())
    stopper.join()
    assert task.parts().result() == squares(4)
    again = attempts(journal, 1)
    assert again[0] == stopped[0] != again[1]


@pytest.mark.slow
def test_a_part_that_hangs_is_made_again_and_one_that_always_kills_is_named(
    crew: Crew, toys: Callable[..., Any], journal: Path
) -> None:
    task = toys(2, fates={"1": "hangs once"})
    crew.make(task, task.parts())
    assert task.parts().result() == squares(2) and len(attempts(journal, 1)) == 2
    task = toys(4, fates={"3": "dies"})
    with pytest.raises(UserError, match=r"3\.txt: 11 worker processes ended while they made it"):
        crew.make(task, task.parts())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_number_of_random_kills_changes_nothing(crew: Crew, toys: Callable[..., Any], journal: Path) -> None:
    """CREW_KILLS of them (100 if not said), every fourth a SIGSTOP."""
    kills, count = int(os.environ.get("CREW_KILLS", "100")), 60
    task, over, sent = toys(count, seconds=0.5), threading.Event(), list[int]()

    def kill() -> None:
        chance = random.Random(0)
        while not over.wait(chance.uniform(0.2, 2.0)) and len(sent) < kills:
            victim = chance.choice(psutil.Process().children() or [None])
            with suppress(psutil.Error):
                if victim is not None and "spawn_main" in " ".join(victim.cmdline()):
                    victim.send_signal(signal.SIGSTOP if len(sent) % 4 == 3 else signal.SIGKILL)
                    sent.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while len(sent) < kills:
            crew.make(task, task.parts())
            assert task.parts().result() == squares(count)
            for path in task.parts().folder.glob("*.txt"):
                path.unlink()
    finally:
        over.set()
        killer.join()
    assert len(sent) == kills and not list(task.parts().claims.folder.iterdir())
