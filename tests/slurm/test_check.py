"""The check of a job's nodes, part by part: what each finds, what it names, and that none waits for ever."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe.parallel import meeting
from ditmoe.slurm import check, supervise
from ditmoe.slurm.check import MARK, NodeReports, check_command, group_problems, node_problems
from ditmoe.slurm.environment import rank_variables, step_of
from tests.forked import run_forked

GIB = 2**20
"""In the kB of /proc/meminfo."""


def meminfo(total: int, free: int) -> str:
    return f"MemTotal: {total * GIB} kB\nMemFree: 7 kB\nMemAvailable: {free * GIB} kB\nHugePages_Total: 0\n"


@pytest.fixture(autouse=True)
def _enough_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(meminfo(100, 6))
    monkeypatch.setattr(check, "MEMINFO", tmp_path / "meminfo")


def found(folder: Path, gpus: int = 0, behind: float = 0) -> list[str]:
    return node_problems(folder, "n1", gpus, time.time() + behind)


# The node.


def test_a_sound_node(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    assert found(folder, behind=-250) == [] and found(folder, behind=250) == []
    assert list(folder.iterdir()) == [], "nothing is left of what was tried"


def test_memory_that_something_else_holds(tmp_path: Path) -> None:
    check.MEMINFO.write_text(meminfo(100, 4))
    assert found(tmp_path) == ["4.0 GiB of its 100.0 GiB of memory are free"]


@pytest.mark.parametrize(("behind", "word"), [(1000, "behind"), (-1000, "ahead of")])
def test_a_clock_that_is_wrong(tmp_path: Path, behind: float, word: str) -> None:
    assert found(tmp_path, behind=behind) == [f"its clock is 1000 s {word} the batch node's"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (problem,) = found(tmp_path / "none")
    assert str(tmp_path / "none") in problem and "No such file or directory" in problem


def test_a_folder_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that other nodes write, and that shows this one what was there before."""
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"of an earlier attempt")
    (problem,) = found(tmp_path)
    assert "holds something else than was written" in problem


def test_a_folder_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def hang(path: Path) -> None:
        answers.wait(60)

    monkeypatch.setattr(check, "replacing", hang)
    assert check.folder_problem(tmp_path, "n1", 0.1) == f"{tmp_path} gave no answer within 0.1 s"
    answers.set()


