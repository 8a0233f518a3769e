"""Work spread over processes: the order is kept, and however a worker ends, the reader hears of it at once."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ditmoe.data.storage.stopping import STOP_SIGNALS
from ditmoe.data.storage.workers import Crew, in_order
from ditmoe.model.errors import UserError

LARGE = 300_000
"""Bytes of a result that no pipe takes at once."""


def children() -> set[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(child) for child in text.split()}


@pytest.fixture(autouse=True)
def _leaves_no_process() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_order(workers: int, count: int) -> None:
    assert list(in_order(lambda item: item * item, range(count), workers)) == [n * n for n in range(count)]


def test_an_endless_iterator_is_read_ahead_and_closed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    results = in_order(lambda item: np.full(LARGE, item, np.uint8), items(), 2, prefetch=3)
    assert [int(next(results)[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(taken) == 4 + 2 * 3
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_in_their_place(workers: int) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise UserError("sample 3: broken")
        return item

    results = in_order(work, range(9), workers)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(UserError, match=r"^sample 3: broken$"):
        next(results)


def test_a_mistake_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        list(in_order(lambda item: 1 // item, [1, 0], 1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("busy", ["computing", "writing", "idle"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_killed_worker_is_a_message_at_once(busy: str, in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was doing, and whichever thread reads; nothing is raised anywhere else."""
    if busy == "computing":
        monkeypatch.setattr("ditmoe.data.storage.workers.LONGEST_END", 1.0)  # which the other one would take
    before = children()

    def work(item: int) -> np.ndarray:
        if busy == "computing" and item >= 2:
            time.sleep(600)
        return np.zeros(LARGE if busy == "writing" else 1, np.uint8)

    results = in_order(work, itertools.count() if busy != "idle" else range(3), 2)
    next(results)
    victim = min(children() - before)
    time.sleep(0.2)
    os.kill(victim, signal.SIGKILL)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            for _ in results:
                pass
        except UserError as error:
            caught.append(error)

    if in_thread:
        reader = threading.Thread(target=read)
        reader.start()
        reader.join()
    else:
        read()
    if busy == "idle":
        assert not caught or "SIGKILL" in str(caught[0])
    else:
        assert "a reading process was killed by SIGKILL" in str(caught[0])


def test_a_worker_leaves_signals_to_the_main_process() -> None:
    before = children()
    results = in_order(lambda item: os.getpid(), itertools.count(), 1)
    (worker,) = {next(results)}
    assert {worker} == children() - before
    for number in STOP_SIGNALS:
        os.kill(worker, number) if number != signal.SIGTERM else os.system(f"kill -TERM {worker}")
    time.sleep(0.2)
    assert {next(results) for _ in range(20)} == {worker}
    results.close()  # type: ignore[attr-defined]


def test_workers_end_with_the_main_process(tmp_path: Path) -> None:
    file = tmp_path / "worker"

    def main() -> None:
        results = in_order(lambda item: np.full(LARGE, os.getpid() % 256, np.uint8), itertools.count(), 2)
        next(results)
        file.write_text(" ".join(map(str, children())))
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        main()
    os.waitpid(pid, 0)
    workers = [int(text) for text in file.read_text().split()]
    assert len(workers) == 2
    while any(Path(f"/proc/{worker}/stat").exists() and not _zombie(worker) for worker in workers):
        time.sleep(0.05)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_processes_may_start_before_there_is_work() -> None:
    before = children()
    crew = Crew(lambda item: (item, os.getpid()), 2)
    started = children() - before
    assert len(started) == 2
    results = list(crew.in_order(range(6)))
    assert [item for item, _ in results] == list(range(6)) and {pid for _, pid in results} == started
    assert not children() - before
    unused = Crew(len, 2)
    unused.close()
    unused.close()
    assert not children() - before
