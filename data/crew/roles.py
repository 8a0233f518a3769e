"""The processes of a crew: one scheduler, and workers that a nanny each watches, as Dask's `distributed` has them.

They listen for members of the crew alone. The libraries' web servers have no certificates: they are never started.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from distributed import Scheduler, Worker
from distributed.http.routing import RoutingApplication
from distributed.security import Security
from tornado.httpserver import HTTPServer

STALLED_SECONDS: Final = 120.0
"""Without a sign of life of a worker's event loop, after which the worker is started anew."""
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
ALLOWED_DEATHS: Final = 10
"""Workers that may die at one part before the job gives it up."""


def settings(stalled: float = STALLED_SECONDS) -> dict[str, Any]:
    """What `distributed` is told in all processes of a crew."""
    return {
        "distributed.comm.require-encryption": True,
        "distributed.comm.timeouts.connect": "30s",
        "distributed.comm.timeouts.tcp": "60s",  # a node that is gone says nothing
        "distributed.scheduler.worker-ttl": f"{stalled}s",
        "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
        "distributed.scheduler.worker-saturation": 1.0,  # a part waits for whoever is free first
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.profile.enabled": False,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.daemon": False,  # a daemon may start no processes, such as those that decode images
        "distributed.nanny.pre-spawn-environ": {},  # it would set them in this process
        "distributed.nanny.environ": {},
        "distributed.diagnostics.nvml": False,
        "distributed.admin.system-monitor.disk": False,
        "distributed.admin.system-monitor.gil.enabled": False,
    }


class CrewScheduler(Scheduler):
    """A scheduler without a web server."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Keep one that listens nowhere, for whoever stops it."""
        self.http_application = RoutingApplication([])
        self.http_server = HTTPServer(self.http_application)


class CrewWorker(Worker):
    """A worker without a web server, and with the threads that its environment allows.

    It ends with the process that keeps it, also where it is stopped and cannot see that one's end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _end_with_parent()
        quiet()
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is not None:
            torch.set_num_threads(int(threads))
        super().__init__(*arguments, **options)

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Keep one that listens nowhere, for whoever stops it."""
        self.http_application = RoutingApplication([])
        self.http_server = HTTPServer(self.http_application)


def _end_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def quiet() -> None:
    """Keep the libraries from telling of each connection that comes and goes: losing workers is no fault."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def nanny_options(host: str, security: Security, environment: Mapping[str, str]) -> dict[str, Any]:
    """The options of a nanny: one part at a time, on this address, in this environment."""
    return {
        "worker_class": CrewWorker,
        "nthreads": 1,
        "memory_limit": None,
        "host": host,
        "protocol": "tls",
        "security": security,
        "env": dict(environment),
        "dashboard": False,
        "death_timeout": 120,
        "quiet": True,
    }
