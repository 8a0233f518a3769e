"""A job that has its parts made by a crew: it runs the scheduler, and as many workers of its own as it wants.

More workers join while it is at work (`members.py`), from this machine or others, and may go at any time. Whoever
leads holds the claim `scheduler` in the crew's folder, and says in a file where it listens:

    CREW/crew.pem         certificate and key (`certificate.py`)
         scheduler.json   the address of whoever leads, its host, and which program it is
         scheduler.0      its claim

Losing a worker loses nothing: what it was making is made by another. The scheduler lives and dies with the job,
which goes on from the parts that are there when it is repeated.
"""

import json
import logging
import queue
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import dask
from distributed import Client, Future
from distributed.deploy.spec import SpecCluster
from distributed.scheduler import KilledWorker

from ditmoe.data.crew.certificate import crew_security
from ditmoe.data.crew.keeper import Keeper
from ditmoe.data.crew.program import program_digest
from ditmoe.data.crew.roles import ALLOWED_DEATHS, STALLED_SECONDS, CrewScheduler, quiet, settings
from ditmoe.data.crew.tasks import AnyParts, Outcome, Task, make_part
from ditmoe.data.storage.claims import BEAT_SECONDS, MISSED_BEATS, Claim, Claims, list_folder
from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.data.storage.parts import Progress, make_parts
from ditmoe.model.errors import UserError

SCHEDULER_CLAIM: Final = "scheduler"
SCHEDULER_FILE: Final = "scheduler.json"
LOOPBACK: Final = "127.0.0.1"
PART_SECONDS: Final = 6 * 3600.0
"""How long a worker may take to make a part."""
_LOOK_SECONDS: Final = 1.0
_SAY_SECONDS: Final = 60.0


