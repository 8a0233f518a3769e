"""The exponential moving average of the weights, over whatever fp32 pieces of them a rank owns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe.model.config import EmaConfig


def ema_decay(config: EmaConfig, step: int) -> float:
    """Share of the average kept at `step` (counted from 1).

    With warm-up it is min(decay, (1 + step) / (10 + step)), which forgets the first weights in short runs.
    """
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


@torch.no_grad()
def update_ema(
    average: Sequence[Tensor], weights: Sequence[Tensor], decay: float, counts: Tensor | None = None
) -> None:
    """average ← decay·average + (1 − decay)·weights, in place, fp32.

    Args:
        counts: 0 where nothing is to change, otherwise 1, of no dims; where the device alone knows it.
    """
    if counts is not None:
        share = (1 - decay) * counts
        for each, new in zip(average, weights, strict=True):
            each.lerp_(new, share)
    elif average:
        torch._foreach_lerp_(list(average), list(weights), 1 - decay)
