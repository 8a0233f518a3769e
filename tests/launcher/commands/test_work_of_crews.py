"""Commands whose parts a crew makes: what they leave is what one process leaves, whoever is killed on the way."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.writer import ShardLimits
from tests.forked import DITMOE, run_forked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Work(NamedTuple):
    """A command, and what it leaves."""

    arguments: Sequence[str]
    """Without what it writes to, which follows them, and who makes its parts."""
    parts: str
    """Pattern of its parts below what it writes to, while it works."""
    found: Callable[[Path], Any]
    """What it leaves there, that must be the same."""


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def encode(folder: Path, make_vae: Callable[..., Path]) -> Work:
    pack(Shapes(96, 3, 16, seed=1), folder / "shapes", PackSettings(limits=ShardLimits(samples=2)))
    vae = make_vae(folder / "vae")
    options = ["--flips", "both", "--device", "cpu", "--vae", str(vae), str(folder / "shapes")]
    return Work(["data", "encode", *options], "*.tar", checksums)


KINDS = {"encode": encode}


@pytest.fixture(params=list(KINDS))
def work(request: pytest.FixtureRequest, tmp_path: Path, make_vae: Callable[..., Path]) -> Work:
    return KINDS[request.param](tmp_path, make_vae)


def alone(work: Work, out: Path, folder: Path) -> Any:
    """What one process leaves."""
    done = run_forked([*DITMOE, *work.arguments, str(out), "--processes", "1"], folder / "alone")
    assert done.returncode == 0, done.stderr
    return work.found(out)


def eventually(what: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never was"
        time.sleep(0.01)
    return found


def started(arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *DITMOE, *arguments], env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )


def kill_a_worker(leader: subprocess.Popen[bytes]) -> bool:
    """Whether there was one."""
    with suppress(psutil.Error):
        for process in psutil.Process(leader.pid).children():
            if "spawn_main" in " ".join(process.cmdline()):
                process.kill()
                return True
    return False


def test_killed_workers_and_leaders_change_nothing(work: Work, tmp_path: Path) -> None:
    expected = alone(work, tmp_path / "one", tmp_path)
    out, output = tmp_path / "two", tmp_path / "output.txt"
    arguments = [*work.arguments, str(out), "--processes", "2"]

    def parts() -> int:
        return len(list(out.glob(work.parts)))

    leader = started(arguments, output)
    eventually(lambda: parts() >= 2 or leader.poll() is not None)
    assert kill_a_worker(leader), output.read_text()
    before = parts()
    eventually(lambda: parts() >= before + 3 or leader.poll() is not None)
    assert leader.poll() is None, output.read_text()
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    there = {path: path.stat().st_ino for path in out.glob(work.parts)}
    again = started(arguments, output)
    eventually(lambda: parts() > len(there) or again.poll() is not None)
    kept = {path: path.stat().st_ino for path in there if path.exists()}
    assert kept == {path: there[path] for path in kept}, "a part that was there was made again"
    assert again.wait(600) == 0, output.read_text()
    assert work.found(out) == expected
