"""The noise levels of a product space of images and σ, and how a level is chosen for an image.

DMCMC (arXiv 2209.14593) samples p(x, σ) ∝ p_σ(x)·p(σ), where p_σ is the data noised by σ and p(σ) is uniform over
levels in equal steps of log σ. Given x, the level has the posterior p(σ | x) ∝ p_σ(x): a classifier's output.

Shapes: B images, N noise levels.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

import torch
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.sampling.settings.names import LevelRule

LEVELS: Final = 1000
"""Levels that the paper takes."""


class NoisePosterior(Protocol):
    """p(σ | x) over levels that are equally likely beforehand."""

    @property
    def level_N(self) -> Tensor:
        """σ of each level, rising, float64 `[N]`."""
        ...

    def __call__(self, x_BCHW: Tensor, label_B: Tensor) -> Tensor:
        """Log probability of each level, float64 `[B, N]`.

        Args:
            x_BCHW: noisy images in the variance-exploding view.
            label_B: their classes, int64; a posterior may leave them out of account.
        """
        ...


def log_uniform_levels(sigma_min: float, sigma_max: float, count: int = LEVELS) -> Tensor:
    """σ_min·(σ_max/σ_min)^u for u in equal steps from 0 to 1, float64 `[count]`."""
    assert 0 < sigma_min <= sigma_max and count >= 1
    levels_N = torch.linspace(math.log(sigma_min), math.log(sigma_max), count, dtype=torch.float64).exp()
    levels_N[0] = sigma_min
    levels_N[-1] = sigma_max if count > 1 else sigma_min
    return levels_N


@dataclass(frozen=True)
class LevelRange:
    """A posterior over the levels of another that lie in a range, in which chains then stay.

    It is the posterior of the narrower product space, so that the Gibbs step is as exact as before.
    """

    posterior: NoisePosterior
    sigma_min: float | None
    """None: without an end."""
    sigma_max: float | None

    def __post_init__(self) -> None:
        """UserError when no level is in the range."""
        if not len(self.level_N):
            level_N = self.posterior.level_N
            raise UserError(
                f"sigma_min = {self.sigma_min} and sigma_max = {self.sigma_max} of chains: no level of noise lies "
                f"between; expected a range within the classifier's, {level_N[0]:g} to {level_N[-1]:g}"
            )

    @cached_property
    def _range(self) -> slice:
        """Places of the levels: they rise. Found once, for on a GPU it waits for the device."""
        level_N = self.posterior.level_N
        first = 0 if self.sigma_min is None else int((level_N < self.sigma_min).sum())
        end = len(level_N) if self.sigma_max is None else int((level_N <= self.sigma_max).sum())
        return slice(first, end)

    @property
    def level_N(self) -> Tensor:
        """σ of each level in the range."""
        return self.posterior.level_N[self._range]

    def __call__(self, x_BCHW: Tensor, label_B: Tensor) -> Tensor:
        """As `NoisePosterior`."""
        return self.posterior(x_BCHW, label_B)[:, self._range].log_softmax(1)


def choose_levels(log_probability_BN: Tensor, rule: LevelRule, uniform_B: Tensor) -> Tensor:
    """A level for each image, int64 `[B]`.

    Args:
        log_probability_BN: of the levels.
        rule: `argmax` takes the likeliest; `sample` draws one, by inversion of the distribution function.
        uniform_B: from [0, 1), float64; used by `sample`.
    """
    if rule == "argmax":
        return log_probability_BN.argmax(1)
    cumulative_BN = log_probability_BN.double().exp().cumsum(1)
    # Scaled by the total, so that rounding of the sum cannot put a draw beyond the last level.
    threshold_B1 = (uniform_B.to(cumulative_BN) * cumulative_BN[:, -1])[:, None]
    found_B = torch.searchsorted(cumulative_BN, threshold_B1, right=True)[:, 0]
    return found_B.clamp(max=log_probability_BN.shape[1] - 1)
