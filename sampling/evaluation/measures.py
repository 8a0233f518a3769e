"""What drawn images are scored with, for as many evaluations as are scored alike."""

from collections.abc import Callable
from typing import Literal

import torch

from ditmoe.data.crew.making import Make
from ditmoe.data.storage.parts import Progress
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.job import Scored
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import Classifier, load_classifier
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.networks.opening import FROM_FILES, open_network
from ditmoe.sampling.metrics.real_statistics import RealStatistics
from ditmoe.sampling.metrics.reference import Reference, ReferenceImages
from ditmoe.sampling.metrics.references.files import reference_statistics
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics


class Measures:
    """What images are scored with, loaded or computed once for all jobs with one request, cache and batch."""

    def __init__(self) -> None:
        self._networks: tuple[FeatureNetwork, Classifier | None] | None = None
        self._statistics: RealStatistics | None = None

    def networks(
        self, job: Scored, workers: Workers, log: Callable[[str], None]
    ) -> tuple[FeatureNetwork, Classifier | None]:
        """The feature network and the recogniser, from the cache or trained now; None: nothing to train it on."""
        if self._networks is None:
            network: FeatureNetwork
            if job.features in FROM_FILES:
                network = open_network(job.features, job.features_path, workers.device, job.resize)
            else:
                found = _classifier("features", job, workers, log)
                if found is None:
                    raise UserError(without_classifier(job.real))
                network = found
            recogniser = _classifier("recogniser", job, workers, log) if job.recogniser else None
            self._networks = network, recogniser
        return self._networks

    def real_statistics(
        self,
        job: Scored,
        network: FeatureNetwork,
        make: Make,
        device: torch.device,
        progress: Callable[[str, int], Progress],
    ) -> RealStatistics:
        """Statistics of the real images, whose parts are made as the stage `real`; moments are on the device."""
        if self._statistics is None:
            self._statistics = reference_statistics(
                job.real,
                network,
                job.cache,
                make=make,
                device=device,
                on_progress=progress("parts of the real images", job.real.parts),
            )
        return self._statistics


def _classifier(
    role: Literal["features", "recogniser"], job: Scored, workers: Workers, log: Callable[[str], None]
) -> Classifier | None:
    """A classifier of the real images, which comes with their statistics where these are a file."""
    if isinstance(job.real, ReferenceStatistics):
        return job.real.classifier(role, workers.device)
    if not isinstance(job.real, ReferenceImages):
        return None
    settings = job.feature_classifier if role == "features" else job.recogniser_classifier
    return load_classifier(settings, job.real, job.cache, workers.device, log)


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
    if isinstance(real, ReferenceStatistics):
        real.check_features(job.features)
    elif not isinstance(real, ReferenceImages) and job.features == "classifier":
        raise UserError(without_classifier(real))
    if job.recogniser and not has_recogniser(real):
        return (f"{real.where}: has no recogniser: the share recognised is left out",)
    return ()


def has_recogniser(real: Reference) -> bool:
    """Whether an independent classifier of the real images can be had."""
    return isinstance(real, ReferenceImages) or (
        isinstance(real, ReferenceStatistics) and real.has_classifier("recogniser")
    )
