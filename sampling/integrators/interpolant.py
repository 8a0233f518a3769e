"""SiT's SDE: the flow's ODE with noise added and taken out again in every step (Ma et al., arXiv 2401.08740).

On the line z = t·x₀ + (1 − t)·ε from noise at t = 0 to data at t = 1, with the velocity v = x₀ − ε and the score
s = −ε/(1 − t), every equation dz = (v + w·s)·dt + √(2w)·dW has the distributions of the ODE dz = v·dt, whatever
the diffusion w(t) ≥ 0 is (eq. 4, where w_t is twice this w). So w is chosen when images are drawn. Here the line
is seen as x = z/t at σ = (1 − t)/t, and ε as (x − D)/σ.

The form of a variance-exploding process, w = (1 − t)/t (SBDM), has no bound at t = 0: for it there is
`stochastic.euler_maruyama`, with σ as time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ditmoe.sampling.integrators.flow import Drawn, NoiseSource, Schedule, levels
from ditmoe.sampling.network.denoiser import Denoiser, column
from ditmoe.sampling.settings.names import DiffusionForm, LastStep

LAST_STEP_SIZE: Final = 0.04
"""In t: SiT's own choice."""

DIFFUSIONS: Final[dict[DiffusionForm, Callable[[Tensor, float], Tensor]]] = {
    "sigma": lambda t_B, norm: norm * (1 - t_B),
    "decreasing": lambda t_B, norm: 0.25 * (norm * torch.cos(math.pi * t_B) + 1).square(),
    "increasing-decreasing": lambda t_B, norm: norm * torch.sin(math.pi * t_B).square(),
}
"""Form → w of (t, norm), `[B]`, float64."""


def interpolant_schedule(
    denoiser: Denoiser, sigma_B: Tensor, steps: int, *, last_step_size: float = LAST_STEP_SIZE
) -> Tensor:
    """σ at t in equal steps from each image's t to 1 − `last_step_size`, then 0; float64 `[B, steps + 1]`.

    An image that starts closer to t = 1 than that takes equal steps all the way.
    """
    noise_B1 = (sigma_B / (1 + sigma_B)).double()[:, None]  # 1 − t
    last_B1 = torch.where(noise_B1 > last_step_size, last_step_size, noise_B1 / steps)
    share_N = torch.linspace(0, 1, steps, dtype=torch.float64, device=sigma_B.device)[1:]
    noise_BN = noise_B1 + share_N * (last_B1 - noise_B1)
    first_B1 = sigma_B.double()[:, None]
    return torch.cat((first_B1, noise_BN / (1 - noise_BN), torch.zeros_like(first_B1)), dim=1)


def interpolant_schedule_of(last_step_size: float) -> Schedule:
    """`interpolant_schedule` with a last step of this size."""
    return partial(interpolant_schedule, last_step_size=last_step_size)


def interpolant_sde(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    form: DiffusionForm = "sigma",
    norm: float = 1.0,
    last_step: LastStep = "mean",
    schedule: Schedule = interpolant_schedule,
) -> Drawn:
    """z ← z + (v + w·s)·dt + √(2w·dt)·n: Euler–Maruyama with t as time, of weak order 1; `steps` evaluations.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0.
        label_B: classes.
        noise: asked for at steps 0 … steps − 2.
        form: w of t.
        norm: the size of w.
        last_step: `mean`: the same step without its noise, which leaves −w·ε in an image; `tweedie`: x ← D, which
            on this line is a step of the ODE too. A single step is x ← D.
    """
    before = denoiser.nfe
    levels_of_steps = levels(schedule(denoiser, sigma_B, steps))
    for step, (now_B, next_B) in enumerate(levels_of_steps):
        x0_BCHW = denoiser(x_BCHW, now_B, label_B)
        rest_BCHW = x_BCHW - x0_BCHW  # σ·ε
        t_B, t_next_B = 1 / (1 + now_B), 1 / (1 + next_B)
        remaining_B = now_B / (1 + now_B)  # 1 − t, without what t has lost
        w_B, size_B = DIFFUSIONS[form](t_B, norm), t_next_B - t_B
        if step < steps - 1:
            kept_B = 1 - t_next_B - size_B * w_B / remaining_B
            x_BCHW = x0_BCHW + column(kept_B / (t_next_B * now_B), x_BCHW) * rest_BCHW
            x_BCHW = x_BCHW + column((2 * w_B * size_B).sqrt() / t_next_B, x_BCHW) * noise(step)
        elif last_step == "mean" and steps > 1:
            x_BCHW = x0_BCHW - column(w_B / now_B, x_BCHW) * rest_BCHW
        else:
            x_BCHW = x0_BCHW
    return Drawn(x_BCHW, denoiser.nfe - before)