class Gpus:
    """torch.cuda with GPUs that the test describes: GiB that are free of 80, or what CUDA says of the GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *gpus: float | str) -> None:
        self.gpus = gpus
        self.product = 256.0**3
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.memory)
        monkeypatch.setattr(torch, "ones", self.ones)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def memory(self, number: int) -> tuple[float, float]:
        gpu = self.gpus[number]
        if isinstance(gpu, str):
            raise RuntimeError(f"{gpu}\nmore lines")
        return gpu * 2**30, 80 * 2**30

    def ones(self, *shape: int, device: str) -> torch.Tensor:
        return torch.full(shape, (self.product / 256**3) ** 0.5)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ((79, 79), []),
        ((79, 79, 79), []),
        ((), ["shows no GPU that works"]),
        ((79,), ["shows 1 GPU of 2"]),
        ((79, 30), ["GPU 1: 30.0 GiB of 80.0 GiB are free"]),
        (("CUDA error: uncorrectable ECC error", 79), ["GPU 0: CUDA error: uncorrectable ECC error"]),
    ],
    ids=["all", "more", "none", "one is missing", "one is in use", "one is broken"],
)
def test_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[Any, ...], expected: list[str]
) -> None:
    Gpus(monkeypatch, *gpus)
    assert found(tmp_path, gpus=2) == expected
    assert found(tmp_path, gpus=0) == [], "a job on CPUs asks for none"


def test_a_device_that_computes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, 79).product = 256.0**3 + 2**10
    assert found(tmp_path, gpus=1) == ["GPU 0: computes a wrong product"]


# The sum over all tasks.


@pytest.fixture
def port() -> Iterator[int]:
    """Of another program, which listens there: in the place of what is left of an earlier attempt."""
    with socket.create_server(("", 0)) as listener:
        yield listener.getsockname()[1]


def task(rank: int, port: int, nodes: int = 2, restart: int = 0) -> dict[str, str]:
    """Variables of one of the tasks, two to a node, all of which are on this machine."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_RESTART_COUNT": str(restart),
        "SLURM_STEP_NODELIST": f"n[1-{nodes}]",
        "SLURM_STEP_TASKS_PER_NODE": f"2(x{nodes})",
        "SLURM_NODEID": str(rank // 2),
        "SLURMD_NODENAME": f"n{rank // 2 + 1}",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


CHECKED = """
import os
import sys
import threading
from pathlib import Path
from ditmoe.slurm import check
port, rank, broken = sys.argv.pop(), int(os.environ.pop("RANK")), int(sys.argv.pop())
for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    del os.environ[name]
from tests.slurm.test_check import task
os.environ.update(task(rank, int(port)))
check.MEMINFO = Path(sys.argv[0]).with_name("meminfo")
if rank == broken:
    sys.argv[1] += "/none"
exit = os._exit
os._exit = lambda code: exit(0)  # whoever starts these ends all once one fails
check.main()
"""


@pytest.mark.parametrize("broken", [-1, 2], ids=["all nodes are sound", "n2 is not"])
def test_all_tasks_sum_a_number(tmp_path: Path, port: int, broken: int) -> None:
    """The port is in use; and a node that has failed holds up nobody, and is the only one to be named."""
    program = tmp_path / "checked.py"
    program.write_text(CHECKED)
    (tmp_path / "job").mkdir()
    begin = time.monotonic()
    arguments = [str(tmp_path / "job"), "0", f"{time.time()}", str(broken), str(port)]
    done = run_forked([str(program), *arguments], tmp_path / "output", 4, seconds=100)
    assert time.monotonic() - begin < check.MEETING_SECONDS
    reports, lines = NodeReports(), []
    for rank in range(4):
        (line,) = (tmp_path / f"output/rank-{rank}.out").read_text().splitlines()
        lines.append(line)
        reports.take(line)
    reports.finish(("n1", "n2"), None, 0, "")
    assert [json.loads(line.removeprefix(MARK))["host"] for line in lines] == ["n1", "n1", "n2", "n2"]
    assert list(reports.failed) == ([] if broken < 0 else ["n2"]), (reports.shown, done.stderr)
    assert reports.problem is None


def test_variables_that_contradict_each_other(tmp_path: Path) -> None:
    """Such as those that a preamble sets: the message comes in the place of a traceback."""
    variables = {**task(0, 1), "SLURM_PROCID": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "ditmoe.slurm.check", str(tmp_path), "0", f"{time.time()}"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and done.stderr == ""
    found = json.loads(done.stdout.removeprefix(MARK))
    assert found["host"] == "n1" and found["missing"] == []
    assert "SLURM_PROCID = '4' in the environment; expected a number below 4" in found["group"][0]


@pytest.fixture
def come(monkeypatch: pytest.MonkeyPatch, port: int) -> Callable[[int, int], tuple[list[str], list[str]]]:
    """Lets one task come to a sum, and no other, and wait little."""

    def come_alone(rank: int, nodes: int) -> tuple[list[str], list[str]]:
        for name, value in task(rank, port, nodes).items():
            monkeypatch.setenv(name, value)
        for name, value in rank_variables(os.environ).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(check, "MEETING_SECONDS", 0.6)
        monkeypatch.setattr(meeting, "_ANSWER_SECONDS", 0.05)
        step = step_of(os.environ)
        assert step is not None
        return group_problems(step, 0, sound=True)

    return come_alone


@pytest.mark.parametrize(("rank", "hosts"), [(0, ["n1", "n2", "n3"]), (3, ["n1"])])
def test_hosts_that_do_not_come_are_named(
    come: Callable[[int, int], tuple[list[str], list[str]]], rank: int, hosts: list[str]
) -> None:
    """Rank 1 shares the host of rank 0. Whoever does not find rank 0 knows of nobody else."""
    (problem,), missing = come(rank, 3)
    assert missing == hosts
    assert "the sum over all tasks failed on" in problem and f"rank {rank} waited" in problem


def test_limits_fit_into_that_of_the_supervisor() -> None:
    assert check.FOLDER_SECONDS + check.MEETING_SECONDS + 4 * check.SUM_SECONDS < supervise.CHECK_SECONDS - 60


# What the supervisor makes of it.


def line(host: str, *problems: str, group: tuple[str, ...] = (), missing: tuple[str, ...] = ()) -> str:
    report = {"host": host, "problems": problems, "group": group, "missing": missing}
    return MARK + json.dumps(report) + "\n"


def reports_of(
    *lines: str, hosts: int = 3, late: float | None = None, code: int = 0, words: str = ""
) -> NodeReports:
    reports = NodeReports()
    for each in lines:
        reports.take(each)
    reports.finish([f"n{number + 1}" for number in range(hosts)], late, code, words)
    return reports


def alone(host: str, *missing: str) -> str:
    return line(host, group=(f"failed on {host}",), missing=missing)


ABSENT = "did not come to the sum over all tasks"


@pytest.mark.parametrize(
    ("lines", "failed"),
    [
        ([alone("n1", "n3"), alone("n2", "n3"), line("n3", "its clock is slow")], {"n3": "its clock is slow"}),
        ([alone("n1", "n3"), alone("n2", "n3"), alone("n3", "n1")], {"n3": ABSENT}),
        ([alone("n1", "n2", "n3"), alone("n2", "n1"), alone("n3", "n1")], {"n1": ABSENT}),
        ([alone("n1", "n2"), line("n2"), line("n3")], {"n2": ABSENT}),
        ([line("n1"), line("n2")], {"n3": "gave no answer (exit code 0)"}),
    ],
    ids=["its own word counts", "n3 is cut off", "rank 0 is cut off", "n1 does not see n2", "n3 says nothing"],
)
def test_who_is_to_blame(lines: list[str], failed: dict[str, str]) -> None:
    assert reports_of(*lines).failed == failed


def test_the_only_host_is_to_blame() -> None:
    """Its second task waited for the first, which hangs with its GPU; or none could sum."""
    assert reports_of(alone("n1", "n1"), hosts=1, late=420.0).failed == {"n1": "failed on n1"}
    assert reports_of(alone("n1"), alone("n1"), hosts=1, code=1).failed == {"n1": "failed on n1"}
    assert reports_of(line("n1"), hosts=1).passed


def test_two_that_miss_each_other_are_not_told_apart() -> None:
    reports = reports_of(alone("n1", "n2"), alone("n2", "n1"), hosts=2, code=1)
    assert reports.failed == {} and reports.problem == "failed on n1" and not reports.passed


def test_what_names_no_host() -> None:
    nobody = reports_of(code=1, words="Unable to create step: Invalid partition")
    assert nobody.problem == "no node gave an answer (Unable to create step: Invalid partition)"
    assert reports_of(late=420.0).problem == "no node gave an answer within 420 s"
    wrong = reports_of(*(line(f"n{number}", group=("the sum is 2, not 3",)) for number in (1, 2, 3)), code=1)
    assert (wrong.failed, wrong.problem) == ({}, "the sum is 2, not 3")
    assert reports_of(line("n1"), line("n2"), line("n3"), code=137).problem == "exit code 137"


def test_lines_that_are_no_reports_are_not_counted() -> None:
    forged = [f"{MARK}{{", f"{MARK}[]\n", f'{MARK}{{"host": "n3"}}\n', "n3 is fine\n"]
    assert set(reports_of(line("n1"), line("n2"), *forged).failed) == {"n3"}
    assert "\x1b" not in reports_of(line("n1", "\x1b[2J")).shown


def test_all_tasks_may_say_what_they_found() -> None:
    """A cluster may be set to end a step with the first task that fails, or soon after the first that ends."""
    srun = ["srun", "--kill-on-bad-exit=1", "--nodes=2", sys.executable]
    command = check_command(srun, Path("/job"), 8, 1.5)
    assert command[:4] == ["srun", "--kill-on-bad-exit=0", "--wait=0", "--distribution=block"]
    assert command[4:] == ["--nodes=2", sys.executable, "-m", "ditmoe.slurm.check", "/job", "8", "1.500"]
