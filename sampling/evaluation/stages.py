"""What an evaluation makes in parts, by stages: alike in the process that leads and in workers of a crew.

The third stage, `real`, is that of the real images (`measures.py`).
"""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.storage.files import read_object
from ditmoe.sampling.evaluation.job import Job, Scored, requests_of
from ditmoe.sampling.evaluation.keeping import CHUNKS_FOLDER, SETTINGS_FILE
from ditmoe.sampling.evaluation.measures import Networks
from ditmoe.sampling.evaluation.stored import Results, key_of
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawChunk
from ditmoe.sampling.metrics.descriptions import (
    ChunkDescriptions,
    describe_with,
    described_of_store,
    recognise_with,
    remove_alike,
)
from ditmoe.sampling.metrics.features import FeatureNetwork

Stage = Literal["drawn", "described", "real"]
STAGES: Final[tuple[Stage, ...]] = ("drawn", "described", "real")


def chunk_store(job: Job, draw: DrawChunk) -> ChunkStore:
    """The images of a job that was begun."""
    evaluation, size = job.evaluation, int(read_object(job.folder / SETTINGS_FILE)["chunk"])
    return ChunkStore(
        job.folder / CHUNKS_FOLDER, evaluation.count, size, evaluation.fingerprint, draw, evaluation.labels_of
    )


def missing_of(job: Scored, results: Results) -> list[int]:
    """Which of `choices_of_job` have no result yet."""
    return [place for place, request in enumerate(requests_of(job)) if key_of(results, request) is None]


class Described(NamedTuple):
    """What networks say of each chunk."""

    of_features: tuple[ChunkDescriptions, ...]
    judged: ChunkDescriptions | None
    """What the recogniser takes the images for; None: nobody was asked."""
    parts: AnyParts
    """Make all of it, in one pass over the images."""

    def remove(self) -> None:
        """Delete the files: they are large, and made again from the chunks."""
        remove_alike([*self.of_features, *([] if self.judged is None else [self.judged])])


def described_of(store: ChunkStore, networks: Networks, places: Sequence[int]) -> Described:
    """What the feature networks at some places, and the recogniser, say of each chunk."""
    chosen: list[FeatureNetwork] = [networks.of_features[place] for place in places]
    asked = [(network.fingerprint, describe_with(network)) for network in chosen]
    if networks.recogniser is not None:
        asked.append((networks.recogniser.fingerprint, recognise_with(networks.recogniser)))
    each, parts = described_of_store(store, asked)
    return Described(tuple(each[: len(chosen)]), None if networks.recogniser is None else each[-1], parts)
