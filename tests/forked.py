"""Runs Python programs in processes that are forked from one whose imports are done: each is there in no time.

A program finds what it would as `python PROGRAM …`: arguments, environment, folder, output and exit code are its
own, and nothing is in its modules that another has left there. Tests of how processes are started, stopped and
ended start them as a user does.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Final

import pytest

from ditmoe.launcher.local.launch import free_port

DITMOE: Final = ("-m", "ditmoe.launcher")
IMPORTED: Final = (
    "pytest",  # the main module of the tests, which every process of multiprocessing imports
    "ditmoe.launcher.commands.data.group",
    "ditmoe.launcher.commands.sample",
    "ditmoe.launcher.commands.train",
    "ditmoe.launcher.training.program",
    "ditmoe.parallel.planner.expert_layer",
    "ditmoe.sampling.evaluation.of_run",
    "deepspeed.module_inject.auto_ep_layer",
    "torch._dynamo",
)
"""What takes the programs long to import."""
_ENVIRONMENT: Final = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""What is read from the environment at an import, and so is the same for all programs."""
_POLL_SECONDS: Final = 0.02

_starting = threading.Lock()
"""Tests run programs in several threads, which share one environment."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


def run_forked(
    program: Sequence[str], folder: Path, processes: int | None = None, seconds: float = 250
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end: alone, or as so many ranks with the variables that torchrun sets.

    Args:
        program: what follows `python`: `-m` and a module, or a file; and the arguments.
        folder: gets the output of each rank, `rank-N.out` and `rank-N.err`.
        processes: ranks; None: one process that is no rank.
        seconds: the longest that it may take.

    Returns:
        The code of the first rank that failed, or 0; the output of rank 0; and the errors of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = range(processes or 1)
    outputs = [(folder / f"rank-{rank}.out", folder / f"rank-{rank}.err") for rank in ranks]
    port = free_port()
    variables = [_of_rank(rank, processes, port) if processes else {} for rank in ranks]
    with _starting, pytest.MonkeyPatch.context() as patch:
        for key, value in _ENVIRONMENT.items():
            patch.setenv(key, value)
        forkserver.ensure_running()
        running = [
            _context.Process(target=_become, args=(list(program), {**os.environ, **own}, *files))
            for own, files in zip(variables, outputs, strict=True)
        ]
        for process in running:
            process.start()
    code = _wait(running, time.monotonic() + seconds)
    errors = "".join(err.read_text() for _, err in outputs if err.exists())
    return subprocess.CompletedProcess(program, code, outputs[0][0].read_text(), errors)


def _of_rank(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(running: Sequence[ForkServerProcess], deadline: float) -> int:
    """Wait for all; when one fails, or the time is up, kill the others with the processes that they started."""
    try:
        while True:
            codes = [process.exitcode for process in running]
            if any(codes):
                return next(code for code in codes if code)
            if None not in codes:
                return 0
            assert time.monotonic() < deadline, "the program takes too long"
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            if process.exitcode is None and process.pid is not None:
                with suppress(ProcessLookupError):  # it ends in this very moment, or has not yet become a leader
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()


def _become(program: list[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
    """Be `python PROGRAM …` with this environment and output."""
    gc.freeze()  # the modules stay: going through their objects is most of what a collection costs
    os.setsid()
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).parent))
        runpy.run_path(program[0], run_name="__main__")


def _end_with_the_tests() -> None:
    """However they end: the server that forked this process goes on as long as it does."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os.killpg(0, signal.SIGKILL)


def packed_digits(parent: Path) -> Path:
    """The digits as shards, packed by the command into a folder in `parent`."""
    packed = run_forked([*DITMOE, "data", "pack", "digits", str(parent / "digits")], parent / "output")
    assert packed.returncode == 0, packed.stderr
    return parent / "digits"
