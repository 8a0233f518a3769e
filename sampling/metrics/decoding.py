"""Images of shards decoded by processes: this one reads their bytes, others make pixels of them."""

import os
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import IMAGE_EXTENSIONS, BadSample
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.shards.sample import RawSample
from ditmoe.data.stream.selection import Selection
from ditmoe.parallel.ranks import this_process

MOST_PROCESSES: Final = 16
"""Processes that decode for one that describes: more would wait for it."""
FEWEST_PROCESSES: Final = 3
"""One that decodes and hands its images over has 0.55 of the rate of the process that reads, and two 0.8."""
WORTH_PROCESSES: Final = 1024
"""Images; fewer are decoded before processes are started."""


class ReferenceBatch(NamedTuple):
    """Some of the images."""

    image_NHWC: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    number_N: NDArray[np.int64]
    """Their numbers in the index's order, 0 … count − 1."""


class UndecodedSample(NamedTuple):
    """What a process needs of a sample."""

    where: str
    """Shard and key, for messages."""
    number: int
    """Among all images, in the index's order."""
    sample: RawSample | None
    """Its bytes; None: they cannot be read."""
    problem: str = ""
    """Why not."""


class LostSamples(NamedTuple):
    """Samples that cannot be used, of one place."""

    where: str
    problem: str
    samples: int


def decoding_processes(images: int) -> int:
    """How many processes decode so many images; 0: none but this one.

    Each process of a job on this machine has its share of the cores, of which it keeps one for itself.
    """
    if images < WORTH_PROCESSES:
        return 0
    cores = len(os.sched_getaffinity(0)) // this_process().processes_here
    found = min(MOST_PROCESSES, cores - 1)
    return found if found >= FEWEST_PROCESSES else 0


def read_undecoded(shard: Shard, member: int, index: DatasetIndex, number: int) -> UndecodedSample:
    """The bytes that image and label of a sample are made of."""
    sample = shard.sample(member)
    extensions = list(sample.extensions)
    try:
        members = {
            extension: sample.read(extension)
            for extension in extensions
            if extension in IMAGE_EXTENSIONS or extension == index.label.extension
        }
    except BadSample as error:
        return UndecodedSample(shard.where(member), number, None, str(error))
    return UndecodedSample(shard.where(member), number, RawSample(extensions, members.get))


def decode_samples(
    index: DatasetIndex, selection: Selection, samples: list[UndecodedSample] | LostSamples
) -> tuple[ReferenceBatch | None, list[LostSamples]]:
    """The images and labels of the samples that can be used, None where there are none; and what is lost."""
    if isinstance(samples, LostSamples):
        return None, [samples]
    images, labels, numbers, lost = [], [], [], []
    for where, number, sample, problem in samples:
        if sample is None:
            lost.append(LostSamples(where, problem, 1))
            continue
        try:
            image_HWC = sample.image(index)
            label = selection.run_label(sample.label(index))
        except BadSample as error:
            lost.append(LostSamples(where, str(error), 1))
            continue
        images.append(image_HWC)
        labels.append(label)
        numbers.append(number)
    if not images:
        return None, lost
    return ReferenceBatch(np.stack(images), np.array(labels, np.int64), np.array(numbers, np.int64)), lost
