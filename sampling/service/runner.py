"""Does the jobs: draws by the engine that answers requests, evaluations by a process of their own.

What is done of a job lies in chunks on disk, so that one that is taken up again goes on where it was.
"""

import hashlib
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from numpy.typing import NDArray

from ditmoe.data.storage.files import make_folder, read_object
from ditmoe.model.errors import UserError
from ditmoe.sampling.batching.engine import Cancelled, Engine, Ticket, users_mistake
from ditmoe.sampling.batching.models import ModelKey, ModelUnavailable
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, prepare_job
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages
from ditmoe.sampling.network.load import shared_folder
from ditmoe.sampling.service.counters import Counters
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.listing import Listed, Listing
from ditmoe.sampling.service.requests import DrawJob, EvaluationJob, options_of, parse_job
from ditmoe.sampling.service.store import CANCELLED, COMPLETED, FAILED, QUEUED, Job, JobStore
from ditmoe.sampling.settings.config import SAMPLER_RULES

LOG: Final = logging.getLogger("ditmoe.service")
CHUNK: Final = 64
"""Images of a draw that are written, and are in the queue, at once."""
MOST_ATTEMPTS: Final = 10
"""Times that a job whose process was killed is taken up without any more images."""
POLL_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 10.0

StartChild = Callable[[Sequence[str], Path], "subprocess.Popen[bytes]"]
"""(a verb of ours and its arguments, file that its output goes to) → its process, which ends with this one."""


@dataclass(eq=False)
class _UnderWay:
    """A job that a thread is at."""

    stop: threading.Event = field(default_factory=threading.Event)
    """It is cancelled, or the service ends."""
    tickets: list[Ticket] = field(default_factory=list)


