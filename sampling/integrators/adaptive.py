"""RK45: the probability flow in steps as long as a tolerance allows, which each image chooses for itself.

Time is λ = log σ, in which the flow is dx/dλ = x − D, and with which the published one's time goes. Steps are then
alike at all σ, and half as many as in σ itself.
"""

import math
from typing import Final

import torch
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.sampling.integrators.flow import Drawn
from ditmoe.sampling.network.denoiser import Denoiser, StepTaken, column

# Dormand & Prince, "A family of embedded Runge–Kutta formulae", J. Comput. Appl. Math. 6 (1980), table 2, 5(4).
NODES: Final = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
STAGES: Final = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
FIFTH: Final = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
"""Weights of the result; the slope there is the next step's first."""
DIFFERENCE: Final = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of the fifth order minus those of the fourth."""

SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0
"""A step is as long as the error allows, times SAFETY, and between these factors of the step before."""
MOST_ATTEMPTS: Final = 2000
"""Steps, with rejected ones, after which an image is given up."""


def rk45(
    denoiser: Denoiser, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, *, tolerance: float = 1e-5
) -> Drawn:
    """Dormand–Prince 5(4) from each image's σ to `sigma_min`, then x ← D(x, σ), which costs nothing more.

    That last step is Tweedie's formula at `sigma_min`, and the Euler step to σ = 0.

    A step is taken when the error estimate, relative to tolerance·(1 + |x|) and as the root of the mean square
    over the image, is at most 1. Each image has steps of its own, so that it depends on no other. Those that
    have arrived stay in the batch, whose shape must not change, until the last one has: `nfe` is that of the
    batch, and `nfe_B` says what each image needed, 2 + 6·attempts (1 where it starts at `sigma_min` or below).

    The length of a step follows from an estimate that rounding moves: in a batch of another size, an image may
    differ by as much as it is off, not by rounding alone.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0; start a flow at `sigma_max`, as for `heun`.
        label_B: classes.
        tolerance: both absolute and relative.

    Raises:
        UserError: the tolerance is beyond what the network's arithmetic resolves.
    """
    with denoiser.own_steps() as step_taken:
        return _in_steps(denoiser, x_BCHW, sigma_B, label_B, tolerance, step_taken)


def _in_steps(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    tolerance: float,
    step_taken: StepTaken,
) -> Drawn:
    """`rk45`, which tells its steps as it takes them, the start among them."""
    before = denoiser.nfe
    now_B = sigma_B.double().log()
    end_B = now_B.clamp(max=math.log(denoiser.sigma_min))

    def slope(x: Tensor, at_B: Tensor) -> Tensor:
        return x - denoiser(x, at_B.exp(), label_B)

    first_BCHW = slope(x_BCHW, now_B)
    step_taken(torch.ones_like(label_B, dtype=torch.bool), x_BCHW - first_BCHW)
    nfe_B = torch.ones_like(label_B)
    active_B = now_B > end_B
    length_B = torch.zeros_like(now_B)
    if bool(active_B.any()):
        ahead_B = _first_guess(x_BCHW, first_BCHW, tolerance).minimum(now_B - end_B)
        ahead_BCHW = slope(x_BCHW - column(ahead_B, x_BCHW) * first_BCHW, now_B - ahead_B)
        length_B = _first_step(x_BCHW, first_BCHW, ahead_BCHW, ahead_B, tolerance)
        nfe_B = nfe_B + active_B
    limit_B = torch.full_like(now_B, LARGEST_FACTOR)
    attempts = 0
    # An image that has left the numbers cannot be brought back; the caller sees it.
    while bool((active_B := active_B & first_BCHW.flatten(1).isfinite().all(1)).any()):
        if attempts == MOST_ATTEMPTS:
            worst = int(active_B.int().argmax())
            raise UserError(
                f"rk45: after {MOST_ATTEMPTS} steps an image is still at sigma = {now_B[worst].exp():.3g}: "
                f"tolerance = {tolerance:g} is beyond what the network's arithmetic resolves; "
                "expected a larger one, or fp32"
            )
        attempts += 1
        rest_B = now_B - end_B
        length_B = torch.where(active_B, length_B.minimum(rest_B), 0.0)
        arrives_B = length_B == rest_B
        slopes = [first_BCHW]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            between_B = torch.where(active_B, now_B - node * length_B, now_B)
            slopes.append(slope(_moved(x_BCHW, length_B, weights, slopes), between_B))
        ahead_BCHW = _moved(x_BCHW, length_B, FIFTH, slopes)
        ahead_B = torch.where(arrives_B, end_B, now_B - length_B)
        slopes.append(slope(ahead_BCHW, ahead_B))
        nfe_B = nfe_B + 6 * active_B
        allowed_BCHW = tolerance * (1 + x_BCHW.abs().maximum(ahead_BCHW.abs()))
        error_B = length_B * _size(_combined(DIFFERENCE, slopes) / allowed_BCHW)
        taken_B = active_B & (error_B <= 1)
        # Order 4 of the estimate, so that the error goes with the fifth power of the length.
        factor_B = (SAFETY * error_B.pow(-1 / 5)).nan_to_num(SMALLEST_FACTOR, posinf=LARGEST_FACTOR)
        length_B = length_B * factor_B.clamp(min=SMALLEST_FACTOR).minimum(limit_B)
        limit_B = torch.where(taken_B, torch.full_like(now_B, LARGEST_FACTOR), 1.0)  # not longer after a rejection
        taken = column(taken_B, x_BCHW).bool()
        x_BCHW = torch.where(taken, ahead_BCHW, x_BCHW)
        first_BCHW = torch.where(taken, slopes[-1], first_BCHW)
        now_B = torch.where(taken_B, ahead_B, now_B)
        step_taken(taken_B, x_BCHW - first_BCHW)
        active_B = active_B & (now_B > end_B)
    # x − slope is D, which the last slope was made of.
    return Drawn(x_BCHW - first_BCHW, denoiser.nfe - before, nfe_B)


def _combined(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Σ w·k."""
    total_BCHW = weights[0] * slopes[0]
    for weight, slope_BCHW in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total_BCHW = total_BCHW + weight * slope_BCHW
    return total_BCHW


