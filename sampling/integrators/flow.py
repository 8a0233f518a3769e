"""From noise to images: what all integrators share, and the one-step methods for the probability flow.

An integrator is a pure function from a denoiser, a batch with its own σ per image, a number of steps (and a source
of noise per image) to samples at σ = 0 and the number of evaluations. The others are in `ddpm`, `stochastic`,
`multistep` and `adaptive`; `samplers` has them all by name. The probability-flow equation is dx/dσ = (x − D)/σ
(Karras et al., arXiv 2206.00364, eq. 4 in variance-exploding form).

Shapes: B images, N noise levels, the last of them 0. σ is float64 until it multiplies an image.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from ditmoe.sampling.network.denoiser import Denoiser, column
from ditmoe.sampling.settings.names import ScheduleName

RHO: Final = 7.0
"""EDM's ρ: larger puts more of the steps at small σ."""

Schedule = Callable[[Denoiser, Tensor, int], Tensor]
"""(denoiser, sigma_B, steps) → noise levels, float64 `[B, steps + 1]`, from each image's σ down to 0."""


class NoiseSource(Protocol):
    """Fresh noise for a batch: that of an image depends on the image and the step, never on the batch."""

    def __call__(self, step: int) -> Tensor:
        """Standard normal `[B, C, H, W]` for this step of the integrator."""


class Drawn(NamedTuple):
    """What an integrator gives back."""

    x_BCHW: Tensor
    """Samples, at σ = 0."""
    nfe: int
    """Evaluations of the denoiser on the whole batch, as it counted them itself."""
    nfe_B: Tensor | None = None
    """Those that each image needed, int64, where they differ (`rk45`); None: all of them."""


def own_schedule(denoiser: Denoiser, sigma_B: Tensor, steps: int) -> Tensor:
    """The levels of the objective that the network was trained with, `[B, steps + 1]`."""
    return denoiser.own_schedule(sigma_B, steps)


def karras_schedule(denoiser: Denoiser, sigma_B: Tensor, steps: int) -> Tensor:
    """The EDM levels: σ^(1/ρ) in equal steps from each image's σ to `sigma_min`, then 0, `[B, steps + 1]` (eq. 5).

    An image that starts below `sigma_min` stays at its σ until the last step.
    """
    first_B1 = sigma_B.double()[:, None]
    last_B1 = first_B1.clamp(max=denoiser.sigma_min)
    share_N = torch.arange(steps, dtype=torch.float64, device=sigma_B.device) / max(steps - 1, 1)
    root_BN = first_B1 ** (1 / RHO) + share_N * (last_B1 ** (1 / RHO) - first_B1 ** (1 / RHO))
    return torch.cat((first_B1, (root_BN**RHO)[:, 1:], torch.zeros_like(first_B1)), dim=1)


SCHEDULES: Final[dict[ScheduleName, Schedule]] = {"own": own_schedule, "karras": karras_schedule}


def euler(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    *,
    schedule: Schedule = own_schedule,
) -> Drawn:
    """Euler steps of the probability flow, first order; `steps` evaluations.

    On a flow's own schedule from `sigma_prior` this is the published rectified-flow sampler z ← z + (t′ − t)·v, to
    rounding: a step that keeps x on the line through x and D is the same in z and t as in x and σ. On DDPM's own
    schedule it is DDIM (arXiv 2010.02502), on the EDM schedule the probability-flow Euler method.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0.
        label_B: classes.
    """
    before = denoiser.nfe
    sigma_BN = schedule(denoiser, sigma_B, steps)
    for now_B, next_B in levels(sigma_BN):
        x0_BCHW = denoiser(x_BCHW, now_B, label_B)
        # x + (σ′ − σ)·(x − D)/σ in the form that loses nothing at a huge σ.
        x_BCHW = x0_BCHW + column(next_B / now_B, x_BCHW) * (x_BCHW - x0_BCHW)
    return Drawn(x_BCHW, denoiser.nfe - before)


def heun(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    *,
    schedule: Schedule = karras_schedule,
) -> Drawn:
    """Heun steps of the probability flow with a last Euler step to 0, second order (Algorithm 1 without churn).

    2·steps − 1 evaluations. It is KAR1 of the DMCMC paper (arXiv 2209.14593), which counts the
    N = steps + 1 levels and so 2(N − 1) − 1 evaluations.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0; start a flow at `sigma_max`, for from t = 1 the slope in σ is unbounded.
        label_B: classes.
    """
    before = denoiser.nfe
    levels_of_steps = levels(schedule(denoiser, sigma_B, steps))
    for now_B, next_B in levels_of_steps[:-1]:
        x_BCHW = heun_step(denoiser, x_BCHW, now_B, next_B, label_B)
    x_BCHW = denoiser(x_BCHW, levels_of_steps[-1][0], label_B)  # the Euler step to σ = 0
    return Drawn(x_BCHW, denoiser.nfe - before)


def heun_step(denoiser: Denoiser, x_BCHW: Tensor, now_B: Tensor, next_B: Tensor, label_B: Tensor) -> Tensor:
    """One step σ → σ′ > 0 of the probability flow with the mean of the slopes at both ends; two evaluations."""
    step = column(next_B - now_B, x_BCHW)
    slope_BCHW = (x_BCHW - denoiser(x_BCHW, now_B, label_B)) / column(now_B, x_BCHW)
    ahead_BCHW = x_BCHW + step * slope_BCHW
    slope_ahead_BCHW = (ahead_BCHW - denoiser(ahead_BCHW, next_B, label_B)) / column(next_B, x_BCHW)
    return x_BCHW + step * 0.5 * (slope_BCHW + slope_ahead_BCHW)


def levels(sigma_BN: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The schedule as steps: (σ, σ′) of all images, each `[B]`."""
    columns = sigma_BN.unbind(1)
    return list(pairwise(columns))
