"""What drawn images are scored with, for as many evaluations as are scored alike."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from ditmoe.data.crew.making import Make
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.storage.parts import Progress
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.job import Scored, choices_of_job
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import Classifier, classifier_file
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.networks.opening import open_network
from ditmoe.sampling.metrics.real_statistics import RealStatistics, parts_of_real_alike
from ditmoe.sampling.metrics.reference import Images, Reference, ReferenceImages
from ditmoe.sampling.metrics.references.files import reference_statistics
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics
from ditmoe.sampling.metrics.training.classifier import ShowProgress, Trainings, load_classifier
from ditmoe.sampling.settings.networks import FROM_FILES


class Networks(NamedTuple):
    """What images are described by."""

    of_features: tuple[FeatureNetwork, ...]
    """For each of `choices_of_job`."""
    recogniser: Classifier | None
    """None: not asked for, or nothing to train it on."""


class Measures:
    """What images are scored with, loaded or computed once for all jobs with one request, cache and batch."""

    def __init__(self) -> None:
        self._networks: Networks | None = None
        self._statistics: dict[str, RealStatistics] = {}

    def networks(
        self,
        job: Scored,
        workers: Workers,
        log: Callable[[str], None],
        progress: ShowProgress = lambda title, total: lambda done: None,
    ) -> Networks:
        """The feature networks and the recogniser, from the cache or trained now."""
        if self._networks is None:
            networks: list[FeatureNetwork] = []
            trainings = _trainings(job, workers.device, log, progress)
            for choice in choices_of_job(job):
                if choice.features in FROM_FILES:
                    networks.append(open_network(choice.features, choice.path, workers.device, choice.resize))
                    continue
                found = _classifier("features", job, workers, log, trainings)
                if found is None:
                    raise UserError(without_classifier(job.real))
                networks.append(found)
            recogniser = _classifier("recogniser", job, workers, log, trainings) if job.recogniser else None
            self._networks = Networks(tuple(networks), recogniser)
        return self._networks

    def real_statistics(
        self,
        job: Scored,
        networks: Sequence[FeatureNetwork],
        make: Make,
        device: torch.device,
        progress: Callable[[str, int], Progress],
    ) -> list[RealStatistics]:
        """Statistics of the real images in each network, from one pass over them; moments are on the device.

        Args:
            make: has the parts of `real_parts` made, as the stage `real`.
        """
        wanted = [network for network in networks if network.fingerprint not in self._statistics]
        if wanted:
            parts = real_parts(job, networks, device)
            if parts is not None:
                make("real", parts, on_progress=progress("parts of the real images", job.real.parts))
            for network in wanted:
                self._statistics[network.fingerprint] = reference_statistics(
                    job.real, network, job.cache, device=device
                )
        return [self._statistics[network.fingerprint] for network in networks]


def real_parts(job: Scored, networks: Sequence[FeatureNetwork], device: torch.device) -> AnyParts | None:
    """Statistics of the real images in some networks; None: a file answers, and none is read."""
    images = job.real.images if isinstance(job.real, ReferenceStatistics) else job.real
    return parts_of_real_alike(images, networks, job.cache, device) if isinstance(images, Images) else None


def _trainings(
    job: Scored, device: torch.device, log: Callable[[str], None], progress: ShowProgress
) -> Trainings | None:
    """The trainings of the classifiers that are not in the cache; None: there are no images to train on."""
    if not isinstance(job.real, ReferenceImages):
        return None
    of_features = any(choice.features not in FROM_FILES for choice in choices_of_job(job))
    wanted = [job.feature_classifier] if of_features else []
    wanted += [job.recogniser_classifier] if job.recogniser else []
    real, cache = job.real, job.cache
    missing = [each for each in wanted if not (cache / classifier_file(each, real, device)).exists()]
    return Trainings(real, missing, cache, device, log, progress)


def _classifier(
    role: Literal["features", "recogniser"],
    job: Scored,
    workers: Workers,
    log: Callable[[str], None],
    trainings: Trainings | None,
) -> Classifier | None:
    """A classifier of the real images, which comes with their statistics where these are a file."""
    if isinstance(job.real, ReferenceStatistics):
        return job.real.classifier(role, workers.device)
    if not isinstance(job.real, ReferenceImages):
        return None
    settings = job.feature_classifier if role == "features" else job.recogniser_classifier
    return load_classifier(settings, job.real, job.cache, workers.device, log, trainings)


def without_classifier(real: Reference) -> str:
    """Why the features of a classifier cannot be had."""
    return (
        f"{real.where}: has no labels to train a classifier on, and no classifier; expected shards, a file of "
        "`ditmoe reference make`, or --features inception with --features-path FILE"
    )


def check_reference(job: Scored) -> tuple[str, ...]:
    """Refuse a reference that is not of the features that are asked for.

    Returns:
        Lines that say what it cannot answer.

    Raises:
        UserError: it does not fit.
    """
    real = job.real
    for choice in choices_of_job(job):
        if isinstance(real, ReferenceStatistics):
            real.check_features(choice.features)
        elif not isinstance(real, ReferenceImages) and choice.features == "classifier":
            raise UserError(without_classifier(real))
    if job.recogniser and not has_recogniser(real):
        return (f"{real.where}: has no recogniser: the share recognised is left out",)
    return ()


def has_recogniser(real: Reference) -> bool:
    """Whether an independent classifier of the real images can be had."""
    return isinstance(real, ReferenceImages) or (
        isinstance(real, ReferenceStatistics) and real.has_classifier("recogniser")
    )
