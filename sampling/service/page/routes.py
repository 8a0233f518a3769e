"""The routes of the page: its files, which all may have, and what it asks for, by the rules of the others."""

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from fastapi import FastAPI, Query, Response
from fastapi.responses import JSONResponse

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoints
from ditmoe.sampling.batching.models import parameters_of
from ditmoe.sampling.evaluation.stored import METRICS_FILE
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.listing import Listed, Listing
from ditmoe.sampling.service.page import evaluation_folders
from ditmoe.sampling.service.page.evaluation_folders import Evaluations, evaluations_of, find_evaluation, sheet
from ditmoe.sampling.service.page.run_folders import RunFolders, preview, previews
from ditmoe.sampling.service.page.static_files import PREFIX, static_files
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import ChainName, IntegratorName, ScheduleName, sample_steps

LARGEST: Final = 2**31 - 1
MOST_IMAGES: Final = 60
MOST_CHAINS: Final = 12


def add_page(app: FastAPI, listing: Listing) -> None:
    """Add the page to an application."""
    _add_files(app)
    folders, found = RunFolders(), Evaluations()

    def folder_of(name: str) -> Path:
        folder = listing.runs().get(name)
        if folder is None:
            raise ServiceError(404, "there is no such run", param="run", reason="not_found")
        return folder

    def newest(name: str) -> tuple[Listed | None, str | None]:
        """Its newest checkpoint, or why there is none; neither: it has not written one yet."""
        try:
            return listing.find(name, None), None
        except (ServiceError, UserError) as error:
            return None, None if getattr(error, "reason", None) == "not_found" else str(error)

    def facts(name: str, folder: Path) -> dict[str, Any]:
        """What the list of runs says of each."""
        listed, problem = newest(name)
        train = {} if listed is None else listed.info.config.get("train") or {}
        evaluations = evaluations_of(folder)
        return {
            "id": name,
            "steps": [int(path.name.removeprefix("step-")) for path in checkpoints(folder)],
            "previews": list(previews(folder)),
            "training": folders.newest(folder),
            "training_steps": train.get("steps"),
            "evaluations": len(evaluations),
            "finished": sum((each / METRICS_FILE).is_file() for each in evaluations.values()),
            "problem": problem,
        }

    def describe(name: str) -> dict[str, Any]:
        folder, (listed, _) = folder_of(name), newest(name)
        described = {**facts(name, folder), "curves": folders.curves(folder), "classes": None, "parameters": None}
        if listed is not None:
            described |= {"classes": list(listed.class_names), "parameters": parameters_of(listed.info)}
            described |= {"objective": listed.info.objective.kind, "model": listed.info.config.get("model")}
        return described

    def class_names(name: str) -> list[str]:
        """For the images of evaluations; a run whose checkpoints are gone has numbers."""
        listed, _ = newest(name)
        return [] if listed is None else list(listed.class_names)

    def evaluation_images(run: str, evaluation: str, label: int | None, first: int, limit: int) -> Any:
        folder = find_evaluation(folder_of(run), evaluation)
        with _damaged():
            reply = evaluation_folders.images(folder, label, first, limit)
        names = class_names(run)
        for each in reply["images"]:
            each["class"] = names[each["label"]] if each["label"] < len(names) else str(each["label"])
        return reply

    def evaluation_traces(run: str, evaluation: str, first: int, limit: int) -> Any:
        folder = find_evaluation(folder_of(run), evaluation)
        with _damaged():
            return evaluation_folders.traces(folder, first, limit)

    @app.get("/v1/samplers")
    async def samplers() -> JSONResponse:
        names = {"samplers": IntegratorName, "chains": ChainName, "schedules": ScheduleName}
        told = {name: get_args(literal) for name, literal in names.items()}
        steps = {name: sample_steps(name) for names in (told["samplers"], told["chains"]) for name in names}
        return JSONResponse({**told, "steps": steps, "settings": SamplerConfig().model_dump(mode="json")})

    @app.get("/v1/runs")
    async def runs() -> JSONResponse:
        data = await asyncio.to_thread(lambda: [facts(name, path) for name, path in listing.runs().items()])
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/runs/{run}")
    async def one_run(run: str) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(describe, run))

    @app.get("/v1/runs/{run}/previews/{step}")
    async def one_preview(run: str, step: int) -> Response:
        return Response(await asyncio.to_thread(lambda: preview(folder_of(run), step)), media_type="image/png")

    @app.get("/v1/runs/{run}/evaluations")
    async def evaluations(run: str) -> JSONResponse:
        data = await asyncio.to_thread(lambda: found.listed(folder_of(run)))
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/runs/{run}/evaluations/{evaluation}")
    async def one_evaluation(run: str, evaluation: str) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(lambda: found.described(folder_of(run), evaluation)))

    @app.get("/v1/runs/{run}/evaluations/{evaluation}/images")
    async def images(
        run: str,
        evaluation: str,
        label: Annotated[int | None, Query(alias="class", ge=0, le=LARGEST)] = None,
        first: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_IMAGES)] = 24,
    ) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(evaluation_images, run, evaluation, label, first, limit))

    @app.get("/v1/runs/{run}/evaluations/{evaluation}/sheets/{label}")
    async def one_sheet(run: str, evaluation: str, label: int) -> Response:
        content = await asyncio.to_thread(lambda: sheet(find_evaluation(folder_of(run), evaluation), label))
        return Response(content, media_type="image/png")

    @app.get("/v1/runs/{run}/evaluations/{evaluation}/traces")
    async def traces(
        run: str,
        evaluation: str,
        first: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_CHAINS)] = 5,
    ) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(evaluation_traces, run, evaluation, first, limit))


def _add_files(app: FastAPI) -> None:
    """The files of the page, each at a path of its own."""

    @app.get("/")
    async def start() -> Response:
        file = static_files()["/"]
        return Response(file.content, headers={"Content-Type": file.media_type})

    @app.get(f"{PREFIX}{{name}}")
    async def static(name: str) -> Response:
        file = static_files().get(f"{PREFIX}{name}")
        if file is None:
            raise ServiceError(404, "the page has no such file", reason="not_found")
        return Response(file.content, headers={"Content-Type": file.media_type})


@contextlib.contextmanager
def _damaged() -> Any:
    """ServiceError for what reading an evaluation's files raises where they are not as this program wrote them."""
    try:
        yield
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        raise ServiceError(503, f"the evaluation cannot be read: {error}", reason="damaged") from error
