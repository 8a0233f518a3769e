"""Integrators that add noise on the way: Heun with churn, and two discretisations of the reverse-time SDE.

The SDE of the variance-exploding process with time σ is dx = −2σ·s dσ + √(2σ) dw̄, from σ down, with the
score s = (D − x)/σ² (Song et al., arXiv 2011.13456, eq. 6; Karras et al., arXiv 2206.00364, eq. 6 with
β = 1/σ). Euler–Maruyama takes its coefficients at the start of a step; Reverse Diffusion makes the step as the
forward process makes it, by the difference of σ². Both make large errors where σ′/σ is far from 1: they want
many steps, on the EDM schedule from a finite σ.

Noise is asked for by number, once each, so that an image's noise depends on the image alone.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ditmoe.sampling.integrators.flow import Drawn, NoiseSource, Schedule, heun_step, karras_schedule, levels
from ditmoe.sampling.network.denoiser import Denoiser, column

LARGEST_CHURN: Final = math.sqrt(2) - 1
"""Largest growth of σ by churn: never more new noise than there is (EDM, Algorithm 2)."""

ReverseStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(σ, σ′) of all images, each `[B]` → (share of the way to D, deviation of the fresh noise), each `[B]`."""


def heun_with_churn(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    churn: float = 80.0,
    churn_min: float = 0.1,
    churn_max: float = 2.0,
    churn_noise: float = 1.007,
    schedule: Schedule = karras_schedule,
) -> Drawn:
    """Heun steps, each after some fresh noise (EDM, Algorithm 2); 2·steps − 1 evaluations.

    The defaults are KAR2 of the DMCMC paper (arXiv 2209.14593) for images from −1 to 1; its own go from 0 to 1,
    with a window half as high. S_churn is divided by the N = steps + 1 levels, as there (EDM: by the steps). With
    churn = 0 it is `heun`.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0; not much above `sigma_max`, as for `heun`.
        label_B: classes.
        noise: asked for at steps 0 … steps − 1 where the σ of some image lies between the bounds.
        churn: S_churn; at a step σ grows by the factor 1 + churn/(steps + 1), at most √2.
        churn_min: S_tmin, the smallest σ that grows.
        churn_max: S_tmax, the largest σ that grows.
        churn_noise: S_noise, deviation of the fresh noise; a little above 1 makes up for detail that D loses.
    """
    before = denoiser.nfe
    growth = min(churn / (steps + 1), LARGEST_CHURN)
    sigma_BN = schedule(denoiser, sigma_B, steps)
    inside_BN = (sigma_BN >= churn_min) & (sigma_BN <= churn_max)
    grows_N = inside_BN.any(0).tolist() if growth > 0 else [False] * (steps + 1)  # a GPU is waited for once
    for step, (now_B, next_B) in enumerate(levels(sigma_BN)):
        if grows_N[step]:
            grown_B = torch.where(inside_BN[:, step], now_B * (1 + growth), now_B)
            fresh_B = churn_noise * (grown_B.square() - now_B.square()).sqrt()
            x_BCHW = x_BCHW + column(fresh_B, x_BCHW) * noise(step)
            now_B = grown_B
        if step < steps - 1:
            x_BCHW = heun_step(denoiser, x_BCHW, now_B, next_B, label_B)
        else:
            x_BCHW = denoiser(x_BCHW, now_B, label_B)  # the Euler step to σ = 0
    return Drawn(x_BCHW, denoiser.nfe - before)


