"""Where the processes of a run meet: the store that rank 0 holds, and that the others find.

Where a start of the processes has a name (a meeting), rank 0 takes the first of several ports that is free, and
tells everybody who comes there the name and where the store is. The others look until they hear it. So a port that
somebody else uses disturbs nothing, and processes of an earlier start that still live find neither the store nor
anything in it.
"""

import errno
import itertools
import os
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Final, NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ditmoe.model.errors import MissingProcessesError, UserError
from ditmoe.parallel.interfaces import choose_interface, source_address
from ditmoe.parallel.ranks import ThisProcess


class Patience(NamedTuple):
    """How long the processes of a run wait for one another at its start."""

    told_after: float
    """Seconds after which they say whom they wait for."""
    limit: float
    """Seconds after which they give up."""


PATIENCE: Final = Patience(10.0, 600.0)
PORTS_TRIED: Final = 16
"""From a meeting's first port on."""
_POLL_SECONDS: Final = 0.1
_LONGEST_POLL_SECONDS: Final = 2.0
"""Between two looks for rank 0, of which there may be thousands at its machine."""
_ANSWER_SECONDS: Final = 5.0
"""For a word of whoever listens at a port."""
_LONGEST_ANSWER: Final = 1000
"""Bytes."""
_meetings = itertools.count()
"""Numbers this process's meetings, which all processes of a run have alike."""


class Meeting(NamedTuple):
    """What the processes have in common once all have come."""

    store: Store
    interface: str | None
    """The network interface that gloo must use; None: it finds the right one by itself."""


def meet(process: ThisProcess, patience: Patience = PATIENCE) -> Meeting:
    """Come to the store that all processes share, and wait until all have. Ctrl-C ends each of the waits.

    Raises:
        UserError: the place cannot be used or reached, some do not come in time, or one of them comes twice.
    """
    begin, number = time.monotonic(), next(_meetings)
    # torchrun's own process holds the store, otherwise rank 0.
    holds = process.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with ExitStack() as stack:
        store = _hold(process, number, patience, stack) if holds else _find(process, number, patience)
        try:
            return _wait_for_all(process, store, number, begin, patience)
        except dist.DistError as error:  # who holds the store may give up a moment before the others
            raise _lost(process, error) from error


def _wait_for_all(process: ThisProcess, store: Store, number: int, begin: float, patience: Patience) -> Meeting:
    """Say in the store that this process is there, and wait until all are."""
    where = _where(process)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"ditmoe/{process.meeting or restarts}/{number}", store)
    source = source_address(process.address)
    if source is not None and not source.is_loopback:
        shared.set("outside", str(source))  # for rank 0's machine, if its own name stands for itself alone there
    if shared.add(f"rank {process.rank}", 1) > 1:
        raise UserError(f"RANK = {process.rank} is set for two processes that meet at {where}; expected each once")
    if shared.add("arrived", 1) == process.ranks:
        shared.set("all", "here")
    told = False
    while not shared.check(["all"]):
        waited = time.monotonic() - begin
        if waited > patience.limit or (waited > patience.told_after and not told):
            missing = [rank for rank in range(process.ranks) if not shared.check([f"rank {rank}"])]
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            those = f"{len(missing)} of {process.ranks} processes (WORLD_SIZE), rank {names}"
            if waited > patience.limit:
                raise MissingProcessesError(
                    f"rank {process.rank} waited {waited:.0f} s at {where} in vain for {those}", missing
                )
            _say_waiting(f"rank {process.rank} waits at {where} for {those}", patience)
            told = True
        time.sleep(_POLL_SECONDS)
    peer = shared.get("outside").decode() if shared.check(["outside"]) else None
    return Meeting(shared, choose_interface(source, peer))


def _hold(process: ThisProcess, number: int, patience: Patience, stack: ExitStack) -> Store:
    """Rank 0: the store. Where the meeting has a name, the others are told as long as the stack is open."""
    seconds = min(60.0, patience.limit)
    if process.meeting is None:
        assert process.port is not None
        try:
            return _open(process, process.port, holds=True, seconds=seconds)
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise _in_use(process) from error
            raise _cannot_meet(process, error) from error
    listener = _listener(process)
    store = _open(process, 0, holds=True, seconds=seconds)
    told = f"{_name(process.meeting, number)} {process.ranks} {store.port}\n".encode()
    threading.Thread(target=_tell, args=(listener, told), daemon=True).start()
    stack.callback(listener.close)
    stack.callback(listener.shutdown, socket.SHUT_RDWR)  # which wakes the thread
    return store


