"""Quality scores of drawn images: how sure a classifier is of the intended class, or how near real images are.

Shapes: N images, F features, K classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.crew.making import ALONE, Make
from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.digests import sha256_of
from ditmoe.data.storage.parts import Parts, Progress
from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.classifier import (
    FEATURE_CLASSIFIER,
    RECOGNISER,
    Classifier,
    ClassifierSettings,
)
from ditmoe.sampling.metrics.features import AT_ONCE, FeatureNetwork, describe, in_blocks
from ditmoe.sampling.metrics.networks.opening import open_network
from ditmoe.sampling.metrics.reference import ReferenceImages
from ditmoe.sampling.metrics.training.classifier import load_classifier
from ditmoe.sampling.settings.names import FeatureName
from ditmoe.sampling.settings.networks import FROM_FILES

ScoreName = Literal["classifier", "features", "none"]
_VERSION: Final = 2
"""Raised whenever this file changes what is kept of real images."""


class Scorer(Protocol):
    """Gives each image a score, higher is better."""

    description: Mapping[str, Any]
    """What the score depends on, as plain data; recorded beside it."""

    def __call__(self, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """uint8 [N, H, W, C] and the intended classes [N] → scores [N]."""
        ...


@dataclass(frozen=True)
class ScoreSettings:
    """Which score is given."""

    kind: ScoreName = "classifier"
    """`classifier`: the probability of the intended class; `features`: minus the distance to the mean of the
    class's real images in a feature network's space."""
    features: FeatureName = "classifier"
    """For `features`: a network that was trained on the real images, or one from a file."""
    features_path: Path | None = None
    """The file of the network, where it comes from one."""
    classifier: ClassifierSettings = RECOGNISER
    feature_classifier: ClassifierSettings = FEATURE_CLASSIFIER


class ClassifierScore:
    """The probability that the classifier gives to the intended class, 0 … 1."""

    def __init__(self, classifier: Classifier, real: ReferenceImages) -> None:
        self._classifier = classifier
        self.description: Mapping[str, Any] = {
            "score": "classifier",
            "network": classifier.fingerprint,
            "held_out_accuracy": classifier.held_out_accuracy,
            "reference": real.fingerprint,
        }

    def __call__(self, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Scorer`."""
        probability_NK = self._classifier.probabilities(image_NHWC)
        score_N: NDArray[np.float32] = probability_NK[np.arange(len(label_N)), label_N]
        return score_N


class FeatureScore:
    """Minus the distance to the mean of the intended class's real images, so 0 at most."""

    def __init__(self, network: FeatureNetwork, mean_KF: NDArray[np.float64], real: ReferenceImages) -> None:
        self._network, self._mean_KF = network, mean_KF
        self.description: Mapping[str, Any] = {
            "score": "features",
            "features": network.name,
            "network": network.fingerprint,
            "reference": real.fingerprint,
        }

    def __call__(self, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Scorer`."""
        features_NF = describe(self._network, image_NHWC)["features"].astype(np.float64)
        distance_N = np.linalg.norm(features_NF - self._mean_KF[label_N], axis=1)
        score_N: NDArray[np.float32] = -distance_N.astype(np.float32)
        return score_N


def make_scorer(
    settings: ScoreSettings,
    real: ReferenceImages,
    labels: Sequence[int],
    cache: Path,
    device: torch.device,
    make: Make = ALONE,
    log: Callable[[str], None] = lambda line: None,
    on_progress: Progress = lambda done: None,
) -> Scorer:
    """The scorer of these settings; every process calls this, and one trains what has to be trained.

    Args:
        labels: the classes that are to be scored.
        cache: folder of trained classifiers and of the means, shared by runs.
        make: has the parts of the means made, as the stage `means`.
        log: takes lines to show.
        on_progress: told the parts of the real images that are done.

    Raises:
        UserError: a file is missing or damaged, the real images are, or a class has none.
    """
    if settings.kind == "classifier":
        return ClassifierScore(load_classifier(settings.classifier, real, cache, device, log), real)
    network = scoring_network(settings, real, cache, device, log)
    mean_KF = class_means(network, real, cache, make, on_progress)
    empty = [label for label in sorted(set(labels)) if np.isnan(mean_KF[label]).any()]
    if empty:
        raise UserError(
            f"{real.where}: has no image of class {empty[0]} ({real.index.class_names[empty[0]]}), "
            "from whose mean distances are measured; leave it out with --classes, or give another --reference"
        )
    return FeatureScore(network, mean_KF, real)


def scoring_network(
    settings: ScoreSettings,
    real: ReferenceImages,
    cache: Path,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
) -> FeatureNetwork:
    """The network in whose space distances are measured; as `make_scorer`."""
    if settings.features in FROM_FILES:
        return open_network(settings.features, settings.features_path, device)
    return load_classifier(settings.feature_classifier, real, cache, device, log)


def class_means(
    network: FeatureNetwork,
    real: ReferenceImages,
    cache: Path,
    make: Make = ALONE,
    on_progress: Progress = lambda done: None,
) -> NDArray[np.float64]:
    """Mean features of each class's real images, `[K, F]`; NaN for a class without any.

    The sums are kept in `cache`. UserError when a shard or a sample is damaged.
    """
    parts = mean_parts(network, real, cache)
    make("means", parts, on_progress=on_progress)
    return parts.result()


def mean_parts(
    network: FeatureNetwork, real: ReferenceImages, cache: Path
) -> Parts[Arrays, Arrays, NDArray[np.float64]]:
    """What `class_means` has made: the sums of each part of the images."""
    folder = cache / f"class-sums-{_VERSION}-{real.fingerprint}-{network.fingerprint}"
    names = [f"part-{part:02d}.npz" for part in range(real.parts)]
    classes = real.index.num_classes

    def add_up(part: int) -> Arrays:
        sum_KF = np.zeros((classes, network.dimension))
        count_K = np.zeros(classes, np.int64)
        images = ((batch.image_NHWC, batch.label_N) for batch in real.read(part, AT_ONCE))
        for image_NHWC, label_N in in_blocks(images, AT_ONCE):
            np.add.at(sum_KF, label_N, describe(network, image_NHWC)["features"].astype(np.float64))
            np.add.at(count_K, label_N, 1)
        return {"sum": sum_KF, "count": count_K}

    def mean(found: Iterable[Arrays]) -> NDArray[np.float64]:
        sum_KF, count_K = np.zeros((classes, network.dimension)), np.zeros(classes, np.int64)
        for part in found:  # in their order: a sum in another one rounds otherwise
            sum_KF, count_K = sum_KF + part["sum"], count_K + part["count"]
        with np.errstate(invalid="ignore"):
            mean_KF: NDArray[np.float64] = sum_KF / count_K[:, None]
        return mean_KF

    return Parts(folder, names, add_up, write_arrays, lambda part: read_arrays(folder / names[part]), mean)


def plain_settings(settings: ScoreSettings, real: ReferenceImages | None) -> dict[str, Any]:
    """The choice of a score as plain data, to tell whether two are the same."""
    if settings.kind == "none" or real is None:
        return {"kind": "none"}
    if settings.kind == "classifier":
        return {"kind": "classifier", "reference": real.fingerprint, "classifier": asdict(settings.classifier)}
    plain = {"kind": "features", "reference": real.fingerprint, "features": settings.features}
    if settings.features == "classifier":
        return {**plain, "classifier": asdict(settings.feature_classifier)}
    assert settings.features_path is not None
    return {**plain, "file": sha256_of(settings.features_path)[:16]}
