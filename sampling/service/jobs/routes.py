"""The routes of jobs: give, list, watch, cancel, and fetch what they made."""

import asyncio
import io
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from PIL import Image

from ditmoe.data.storage.arrays import read_arrays
from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.model.settings import message_of
from ditmoe.sampling.evaluation.stored import METRICS_FILE
from ditmoe.sampling.service.access import User, read_body, user_of
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.jobs.evaluators import Evaluators
from ditmoe.sampling.service.jobs.runner import Runner, weights_of
from ditmoe.sampling.service.jobs.store import COMPLETED, ENDED, EXPIRED, Job, JobStore, TooManyJobs
from ditmoe.sampling.service.listing import Listing
from ditmoe.sampling.service.posteriors import Posteriors
from ditmoe.sampling.service.requests import DrawJob, EvaluationJob, check_cost, parse_job

LOOK_SECONDS: Final = 0.25
ALIVE_SECONDS: Final = 15.0
"""Between two signs of life to whoever watches a job at which nothing changes."""
MOST_LISTED: Final = 200


def _asks(request: Request) -> User:
    return user_of(request)


Asks = Annotated[User, Depends(_asks)]
"""Who asks."""


def add_jobs(
    app: FastAPI,
    listing: Listing,
    store: JobStore,
    runner: Runner,
    posteriors: Posteriors,
    evaluators: Evaluators,
    most_images: int,
    most_passes: int,
) -> None:
    """Add the routes to an application."""

    def check(body: bytes, http: Request) -> Job:
        """The job of a request, on disk."""
        request = parse_job(body)
        listed = listing.find(request.model, request.step)
        config = request.sampler_config().resolved(listed.info.objective)
        if isinstance(request, EvaluationJob):
            evaluators.check(request)
        elif request.one_class is not None:
            listed.label_of(request.one_class, "class")
        posterior = posteriors.find(listed, config)
        check_cost(request.count, config, listed.info.objective, most_images, most_passes, "count")
        if request.weights not in listed.info.parts:
            raise ServiceError(400, f"weights: the checkpoint has no {request.weights}", param="weights")
        fixed = request.model_copy(update={"model": listed.run, "step": listed.info.step})
        try:
            return store.add(
                key=request.key,
                user=user_of(http, request.user).name,
                kind=request.kind,
                request=fixed.model_dump_json(by_alias=True, exclude_unset=False, exclude=_not_asked(fixed)),
                weights=weights_of(listed, request.weights, posterior),
                total=request.count,
            )
        except TooManyJobs as error:
            raise ServiceError(429, str(error), reason="queue_full", retry_after=60) from None

    async def find(job_id: str, user: User) -> Job:
        """A job of whoever asks: another's is as if it were not there."""
        job = await asyncio.to_thread(store.get, job_id)
        if job is None or not user.sees(job.user):
            raise ServiceError(404, "there is no such job", param="id", reason="not_found")
        return job

    async def folder(job_id: str, user: User) -> tuple[Job, Path]:
        job = await find(job_id, user)
        if job.state == EXPIRED:
            raise ServiceError(410, "the job has expired: what it made is removed", reason="expired")
        path = runner.folder_of(job)
        if path is None:
            raise ServiceError(404, "the job has made nothing yet", reason="not_found")
        return job, path

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        told = ServiceError(400, f"{name}: {message_of(first)}", param=name)
        return JSONResponse(told.body(), 400)

    @app.get("/v1/evaluators")
    async def scored_with() -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(evaluators.described))

    @app.post("/v1/jobs")
    async def give(request: Request) -> JSONResponse:
        body = await read_body(request)
        job = await asyncio.to_thread(check, body, request)
        runner.wake()
        return JSONResponse(described(job), 201)

    @app.get("/v1/jobs")
    async def listed(
        user: Asks, limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 50, after: str | None = None
    ) -> JSONResponse:
        before = None if after is None else (await find(after, user)).number
        jobs = await asyncio.to_thread(store.newest, limit + 1, before, None if user.sees_all else user.name)
        return JSONResponse(
            {"object": "list", "data": [described(job) for job in jobs[:limit]], "has_more": len(jobs) > limit}
        )

    @app.get("/v1/jobs/{job_id}")
    async def one(job_id: str, user: Asks) -> JSONResponse:
        return JSONResponse(described(await find(job_id, user)))

    @app.post("/v1/jobs/{job_id}/cancel")
    async def cancel(job_id: str, user: Asks) -> JSONResponse:
        await find(job_id, user)
        await asyncio.to_thread(runner.cancel, job_id)
        return JSONResponse(described(await find(job_id, user)))

    @app.get("/v1/jobs/{job_id}/events")
    async def watch(job_id: str, user: Asks) -> StreamingResponse:
        await find(job_id, user)
        return StreamingResponse(_events(store, job_id), media_type="text/event-stream")

    @app.get("/v1/jobs/{job_id}/figures")
    async def figures(job_id: str, user: Asks) -> JSONResponse:
        _, path = await folder(job_id, user)
        try:
            return JSONResponse(await asyncio.to_thread(read_object, path / METRICS_FILE))
        except UserError:
            raise ServiceError(404, "the job has no figures, or not yet", reason="not_found") from None

    @app.get("/v1/jobs/{job_id}/files")
    async def files(job_id: str, user: Asks) -> JSONResponse:
        _, path = await folder(job_id, user)
        found = await asyncio.to_thread(files_of, path)
        data = [{"name": name, "bytes": size} for name, size in found.items()]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/jobs/{job_id}/files/{name:path}")
    async def file(job_id: str, name: str, user: Asks) -> FileResponse:
        _, path = await folder(job_id, user)
        if name not in await asyncio.to_thread(files_of, path):
            raise ServiceError(404, "the job has no such file", param="name", reason="not_found")
        # Never shown as a page of this service's own.
        return FileResponse(path / name, media_type="application/octet-stream", filename=name.rpartition("/")[2])

    @app.get("/v1/jobs/{job_id}/images/{number}")
    async def image(job_id: str, number: int, user: Asks) -> Response:
        job, path = await folder(job_id, user)
        if not 0 <= number < job.total:
            raise ServiceError(
                404, f"the job has {counted(job.total, 'image')}", param="number", reason="not_found"
            )
        return Response(await asyncio.to_thread(_image, job, path, number), media_type="image/png")


