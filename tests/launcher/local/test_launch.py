"""Starting processes: variables, the first failure's message, stops, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditmoe.data.storage.stopping import EXIT_STOPPED, STOP_SIGNALS
from ditmoe.launcher.local.launch import spawn
from ditmoe.launcher.local.signals import REPEAT_SECONDS, StopSignal

MISBEHAVING = (sys.executable, str(Path(__file__).with_name("misbehaving.py")), "misbehave")


def start(kind: str, folder: Path, processes: int = 2, grace: float = 1.0) -> int:
    return spawn([kind, str(folder)], processes, log_dir=folder / "ranks", program=MISBEHAVING, grace=grace)


def pids(folder: Path, count: int = 2) -> list[int]:
    """The process ids that the ranks left."""
    files = [folder / f"started-{rank}" for rank in range(count)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def wait_for(condition: object, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    code = spawn(["variables", str(tmp_path)], 3, threads=5, program=MISBEHAVING)
    assert code == 0
    seen = [(tmp_path / f"variables-{rank}").read_text().split() for rank in range(3)]
    port = seen[0][5]
    assert seen == [[str(r), str(r), "3", "3", "127.0.0.1", port, "5", "lo"] for r in range(3)]
    assert 1024 <= int(port) < 65536


def test_variables_of_the_ranks_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two nodes starts ranks 3 to 5 of 6, which meet where the task was told to."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    task = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "DITMOE_NODE_TASK": "1"}
    for name, value in {**task, "MASTER_ADDR": "n1", "MASTER_PORT": "12345", "DITMOE_MEETING": "7.0.0"}.items():
        monkeypatch.setenv(name, value)
    code = spawn(["variables", str(tmp_path)], 3, threads=5, log_dir=tmp_path / "ranks", program=MISBEHAVING)
    assert code == 0
    seen = [(tmp_path / f"variables-{rank}").read_text().split() for rank in (3, 4, 5)]
    assert seen == [[str(3 + r), str(r), "6", "3", "n1", "12345", "5", "none"] for r in range(3)]
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == [f"rank-{r}.txt" for r in (3, 4, 5)]


def test_output_goes_to_the_terminal_and_to_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("none", tmp_path) == 0
    assert start("none", tmp_path) == 0
    out, err = capfd.readouterr()
    assert out == "hello from rank 0\n" * 2 and err == ""
    assert (tmp_path / "ranks" / "rank-1.txt").read_text() == "hello from rank 1\n" * 2


def test_a_user_error_of_every_rank_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("user-error-everywhere", tmp_path) == 2
    assert capfd.readouterr().err == "error: data.sources: the same mistake on every rank\n"


@pytest.mark.timeout(120)
def test_the_exit_code_of_an_error_in_a_process_group(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the group's threads do at the end."""
    assert start("user-error-in-a-group", tmp_path, processes=1) == 2
    assert capfd.readouterr().err.count("a mistake that shows late") == 1


@pytest.mark.timeout(120)
def test_missing_ranks_are_no_mistake_of_the_user(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, so that a job is queued again, where 2 would end it; and a message without a traceback."""
    assert start("missing-ranks", tmp_path) == 1
    err = capfd.readouterr().err
    assert err.startswith("rank 0 waited ") and "in vain for 1 of 2 processes (WORLD_SIZE), rank 1" in err
    assert "Traceback" not in err


@pytest.mark.timeout(120)
def test_missing_ranks_of_a_process_that_srun_started(tmp_path: Path) -> None:
    """There is no process of ours above it, which could tell."""
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "12345"}
    done = subprocess.run(
        [*MISBEHAVING, "missing-ranks", str(tmp_path)],
        env={**os.environ, **rank, "DITMOE_MEETING": "7.0.0"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: rank 0 waited ") and "Traceback" not in done.stderr


def test_one_crash_ends_a_hanging_group(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("crash-1", tmp_path, processes=3) == 1  # the others would hang for ever
    assert not any(alive(pid) for pid in pids(tmp_path, 3))
    err = capfd.readouterr().err
    assert "[rank 1] RuntimeError: rank one broke" in err
    assert "error: rank 1 failed with exit code 1; the others were ended" in err
    assert str(tmp_path / "ranks") in err


def test_the_first_cause_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("crash-1-then-0", tmp_path, grace=3) == 1
    err = capfd.readouterr().err
    assert "the first cause" in err and "connection closed by peer" not in err


def test_a_killed_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("killed-1", tmp_path) == 128 + signal.SIGKILL
    err = capfd.readouterr().err
    assert "error: rank 1 was killed by SIGKILL (the system kills so when memory runs out)" in err
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_ranks_that_stopped_have_not_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first to end does not end the others, which are still saving; and a failure beside it is one."""
    assert start("stopped-at-different-times", tmp_path) == EXIT_STOPPED
    assert (tmp_path / "saved-1").exists() and capfd.readouterr().err == ""
    assert start("stopped-beside-a-failure", tmp_path) == 7


def test_exit_code_of_the_rank_that_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("exit-code", tmp_path) == 7
    assert "rank 1 failed with exit code 7" in capfd.readouterr().err


def launcher_process(kind: str, folder: Path) -> subprocess.Popen[str]:
    """A process of its own that starts two ranks, as `ditmoe train` does, in a process group of its own."""
    code = (
        "import sys; from pathlib import Path; from ditmoe.launcher.local.launch import spawn;"
        "sys.exit(spawn(sys.argv[4:], 2, log_dir=Path(sys.argv[1]), program=sys.argv[2:4] + ['misbehave']))"
    )
    arguments = [str(folder / "ranks"), *MISBEHAVING[:2], kind, str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("sent", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_reaches_all_ranks_once_by_its_name(tmp_path: Path, sent: signal.Signals) -> None:
    """Ctrl-C reaches them as another signal, and is told as what it was."""
    parent = launcher_process("stop", tmp_path)
    pids(tmp_path)
    os.killpg(parent.pid, sent)  # as a terminal does: to the whole group, in which the ranks are not
    _, err = parent.communicate(timeout=40)
    assert parent.returncode == 0, err
    assert {(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)} == {sent.name}
    assert ("Ctrl-C again" in err) == (sent == signal.SIGINT)


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    parent = launcher_process("hang", tmp_path)
    ranks = pids(tmp_path)
    for _ in range(2):  # at once: one Ctrl-C that was sent twice
        parent.send_signal(signal.SIGINT)
        time.sleep(0.05)
    time.sleep(REPEAT_SECONDS + 0.1)
    assert all(alive(pid) for pid in ranks)
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=40)
    assert parent.returncode == 128 + signal.SIGINT and "Ctrl-C again kills" in err
    assert not any(alive(pid) for pid in ranks)


def test_no_rank_outlives_a_killed_parent(tmp_path: Path) -> None:
    parent = launcher_process("stop", tmp_path)
    ranks = pids(tmp_path)
    parent.kill()
    parent.communicate(timeout=40)
    wait_for(lambda: not any(alive(pid) for pid in ranks))
    assert (tmp_path / "stopped-0").read_text() == "SIGTERM"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_is_noted_and_the_handler_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_so() -> None:
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_within_the_process() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        time.sleep(REPEAT_SECONDS + 0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.timeout(180)
def test_a_lost_terminal_under_torchrun(tmp_path: Path) -> None:
    """Torchrun passes SIGHUP on; its ranks stop in order, and do not die of it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, MISBEHAVING[1], "misbehave", "stop", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pids(tmp_path)
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)
    assert {(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)} == {"SIGHUP"}