def _moved(x_BCHW: Tensor, length_B: Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """x after a step of this length in log σ, towards smaller σ."""
    return x_BCHW - column(length_B, x_BCHW) * _combined(weights, slopes)


def _size(value_BCHW: Tensor) -> Tensor:
    """Root of the mean square over each image, float64 `[B]`."""
    return value_BCHW.double().flatten(1).square().mean(1).sqrt()


def _first_guess(x_BCHW: Tensor, first_BCHW: Tensor, tolerance: float) -> Tensor:
    """A length that changes x by about a hundredth, to measure with (Hairer, Nørsett & Wanner, I, II.4)."""
    allowed_BCHW = tolerance * (1 + x_BCHW.abs())
    size_B, speed_B = _size(x_BCHW / allowed_BCHW), _size(first_BCHW / allowed_BCHW)
    return torch.where((size_B < 1e-5) | (speed_B < 1e-5), 1e-6, 0.01 * size_B / speed_B)


def _first_step(
    x_BCHW: Tensor, first_BCHW: Tensor, ahead_BCHW: Tensor, ahead_B: Tensor, tolerance: float
) -> Tensor:
    """The first step's length, from the slopes at both ends of the guess (II.4 of the same book)."""
    allowed_BCHW = tolerance * (1 + x_BCHW.abs())
    speed_B = _size(first_BCHW / allowed_BCHW)
    bend_B = _size((ahead_BCHW - first_BCHW) / allowed_BCHW) / ahead_B
    most_B = speed_B.maximum(bend_B)
    length_B = torch.where(most_B <= 1e-15, (1e-3 * ahead_B).clamp(min=1e-6), (0.01 / most_B).pow(1 / 5))
    return length_B.minimum(100 * ahead_B).nan_to_num(1e-6)
