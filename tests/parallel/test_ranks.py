"""Which process this is: the environment is read in one place, and what is wrong in it is one message."""

import itertools
import random
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ditmoe.model.errors import UserError
from ditmoe.parallel import processes
from ditmoe.parallel.processes import Patience
from ditmoe.parallel.ranks import ThisProcess, own_device, this_process

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}


def test_what_torchrun_sets() -> None:
    assert this_process(TORCHRUN) == ThisProcess(3, 4, 1, "node7", 29500, started=True)
    assert this_process({}) == this_process({"WORLD_SIZE": "1", "MASTER_PORT": "x"}) == ThisProcess()
    assert this_process({"RANK": "0", "WORLD_SIZE": "1"}) == ThisProcess(started=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "abc"}, "RANK = 'abc'"),
        ({"RANK": "4"}, "RANK = '4' in the environment; expected a whole number from 0 to 3"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": ""}, "RANK = ''"),
        ({"RANK": "٣"}, "RANK = "),
        ({"RANK": "9" * 5000}, "RANK = '999"),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK = 'abc'"),
        ({"LOCAL_RANK": "2"}, "from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": None}, "without WORLD_SIZE"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT = 'abc'"),
        ({"MASTER_PORT": "99999"}, "from 1 to 65535"),
        ({"MASTER_PORT": None}, "without MASTER_PORT"),
        ({"RANK": None}, "WORLD_SIZE = 4 and LOCAL_RANK = 1 in the environment without RANK"),
        ({"RANK": None, "LOCAL_RANK": None}, "unset WORLD_SIZE"),
    ],
)
def test_what_contradicts_itself(changes: dict[str, str | None], words: str) -> None:
    variables = {key: value for key, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        this_process(variables)
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_any_environment_is_a_process_or_a_message() -> None:
    draw = random.Random(0)
    values = ["0", "1", "2", "-1", "abc", "", " 1", "1.0", "1e3", "٣", "99999", "9" * 400, "\n", "0x1"]
    read = 0
    for _ in range(3000):
        variables = {name: draw.choice(values) for name in TORCHRUN if draw.random() < 0.8}
        try:
            process = this_process(variables)
        except UserError as error:
            assert any(name in str(error) for name in TORCHRUN)
        else:
            read += 1
            assert 0 <= process.rank < process.ranks
    assert read > 20


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert own_device("auto", "--processes") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto", "--processes") == torch.device("cuda", 1)
    assert own_device("cpu", "--processes") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"process 1 of this machine has no GPU: 1 found.*--processes 1"):
        own_device("cuda", "--processes")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="LOCAL_RANK is not set"):
        own_device("auto", "--processes")


SOON = Patience(0.1, 0.6)


@pytest.fixture
def port() -> Iterator[int]:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


def test_waiting_says_for_whom_and_where_and_ends(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"rank 0 waited 1 s at 127\.0\.0\.1:{port} .*2 of 3 .*rank 1, 2"):
        processes._meeting_store(ThisProcess(0, 3, 0, port=port, started=True), SOON)
    said = capsys.readouterr().err
    assert re.search(rf"rank 0 waits at 127\.0\.0\.1:{port} .*2 of 3 .*rank 1, 2; for 0\.6 s at most", said)


def test_a_rank_without_the_first(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"rank 2 waited 1 s in vain for rank 0 at 127\.0\.0\.1:{port}"):
        processes._meeting_store(ThisProcess(2, 3, 2, port=port, started=True), SOON)
    assert capsys.readouterr().err.count("rank 2 waits for rank 0 at") == 1


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match=r"rank 1 waited .* for rank 0 at no\.such\.host\.invalid:29500"):
        processes._meeting_store(ThisProcess(1, 2, 1, "no.such.host.invalid", 29500, started=True), SOON)


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf":{port} \(MASTER_ADDR:MASTER_PORT\): in use by another program"):
            processes._meeting_store(ThisProcess(0, 2, 0, port=port, started=True), SOON)


def test_all_come_and_none_comes_twice(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_meetings", itertools.repeat(0))  # here all ranks are in one process
    patience, met = Patience(60, 60), []

    def come(rank: int) -> None:
        met.append(processes._meeting_store(ThisProcess(rank, 3, rank, port=port, started=True), patience))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    while not _knows(port, "rank 1"):
        time.sleep(0.02)
    with pytest.raises(UserError, match="RANK = 1 is set for two processes"):
        come(1)
    come(2)
    for thread in threads:
        thread.join(30)
    assert len(met) == 3


def _knows(port: int, key: str) -> bool:
    """Whether a rank has said that it is there."""
    from torch.distributed import PrefixStore, TCPStore

    try:
        store = TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)
    except RuntimeError:
        return False
    return bool(PrefixStore("ditmoe/0/0", store).check([key]))
