"""Where the processes of a run meet: whom they wait for, and that those of another start disturb nobody."""

import gc
import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ditmoe.model.errors import MissingProcessesError, UserError
from ditmoe.parallel import meeting
from ditmoe.parallel.meeting import Meeting, Patience, meet
from ditmoe.parallel.ranks import ThisProcess

SOON = Patience(0.1, 0.6)


class UntilTold:
    """A patience that is over when the test says so."""

    told_after = 60.0

    def __init__(self) -> None:
        self._over = threading.Event()

    @property
    def limit(self) -> float:
        return 0.0 if self._over.is_set() else 60.0

    def end(self) -> None:
        self._over.set()


@pytest.fixture(autouse=True)
def _no_store_is_left() -> Iterator[None]:
    """A store has threads, and errors keep it in cycles: a process forked later would abort on collecting it."""
    yield
    gc.collect()


@pytest.fixture
def port() -> Iterator[int]:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


def test_waiting_says_for_whom_and_where_and_ends(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    expected = rf"rank 0 waited \d+ s at 127\.0\.0\.1:{port} .*2 of 3 .*rank 1, 2"
    with pytest.raises(MissingProcessesError, match=expected) as error:
        meet(ThisProcess(0, 3, 0, port=port, started=True), SOON)
    assert error.value.ranks == (1, 2)
    said = capsys.readouterr().err
    assert re.search(rf"rank 0 waits at 127\.0\.0\.1:{port} .*2 of 3 .*rank 1, 2; for 0\.6 s at most", said)


def test_a_rank_without_the_first(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    expected = rf"rank 2 waited \d+ s in vain for rank 0 at 127\.0\.0\.1:{port}"
    with pytest.raises(MissingProcessesError, match=expected) as error:
        meet(ThisProcess(2, 3, 2, port=port, started=True), SOON)
    assert error.value.ranks == (0,)
    assert capsys.readouterr().err.count("rank 2 waits for rank 0 at") == 1


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match=r"rank 1 waited .* for rank 0 at no\.such\.host\.invalid:29500"):
        meet(ThisProcess(1, 2, 1, "no.such.host.invalid", 29500, started=True), SOON)


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf":{port} \(MASTER_ADDR:MASTER_PORT\): in use by another program"):
            meet(ThisProcess(0, 2, 0, port=port, started=True), SOON)


def test_all_come_and_none_comes_twice(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_meetings", itertools.repeat(0))  # here all ranks are in one process

    def come(rank: int) -> Meeting:
        return meet(ThisProcess(rank, 3, rank, port=port, started=True), Patience(60, 60))

    with ThreadPoolExecutor() as pool:
        coming = [pool.submit(come, rank) for rank in (0, 1)]
        while not _knows(port, "rank 1"):
            time.sleep(0.02)
        with pytest.raises(UserError, match="RANK = 1 is set for two processes"):
            come(1)
        come(2)
        for each in coming:
            each.result(60)


def _knows(port: int, key: str) -> bool:
    """Whether a rank has said that it is there."""
    from torch.distributed import PrefixStore, TCPStore

    try:
        store = TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)
    except RuntimeError:
        return False
    return bool(PrefixStore("ditmoe/0/0", store).check([key]))


def together(ranks: int, first: ThisProcess) -> None:
    """Let all ranks come to a meeting, each in a thread; raises what the first to fail raised."""
    failed: list[Exception] = []
    met: list[Meeting] = []  # rank 0 holds the store as long as others look into it

    def come(rank: int) -> None:
        try:
            met.append(meet(replace(first, rank=rank, ranks=ranks), Patience(60, 20)))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if failed:
        raise failed[0]
    assert len(met) == ranks


