"""Which process this is: the environment is read in one place, and what is wrong in it is one message."""

import random

import pytest
import torch

from ditmoe.model.errors import UserError
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
    assert this_process(TORCHRUN) == ThisProcess(3, 4, 1, "node7", 29500, started=True, processes_here=2)
    assert this_process({}) == this_process({"WORLD_SIZE": "1", "MASTER_PORT": "x"}) == ThisProcess()
    assert this_process({"RANK": "0", "WORLD_SIZE": "1"}) == ThisProcess(started=True)
    ours = {**TORCHRUN, "DITMOE_MEETING": "7.0.1", "DITMOE_NODE_TASK": "1"}
    task = ThisProcess(3, 4, 1, "node7", 29500, "7.0.1", started=True, node_task=True, processes_here=2)
    assert this_process(ours) == task


def test_how_many_share_the_machine() -> None:
    assert this_process({"DITMOE_WORKERS_HERE": "8"}).processes_here == 8
    assert this_process({**TORCHRUN, "DITMOE_WORKERS_HERE": "8"}).processes_here == 8
    without = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert this_process(without).processes_here == 4
    with pytest.raises(UserError, match="DITMOE_WORKERS_HERE = 'many' in the environment"):
        this_process({"DITMOE_WORKERS_HERE": "many"})


def test_who_starts_ranks() -> None:
    assert this_process({}).starts_ranks
    assert not this_process(TORCHRUN).starts_ranks
    assert this_process({**TORCHRUN, "DITMOE_NODE_TASK": "1"}).starts_ranks


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
