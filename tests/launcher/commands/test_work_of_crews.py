"""Commands whose parts a crew makes: what they leave is what one process leaves, whoever is killed on the way."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from ditmoe.data.crew.leader import lead_crew
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.storage.files import read_object
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Work(NamedTuple):
    """A command, and what it leaves."""

    command: Callable[[Path], list[str]]
    """What it writes to → the command, without who makes its parts."""
    parts: str
    """Pattern of its parts below what it writes to, while it works."""
    found: Callable[[Path], Any]
    """What it leaves there, that must be the same."""


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def encode(folder: Path, make_vae: Callable[..., Path]) -> Work:
    pack(Shapes(96, 3, 16, seed=1), folder / "shapes", PackSettings(limits=ShardLimits(samples=2)))
    options = ["--flips", "both", "--device", "cpu", "--vae", str(make_vae(folder / "vae"))]
    return Work(lambda out: ["data", "encode", *options, str(folder / "shapes"), str(out)], "*.tar", checksums)


def digits(folder: Path, shards: int = 1) -> str:
    """All of them, as shards."""
    limits = ShardLimits(samples=-(-1797 // shards))
    pack(open_source("digits", count=None, seed=0), folder / "digits", PackSettings(limits=limits))
    return str(folder / "digits")


def synthesize(folder: Path, make_vae: Callable[..., Path]) -> Work:
    run, real = write_run(folder / "run"), digits(folder)
    options = ["--from", str(run), "--reference", real, "--count", "600", "--steps", "4", "--batch", "8"]
    options += ["--shard-samples", "20", "--score", "features", "--cache", str(folder / "cache")]
    return Work(lambda out: ["data", "synthesize", *options, str(out)], "*.tar", checksums)


def reference(folder: Path, make_vae: Callable[..., Path]) -> Work:
    real = digits(folder, shards=16)

    def command(out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        file = out / "digits.safetensors"
        return ["reference", "make", real, str(file), "--no-recogniser", "--cache", str(out / "cache")]

    return Work(
        command,
        "cache/real-*/part-*.npz",
        lambda out: hashlib.sha256((out / "digits.safetensors").read_bytes()).hexdigest(),
    )


def results_below(folder: Path) -> dict[str, Any]:
    files = sorted(folder.rglob("metrics.json"))
    return {str(path.relative_to(folder)): read_object(path)["results"] for path in files}


def score(folder: Path, make_vae: Callable[..., Path]) -> Work:
    images = np.random.default_rng(0).integers(0, 256, (9000, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    options = [str(folder / "images.npz"), "--reference", digits(folder), "--cache", str(folder / "cache")]
    return Work(lambda out: ["score", *options, "--out", str(out)], "features/*/part-*.npz", results_below)


def grid(folder: Path, make_vae: Callable[..., Path]) -> Work:
    file, real = folder / "digits.yaml", digits(folder)
    file.write_text("count: 160\nnfe: [2, 3]\nsamplers: [heun, euler]\n")
    options = ["--grid", str(file), "--reference", real, "--cache", str(folder / "cache"), "--no-recogniser"]
    options += ["--batch", "8", "--chunk", "8"]

    def command(out: Path) -> list[str]:
        if not out.exists():
            write_run(out)
        return ["evaluate", str(out), *options]

    return Work(command, "evaluations/*/chunks/*.npz", results_below)


KINDS = {"encode": encode, "synthesize": synthesize, "reference": reference, "score": score, "grid": grid}


@pytest.fixture(params=list(KINDS))
def work(request: pytest.FixtureRequest, tmp_path: Path, make_vae: Callable[..., Path]) -> Work:
    return KINDS[request.param](tmp_path, make_vae)


def alone(work: Work, out: Path, folder: Path) -> Any:
    """What one process leaves."""
    done = run_forked([*DITMOE, *work.command(out), "--processes", "1"], folder / "alone")
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
    arguments = [*work.command(out), "--processes", "2"]

    def parts() -> int:
        return len(list(out.glob(work.parts)))

    leader = started(arguments, output)
    eventually(lambda: parts() >= 1 or leader.poll() is not None)
    assert kill_a_worker(leader), output.read_text()
    before = parts()
    eventually(lambda: parts() > before or leader.poll() is not None)
    assert leader.poll() is None, output.read_text()
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    there = {path: path.stat().st_ino for path in out.glob(work.parts)}
    again = started(arguments, output)
    while again.poll() is None:
        for path, number in there.items():
            with suppress(FileNotFoundError):  # those of some commands go when all is done
                assert path.stat().st_ino == number, "a part that was there was made again"
        time.sleep(0.01)
    assert again.wait(600) == 0, output.read_text()
    assert work.found(out) == expected


@pytest.mark.timeout(1800)
def test_one_worker_serves_every_command_without_being_told_which(
    tmp_path: Path, make_vae: Callable[..., Path]
) -> None:
    crew, output = tmp_path / "crew", tmp_path / "worker.txt"
    worker = started(["worker", str(crew), "--processes", "1", "--idle", "2"], output)
    try:
        for name, kind in KINDS.items():
            (tmp_path / name).mkdir()
            work = kind(tmp_path / name, make_vae)
            expected = alone(work, tmp_path / name / "one", tmp_path / name)
            shutil.rmtree(tmp_path / name / "cache", ignore_errors=True)
            arguments = [*work.command(tmp_path / name / "led"), "--crew", str(crew), "--processes", "0"]
            done = run_forked([*DITMOE, *arguments], tmp_path / name / "output")
            assert done.returncode == 0, done.stderr
            assert work.found(tmp_path / name / "led") == expected, name
            assert worker.poll() is None, output.read_text()
        assert output.read_text().count(" join tls://") == len(KINDS)
    finally:
        worker.terminate()
        worker.wait(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_workers_that_are_asked_to_end_leave_nothing_and_say_nothing(tmp_path: Path, number: int) -> None:
    with lead_crew(tmp_path / "crew", []):
        keeper = subprocess.Popen(
            [sys.executable, *DITMOE, "worker", str(tmp_path / "crew"), "--processes=2"],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert keeper.stderr is not None
        assert "2 workers at 127.0.0.1 join" in keeper.stderr.readline()
        process, end = psutil.Process(keeper.pid), time.monotonic() + 120
        while (
            len(process.children()) < 3 and time.monotonic() < end
        ):  # two workers, and what tracks their resources
            time.sleep(0.1)
        started = process.children(recursive=True)
        keeper.send_signal(number)
        said = keeper.communicate(timeout=120)[1]
        assert keeper.returncode == 128 + number and said == "", said
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