@pytest.fixture
def _one_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks are in one process here, and each counts its meetings by itself."""
    monkeypatch.setattr(meeting, "_meetings", itertools.repeat(0))


def named(port: int, name: str = "7.0.1") -> ThisProcess:
    return ThisProcess(port=port, meeting=name, started=True)


def listening(port: int, serve: Callable[[socket.socket], None]) -> socket.socket:
    """Another program at a port."""
    listener = socket.create_server(("", port))

    def work() -> None:
        while True:
            try:
                visitor, _ = listener.accept()
            except OSError:
                return
            serve(visitor)

    threading.Thread(target=work, daemon=True).start()
    return listener


@pytest.mark.usefixtures("_one_meeting")
@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9\r\n", b"", b"ditmoe/7.0.0/0 3 1\n", b"ditmoe/7.0.1/1 3 1\n", b"\xff" * 5000, b"no end"],
    ids=["another server", "nothing", "an earlier attempt", "another meeting of ours", "noise", "half a line"],
)
def test_a_port_in_use_is_passed_over(port: int, answer: bytes) -> None:
    def serve(visitor: socket.socket) -> None:
        with visitor:
            visitor.sendall(answer)

    with listening(port, serve):
        together(3, named(port))


@pytest.mark.usefixtures("_one_meeting")
def test_who_listens_and_says_nothing_is_passed_over(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as rank 0 of an earlier attempt that is stopped."""
    monkeypatch.setattr(meeting, "_ANSWER_SECONDS", 0.2)
    visitors: list[socket.socket] = []
    with listening(port, visitors.append):
        together(3, named(port))
    assert visitors


@pytest.mark.usefixtures("_one_meeting")
def test_processes_of_an_earlier_attempt_do_not_join(port: int) -> None:
    """They look at the same ports, with ranks and a number of processes that would fit."""
    patience = UntilTold()

    def left_over(rank: int) -> str:
        with pytest.raises(MissingProcessesError) as error:
            meet(replace(named(port, "7.0.0"), rank=rank, ranks=3), patience)  # type: ignore[arg-type]
        return str(error.value)

    with ThreadPoolExecutor() as pool:
        left = [pool.submit(left_over, rank) for rank in (0, 1)]
        time.sleep(0.3)  # they are there first
        together(3, named(port))
        assert not any(each.done() for each in left)
        patience.end()
        first, second = [each.result(60) for each in left]
    assert "1 of 3 processes (WORLD_SIZE), rank 2" in first
    # Rank 0 may give up a moment before it.
    assert "1 of 3 processes (WORLD_SIZE), rank 2" in second or "rank 1 found rank 0" in second


@pytest.mark.usefixtures("_one_meeting")
def test_the_first_gives_up_before_the_others(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = UntilTold()

    def say(what: str, _: Patience) -> None:
        if what.startswith("rank 1 waits at"):  # it has come
            patience.end()

    monkeypatch.setattr(meeting, "_say_waiting", say)

    def first() -> None:
        with pytest.raises(MissingProcessesError, match=r"2 of 4 processes \(WORLD_SIZE\), rank 2, 3"):
            meet(replace(named(port), ranks=4), patience)  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(first)
        expected = rf"rank 1 found rank 0 at 127\.0\.0\.1:{port} .* and lost it again: "
        with pytest.raises(MissingProcessesError, match=expected) as error:
            meet(replace(named(port), rank=1, ranks=4), Patience(0, 30))
        assert error.value.ranks == ()  # rank 0 told who is missing
        waiting.result(60)


@pytest.mark.usefixtures("_one_meeting")
def test_the_store_is_gone_before_it_is_found(port: int) -> None:
    """Rank 0 has told where it is, and ends."""
    with socket.socket() as bound:  # at which nobody listens
        bound.bind(("127.0.0.1", 0))
        told = f"ditmoe/7.0.1/0 3 {bound.getsockname()[1]}\n".encode()

        def serve(visitor: socket.socket) -> None:
            with visitor:
                visitor.sendall(told)

        expected = rf"rank 1 found rank 0 at 127\.0\.0\.1:{port} .* and lost it again: "
        with listening(port, serve), pytest.raises(MissingProcessesError, match=expected):
            meet(replace(named(port), rank=1, ranks=3), SOON)


@pytest.mark.usefixtures("_one_meeting")
def test_nodes_that_start_another_number(port: int) -> None:
    patience = UntilTold()

    def wait() -> None:
        with pytest.raises(UserError, match="3 of 4 processes"):
            meet(replace(named(port), ranks=4), patience)  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(wait)
        with pytest.raises(UserError, match="rank 2 is one of 6 processes, but rank 0 of 4; expected as many"):
            meet(replace(named(port), rank=2, ranks=6), Patience(60, 20))
        patience.end()
        waiting.result(60)


def test_all_ports_in_use(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PORTS_TRIED", 1)
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=rf":{port} .*in use by another program; expected a free port"),
    ):
        meet(replace(named(port), ranks=2), SOON)
