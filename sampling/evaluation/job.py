"""What an evaluation is: its settings, which name its folder, and one use of it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.storage.digests import sha256_of
from ditmoe.model.count import count
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.model.randomness import generator
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.evaluation.keeping import Keep
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER, ClassifierSettings
from ditmoe.sampling.metrics.reference import Reference, ReferenceImages
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics
from ditmoe.sampling.network.load import complete_config
from ditmoe.sampling.settings.config import SAMPLER_RULES, SamplerConfig
from ditmoe.sampling.settings.names import FeatureName, ResizeName
from ditmoe.sampling.settings.networks import NetworkChoice

LabelSampling = Literal["random", "balanced"]


@dataclass(frozen=True)
class Evaluation:
    """What the images of an evaluation depend on."""

    weights: str
    """Fingerprint of the weights."""
    which: Literal["ema", "weights"]
    step: int
    """Training step of the weights."""
    sampler: SamplerConfig
    """Resolved: its sampler and schedule are named."""
    count: int
    """Images N."""
    labels: LabelSampling
    """`random`: drawn for each image by (seed, number); `balanced`: the classes in turn."""
    num_classes: int
    vae: str | None = None
    """Checksum of the VAE that decodes them; None: they are drawn in pixels."""
    noise_classifier: str | None = None
    """Fingerprint of the noise-level classifier that chains ask; None: they are no chains."""

    def __post_init__(self) -> None:
        assert self.sampler.sampler is not None and self.sampler.schedule is not None and self.count > 0
        assert self.sampler.chains == (self.noise_classifier is not None)

    @property
    def fingerprint(self) -> str:
        """Of everything here (first 16 hex digits of SHA-256)."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        """Name of the folder: step, sampler, steps or tolerance, guidance, labels, N, seed, fingerprint."""
        sampler = self.sampler
        length = f"{sampler.tolerance:g}" if sampler.integrator == "rk45" else f"{sampler.steps}"
        name = sampler.sampler.replace(":", "-") if sampler.sampler else ""
        return (
            f"step-{self.step:08d}-{self.which}-{name}-{length}-cfg-{sampler.cfg_scale:g}"
            f"-{self.labels}-{self.count}-seed-{sampler.seed}-{self.fingerprint[:8]}"
        )

    def plain(self) -> dict[str, Any]:
        """These settings as plain data."""
        return {
            "weights": self.weights,
            "which": self.which,
            "step": self.step,
            "sampler": self.sampler.plain(),
            "sampler_rules": SAMPLER_RULES,
            "count": self.count,
            "labels": self.labels,
            "num_classes": self.num_classes,
            **({} if self.vae is None else {"vae": self.vae}),
            **({} if self.noise_classifier is None else {"noise_classifier": self.noise_classifier}),
        }

    def labels_of(self, numbers: list[int]) -> NDArray[np.int64]:
        """The classes of the images with these numbers, int64 [len(numbers)]; samples of a chain share one."""
        units = [number // self.sampler.images_per_unit for number in numbers]
        if self.labels == "balanced":
            return np.array([unit % self.num_classes for unit in units], dtype=np.int64)
        seed = self.sampler.seed
        drawn = {
            unit: generator(seed, "evaluate/label", unit).integers(self.num_classes)
            for unit in dict.fromkeys(units)
        }
        return np.array([drawn[unit] for unit in units], dtype=np.int64)


class Scored(Protocol):
    """What is scored, as far as it decides what it is scored with; the fields are those of `Job`."""

    @property
    def real(self) -> Reference: ...
    @property
    def cache(self) -> Path: ...
    @property
    def features(self) -> FeatureName: ...
    @property
    def features_path(self) -> Path | None: ...
    @property
    def resize(self) -> ResizeName | None: ...
    @property
    def more_networks(self) -> tuple[NetworkChoice, ...]: ...
    @property
    def recogniser(self) -> bool: ...
    @property
    def feature_classifier(self) -> ClassifierSettings: ...
    @property
    def recogniser_classifier(self) -> ClassifierSettings: ...
    @property
    def neighbour_images(self) -> int | None: ...


@dataclass(frozen=True)
class Job:
    """One use of an evaluation: where it lies, and what it is scored with."""

    evaluation: Evaluation
    folder: Path
    """`RUN/evaluations/<id>`."""
    real: Reference
    """What they are compared with."""
    cache: Path
    """Folder of trained classifiers and statistics of real images, shared by runs."""
    features: FeatureName = "classifier"
    features_path: Path | None = None
    """The file of the network, where it comes from one."""
    resize: ResizeName | None = None
    """How images come to the size of Inception; None: as its file has it."""
    more_networks: tuple[NetworkChoice, ...] = ()
    """Further feature networks, which describe the images in the same pass; the one above is what is followed."""
    neighbour_images: int | None = None
    """Real images that precision and recall look at; None: all, up to 50,000."""
    recogniser: bool = True
    """Report the share of images that an independent classifier recognises."""
    chunk: int | None = None
    """Images of a chunk; None: as the evaluation was started, or `default_chunk`."""
    batch: int = 64
    """Images through a network at once."""
    keep: Keep = "chunks"
    """What is left of the images when all is scored."""
    vae: Path | None = None
    """Where the VAE lies; None: they are drawn in pixels."""
    checkpoint: Path | None = None
    """Where the weights lie; None when they are not drawn from a checkpoint."""
    expert_parallel: int = 1
    """Ranks that share out the experts, and draw together."""
    shared_weights: Path | None = None
    """Folder of the weights that the processes of a machine share; None: the run's, where there are several."""
    learned_names: tuple[str, ...] = ()
    """Names of the classes that the network was trained on; none where they are not known."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More to record beside the figures: the run, its data, versions."""
    warnings: tuple[str, ...] = ()
    """To show with the figures, beside those of the scoring."""
    feature_classifier: ClassifierSettings = FEATURE_CLASSIFIER
    recogniser_classifier: ClassifierSettings = RECOGNISER

    def __post_init__(self) -> None:
        samples = self.evaluation.sampler.images_per_unit
        if self.chunk is not None and self.chunk % samples:
            raise UserError(
                f"--chunk {self.chunk}: chains have {samples} samples each, which are drawn as one; expected a "
                f"multiple of {samples}"
            )
        names = self.real.form.class_names
        if names is not None and len(names) != self.evaluation.num_classes:
            raise UserError(
                f"{self.real.where}: has {counted(len(names), 'class')}; "
                f"expected the network's {self.evaluation.num_classes}"
            )

    @property
    def class_names(self) -> Sequence[str]:
        """Those of the real images; where they have none, those that the network learned, or numbers."""
        numbers = tuple(map(str, range(self.evaluation.num_classes)))
        return self.real.form.class_names or self.learned_names or numbers

    @property
    def request(self) -> dict[str, Any]:
        """What the scores depend on, besides the images: a stored result of an equal request is the result."""
        return request_of(self)


