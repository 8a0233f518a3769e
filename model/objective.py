"""The two training objectives: DDPM with learned-range variance, and rectified flow.

What is random in a sample's loss (noise, timestep, label drop) is drawn from streams keyed by (seed, position in
the global sample order), so that it is the same on every layout.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe.model import randomness
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.schedule import DDPM_STEPS, DdpmSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BCHW, timestep_B, label_B) → prediction `[B, out_channels, H, W]`, float32."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of some samples."""

    noise_BCHW: Tensor
    """Standard normal, float32."""
    timestep_B: Tensor
    """DDPM: 0…999; rectified flow: 0…1. float32."""
    drop_B: Tensor
    """Whether the label is replaced by the null class, bool."""

    def to(self, device: torch.device) -> "Draws":
        """The same on another device."""
        return Draws(self.noise_BCHW.to(device), self.timestep_B.to(device), self.drop_B.to(device))


class Objective(ABC):
    """A training loss: how a sample is noised, and what the network should predict."""

    def draw(self, seed: int, positions: Sequence[int], shape: Sequence[int], label_dropout: float) -> Draws:
        """The random numbers of the samples at these positions of the global order.

        Args:
            shape: (C, H, W) of one sample.
            label_dropout: probability of dropping a label.
        """
        return Draws(
            noise_BCHW=randomness.normal(seed, "noise", positions, shape),
            timestep_B=self._draw_timestep(seed, positions),
            drop_B=randomness.uniform(seed, "label drop", positions) < label_dropout,
        )

    @abstractmethod
    def _draw_timestep(self, seed: int, positions: Sequence[int]) -> Tensor: ...

    @abstractmethod
    def noised(self, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """What the network is shown: clean images in −1…1, or latents, with noise."""

    @abstractmethod
    def loss_of(self, prediction_BCHW: Tensor, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """The loss of each sample's prediction, float32 `[B]`; the images are the clean ones."""

    def loss(self, network: Network, x_BCHW: Tensor, label_B: Tensor, draws: Draws) -> Tensor:
        """The loss of each sample, float32 `[B]`.

        Args:
            x_BCHW: clean images in −1…1, or latents.
            label_B: classes, the null class already in place of the dropped ones.
        """
        prediction_BCHW = network(self.noised(x_BCHW, draws), draws.timestep_B, label_B)
        return self.loss_of(prediction_BCHW, x_BCHW, draws)


class RectifiedFlow(Objective):
    """z_t = (1 − t)·x + t·ε with t = sigmoid(N(0, 1)); the target is v = ε − x (Liu et al., arXiv 2209.03003;
    logit-normal t: Esser et al., arXiv 2403.03206)."""

    def _draw_timestep(self, seed: int, positions: Sequence[int]) -> Tensor:
        return randomness.normal(seed, "timestep", positions, ()).sigmoid()

    def noised(self, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """z_t."""
        t = draws.timestep_B.view(-1, 1, 1, 1)
        return (1 - t) * x_BCHW + t * draws.noise_BCHW

    def loss_of(self, prediction_BCHW: Tensor, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """Mean squared error of v per sample, `[B]`."""
        v_BCHW = prediction_BCHW[:, : x_BCHW.shape[1]]
        return (v_BCHW - (draws.noise_BCHW - x_BCHW)).square().flatten(1).mean(1)


class Ddpm(Objective):
    """ε-prediction over 1000 linear steps, with a learned variance when the network has channels for it."""

    def __init__(self) -> None:
        schedule = DdpmSchedule.linear()
        # 1 − ᾱ is 1e-4 at the first step, where a float32 ᾱ would leave three digits of it.
        self._tables = torch.stack(
            (
                schedule.alphas_bar.sqrt(),
                (1 - schedule.alphas_bar).sqrt(),
                schedule.betas.log(),
                schedule.posterior_log_variance_clipped,
                schedule.posterior_mean_x0,
                schedule.posterior_mean_xt,
            )
        )
        """float64 `[6, 1000]`, on the device of the last batch."""

    def _draw_timestep(self, seed: int, positions: Sequence[int]) -> Tensor:
        return (randomness.uniform(seed, "timestep", positions) * DDPM_STEPS).floor().float()

    def noised(self, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε."""
        chain = self._at(draws.timestep_B.long())
        return chain.signal * x_BCHW + chain.noise * draws.noise_BCHW

    def loss_of(self, prediction_BCHW: Tensor, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """MSE(ε) plus, with a learned variance, the variational bound of the step in bits/dim, `[B]`.

        In the bound ε is detached, so that it trains the variance alone. The sum is L_simple + λ·L_vlb with
        λ = 1/1000: L_vlb sums over the steps what is drawn here as one of 1000 (arXiv 2102.09672, eq. 16).
        """
        channels = x_BCHW.shape[1]
        epsilon_BCHW, variance_BCHW = prediction_BCHW[:, :channels], prediction_BCHW[:, channels:]
        loss_B = (epsilon_BCHW - draws.noise_BCHW).square().flatten(1).mean(1)
        if variance_BCHW.shape[1] == channels:
            noisy_BCHW, step = self.noised(x_BCHW, draws), draws.timestep_B.long()
            loss_B = loss_B + self._bound(x_BCHW, noisy_BCHW, epsilon_BCHW.detach(), variance_BCHW, step)
        return loss_B

    def _bound(self, x: Tensor, noisy: Tensor, epsilon: Tensor, variance: Tensor, step: Tensor) -> Tensor:
        """L_t in bits/dim: KL of the two posteriors, or at step 0 likelihood of the 8-bit pixels (eq. 5, 6)."""
        signal, noise, log_beta, true_log_variance, mean_x0, mean_xt = self._at(step)
        share = (variance + 1) / 2  # the network's output −1…1 runs from log β̃ to log β (eq. 15)
        log_variance = share * log_beta + (1 - share) * true_log_variance
        predicted_x = (noisy - noise * epsilon) / signal
        true_mean = mean_x0 * x + mean_xt * noisy
        mean = mean_x0 * predicted_x + mean_xt * noisy
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
            - 1
        )
        decoder = -_pixel_log_likelihood(x, mean, 0.5 * log_variance)
        nats = torch.where(step.view(-1, 1, 1, 1) == 0, decoder, divergence)
        return nats.flatten(1).mean(1) / math.log(2)

    def _at(self, step_B: Tensor) -> "_Coefficients":
        self._tables = self._tables.to(step_B.device)  # copied once: every copy to a GPU would be waited for
        return _Coefficients(*self._tables[:, step_B].float().view(6, -1, 1, 1, 1))


class _Coefficients(NamedTuple):
    """The chain's coefficients at each sample's step, float32 `[B, 1, 1, 1]` each."""

    signal: Tensor
    """√ᾱ."""
    noise: Tensor
    """√(1 − ᾱ)."""
    log_beta: Tensor
    log_posterior_variance: Tensor
    mean_x0: Tensor
    mean_xt: Tensor


def _pixel_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of the 1/127.5-wide bin that holds x under N(mean, scale²), the end bins reaching to ±∞."""
    half_bin, tiny = 1 / 255, 1e-12
    inverse_scale = (-log_scale).exp()
    below_upper = torch.special.ndtr((x - mean + half_bin) * inverse_scale)
    below_lower = torch.special.ndtr((x - mean - half_bin) * inverse_scale)
    inside = below_upper - below_lower
    probability = torch.where(x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, inside))
    return probability.clamp(min=tiny).log()


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the configuration names."""
    return Ddpm() if config.kind == "ddpm" else RectifiedFlow()