def _listener(process: ThisProcess) -> socket.socket:
    """Listens at the first of the meeting's ports that is free."""
    both = socket.has_dualstack_ipv6()
    for port in _ports(process):
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=1024, dualstack_ipv6=both
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _cannot_meet(process, error) from error
    raise _in_use(process)


def _tell(listener: socket.socket, told: bytes) -> None:
    """Tell everybody who comes, until the listener is shut down."""
    while True:
        try:
            visitor, _ = listener.accept()
        except OSError:
            return
        with visitor, suppress(OSError):  # who is gone need not be told
            visitor.sendall(told)


def _find(process: ThisProcess, number: int, patience: Patience) -> Store:
    """The store that rank 0 holds, as soon as it does."""
    begin, told, pause = time.monotonic(), False, _POLL_SECONDS
    while True:
        reasons: list[object] = []
        for port in _ports(process):
            try:
                found = _store_port(process, number, port)
            except OSError as error:
                reasons.append(error.strerror or error)
                continue
            if found is not None:
                try:
                    return _open(process, found, holds=False, seconds=min(60.0, patience.limit))
                except dist.DistError as error:
                    # Who told of the store has gone with it; without a name, any program may listen at a port.
                    told_of_it = process.meeting is not None
                    raise (_lost if told_of_it else _cannot_meet)(process, error) from error
            reasons.insert(0, f"port {port} is another program's")
        waited, reason = time.monotonic() - begin, reasons[0]
        if waited > patience.limit:
            raise MissingProcessesError(
                f"rank {process.rank} waited {waited:.0f} s in vain for rank 0 at {_where(process)}: {reason}", [0]
            )
        if waited > patience.told_after and not told:
            _say_waiting(f"rank {process.rank} waits for rank 0 at {_where(process)}: {reason}", patience)
            told = True
        time.sleep(pause)
        pause = min(pause * 1.3, _LONGEST_POLL_SECONDS)


def _store_port(process: ThisProcess, number: int, port: int) -> int | None:
    """Where the store is, by who listens at a port; None where that is not rank 0 of this meeting.

    Raises:
        OSError: nobody listens there.
        UserError: rank 0 counts other processes.
    """
    with socket.create_connection((process.address, port), timeout=_ANSWER_SECONDS) as connection:
        if process.meeting is None:
            return port
        try:
            answer = connection.makefile("rb").readline(_LONGEST_ANSWER)
        except OSError:  # it says nothing
            return None
    words = answer.decode(errors="replace").split()
    if len(words) != 3 or words[0] != _name(process.meeting, number):
        return None
    if words[1] != str(process.ranks):
        raise UserError(
            f"rank {process.rank} is one of {process.ranks} processes, but rank 0 of {words[1]}; expected as many"
            " processes on each node, so as many GPUs"
        )
    return int(words[2])


def _open(process: ThisProcess, port: int, holds: bool, seconds: float) -> TCPStore:
    """Open the store at a port, 0: any. DistError where that cannot be."""
    return TCPStore(
        process.address,
        port,
        process.ranks,
        is_master=holds,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _name(meeting: str, number: int) -> str:
    """By which rank 0 of a meeting is known."""
    return f"ditmoe/{meeting}/{number}"


def _ports(process: ThisProcess) -> range:
    """Where to look, in order."""
    assert process.port is not None
    end = process.port + (PORTS_TRIED if process.meeting is not None else 1)
    return range(process.port, min(end, 65536))


def _where(process: ThisProcess) -> str:
    return f"{process.address}:{process.port} (MASTER_ADDR:MASTER_PORT)"


def _in_use(process: ThisProcess) -> UserError:
    ports = _ports(process)
    those = f", as are all ports up to {ports[-1]}" if len(ports) > 1 else ""
    return _cannot_meet(process, f"in use by another program{those}; expected a free port of rank 0's machine")


def _lost(process: ThisProcess, reason: object) -> MissingProcessesError:
    first = str(reason).partition("\n")[0]
    return MissingProcessesError(
        f"rank {process.rank} found rank 0 at {_where(process)} and lost it again: {first}"
    )


def _cannot_meet(process: ThisProcess, reason: object) -> UserError:
    first = str(reason).partition("\n")[0]
    return UserError(f"rank {process.rank} cannot meet the others at {_where(process)}: {first}")


def _say_waiting(what: str, patience: Patience) -> None:
    print(f"{what}; for {patience.limit:g} s at most", file=sys.stderr, flush=True)
