"""One Denoising Langevin Gibbs step in the product space: x given σ by Langevin dynamics, then σ given x.

Alternating the two keeps p(x, σ) ∝ p_σ(x)·p(σ) (Gibbs sampling; DMCMC, arXiv 2209.14593) up to what the Langevin
step, which no Metropolis test corrects, is off by. Any step length that depends on σ alone is as valid as another,
for σ stands still while x moves.

Three rules are x ← x + share·(D − x) + deviation·z, and agree to first order in η with each other and the fourth:

    rule           share           deviation     on N(μ, v) with v = s² + σ² settles at the variance
    constant       η/(2σ²)         √η            v/(1 − η/(4v))
    proportional   η/2             √η·σ          v/(1 − η·σ²/(4v))
    exponential    1 − √(1 − η)    √η·σ          v/(1 + share·s²/((2 − share)·v))
    underdamped    (see there)                   v

The third is exact where nothing but noise varies (s = 0), as in most directions of an image; there the first two
lengthen the noise at every step, which in many dims is enough to drive σ up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe.sampling.network.denoiser import Denoiser, column
from ditmoe.sampling.noise_level.levels import NoisePosterior, choose_levels
from ditmoe.sampling.settings.names import LevelRule, StepRule


class State(NamedTuple):
    """Points of the product space."""

    x_BCHW: Tensor
    sigma_B: Tensor
    """float64."""
    velocity_BCHW: Tensor | None = None
    """Of `underdamped`, in units of σ for one of time: standard normal in the long run, whatever x and σ are."""


def langevin(
    denoiser: Denoiser,
    state: State,
    label_B: Tensor,
    step_size_B: Tensor,
    noise_BCHW: Tensor,
    rule: StepRule = "constant",
) -> Tensor:
    """x after one Langevin step at its σ (score SDE, arXiv 2011.13456, eq. 2, with ε = η/2); one evaluation.

    Args:
        step_size_B: η of each image, float64.
        noise_BCHW: standard normal.
    """
    x_BCHW, sigma_B, _ = state
    if rule == "constant":
        share_B, deviation_B = step_size_B / (2 * sigma_B.square()), step_size_B.sqrt()
    else:
        share_B = step_size_B / 2 if rule == "proportional" else 1 - (1 - step_size_B).sqrt()
        deviation_B = step_size_B.sqrt() * sigma_B
    x0_BCHW = denoiser(x_BCHW, sigma_B, label_B)
    moved_BCHW = x_BCHW + column(share_B, x_BCHW) * (x0_BCHW - x_BCHW)
    return moved_BCHW + column(deviation_B, x_BCHW) * noise_BCHW


def underdamped(
    denoiser: Denoiser,
    state: State,
    label_B: Tensor,
    step_size_B: Tensor,
    noise_BCHW: Tensor,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """x and velocity after one step of underdamped Langevin dynamics at its σ; one evaluation.

    Half a drift, a kick by the score, half a drift, and a partial renewal of the velocity: generalised Hamiltonian
    Monte Carlo (Horowitz 1991), one leapfrog step of time √η in units of σ, without a Metropolis test. Half a
    drift adds noise of its own, and the score is asked for at the level that both make: so on a normal
    distribution of any width the step is a rotation of (x, velocity), and exact at any length.

    Args:
        step_size_B: η of each image, float64.
        noise_BCHW: standard normal.
        momentum: share of the velocity that stays.
    """
    x_BCHW, sigma_B, velocity_BCHW = state
    assert velocity_BCHW is not None
    drift = column(0.5 * step_size_B.sqrt() * sigma_B, x_BCHW)
    middle_BCHW = x_BCHW + drift * velocity_BCHW
    level_B = sigma_B * (1 + step_size_B / 4).sqrt()
    x0_BCHW = denoiser(middle_BCHW, level_B, label_B)
    kick = column(step_size_B.sqrt() * sigma_B / level_B.square(), x_BCHW)
    velocity_BCHW = velocity_BCHW + kick * (x0_BCHW - middle_BCHW)
    moved_BCHW = middle_BCHW + drift * velocity_BCHW
    return moved_BCHW, momentum * velocity_BCHW + (1 - momentum**2) ** 0.5 * noise_BCHW


def draw_sigma(
    posterior: NoisePosterior, x_BCHW: Tensor, label_B: Tensor, rule: LevelRule, uniform_B: Tensor
) -> Tensor:
    """σ given x, float64 `[B]`; no evaluation of the denoiser."""
    level_B = choose_levels(posterior(x_BCHW, label_B), rule, uniform_B.to(x_BCHW.device))
    return posterior.level_N.to(x_BCHW.device)[level_B]


def langevin_gibbs(
    denoiser: Denoiser,
    posterior: NoisePosterior,
    state: State,
    label_B: Tensor,
    step_size_B: Tensor,
    noise_BCHW: Tensor,
    uniform_B: Tensor,
    *,
    step_rule: StepRule = "constant",
    level_rule: LevelRule = "argmax",
    momentum: float = 0.0,
) -> State:
    """The state after one step; one evaluation. Arguments as those of the functions above."""
    velocity_BCHW = state.velocity_BCHW
    if step_rule == "underdamped":
        x_BCHW, velocity_BCHW = underdamped(denoiser, state, label_B, step_size_B, noise_BCHW, momentum)
    else:
        x_BCHW = langevin(denoiser, state, label_B, step_size_B, noise_BCHW, step_rule)
    return State(x_BCHW, draw_sigma(posterior, x_BCHW, label_B, level_rule, uniform_B), velocity_BCHW)


def smaller(first: State, second: State) -> State:
    """Of two states of each chain the one of smaller σ; the first where they are equal."""
    take_B = second.sigma_B < first.sigma_B
    take_BCHW = take_B.view(-1, *(1,) * (first.x_BCHW.ndim - 1))
    return State(
        torch.where(take_BCHW, second.x_BCHW, first.x_BCHW), torch.where(take_B, second.sigma_B, first.sigma_B)
    )
