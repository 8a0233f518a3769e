"""The stochastic samplers of DDPM, written in the variance-exploding view, so that they run on any denoiser.

There the chain is x_σ = x_0 + σ·ε, and the posterior of a step σ → σ′ given x_0 is normal with

    mean       x_0 + (σ′²/σ²)·(x − x_0)
    variance   (σ² − σ′²)·σ′²/σ²                     β̃, when x_0 is known
               (σ² − σ′²)·(1 + σ′²)/(1 + σ²)         β, when x_0 is standard normal

which are the DDPM's (Ho et al., arXiv 2006.11239, eq. 7) divided by √ᾱ and ᾱ of the level that the step goes to.
"""

from torch import Tensor

from ditmoe.sampling.integrators.flow import Drawn, NoiseSource, Schedule, own_schedule
from ditmoe.sampling.network.denoiser import Denoiser, column


def ancestral(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    schedule: Schedule = own_schedule,
) -> Drawn:
    """The ancestral sampler; `steps` evaluations.

    log variance = v·log β + (1 − v)·log β̃ with the learned share v (Nichol & Dhariwal, arXiv 2102.09672, eq. 15);
    β̃ where the network has learned none. The published sampler on DDPM's own schedule, without clipping of x_0.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0.
        label_B: classes.
        noise: asked for steps 0 … steps − 2; the last step adds none.
    """
    before = denoiser.nfe
    sigma_BN = schedule(denoiser, sigma_B, steps)
    for step in range(steps):
        now_B, next_B = sigma_BN[:, step], sigma_BN[:, step + 1]
        x0_BCHW, share_BCHW = denoiser.denoise(x_BCHW, now_B, label_B)
        ratio_B = (next_B / now_B).square()
        x_BCHW = x0_BCHW + column(ratio_B, x_BCHW) * (x_BCHW - x0_BCHW)
        if step == steps - 1:
            break
        deviation = column(next_B * (1 - ratio_B).clamp(min=0).sqrt(), x_BCHW)
        if share_BCHW is not None:
            beta_over_posterior_B = (1 + next_B.square()) / (ratio_B * (1 + now_B.square()))
            deviation = deviation * (0.5 * share_BCHW * column(beta_over_posterior_B.log(), x_BCHW)).exp()
        x_BCHW = x_BCHW + deviation * noise(step)
    return Drawn(x_BCHW, denoiser.nfe - before)


def ddim(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    steps: int,
    noise: NoiseSource,
    *,
    eta: float = 0.0,
    schedule: Schedule = own_schedule,
) -> Drawn:
    """DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16); `steps` evaluations.

    At η = 0 it is deterministic and the same as Euler steps of the probability flow; at η = 1 it is the ancestral
    sampler with variance β̃.

    Args:
        x_BCHW: noisy images, float32.
        sigma_B: their noise levels, > 0.
        label_B: classes.
        noise: asked for steps 0 … steps − 2 when η > 0.
        eta: share of the ancestral sampler's fresh noise.
    """
    before = denoiser.nfe
    sigma_BN = schedule(denoiser, sigma_B, steps)
    for step in range(steps):
        now_B, next_B = sigma_BN[:, step], sigma_BN[:, step + 1]
        x0_BCHW = denoiser(x_BCHW, now_B, label_B)
        fresh_B = eta * next_B * (1 - (next_B / now_B).square()).clamp(min=0).sqrt()
        kept_B = (next_B.square() - fresh_B.square()).sqrt()
        x_BCHW = x0_BCHW + column(kept_B / now_B, x_BCHW) * (x_BCHW - x0_BCHW)
        if eta > 0 and step < steps - 1:
            x_BCHW = x_BCHW + column(fresh_B, x_BCHW) * noise(step)
    return Drawn(x_BCHW, denoiser.nfe - before)