def facts_of(info: CheckpointInfo, real: Reference, evaluation: Evaluation) -> dict[str, Any]:
    """What a table needs of a network, beside the figures: how it was trained, and how large it is.

    `epochs` is known where the network was trained on one source, and is compared with that; what a converted
    checkpoint has seen is not.
    """
    size = count(complete_config(info.model, info))
    trained = "train" in info.config
    seen = info.images if trained or info.images else None
    sources = info.dataset.get("shards") or []
    own = real if isinstance(real, ReferenceImages) and sources == [real.index.fingerprint] else None
    return {
        "images_seen": seen,
        "epochs": None if seen is None or own is None else seen / own.count,
        "train_batch": info.config["train"]["batch"] if trained else None,
        "ema": info.config.get("ema"),
        "parameters": {"total": size.total, "activated": size.activated},
        "model": info.config["model"],
        "objective": info.config["objective"],
        "trained_on": info.dataset.get("name"),
        "guidance_interval": _where_it_guides(evaluation.sampler),
        "torch": torch.__version__,
    }


def _where_it_guides(sampler: SamplerConfig) -> str | None:
    """The noise levels of guidance, in words; None: there is none."""
    if sampler.cfg_scale == 1:
        return None
    if not sampler.guides_in_part:
        return "all noise levels"
    most = "" if sampler.cfg_sigma_max is None else f" ≤ {sampler.cfg_sigma_max:g}"
    return f"{sampler.cfg_sigma_min:g} < σ{most}"


def choices_of_job(job: Scored) -> tuple[NetworkChoice, ...]:
    """All feature networks that it is scored with; the first is what is followed."""
    return (NetworkChoice(job.features, job.features_path, job.resize), *job.more_networks)


def requests_of(job: Scored) -> list[dict[str, Any]]:
    """`request_of` for each of `choices_of_job`."""
    return [request_of(job, choice) for choice in choices_of_job(job)]


def request_of(job: Scored, choice: NetworkChoice | None = None) -> dict[str, Any]:
    """What figures in a feature network depend on, besides the images.

    Args:
        choice: the network; None: the first.
    """
    choice = choice or choices_of_job(job)[0]
    file = None
    if choice.features != "classifier" and choice.path is not None and choice.path.is_file():
        file = sha256_of(choice.path)[:16]
    classifier = job.feature_classifier if choice.features == "classifier" else None
    stated = job.real.stated if isinstance(job.real, ReferenceStatistics) else None
    return {
        "real": job.real.fingerprint,
        "features": choice.features,
        "features_file": file,
        "resize": choice.resize,
        "classifier": vars(classifier) if classifier is not None else None,
        "neighbour_images": job.neighbour_images,
        "recogniser": vars(job.recogniser_classifier) if job.recogniser else None,
        **({} if stated is None else {"reference_network": stated}),
    }
