"""The workers that a process has on its machine: each watched by a nanny, which is replaced where it gives up."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from distributed import Nanny
from distributed.security import Security

from ditmoe.data.crew.roles import nanny_options

_WORKERS_NAME: Final = "Dask Worker process"
_AGAIN_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 2.0
_ALONE_SECONDS: Final = 60.0
"""Without a worker, after which a nanny is replaced."""
_UNWANTED_LOOKS: Final = 3
"""In a row that show no leader before workers leave: a shared folder may fail for a moment."""
_CLOSE_SECONDS: Final = 5.0


class Keeper:
    """Keeps some workers at the service of a leader, in one event loop.

    A nanny starts a worker anew that dies at work. It gives up where the leader has gone, and where the worker
    dies while it starts: then it may end, or stay without a worker. Either way another takes its place.
    """

    def __init__(
        self, address: str, host: str, security: Security, environments: Sequence[Mapping[str, str]]
    ) -> None:
        self._address = address
        self._options = [nanny_options(host, security, environment) for environment in environments]
        self._nannies: dict[int, Nanny] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, wanted: Callable[[], bool]) -> None:
        """Start the workers, and start them again, as long as they are wanted."""
        self._tasks = [
            asyncio.create_task(self._keep(place, options, wanted)) for place, options in enumerate(self._options)
        ]

    async def finished(self) -> None:
        """Return when none is wanted any more and all have ended."""
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        """End the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*map(_close, self._nannies.values()))
        for child in multiprocessing.active_children() if self._options else ():
            # One that was stopped while it started hears of no request, and this process would wait for its end.
            if child.name.startswith(_WORKERS_NAME):
                child.kill()

    async def _keep(self, place: int, options: Mapping[str, Any], wanted: Callable[[], bool]) -> None:
        while await asyncio.to_thread(wanted):
            nanny = self._nannies[place] = Nanny(self._address, **options)
            # Killed while it started, or the leader has gone: what it raises has many types.
            with suppress(Exception):
                await nanny
                await _until_of_no_use(nanny, wanted)
            await _close(nanny)
            await asyncio.sleep(_AGAIN_SECONDS)


async def _until_of_no_use(nanny: Nanny, wanted: Callable[[], bool]) -> None:
    """Return when a nanny has ended, has had no worker for long, or works for somebody who no longer leads."""
    ended = asyncio.ensure_future(nanny.finished())
    alone_since, unwanted = None, 0
    try:
        while not ended.done() and unwanted < _UNWANTED_LOOKS:
            await asyncio.wait([ended], timeout=_LOOK_SECONDS)
            unwanted = 0 if await asyncio.to_thread(wanted) else unwanted + 1
            if nanny.is_alive():
                alone_since = None
            elif alone_since is None:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > _ALONE_SECONDS:
                return
    finally:
        ended.cancel()


async def _close(nanny: Nanny) -> None:
    """End a nanny and its worker, also where the worker is stopped and hears of nothing."""
    closing = asyncio.create_task(nanny.close(timeout=_CLOSE_SECONDS))
    done, _ = await asyncio.wait([closing], timeout=_CLOSE_SECONDS)
    if not done:
        with suppress(ProcessLookupError):
            if nanny.pid:
                os.kill(nanny.pid, signal.SIGKILL)
        await asyncio.wait([closing], timeout=_CLOSE_SECONDS)
    if closing.done():
        closing.exception()  # of a nanny that never started: nothing is left to end