class Runner:
    """Threads that do jobs."""

    def __init__(
        self,
        store: JobStore,
        engine: Engine,
        listing: Listing,
        counters: Counters,
        start_child: StartChild,
        draws_at_once: int = 2,
    ) -> None:
        """Start the threads; evaluations go one by one. Processes of a service that was killed are ended first."""
        self._store, self._engine, self._listing = store, engine, listing
        self._counters, self._start_child = counters, start_child
        self._lock = threading.Lock()
        self._under_way: dict[str, _UnderWay] = {}
        self._closing = threading.Event()
        self._new = {kind: threading.Event() for kind in ("draw", "evaluate")}
        for job in store.left:
            end_child(job)
        kinds = ["draw"] * draws_at_once + ["evaluate"]
        self._threads = [threading.Thread(target=self._work, args=(kind,), daemon=True) for kind in kinds]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def wake(self) -> None:
        """There is a new job."""
        for event in self._new.values():
            event.set()

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job; None: there is none of this name."""
        job = self._store.cancel(job_id)
        with self._lock:
            under_way = self._under_way.get(job_id)
        if under_way is not None:
            self._stop(under_way)
        return job

    def close(self) -> None:
        """Stop all jobs, which wait for the next service."""
        self._closing.set()
        self.wake()
        with self._lock:
            under_way = list(self._under_way.values())
        for each in under_way:
            self._stop(each)
        for thread in self._threads:
            thread.join(timeout=3 * GRACE_SECONDS)

    def folder_of(self, job: Job) -> Path | None:
        """Where what a job has made lies; None: nothing yet."""
        if job.kind == "draw":
            folder = self._store.folder_of(job.id)
            return folder if folder.is_dir() else None
        return None if job.folder is None else Path(job.folder)

    def _stop(self, under_way: _UnderWay) -> None:
        with self._lock:
            under_way.stop.set()
            tickets = list(under_way.tickets)
        self._engine.cancel([ticket for ticket in tickets if not ticket.image.done()])

    def _work(self, kind: str) -> None:
        """One job after another."""
        while not self._closing.is_set():
            self._new[kind].clear()
            try:
                job = self._store.take(kind)
            except Exception:  # such as a full disk: the jobs wait
                LOG.exception("the jobs could not be read")
                self._closing.wait(5)
                continue
            if job is None:
                self._new[kind].wait(timeout=2)
                continue
            under_way = _UnderWay()
            with self._lock:
                self._under_way[job.id] = under_way
            if self._closing.is_set() or job.cancelling:
                under_way.stop.set()
            state, error = self._do(job, under_way)
            with self._lock:
                del self._under_way[job.id]
            self._counters.jobs.labels(kind, state).inc()
            while True:
                try:
                    self._store.end(job.id, state, error)
                    break
                except Exception:
                    LOG.exception("the end of a job could not be written")
                    if self._closing.wait(5):
                        return  # it is in progress on disk, and is taken up again

    def _do(self, job: Job, under_way: _UnderWay) -> tuple[str, str | None]:
        """The state of a job at its end, and what went wrong."""
        try:
            request = parse_job(job.request.encode())
            listed = self._listing.find(request.model, request.step)
            if f"{listed.info.fingerprint}-{request.weights}" != job.weights:
                return FAILED, f"{listed.checkpoint}: is another checkpoint than when the job was given"
            if isinstance(request, DrawJob):
                self._draw(job, request, listed, under_way)
            else:
                return self._evaluate(job, request, listed, under_way)
        except Cancelled:
            return self._stopped()
        except (ServiceError, ModelUnavailable) as error:
            return FAILED, str(error)
        except Exception as error:
            if users_mistake(error):
                return FAILED, str(error)
            LOG.exception("job %s failed", job.id)
            return FAILED, "the job failed; the service's log says why"
        return COMPLETED, None

    def _stopped(self) -> tuple[str, str | None]:
        """Of a job that was told to stop."""
        return (QUEUED if self._closing.is_set() else CANCELLED), None

    def _draw(self, job: Job, request: DrawJob, listed: Listed, under_way: _UnderWay) -> None:
        """Draw what is missing. Cancelled: it is to stop."""
        config = request.sampler_config().resolved(listed.info.objective)
        key = ModelKey(listed.checkpoint, request.weights, config.precision)
        one = None if request.one_class is None else listed.label_of(request.one_class, "class")
        classes = len(listed.class_names)
        settings = [job.weights, config.plain(), SAMPLER_RULES, one, request.count]

        def labels_of(numbers: list[int]) -> NDArray[np.int64]:
            return np.array([number % classes if one is None else one for number in numbers], dtype=np.int64)

        def draw(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
            tickets = [
                Ticket(job.user, key, label, number, config)
                for number, label in zip(numbers, label_N.tolist(), strict=True)
            ]
            with self._lock:
                if under_way.stop.is_set():
                    raise Cancelled
                under_way.tickets = tickets
                self._engine.submit(tickets, bounded=False)
            try:
                images = [ticket.image.result() for ticket in tickets]
            finally:
                self._engine.cancel([ticket for ticket in tickets if not ticket.image.done()])
            for image in images:
                self._counters.drawn(image.nfe)
            return DrawnImages(
                np.stack([image.image_HWC.numpy() for image in images]),
                np.array([image.nfe for image in images], dtype=np.int64),
                finite_N=np.array([image.finite for image in images]),
            )

        store = ChunkStore(
            self._store.folder_of(job.id) / "chunks",
            request.count,
            CHUNK,
            hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
            draw,
            labels_of,
        )
        store.draw_pending(on_progress=lambda done: self._store.progress(job.id, min(done * CHUNK, request.count)))
        store.not_finite()

    def _evaluate(
        self, job: Job, request: EvaluationJob, listed: Listed, under_way: _UnderWay
    ) -> tuple[str, str | None]:
        """Have a process do what is missing."""
        options = EvaluationOptions(
            listed.checkpoint,
            request.sampler_config(),
            count=request.count,
            labels=request.labels,
            weights=request.weights,
            recogniser=request.recogniser,
        )
        results = prepare_job(options).folder.resolve()
        logs = self._store.folder_of(job.id)
        make_folder(logs)
        arguments = ["evaluate", *options_of(request.sampler_config()), f"--count={request.count}"]
        arguments += [f"--labels={request.labels}", f"--weights={request.weights}", "--processes=1"]
        arguments += ["--recogniser" if request.recogniser else "--no-recogniser"]
        arguments += [f"--shared-weights={shared_folder(listed.checkpoint)}", "--", str(listed.checkpoint)]
        if under_way.stop.is_set():
            return self._stopped()
        log = logs / "output.txt"
        begun = log.stat().st_size if log.exists() else 0
        child = self._start_child(arguments, log)
        try:
            with suppress(psutil.NoSuchProcess):
                started = psutil.Process(child.pid).create_time()
                self._store.set(job.id, folder=str(results), child=child.pid, child_started=started)
            while True:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=POLL_SECONDS)
                self._store_progress(job, results)
                if child.returncode is not None or under_way.stop.is_set():
                    break
        finally:
            _end(child)
        if under_way.stop.is_set() and child.returncode != 0:
            return self._stopped()
        if child.returncode == 0:
            return COMPLETED, None
        if child.returncode < 0 or child.returncode > 128:
            now = self._store.get(job.id)
            if now is not None and now.attempts < MOST_ATTEMPTS:
                return QUEUED, None
            return FAILED, f"its process was ended by signal {child.returncode % 128} {MOST_ATTEMPTS} times"
        return FAILED, _last_words(log, begun)

    def _store_progress(self, job: Job, results: Path) -> None:
        """Note the images that an evaluation has drawn."""
        with suppress(OSError, UserError, KeyError, ValueError):
            size = int(read_object(results / "evaluation.json")["chunk"])
            with os.scandir(results / "chunks") as entries:
                chunks = sum(entry.name.endswith(".npz") for entry in entries)
            done = min(job.total, chunks * size)
            if done > job.done:
                self._store.progress(job.id, done)
                job.done = done


def end_child(job: Job) -> None:
    """End the process, with all that it started, that was at a job of a service that was killed."""
    if job.child is None:
        return
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(job.child)
        if abs(process.create_time() - (job.child_started or 0)) < 0.1:
            for each in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
            psutil.wait_procs([process], timeout=GRACE_SECONDS)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process: politely, and then not."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_words(log: Path, begun: int) -> str:
    """What a process said of its failure."""
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read()[-20_000:].decode(errors="replace").splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return "the evaluation failed; the service's log and the job's output.txt say why"
    return "\n".join(lines[starts[-1] :]).removeprefix("error: ")
