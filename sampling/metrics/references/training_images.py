"""Real images that classifiers are trained on, small and in memory.

Shapes: N images, C channels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ditmoe.data.storage.parts import Progress
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import permutation
from ditmoe.sampling.metrics.features import AT_ONCE, images_to_tensor
from ditmoe.sampling.metrics.reference import ReferenceImages

MAX_IMAGES: Final = 50_000
"""Real images that a classifier is trained on at most, drawn at random from larger sets."""
MAX_SIZE: Final = 64
"""Side in pixels that larger images are reduced to (mean over areas)."""


class TrainingImages:
    """Real images that some classifiers are trained on, decoded in one pass when the first of them asks."""

    def __init__(
        self,
        real: ReferenceImages,
        seeds: Sequence[int],
        progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
    ) -> None:
        """Read nothing yet.

        Args:
            seeds: of the classifiers that are to be trained.
            progress: (title, images) → a function that is told how many are read.
        """
        self._progress = progress
        self._real = real
        self._seeds = list(seeds)
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, seed: int) -> tuple[Tensor, Tensor]:
        """Up to MAX_IMAGES in the order of a seed, uint8 [N, C, H, W], and labels [N]; the first are held out.

        They are given away: who asks again has them decoded again.

        Raises:
            UserError: a shard or an image is damaged, or none can be used.
        """
        if seed not in self._read:
            self._read = self._read_all(dict.fromkeys((seed, *self._seeds)))
        self._seeds = [other for other in self._seeds if other != seed]
        return self._read.pop(seed)

    def _read_all(self, seeds: Iterable[int]) -> dict[int, tuple[Tensor, Tensor]]:
        real = self._real
        size = min(real.index.image_size, MAX_SIZE)
        rows_of, read = {}, {}
        for seed in seeds:
            chosen = permutation(seed, "classifier/split", 0, real.count)[:MAX_IMAGES]
            rows_of[seed] = np.full(real.count, -1, dtype=np.int64)
            rows_of[seed][chosen] = np.arange(len(chosen))
            image_NCHW = torch.empty(len(chosen), real.index.channels, size, size, dtype=torch.uint8)
            read[seed] = image_NCHW, torch.full((len(chosen),), -1, dtype=torch.int64)
        shown, done = self._progress("real images read", real.count), 0
        for batch in real.read_all(AT_ONCE):
            done += len(batch.number_N)
            shown(done)
            for seed, row_of in rows_of.items():
                wanted = row_of[batch.number_N] >= 0
                if wanted.any():
                    rows = torch.from_numpy(row_of[batch.number_N[wanted]])
                    images = images_to_tensor(batch.image_NHWC[wanted], torch.device("cpu"), colour=False)
                    image_NCHW, label_N = read[seed]
                    image_NCHW[rows] = reduced(images)
                    label_N[rows] = torch.from_numpy(batch.label_N[wanted])
        shown(real.count)
        for seed, (image_NCHW, label_N) in read.items():
            there = label_N >= 0
            if not there.any():
                raise UserError(f"{real.where}: none of its images can be used")
            if not there.all():
                read[seed] = image_NCHW[there], label_N[there]
        return read


def reduced(x_NCHW: Tensor) -> Tensor:
    """Images of more than MAX_SIZE pixels a side reduced to it; uint8 in, uint8 out."""
    if x_NCHW.shape[2] <= MAX_SIZE:
        return x_NCHW
    return functional.adaptive_avg_pool2d(x_NCHW.float(), MAX_SIZE).round().to(torch.uint8)
