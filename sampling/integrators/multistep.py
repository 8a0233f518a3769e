"""DPM-Solver++(2M): an integrator that uses what the denoiser said a step earlier."""

import torch
from torch import Tensor

from ditmoe.sampling.integrators.flow import Drawn, Schedule, karras_schedule, levels
from ditmoe.sampling.network.denoiser import Denoiser, column


def dpm_solver(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    *,
    schedule: Schedule = karras_schedule,
) -> Drawn:
    """DPM-Solver++(2M), second order (Lu et al., arXiv 2211.01095, Algorithm 2); `steps` evaluations.

    In variance-exploding form α = 1 and λ = −log σ, and a step h = log(σ/σ′) is x ← (σ′/σ)·x + (1 − σ′/σ)·D̄ with

        D̄ = D + (h/(2·h_before))·(D − D_before)

    The first step has nothing before it, and at the last, to σ = 0, h has no bound: there D̄ = D, an Euler step.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0.
        label_B: classes.
    """
    before = denoiser.nfe
    length_before_B = torch.zeros_like(sigma_B, dtype=torch.float64)
    x0_before_BCHW = x_BCHW
    for step, (now_B, next_B) in enumerate(levels(schedule(denoiser, sigma_B, steps))):
        x0_BCHW = denoiser(x_BCHW, now_B, label_B)
        length_B = (now_B / next_B).log()
        # An image that started below the smallest σ stays at its σ, in steps of length 0, until the last.
        usable_B = (length_before_B > 0) & (step < steps - 1)
        weight_B = torch.where(usable_B, length_B / (2 * length_before_B), 0.0)
        ahead_BCHW = x0_BCHW + column(weight_B, x_BCHW) * (x0_BCHW - x0_before_BCHW)
        x_BCHW = ahead_BCHW + column(next_B / now_B, x_BCHW) * (x_BCHW - ahead_BCHW)
        x0_before_BCHW, length_before_B = x0_BCHW, length_B
    return Drawn(x_BCHW, denoiser.nfe - before)
