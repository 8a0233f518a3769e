"""An evaluation of a run folder by a crew: what its workers are told, and the parts that they build from it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import TypeAdapter

from ditmoe.data.crew.making import Make, absolute, absolute_place, by_crew, check_same, stage_of
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.parallel.ranks import own_device
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.measures import Measures, real_parts
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, ModelOfJob, drawer, prepare_job
from ditmoe.sampling.evaluation.stages import chunk_store, described_of, missing_of
from ditmoe.sampling.evaluation.stored import stored_results
from ditmoe.sampling.jobs.chunks import DrawChunk
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import ClassifierSettings

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew

_OPTIONS = TypeAdapter(EvaluationOptions)
_OF_ONE_JOB: Final = ("sampler", "count", "labels", "batch", "chunk", "keep")
"""Options that decide neither on the network nor on what images are scored with."""


def made_by(crew: "Crew", options: EvaluationOptions, job: Job) -> Make:
    """Has the parts of a job of these options made by a crew."""
    return by_crew(crew, parts_of_stage, request_for(options, job))


def request_for(options: EvaluationOptions, job: Job) -> dict[str, Any]:
    """What a worker builds the same job from, wherever it was started."""
    assert job.checkpoint is not None
    told = replace(
        options,
        source=job.checkpoint.absolute(),
        step=None,
        sampler=job.evaluation.sampler,
        data=None if options.data is None else absolute_place(str(options.data)),
        index=absolute(options.index),
        features_path=absolute(options.features_path),
        more_networks=tuple(choice.absolute() for choice in options.more_networks),
        cache=job.cache.absolute(),
        vae=absolute(options.vae),
        shared_weights=absolute(options.shared_weights),
    )
    return {
        "options": _OPTIONS.dump_python(told, mode="json"),
        "feature_classifier": vars(job.feature_classifier),
        "recogniser_classifier": vars(job.recogniser_classifier),
        "job": _identity(job),
    }


def parts_of_stage(request: Mapping[str, Any]) -> AnyParts:
    """The parts of one stage of a job, in a worker.

    Args:
        request: `request_for`, and the stage.

    Raises:
        UserError: this machine sees another checkpoint, or other real images.
    """
    stage, told = stage_of(request)
    job, draw, tools = _job_of(told)
    store = chunk_store(job, draw)
    if stage == "drawn":
        return store.parts
    networks = tools.measures.networks(job, tools.workers, lambda line: None)
    # As whoever leads found it: what is stored changes when all is made.
    places = missing_of(job, stored_results(job.folder))
    if stage == "described":
        return described_of(store, networks, places).parts
    assert stage == "real", stage
    parts = real_parts(job, [networks.of_features[place] for place in places], tools.workers.device)
    assert parts is not None
    return parts


class _Tools(NamedTuple):
    """What a worker draws and scores with."""

    workers: Workers
    model: ModelOfJob
    measures: Measures


@lru_cache(maxsize=1)
def _job_of(told: str) -> tuple[Job, DrawChunk, _Tools]:
    """The job that this worker is at."""
    request = json.loads(told)
    job = replace(
        prepare_job(_OPTIONS.validate_python(request["options"])),
        feature_classifier=ClassifierSettings(**request["feature_classifier"]),
        recogniser_classifier=ClassifierSettings(**request["recogniser_classifier"]),
    )
    check_same(job.checkpoint, _identity(job), request["job"])
    alike = {key: value for key, value in request["options"].items() if key not in _OF_ONE_JOB}
    tools = _tools_for(json.dumps([alike, job.request], sort_keys=True))
    return job, drawer(job, tools.model), tools


@lru_cache(maxsize=1)
def _tools_for(alike: str) -> _Tools:
    """Kept from one job to the next that is drawn by the same network and scored alike."""
    device = own_device("auto", "--processes")
    return _Tools(Workers(device=device), ModelOfJob(device, several=True), Measures())


def _identity(job: Job) -> dict[str, str]:
    return {"folder": str(job.folder.absolute()), "id": job.evaluation.fingerprint, "real": job.real.fingerprint}
