"""What drawn images are scored with, for as many evaluations as are scored alike."""

from collections.abc import Callable

from ditmoe.data.storage.parts import Progress
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import Classifier, load_classifier
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.inception import load_inception
from ditmoe.sampling.metrics.scores import RealStatistics, real_statistics


class Measures:
    """What images are scored with, loaded or computed once for all jobs with one request, cache and batch."""

    def __init__(self) -> None:
        self._networks: tuple[FeatureNetwork, Classifier | None] | None = None
        self._statistics: RealStatistics | None = None

    def networks(
        self, job: Job, workers: Workers, log: Callable[[str], None]
    ) -> tuple[FeatureNetwork, Classifier | None]:
        """The feature network and the recogniser, from the cache or trained now."""
        if self._networks is None:
            network: FeatureNetwork
            if job.features == "inception":
                network = load_inception(job.features_path, workers.device)
            else:
                network = load_classifier(job.feature_classifier, job.real, job.cache, workers.device, log)
            recogniser = None
            if job.recogniser:
                recogniser = load_classifier(job.recogniser_classifier, job.real, job.cache, workers.device, log)
            self._networks = network, recogniser
        return self._networks

    def real_statistics(
        self,
        job: Job,
        network: FeatureNetwork,
        workers: Workers,
        progress: Callable[[str, int], Progress],
    ) -> RealStatistics:
        """Statistics of the real images, by all processes together."""
        if self._statistics is None:
            self._statistics = real_statistics(
                job.real,
                network,
                job.cache,
                rank=workers.rank,
                ranks=workers.ranks,
                device=workers.device,
                on_progress=progress("parts of the real images", job.real.parts),
            )
        return self._statistics
