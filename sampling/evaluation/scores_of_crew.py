"""Scores of images, and files of references, by a crew: what workers are told, and the parts that they build."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter

from ditmoe.data.crew.making import Make, absolute_place, by_crew, check_same, stage_of
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.parallel.ranks import own_device
from ditmoe.sampling.evaluation.job import Scored
from ditmoe.sampling.evaluation.make_reference import ReferenceJob, prepare_reference
from ditmoe.sampling.evaluation.measures import Measures, real_parts
from ditmoe.sampling.evaluation.score_images import ScoreJob, images_described, prepare_score, stored_for
from ditmoe.sampling.evaluation.stages import missing_of
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import ClassifierSettings
from ditmoe.sampling.settings.networks import NetworkChoice

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew

_CHOICES = TypeAdapter(tuple[NetworkChoice, ...])
_PATHS: Final = ("out", "cache", "index", "images_index", "features_path", "run")
"""Arguments that are paths."""
_PLACES: Final = ("images", "reference", "shards")
"""Arguments that are paths or places of shards."""


def scores_made_by(crew: "Crew", arguments: Mapping[str, Any], job: ScoreJob) -> Make:
    """Has the parts of scores made by a crew.

    Args:
        arguments: those of `prepare_score`, which made the job.
    """
    told = _told({**arguments, "out": job.folder}, job)
    return by_crew(crew, parts_of_scores, {**told, "found": _scored(job)})


def reference_made_by(crew: "Crew", arguments: Mapping[str, Any], job: ReferenceJob) -> Make:
    """Has the parts of a file of statistics made by a crew.

    Args:
        arguments: those of `prepare_reference`, which made the job.
    """
    return by_crew(crew, parts_of_reference, {**_told(arguments, job), "found": _real(job)})


def parts_of_scores(request: Mapping[str, Any]) -> AnyParts:
    """The parts of a stage of scores, in a worker. UserError where this machine sees other images."""
    stage, told = stage_of(request)
    job, workers, measures = _score_job(told)
    of_features, recogniser = measures.networks(job, workers, lambda line: None)
    # As whoever leads found it: what is stored changes when all is made.
    networks = [of_features[place] for place in missing_of(job, stored_for(job))]
    if stage == "described":
        return images_described(job, networks, recogniser).parts
    assert stage == "real", stage
    parts = real_parts(job, networks, workers.device)
    assert parts is not None
    return parts


def parts_of_reference(request: Mapping[str, Any]) -> AnyParts:
    """The parts of the real images, in a worker. UserError where this machine sees other images."""
    stage, told = stage_of(request)
    assert stage == "real", stage
    job, workers, measures = _reference_job(told)
    of_features, _ = measures.networks(job, workers, lambda line: None)
    parts = real_parts(job, of_features, workers.device)
    assert parts is not None
    return parts


@lru_cache(maxsize=1)
def _score_job(told: str) -> tuple[ScoreJob, Workers, Measures]:
    request = json.loads(told)
    features, recogniser = _classifiers(request)
    job = prepare_score(**_arguments(request))
    job = replace(job, feature_classifier=features, recogniser_classifier=recogniser)
    check_same(job.images.where, _scored(job), request["found"])
    return job, Workers(device=own_device("auto", "--processes")), Measures()


@lru_cache(maxsize=1)
def _reference_job(told: str) -> tuple[ReferenceJob, Workers, Measures]:
    request = json.loads(told)
    features, recogniser = _classifiers(request)
    job = prepare_reference(**_arguments(request))
    job = replace(job, feature_classifier=features, recogniser_classifier=recogniser)
    check_same(job.real.where, _real(job), request["found"])
    return job, Workers(device=own_device("auto", "--processes")), Measures()


def _told(arguments: Mapping[str, Any], job: Scored) -> dict[str, Any]:
    """Arguments as plain data that mean the same in other folders; and what classifiers are trained with."""
    plain = {}
    for name, value in arguments.items():
        if value is not None and name in _PLACES:
            value = absolute_place(str(value))
        elif value is not None and name in _PATHS:
            value = str(Path(value).absolute())
        elif name == "more_networks":
            value = _CHOICES.dump_python(tuple(choice.absolute() for choice in value), mode="json")
        plain[name] = value
    return {
        "arguments": plain,
        "feature_classifier": vars(job.feature_classifier),
        "recogniser_classifier": vars(job.recogniser_classifier),
    }


def _arguments(request: Mapping[str, Any]) -> dict[str, Any]:
    told = request["arguments"]
    found = {name: Path(value) if name in _PATHS and value is not None else value for name, value in told.items()}
    more = {"more_networks": _CHOICES.validate_python(told["more_networks"])} if "more_networks" in told else {}
    return found | more


def _classifiers(request: Mapping[str, Any]) -> tuple[ClassifierSettings, ClassifierSettings]:
    """That of features, and the recogniser."""
    features, recogniser = (request[name] for name in ("feature_classifier", "recogniser_classifier"))
    return ClassifierSettings(**features), ClassifierSettings(**recogniser)


def _scored(job: ScoreJob) -> dict[str, str]:
    return {"images": job.images.fingerprint, "reference": job.real.fingerprint}


def _real(job: ReferenceJob) -> dict[str, str]:
    return {"images": job.real.fingerprint}
