"""The workers of a crew on this machine: how many, and which GPU and how many threads each has."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from ditmoe.launcher.local.launch import threads_per_process
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.parallel.interfaces import source_address
from ditmoe.parallel.ranks import WORKERS_VARIABLE

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew

LOOPBACK: Final = "127.0.0.1"
_FAR_AWAY: Final = "8.8.8.8"
"""Any address of the Internet: nothing is sent to it, the way there is asked for."""


def worker_environments(processes: int | None, *, gpus: bool = True) -> list[dict[str, str]]:
    """The variables of each worker.

    Args:
        processes: how many; None: one per GPU, or 1.
        gpus: whether they compute on GPUs where there are any.

    Raises:
        UserError: there are fewer GPUs.
    """
    import torch

    found = torch.cuda.device_count() if gpus else 0
    count = (found or 1) if processes is None else processes
    if found and count > found:
        raise UserError(f"--processes {count}: each has a GPU to itself, and {found} are found; expected {found}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_per_process(max(count, 1)))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(number) for number in range(found)]
    shared = {"OMP_NUM_THREADS": threads, WORKERS_VARIABLE: str(count)}
    return [{**shared, **({"CUDA_VISIBLE_DEVICES": visible[number]} if found else {})} for number in range(count)]


def check_gpus(known: int) -> None:
    """RuntimeError where this machine shows fewer GPUs than it is known to have.

    A worker would compute on the CPU then: slowly, and with other bits than those of the others.
    """
    import torch

    found = torch.cuda.device_count()
    if found < known:
        raise RuntimeError(
            f"{socket.gethostname()} shows {counted(found, 'GPU')}; expected {known}, as it was said to have"
        )


def own_address(listen: str | None = None, towards: str | None = None) -> str:
    """The address at which other machines find this one.

    Args:
        listen: an address or name of this machine, or one of its network interfaces, as a user chose it; None:
            that of the way to the other.
        towards: name or address of the other; None: the way to the rest of the world.

    Raises:
        UserError: `listen` is nothing of this machine.
    """
    if listen is not None:
        return _chosen(listen)
    for other in (towards, _FAR_AWAY, socket.gethostname()):
        found = None if other is None else source_address(other)
        if found is not None and (other == towards or not found.is_loopback):
            return str(found)
    # Without a way out, or a name that means anything: whatever leads to any other machine.
    return next((address for address in _addresses() if not ip_address(address).is_loopback), LOOPBACK)


def _chosen(listen: str) -> str:
    """The address that a user chose."""
    of_interface = next((address for address in _addresses(listen)), None)
    if of_interface is not None:
        return of_interface
    try:
        address = str(socket.getaddrinfo(listen, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        address = ""
    if not address or not _is_own(address):
        interfaces = ", ".join(sorted(psutil.net_if_addrs()))
        raise UserError(
            f"--listen {listen!a}: nothing of this machine; expected one of its addresses, or of its network"
            f" interfaces: {interfaces}"
        )
    return address


def _is_own(address: str) -> bool:
    """Whether this machine can listen there, and there alone."""
    if ip_address(address).is_unspecified:
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _addresses(interface: str | None = None) -> Iterator[str]:
    """The IPv4 addresses of an interface, or of all that are up."""
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    for name, entries in psutil.net_if_addrs().items():
        if name == interface or (interface is None and name in up):
            yield from (entry.address for entry in entries if entry.family == socket.AF_INET)


@contextmanager
def leads_crew(
    folder: Path | None,
    processes: int | None,
    part_minutes: float,
    log: Callable[[str], None],
    listen: str | None = None,
    *,
    gpus: bool = True,
) -> "Iterator[Crew]":
    """Lead a crew for the body.

    Args:
        folder: at which workers of any machine join; None: a temporary one, for this machine alone.
        processes: workers of this machine; None: one per GPU, or 1.
        part_minutes: how long a worker may take to make a part.
        log: takes lines to show.
        listen: the address or interface at which workers of other machines find the crew of the folder.
        gpus: whether those of this machine compute on GPUs where there are any.

    Raises:
        UserError: as `lead_crew`; `listen` is nothing of this machine.
    """
    from ditmoe.data.crew.leader import lead_crew

    environments = worker_environments(processes, gpus=gpus)
    with tempfile.TemporaryDirectory(prefix="ditmoe-crew-") as scratch:
        where = Path(scratch) / "crew" if folder is None else folder
        host = LOOPBACK if folder is None else own_address(listen)
        with lead_crew(where, environments, host=host, part_seconds=60 * part_minutes, log=log) as crew:
            yield crew
