"""`ditmoe serve` as a process, which is killed and started again at its port."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil

from ditmoe.sampling.service.jobs.evaluating import JOB_VARIABLE


def port_of_nobody() -> int:
    """A free port that the kernel gives to no connection: whoever is started again finds it free."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = Random().randrange(10_000, first)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


class Served:
    """A service whose errors are kept in a file beside its state."""

    def __init__(self, runs: Path, state: Path, *options: object) -> None:
        self._runs, self._state, self._port, self._options = runs, state, port_of_nobody(), options
        self.errors = state.with_name(f"{state.name}-errors.txt")
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Its address, when it listens."""
        command = [sys.executable, "-m", "ditmoe.launcher", "serve", str(self._runs), "--state", str(self._state)]
        command += ["--port", str(self._port), "--batch", "8", *map(str, self._options)]
        with self.errors.open("a") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving"), (line, self.process.poll(), self.errors.read_text()[-5000:])
        return line.split()[-1]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; one that is stopped is killed half a second later."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(0.5)
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def processes_of(job_id: str) -> list[psutil.Process]:
    """The processes of a job: they bear its name."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(JOB_VARIABLE) == job_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def number_of(variable: str, usual: int) -> int:
    """A count that the environment may change."""
    return int(os.environ.get(variable, usual))
