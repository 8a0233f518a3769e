"""Threads that do the jobs: draws by the engine that answers requests, evaluations by a process of their own.

What is done of a job lies in chunks on disk, so that one that is taken up again goes on where it was.
"""

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.sampling.batching.engine import Cancelled, Engine, OneImage, Ticket, users_mistake
from ditmoe.sampling.batching.models import ModelKey, ModelUnavailable
from ditmoe.sampling.chains.images import StateFile
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages
from ditmoe.sampling.network.load import Weights
from ditmoe.sampling.noise_level.classifier import NoiseClassifier
from ditmoe.sampling.service.counters import Counters
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.images import tickets_for
from ditmoe.sampling.service.jobs.evaluating import GRACE_SECONDS, Evaluating, end_processes
from ditmoe.sampling.service.jobs.store import CANCELLED, COMPLETED, FAILED, QUEUED, Job, JobStore
from ditmoe.sampling.service.listing import Listed, Listing
from ditmoe.sampling.service.posteriors import Posteriors
from ditmoe.sampling.service.requests import DrawJob, parse_job
from ditmoe.sampling.settings.config import SAMPLER_RULES

LOG: Final = logging.getLogger("ditmoe.service")
JOIN_SECONDS: Final = 3 * GRACE_SECONDS


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
        posteriors: Posteriors,
        evaluating: Evaluating,
        draws_at_once: int = 2,
    ) -> None:
        """Start the threads; evaluations go one by one. Processes of a service that was killed are ended first."""
        self._store, self._engine, self._listing = store, engine, listing
        self._counters, self._posteriors, self._evaluating = counters, posteriors, evaluating
        self._lock = threading.Lock()
        self._under_way: dict[str, _UnderWay] = {}
        self._closing = threading.Event()
        self._new = {kind: threading.Event() for kind in ("draw", "evaluate")}
        for job in store.left:
            if job.kind == "evaluate":
                end_processes(job.id)
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
            thread.join(timeout=JOIN_SECONDS)

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
        self._engine.cancel([ticket for ticket in tickets if not ticket.drawn.done()])

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
            posterior = self._posteriors.find(listed, request.sampler_config())
            if weights_of(listed, request.weights, posterior) != job.weights:
                what = "checkpoint" if posterior is None else "checkpoint, or has another noise-level classifier,"
                return FAILED, f"{listed.checkpoint}: is another {what} than when the job was given"
            if isinstance(request, DrawJob):
                self._draw(job, request, listed, under_way)
            else:
                return self._evaluating.do(job, request, listed, under_way.stop)
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
        classes, samples = len(listed.class_names), config.images_per_unit
        settings = [job.weights, config.plain(), SAMPLER_RULES, one, request.count]
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        folder = self._store.folder_of(job.id)
        unfinished = StateFile(folder / ".chains", identity) if config.chains else None
        like = Ticket(job.user, key, 0, (), config, self._posteriors.find(listed, config), unfinished)

        def labels_of(numbers: list[int]) -> NDArray[np.int64]:
            return np.array(
                [number // samples % classes if one is None else one for number in numbers], dtype=np.int64
            )

        def draw(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
            tickets = tickets_for(numbers, label_N.tolist(), like)
            with self._lock:
                if under_way.stop.is_set():
                    raise Cancelled
                under_way.tickets = tickets
                self._engine.submit(tickets, bounded=False)
            try:
                images = [image for ticket in tickets for image in ticket.drawn.result()]
            finally:
                self._engine.cancel([ticket for ticket in tickets if not ticket.drawn.done()])
            for image in images:
                self._counters.drawn(image.nfe)
            return _as_chunk(images)

        store = ChunkStore(folder / "chunks", request.count, request.chunk, identity, draw, labels_of)
        store.draw_pending(
            on_progress=lambda done: self._store.progress(job.id, min(done * store.size, request.count))
        )
        store.not_finite()
        if unfinished is not None:
            shutil.rmtree(unfinished.path, ignore_errors=True)


def weights_of(listed: Listed, weights: Weights, posterior: NoiseClassifier | None) -> str:
    """What a job's images are made with, beside its settings."""
    chains = "" if posterior is None else f"-{posterior.fingerprint}"
    return f"{listed.info.fingerprint}-{weights}{chains}"


def _as_chunk(images: Sequence[OneImage]) -> DrawnImages:
    """Images as a chunk keeps them."""
    sigmas = [image.sigma for image in images if image.sigma is not None]
    traces = [image.trace_T.numpy() for image in images if image.trace_T is not None]
    return DrawnImages(
        np.stack([image.image_HWC.numpy() for image in images]),
        np.array([image.nfe for image in images], dtype=np.int64),
        np.array(sigmas, dtype=np.float32) if sigmas else None,
        np.stack(traces) if traces else None,
        np.array([image.finite for image in images]),
    )