class Crew:
    """The workers at hand, for the job that leads them."""

    def __init__(
        self, folder: Path, client: Client, part_seconds: float, log: Callable[[str], None], size: int
    ) -> None:
        self.folder = folder
        self.size = size
        """Workers that the job started itself."""
        self._client = client
        self._part_seconds = part_seconds
        self._log = log

    def members(self) -> int:
        """The workers that are there now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def make(
        self,
        task: Task,
        parts: AnyParts,
        *,
        only: Sequence[int] | None = None,
        on_progress: Progress = lambda done: None,
    ) -> int:
        """Have the parts made that are not there.

        Args:
            task: what the workers build them from.
            parts: the same, as this process has them.
            only: these parts; None: all.
            on_progress: gets the size of the finished parts, at the start and after each.

        Returns:
            The number of parts that were not there.

        Raises:
            UserError: a part cannot be made, or too many workers died at it.
        """
        wanted = range(len(parts.names)) if only is None else only
        make_folder(parts.folder)
        there = set(list_folder(parts.folder))
        missing = [part for part in wanted if parts.names[part] not in there]
        done = parts.size(wanted) - parts.size(missing)
        on_progress(done)
        finished: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
        name = uuid.uuid4().hex
        futures: list[Future[Any]] = []
        try:
            for place, part in enumerate(missing):
                future = self._client.submit(
                    make_part,
                    task.builder,
                    task.request,
                    part,
                    self._part_seconds,
                    key=f"part-{name}-{part}",
                    priority=-place,
                    pure=False,
                )
                futures.append(future)
                future.add_done_callback(lambda ended, part=part: finished.put((part, ended)))
            for _ in missing:
                part, future = self._next(finished)
                self._check(parts, part, future)
                done += parts.size([part])
                on_progress(done)
        finally:
            if futures:
                self._client.cancel(futures, force=True)
        make_parts(
            parts, only=only
        )  # nothing is left to make but what somebody removed; what was left behind goes
        return len(missing)

    def _next(self, finished: "queue.SimpleQueue[tuple[int, Future[Any]]]") -> "tuple[int, Future[Any]]":
        """The next part that has ended; says now and then that nobody is there to make one."""
        said = time.monotonic() - _SAY_SECONDS + 10 * _LOOK_SECONDS
        while True:
            with suppress(queue.Empty):
                return finished.get(timeout=_LOOK_SECONDS)
            if time.monotonic() - said >= _SAY_SECONDS:
                said = time.monotonic()
                if not self.members():
                    self._log(f"no worker is there: `ditmoe worker {self.folder}` on any machine starts some")

    def _check(self, parts: AnyParts, part: int, future: "Future[Any]") -> None:
        """Raise what went wrong with a part."""
        try:
            outcome = Outcome(*future.result())
        except KilledWorker as error:
            raise UserError(
                f"{parts.path(part)}: {ALLOWED_DEATHS + 1} worker processes ended while they made it, the last at "
                f"{error.last_worker.address}; the system kills when memory runs out, and a part may take "
                f"{self._part_seconds:g} s: what they printed says more"
            ) from None
        if outcome.mistake is not None:
            raise UserError(outcome.mistake)
        if outcome.failure is not None:
            raise RuntimeError(f"in a worker process, at {parts.path(part)}:\n{outcome.failure}")


@contextmanager
def lead_crew(
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    *,
    host: str = LOOPBACK,
    stalled_seconds: float = STALLED_SECONDS,
    part_seconds: float = PART_SECONDS,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[Crew]:
    """Lead the crew of a folder for the body.

    Args:
        folder: of the crew; made where it is not there.
        environments: variables of each worker that is started here, such as CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS.
        host: the address to listen on; members elsewhere need one that they can reach.
        stalled_seconds: without a sign of life of a worker, after which it is started anew.
        part_seconds: how long a worker may take to make a part.
        log: takes lines to show.

    Raises:
        UserError: another process leads it, others may read the folder, or the address is not this machine's.
    """
    security = crew_security(folder)
    with _led(folder, log) as claim:
        file = folder / SCHEDULER_FILE
        file.unlink(missing_ok=True)
        quiet()
        with dask.config.set(settings(stalled_seconds)):
            try:
                cluster = SpecCluster(
                    scheduler={
                        "cls": CrewScheduler,
                        "options": {"host": host, "port": 0, "protocol": "tls", "security": security},
                    },
                    workers={},  # it would not replace a nanny that gives up
                    security=security,
                    silence_logs=logging.CRITICAL,
                )
            except (OSError, RuntimeError) as error:
                raise UserError(f"{folder}: no crew could be started on {host}: {error}") from error
            options: dict[str, Any] = {"security": security, "set_as_default": False, "loop": cluster.loop}
            with cluster, Client(cluster.scheduler_address, **options) as client:
                with replacing(file, private=True) as written:
                    facts = {
                        "address": cluster.scheduler_address,
                        "host": socket.gethostname(),
                        "program": program_digest(),
                    }
                    written.write(json.dumps(facts).encode() + b"\n")
                keeper = Keeper(cluster.scheduler_address, host, security, environments)
                cluster.sync(keeper.start, lambda: True)
                try:
                    yield Crew(folder, client, part_seconds, log, len(environments))
                finally:
                    if claim.held():  # it is another's where this process was stopped for long
                        file.unlink(missing_ok=True)
                    cluster.sync(keeper.close)


@contextmanager
def _led(folder: Path, log: Callable[[str], None]) -> Iterator[Claim]:
    """Hold the claim of whoever leads, for the body.

    One of another machine is waited for as long as it takes to tell that it is dead: a job of Slurm that was put
    back into the queue by its node's end starts elsewhere within seconds.

    Raises:
        UserError: another process leads.
    """
    claims, told = Claims(folder), False
    deadline = time.monotonic() + (MISSED_BEATS + 2) * BEAT_SECONDS
    while True:
        with claims.taken(SCHEDULER_CLAIM) as claim:
            if claim is not None:
                yield claim
                return
        who = claims.who(SCHEDULER_CLAIM)
        if who and (claims.is_held_here(SCHEDULER_CLAIM) or time.monotonic() > deadline):
            raise UserError(
                f"{folder}: another process leads this crew{who}; wait for it, or choose another folder"
            )
        if who and not told:
            log(f"{folder}: another process leads this crew{who}; waiting for a sign that it is dead, or alive")
            told = True
        time.sleep(_LOOK_SECONDS)
