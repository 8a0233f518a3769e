"""What an evaluation makes in parts, by stages: alike in the process that leads and in workers of a crew."""

from typing import Final, Literal

import torch

from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.storage.files import read_object
from ditmoe.sampling.evaluation.job import Job, Scored
from ditmoe.sampling.evaluation.keeping import CHUNKS_FOLDER, SETTINGS_FILE
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawChunk
from ditmoe.sampling.metrics.classifier import Classifier
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions, describe_with
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.real_statistics import parts_of_real
from ditmoe.sampling.metrics.reference import Images
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics

Stage = Literal["drawn", "described", "recognised", "real"]
STAGES: Final[tuple[Stage, ...]] = ("drawn", "described", "recognised", "real")


def chunk_store(job: Job, draw: DrawChunk) -> ChunkStore:
    """The images of a job that was begun."""
    evaluation, size = job.evaluation, int(read_object(job.folder / SETTINGS_FILE)["chunk"])
    return ChunkStore(
        job.folder / CHUNKS_FOLDER, evaluation.count, size, evaluation.fingerprint, draw, evaluation.labels_of
    )


def descriptions_of(store: ChunkStore, network: FeatureNetwork) -> ChunkDescriptions:
    """The features of each chunk."""
    return ChunkDescriptions.of_store(store, network.fingerprint, describe_with(network))


def recognised_of(store: ChunkStore, recogniser: Classifier) -> ChunkDescriptions:
    """What the recogniser takes the images of each chunk for."""
    return ChunkDescriptions.of_store(
        store, recogniser.fingerprint, lambda image_NHWC: {"predicted": recogniser.predict(image_NHWC)}
    )


def real_parts(job: Scored, network: FeatureNetwork, device: torch.device) -> AnyParts | None:
    """Statistics of the real images; None: a file answers, and none is read."""
    images = job.real.images if isinstance(job.real, ReferenceStatistics) else job.real
    return parts_of_real(images, network, job.cache, device) if isinstance(images, Images) else None
