"""Workers that join a crew from outside: those of `ditmoe worker`, on this machine or another."""

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import dask

from ditmoe.data.crew.certificate import crew_security
from ditmoe.data.crew.keeper import Keeper
from ditmoe.data.crew.leader import LOOPBACK, SCHEDULER_CLAIM, SCHEDULER_FILE
from ditmoe.data.crew.program import program_digest
from ditmoe.data.crew.roles import quiet, settings
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError

_LOOK_SECONDS: Final = 1.0


def join_crew(
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    *,
    own_host: Callable[[str], str],
    idle_seconds: float,
    log: Callable[[str], None] = lambda line: None,
    beat: Callable[[str], None] = lambda doing: None,
) -> None:
    """Work for whoever leads the crew of a folder, one job after another, until nobody has for a while.

    Args:
        folder: of the crew; made where it is not there.
        environments: variables of each worker, such as CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS.
        own_host: from the leader's host, this machine's address at which that one finds it.
        idle_seconds: how long to wait for somebody who leads.
        log: takes lines to show.
        beat: hears every second what is being done: it waits, or works.

    Raises:
        UserError: others may read the folder; or whoever leads cannot be joined from here, and nobody else came.
    """
    security = crew_security(folder)
    quiet()
    idle_since, told = time.monotonic(), ""
    with dask.config.set(settings()):
        while True:
            beat("waits for somebody who leads")
            leader = _leader(folder)
            obstacle = "" if leader is None else _obstacle(folder, leader)
            if obstacle and obstacle != told:
                log(obstacle)
                told = obstacle
            if leader is None or obstacle:
                if time.monotonic() - idle_since >= idle_seconds:
                    if told:
                        raise UserError(told)
                    break
                time.sleep(min(_LOOK_SECONDS, idle_seconds))
                continue
            address, told = str(leader["address"]), ""
            leading_host = urlsplit(address).hostname or ""
            host = LOOPBACK if leading_host == LOOPBACK else own_host(leading_host)
            count = len(environments)
            log(f"{folder}: {count} {'worker' if count == 1 else 'workers'} at {host} join {address}")
            keeper = Keeper(address, host, security, environments)
            asyncio.run(_work(keeper, partial(_leads, folder, address), partial(beat, f"works for {address}")))
            idle_since = time.monotonic()
    log(f"{folder}: nobody has led this crew for {idle_seconds:g} s")


def _leader(folder: Path) -> dict[str, Any] | None:
    """What whoever leads says of itself; None: nobody does, or it does not listen yet."""
    if Claims(folder).holder(SCHEDULER_CLAIM) is None:
        return None
    try:
        facts = read_object(folder / SCHEDULER_FILE)
    except UserError:  # not there yet, or no more
        return None
    address = facts.get("address")
    # Never without the certificate, whatever the file says.
    return facts if isinstance(address, str) and address.startswith("tls://") else None


def _obstacle(folder: Path, leader: Mapping[str, Any]) -> str:
    """Why whoever leads is not to be joined from here; empty: it is."""
    who = f"{folder}: the command that leads it on {leader.get('host')}"
    if urlsplit(leader["address"]).hostname == LOOPBACK and leader.get("host") != socket.gethostname():
        return (
            f"{who} listens on {LOOPBACK}, where only its own machine reaches it; expected an address that"
            " this machine reaches: `--listen ADDRESS|INTERFACE` of that command"
        )
    if leader.get("program") != program_digest():
        return (
            f"{who} is another version of this program, or of torch, numpy or distributed, than these workers run;"
            " expected the same: start the workers anew (as jobs: submit them anew)"
        )
    return ""


def _leads(folder: Path, address: str) -> bool:
    leader = _leader(folder)
    return leader is not None and leader["address"] == address


async def _work(keeper: Keeper, wanted: Callable[[], bool], beat: Callable[[], None]) -> None:
    """Keep workers for a leader until it has gone."""

    async def beat_on() -> None:
        while True:
            beat()
            await asyncio.sleep(_LOOK_SECONDS)

    beating = asyncio.create_task(beat_on())
    try:
        await keeper.start(wanted)
        await keeper.finished()
    finally:
        beating.cancel()
        await keeper.close()
