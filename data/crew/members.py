"""Workers that join a crew from outside: those of `ditmoe worker`, on this machine or another."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import dask

from ditmoe.data.crew.certificate import crew_security
from ditmoe.data.crew.keeper import Keeper
from ditmoe.data.crew.leader import LOOPBACK, SCHEDULER_CLAIM, SCHEDULER_FILE
from ditmoe.data.crew.roles import quiet, settings
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError

_LOOK_SECONDS: Final = 1.0


def join_crew(
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    *,
    own_host: Callable[[], str],
    idle_seconds: float,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Work for whoever leads the crew of a folder, one job after another, until nobody has for a while.

    Args:
        folder: of the crew; made where it is not there.
        environments: variables of each worker, such as CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS.
        own_host: this machine's address, at which the others find it; asked where they are not all on it.
        idle_seconds: how long to wait for somebody who leads.
        log: takes lines to show.

    Raises:
        UserError: others may read the folder.
    """
    security = crew_security(folder)
    quiet()
    idle_since = time.monotonic()
    with dask.config.set(settings()):
        while True:
            address = _leader(folder)
            if address is None:
                if time.monotonic() - idle_since >= idle_seconds:
                    break
                time.sleep(min(_LOOK_SECONDS, idle_seconds))
                continue
            host = LOOPBACK if address.startswith(f"tls://{LOOPBACK}:") else own_host()
            log(f"{folder}: {len(environments)} workers at {host} join {address}")
            keeper = Keeper(address, host, security, environments)
            asyncio.run(_work(keeper, partial(_leads, folder, address)))
            idle_since = time.monotonic()
    log(f"{folder}: nobody has led this crew for {idle_seconds:g} s")


def _leader(folder: Path) -> str | None:
    """The address of whoever leads; None: nobody does, or it does not listen yet."""
    if Claims(folder).holder(SCHEDULER_CLAIM) is None:
        return None
    try:
        address = read_object(folder / SCHEDULER_FILE).get("address")
    except UserError:  # not there yet, or no more
        return None
    # Never without the certificate, whatever the file says.
    return address if isinstance(address, str) and address.startswith("tls://") else None


def _leads(folder: Path, address: str) -> bool:
    return _leader(folder) == address


async def _work(keeper: Keeper, wanted: Callable[[], bool]) -> None:
    """Keep workers for a leader until it has gone."""
    await keeper.start(wanted)
    await keeper.finished()
