"""An evaluation of a run folder by a crew: what its workers are told, and the parts that they build from it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ditmoe.data.crew.leader import Crew
from ditmoe.data.crew.tasks import AnyParts, Task
from ditmoe.data.storage.parts import Progress
from ditmoe.model.errors import UserError
from ditmoe.parallel.ranks import own_device
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.measures import Measures
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, ModelOfJob, drawer, prepare_job
from ditmoe.sampling.evaluation.stages import (
    MakeStage,
    Stage,
    chunk_store,
    descriptions_of,
    real_parts,
    recognised_of,
)
from ditmoe.sampling.jobs.chunks import DrawChunk
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import ClassifierSettings

_OPTIONS = TypeAdapter(EvaluationOptions)
_CLASSIFIER = TypeAdapter(ClassifierSettings)


def made_by(crew: Crew, options: EvaluationOptions, job: Job) -> MakeStage:
    """Has the parts of a job of these options made by a crew."""
    request = request_for(options, job)

    def make(stage: Stage, parts: AnyParts, on_progress: Progress) -> None:
        crew.make(Task.of(parts_of_stage, {**request, "stage": stage}), parts, on_progress=on_progress)

    return make


def request_for(options: EvaluationOptions, job: Job) -> dict[str, Any]:
    """What a worker builds the same job from, wherever it was started."""
    assert job.checkpoint is not None
    data = options.data
    if data is not None and Path(data).exists():
        data = Path(data).absolute()
    told = replace(
        options,
        source=job.checkpoint.absolute(),
        step=None,
        sampler=job.evaluation.sampler,
        data=data,
        index=_absolute(options.index),
        features_path=_absolute(options.features_path),
        cache=job.cache.absolute(),
        vae=_absolute(options.vae),
        shared_weights=_absolute(options.shared_weights),
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
    stage, rest = request["stage"], {key: value for key, value in request.items() if key != "stage"}
    job, draw, measures, workers = _job_of(json.dumps(rest, sort_keys=True))
    store = chunk_store(job, draw)
    if stage == "drawn":
        return store.parts
    network, recogniser = measures.networks(job, workers, lambda line: None)
    if stage == "described":
        return descriptions_of(store, network).parts
    if stage == "recognised":
        assert recogniser is not None
        return recognised_of(store, recogniser).parts
    assert stage == "real", stage
    parts = real_parts(job, network, workers.device)
    assert parts is not None
    return parts


@lru_cache(maxsize=1)
def _job_of(request: str) -> tuple[Job, DrawChunk, Measures, Workers]:
    """The job that this worker is at, whose networks it keeps from one stage to the next."""
    told = json.loads(request)
    job = replace(
        prepare_job(_OPTIONS.validate_python(told["options"])),
        feature_classifier=_CLASSIFIER.validate_python(told["feature_classifier"]),
        recogniser_classifier=_CLASSIFIER.validate_python(told["recogniser_classifier"]),
    )
    for name, value in _identity(job).items():
        if value != told["job"][name]:
            raise UserError(
                f"{job.checkpoint}: {name} is {value} where this worker looks, expected {told['job'][name]}: "
                "workers must see the files of whoever leads them under the same names"
            )
    device = own_device("auto", "--processes")
    return job, drawer(job, ModelOfJob(device, several=True)), Measures(), Workers(device=device)


def _identity(job: Job) -> dict[str, str]:
    return {"folder": str(job.folder.absolute()), "id": job.evaluation.fingerprint, "real": job.real.fingerprint}


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