def _not_asked(request: Any) -> set[str]:
    """Fields that a stored request leaves out: settings of chains where there are none."""
    return set() if request.chains else {"dlg"}


def described(job: Job) -> dict[str, Any]:
    """A job as clients have it, with what was asked for."""
    evaluation = None if job.folder is None else Path(job.folder).name
    return {**job.plain(), "request": json.loads(job.request), "evaluation": evaluation}


async def _events(store: JobStore, job_id: str) -> AsyncIterator[str]:
    """The job whenever it changes, until it ends: server-sent events."""
    told, alive = "", time.monotonic()
    while True:
        job = await asyncio.to_thread(store.get, job_id)
        if job is None:
            return
        text = json.dumps(described(job))
        if text != told:
            told, alive = text, time.monotonic()
            yield f"data: {text}\n\n"
        elif time.monotonic() > alive + ALIVE_SECONDS:
            alive = time.monotonic()
            yield ": alive\n\n"
        if job.state in ENDED:
            return
        await asyncio.sleep(LOOK_SECONDS)


def files_of(folder: Path) -> dict[str, int]:
    """Name → bytes of all regular files below a folder, apart from hidden ones; links are not followed."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(path, name)
            if not name.startswith(".") and file.is_file() and not file.is_symlink():
                found[file.relative_to(folder).as_posix()] = file.stat().st_size
    return found


def _image(job: Job, folder: Path, number: int) -> bytes:
    """An image as PNG. ServiceError: it is not there yet."""
    request = parse_job(job.request.encode())
    try:
        if isinstance(request, DrawJob):
            size = request.chunk
        else:
            size = int(read_object(folder / "evaluation.json")["chunk"])
        stored = read_arrays(folder / "chunks" / f"{number // size:05d}.npz", ["images"])
    except (UserError, OSError, KeyError):
        why = "the image is not there, or not yet"
        if job.state == COMPLETED and isinstance(request, EvaluationJob) and request.keep != "chunks":
            why = f"the evaluation kept no chunks (keep: {request.keep}); what it kept is among its files"
        raise ServiceError(404, why, param="number", reason="not_found") from None
    array = stored["images"][number % size]
    array = array[:, :, 0] if array.shape[2] < 3 else array[:, :, :3]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG")
    return file.getvalue()
