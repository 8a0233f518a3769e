"""The routes of the sampling service."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ditmoe.sampling.batching.engine import Engine
from ditmoe.sampling.batching.models import Models
from ditmoe.sampling.service.access import Guard, Tokens, read_body
from ditmoe.sampling.service.counters import Counters
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.images import generate_images
from ditmoe.sampling.service.jobs.evaluating import Evaluating, StartChild
from ditmoe.sampling.service.jobs.evaluators import Evaluators
from ditmoe.sampling.service.jobs.expiry import Sweeper
from ditmoe.sampling.service.jobs.routes import add_jobs
from ditmoe.sampling.service.jobs.runner import Runner
from ditmoe.sampling.service.jobs.store import IN_PROGRESS, QUEUED, JobStore
from ditmoe.sampling.service.listing import Listing
from ditmoe.sampling.service.page.routes import add_page
from ditmoe.sampling.service.page.static_files import static_files
from ditmoe.sampling.service.posteriors import Posteriors
from ditmoe.sampling.service.requests import ImageRequest, parse
from ditmoe.sampling.service.warmup import WarmUp

LOG: Final = logging.getLogger("ditmoe.service")


@dataclass(frozen=True)
class ServiceSettings:
    """What a service is started with."""

    runs: Path
    """A folder of runs, or a run."""
    device: torch.device
    memory: int
    """Bytes for the weights of all networks."""
    state: Path
    """Folder of the jobs."""
    start_child: StartChild
    """Starts what does an evaluation."""
    batch: int = 16
    """Rows of each pass, and images under way at once."""
    queue: int = 256
    """Images of a user that may wait."""
    most_images: int = 64
    """Of a request."""
    most_passes: int = 100_000
    """Rows of passes that a request may take."""
    most_job_images: int = 1_000_000
    most_job_passes: int = 10**9
    tokens: Tokens | None = None
    loopback: bool = True
    """It listens on loopback alone."""
    load: Sequence[str] = ()
    """Runs whose networks are loaded before anybody asks."""
    keep_seconds: float | None = None
    """After which what a job made is removed; None: never."""
    evaluators: Evaluators = field(default_factory=Evaluators)
    """What evaluations are scored with, and by whom."""


class Service:
    """What the routes share."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Start all threads. UserError: there is no such folder, or another service has the jobs."""
        self.settings = settings
        self.counters = Counters()
        self.listing = Listing(settings.runs)
        self.models = Models(
            settings.device,
            settings.memory,
            settings.batch,
            self.counters.rows.observe,
            self.counters.loaded,
        )
        self.warm_up = WarmUp(settings.load, self.listing, self.models)
        self.store = JobStore(settings.state, keep_seconds=settings.keep_seconds)
        self.sweeper = Sweeper(self.store)
        self.engine = Engine(self.models, settings.batch, settings.queue)
        self.counters.gauge("ditmoe_images_waiting", "Images that nobody has begun.", lambda: self.engine.waiting)
        self.counters.gauge("ditmoe_networks_loaded", "Networks in memory.", lambda: len(self.models.loaded()))
        self.counters.gauge(
            "ditmoe_networks_bytes",
            "Bytes of their weights.",
            lambda: sum(loaded.bytes for loaded in self.models.loaded().values()),
        )

        for state in (QUEUED, IN_PROGRESS):
            self.counters.gauge(f"ditmoe_jobs_{state}", f"Jobs {state}.", partial(self.store.count, state))
        self.posteriors = Posteriors(settings.device)
        evaluating = Evaluating(self.store, settings.evaluators, settings.start_child)
        self.runner = Runner(self.store, self.engine, self.listing, self.counters, self.posteriors, evaluating)

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(each.alive for each in (self.engine, self.runner, self.sweeper, self.warm_up))

    def close(self) -> None:
        """End the threads; jobs wait for the next service."""
        self.warm_up.close()
        self.runner.close()
        self.engine.close()
        self.sweeper.close()
        self.store.close()


def make_app(service: Service) -> ASGIApp:
    """The service as an application, behind its guard; it closes the service at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(
        title="ditmoe", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )
    _count_and_tell(app, service.counters)
    _add_facts(app, service)
    add_jobs(
        app,
        service.listing,
        service.store,
        service.runner,
        service.posteriors,
        service.settings.evaluators,
        service.settings.most_job_images,
        service.settings.most_job_passes,
    )
    add_page(app, service.listing)

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> JSONResponse:
        asked = parse(ImageRequest, await read_body(request))
        settings = service.settings
        reply = await generate_images(
            request,
            asked,
            service.listing,
            service.engine,
            service.counters,
            service.posteriors,
            settings.most_images,
            settings.most_passes,
        )
        return JSONResponse(reply)

    settings = service.settings
    return Guard(_Counted(app, service.counters), settings.tokens, settings.loopback, tuple(static_files()))


def _add_facts(app: FastAPI, service: Service) -> None:
    """Routes that say how the service is."""

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        runs = len(await asyncio.to_thread(service.listing.runs))
        loading = service.warm_up.loading()
        well = service.alive and runs > 0 and not loading
        status = {"status": "ok" if well else "not ready", "runs": runs, "loading": loading}
        return JSONResponse(status, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.counters.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        described = await asyncio.to_thread(service.listing.described)
        loaded = {str(key.checkpoint) for key in service.models.loaded()}
        runs = service.listing.runs()
        for each in described:
            folder = str(runs.get(str(each["id"]), ""))
            each["loaded"] = bool(folder) and any(path.startswith(f"{folder}/") for path in loaded)
        return JSONResponse({"object": "list", "data": described})


def _count_and_tell(app: FastAPI, counters: Counters) -> None:
    """Errors as JSON, each counted by its reason."""

    def reply(error: ServiceError) -> JSONResponse:
        counters.failures.labels(error.reason).inc()
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ServiceError)
    async def refused(_: Request, error: ServiceError) -> JSONResponse:
        return reply(error)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        reason = "not_found" if error.status_code == 404 else "rejected"
        return reply(ServiceError(error.status_code, str(error.detail), reason=reason))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return reply(ServiceError(500, "the service failed; its log says why", reason="other"))


class _Counted:
    """Counts requests by their route, not by their path: paths are whatever a client makes up."""

    def __init__(self, app: FastAPI, counters: Counters) -> None:
        self._app, self._counters = app, counters

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 500

        async def note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            if scope["type"] == "http":
                route = getattr(scope.get("route"), "path", "unknown")
                self._counters.requests.labels(route, str(status)).inc()
