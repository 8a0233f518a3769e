"""`ditmoe` with one more verb, which misbehaves as its arguments say: the program that launch tests start."""

import os
import signal
import sys
import time
from pathlib import Path

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.launcher import cli
from ditmoe.launcher.local.failures import FAILURE_VARIABLE
from ditmoe.launcher.local.signals import StopSignal
from ditmoe.model.errors import UserError


def command(kind: str, folder: Path) -> None:
    """Do what `kind` says; leave a file per rank in `folder`."""
    rank = int(os.environ["RANK"])
    if kind not in ("stop", "hang"):
        announce(folder)
    print(f"hello from rank {rank}", flush=True)
    if kind == "variables":
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
        names += " GLOO_SOCKET_IFNAME"
        (folder / f"variables-{rank}").write_text(" ".join(os.environ.get(name, "none") for name in names.split()))
    elif kind == "user-error-everywhere":
        raise UserError("data.sources: the same mistake on every rank")
    elif kind == "user-error-in-a-group":
        import atexit

        import torch

        from ditmoe.parallel import processes

        processes.join(torch.device("cpu"))
        atexit.register(os.abort)  # as threads of a group may end the interpreter's own end
        raise UserError("data.sources: a mistake that shows late")
    elif kind == "missing-ranks":
        from datetime import timedelta

        import torch

        from ditmoe.parallel import processes
        from ditmoe.parallel.meeting import Patience

        if os.environ["RANK"] == "1":
            hang_in_a_collective()
        processes.meet(torch.device("cpu"), timedelta(minutes=1), Patience(told_after=60, limit=0.3))
    elif kind == "crash-1":
        if rank != 1:
            hang_in_a_collective()
        wait_for_all(folder)
        raise RuntimeError("rank one broke")
    elif kind == "crash-1-then-0":
        # The first cause ends last: rank 0 fails for want of its peer while rank 1 is still on its way out.
        if rank == 1:
            import atexit

            atexit.register(time.sleep, 1.0)
            raise RuntimeError("the first cause")
        # Its peer's failure file is beside its own.
        peer = Path(os.environ[FAILURE_VARIABLE].replace("failure-0", "failure-1"))
        while not peer.exists():
            time.sleep(0.02)
        raise RuntimeError("connection closed by peer")
    elif kind == "killed-1":
        if rank == 1:
            wait_for_all(folder)
            os.kill(os.getpid(), signal.SIGKILL)
        hang_in_a_collective()
    elif kind == "stopped-at-different-times":
        if rank == 1:
            time.sleep(0.5)
            (folder / "saved-1").touch()
        sys.exit(EXIT_STOPPED)
    elif kind == "stopped-beside-a-failure":
        if rank == 1:
            time.sleep(0.5)
        sys.exit(7 if rank else EXIT_STOPPED)
    elif kind == "exit-code":
        sys.exit(7 if rank else 0)
    elif kind == "stop":
        with StopSignal() as stop:
            announce(folder)
            while not stop.requested:
                time.sleep(0.02)
            (folder / f"stopped-{rank}").write_text(str(stop.name))
    elif kind == "hang":
        hang_in_a_collective(folder)


def announce(folder: Path) -> None:
    """Leave the process id where the test finds it."""
    (folder / f"started-{os.environ['RANK']}").write_text(str(os.getpid()))


def wait_for_all(folder: Path) -> None:
    """Fail no earlier than all ranks run, however slow the machine is."""
    while len(list(folder.glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)


def hang_in_a_collective(folder: Path | None = None) -> None:
    """As a rank does whose peer is gone: it notes SIGTERM, and does not come round to acting on it."""
    with StopSignal():
        if folder is not None:
            announce(folder)
        while True:
            time.sleep(0.1)


if __name__ == "__main__":
    sys.modules["misbehaving"] = sys.modules["__main__"]
    cli.VERBS["misbehave"] = cli.Verb("misbehaving", "Fail.")
    cli.main()