def reverse_diffusion(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    corrector_steps: int = 0,
    corrector_snr: float = 0.16,
    schedule: Schedule = karras_schedule,
) -> Drawn:
    """x ← x + (σ² − σ′²)·s + √(σ² − σ′²)·z (arXiv 2011.13456, eq. 46 and Algorithm 2), of weak order 1.

    The last step, to σ = 0, adds no noise, so it is x ← D(x, σ). steps + corrector_steps·(steps − 1) evaluations.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0, finite in earnest: the noise of the first step is about σ itself.
        label_B: classes.
        noise: asked for (steps − 1)·(1 + corrector_steps) times, numbered from 0.
        corrector_steps: Langevin steps at each level that is reached, but the last; see `langevin_step`.
        corrector_snr: their signal-to-noise ratio.
    """

    def rule(now_B: Tensor, next_B: Tensor) -> tuple[Tensor, Tensor]:
        kept_B = (next_B / now_B).square()
        return 1 - kept_B, now_B * (1 - kept_B).clamp(min=0).sqrt()

    levels_of_steps = levels(schedule(denoiser, sigma_B, steps))
    return _predict_and_correct(
        denoiser, x_BCHW, label_B, levels_of_steps, noise, rule, corrector_steps, corrector_snr
    )


def euler_maruyama(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    corrector_steps: int = 0,
    corrector_snr: float = 0.16,
    schedule: Schedule = karras_schedule,
) -> Drawn:
    """x ← x + 2σ(σ − σ′)·s + √(2σ(σ − σ′))·z: Euler–Maruyama with σ as time, of weak order 1.

    The last step, to σ = 0, where this would go as far beyond D as x was before it, is x ← D(x, σ) without noise.
    Arguments and evaluations are those of `reverse_diffusion`.
    """

    def rule(now_B: Tensor, next_B: Tensor) -> tuple[Tensor, Tensor]:
        share_B = 2 * (1 - next_B / now_B)
        return share_B, now_B * share_B.clamp(min=0).sqrt()

    levels_of_steps = levels(schedule(denoiser, sigma_B, steps))
    return _predict_and_correct(
        denoiser, x_BCHW, label_B, levels_of_steps, noise, rule, corrector_steps, corrector_snr
    )


def langevin_step(
    denoiser: Denoiser, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, noise_BCHW: Tensor, snr: float
) -> Tensor:
    """One Langevin step towards p_σ: x ← x + ε·s + √(2ε)·z; one evaluation (arXiv 2011.13456, Algorithm 4).

    ε = 2·(snr·‖z‖/‖s‖)². Published norms are means over a batch, and an image must not depend on others: ‖z‖
    is taken as √dims, which that mean is nearly, and ‖s‖ is the image's own. It is steady where an image has
    many dims; with a handful it may be near 0, and the step without bound. What is too long in a step is not
    made good: on Gaussian data of many dims the variance settles at 1 + snr² times what it should be (a little
    more at 64 dims), whatever the number of levels.
    """
    pull_BCHW = denoiser(x_BCHW, sigma_B, label_B) - x_BCHW  # σ²·s
    norm_B = pull_BCHW.double().flatten(1).norm(dim=1)
    share_B = 2 * pull_BCHW[0].numel() * (snr * sigma_B / norm_B).square()  # ε/σ²
    fresh_B = sigma_B * (2 * share_B).sqrt()
    return x_BCHW + column(share_B, x_BCHW) * pull_BCHW + column(fresh_B, x_BCHW) * noise_BCHW


def _predict_and_correct(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    label_B: Tensor,
    levels_of_steps: list[tuple[Tensor, Tensor]],
    noise: NoiseSource,
    rule: ReverseStep,
    corrector_steps: int,
    corrector_snr: float,
) -> Drawn:
    """A step of the SDE to each level and Langevin steps there (arXiv 2011.13456, Algorithm 2)."""
    before = denoiser.nfe
    drawn = 0
    for now_B, next_B in levels_of_steps[:-1]:
        share_B, deviation_B = rule(now_B, next_B)
        x0_BCHW = denoiser(x_BCHW, now_B, label_B)
        x_BCHW = x_BCHW + column(share_B, x_BCHW) * (x0_BCHW - x_BCHW)
        x_BCHW = x_BCHW + column(deviation_B, x_BCHW) * noise(drawn)
        drawn += 1
        for _ in range(corrector_steps):
            x_BCHW = langevin_step(denoiser, x_BCHW, next_B, label_B, noise(drawn), corrector_snr)
            drawn += 1
    x_BCHW = denoiser(x_BCHW, levels_of_steps[-1][0], label_B)
    return Drawn(x_BCHW, denoiser.nfe - before)
