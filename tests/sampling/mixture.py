"""Mixtures of Gaussians: data whose denoiser, score, noised density and posterior of σ are known in closed form.

K components, D dims (a sample's shape flattened), N noise levels. All float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe.model import randomness
from ditmoe.sampling.network.denoiser import Denoised, Denoiser, flow_grid


@dataclass(frozen=True)
class GaussianMixture:
    """p(x) = Σ w_k N(x; μ_k, s_k² I); noised by σ each component widens to √(s_k² + σ²)."""

    means_KD: Tensor
    deviations_K: Tensor
    weights_K: Tensor

    @classmethod
    def of(cls, means: Sequence[Sequence[float]], deviations: Sequence[float], weights: Sequence[float]):
        """From plain numbers; the weights are normalised."""
        weights_K = torch.tensor(weights, dtype=torch.float64)
        return cls(
            torch.tensor(means, dtype=torch.float64),
            torch.tensor(deviations, dtype=torch.float64),
            weights_K / weights_K.sum(),
        )

    def log_joint(self, x_BD: Tensor, sigma_B: Tensor) -> Tensor:
        """log w_k N(x; μ_k, (s_k² + σ²) I), `[B, K]`."""
        variance_BK = self.deviations_K.square() + sigma_B[:, None].square()
        distance_BK = (x_BD[:, None] - self.means_KD).square().sum(-1)
        normaliser_BK = 0.5 * x_BD.shape[1] * (2 * torch.pi * variance_BK).log()
        return self.weights_K.log() - 0.5 * distance_BK / variance_BK - normaliser_BK

    def log_density(self, x_BD: Tensor, sigma_B: Tensor) -> Tensor:
        """log p_σ(x), `[B]`."""
        return self.log_joint(x_BD, sigma_B).logsumexp(1)

    def denoise(self, x_BD: Tensor, sigma_B: Tensor) -> Tensor:
        """E[x_0 | x, σ], `[B, D]`."""
        share_BK1 = self.log_joint(x_BD, sigma_B).softmax(1)[..., None]
        narrow_K1, wide_B11 = self.deviations_K.square()[:, None], sigma_B[:, None, None].square()
        given_BKD = (narrow_K1 * x_BD[:, None] + wide_B11 * self.means_KD) / (narrow_K1 + wide_B11)
        return (share_BK1 * given_BKD).sum(1)

    def score(self, x_BD: Tensor, sigma_B: Tensor) -> Tensor:
        """∇ log p_σ(x), `[B, D]`."""
        return (self.denoise(x_BD, sigma_B) - x_BD) / sigma_B[:, None].square()

    def sigma_posterior(self, x_BD: Tensor, sigma_N: Tensor) -> Tensor:
        """p(σ | x) over levels that are equally likely beforehand, `[B, N]`."""
        log_BN = torch.stack([self.log_density(x_BD, sigma.expand(len(x_BD))) for sigma in sigma_N], dim=1)
        return log_BN.softmax(1)

    def sample(self, count: int, sigma: float = 0.0, seed: int = 0) -> Tensor:
        """Exact draws from p_σ, `[count, D]`."""
        random = randomness.generator(seed, "mixture", 0)
        component_B = torch.from_numpy(random.choice(len(self.weights_K), count, p=self.weights_K.numpy()))
        noise_BD = torch.from_numpy(random.standard_normal((count, self.means_KD.shape[1])))
        wide_B1 = (self.deviations_K[component_B].square() + sigma**2).sqrt()[:, None]
        return self.means_KD[component_B] + wide_B1 * noise_BD


class MixtureDenoiser(Denoiser):
    """The exact denoiser of a mixture, for samples of any shape; labels make no difference."""

    def __init__(
        self,
        mixture: GaussianMixture,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        variance_share: float | None = None,
    ) -> None:
        """`variance_share`: what a network with learned range would put out, the same everywhere."""
        super().__init__()
        self.mixture = mixture
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.sigma_prior = self.prior_deviation = sigma_max
        self.variance_share = variance_share

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        """The posterior mean."""
        self.nfe += 1
        self.network_evaluations += 1
        x0_BD = self.mixture.denoise(x_BCHW.double().flatten(1), sigma_B.double())
        x0_BCHW = x0_BD.view(x_BCHW.shape).to(x_BCHW.dtype)
        share = self.variance_share
        return Denoised(x0_BCHW, None if share is None else torch.full_like(x0_BCHW, share))

    def own_schedule(self, sigma_B: Tensor, steps: int) -> Tensor:
        """As a flow's."""
        return flow_grid(sigma_B, steps)


class StreamNoise:
    """A noise source as samplers use it: the noise of a sample depends on (seed, its number, step) alone."""

    def __init__(self, numbers: Sequence[int], shape: Sequence[int], seed: int = 0) -> None:
        self.numbers, self.shape, self.seed = numbers, shape, seed

    def __call__(self, step: int) -> Tensor:
        """Standard normal `[B, …]`, float64."""
        return randomness.normal(self.seed, f"test/{step}", self.numbers, self.shape).double()


class MixturePosterior:
    """The exact p(σ | x) of a mixture (a `NoisePosterior`), for samples of any shape; labels do not matter."""

    def __init__(self, mixture: GaussianMixture, level_N: Tensor) -> None:
        self.mixture, self.level_N = mixture, level_N

    def __call__(self, x_BCHW: Tensor, label_B: Tensor) -> Tensor:
        """Log probabilities, `[B, N]`."""
        mixture, x_BD = self.mixture, x_BCHW.double().flatten(1)
        variance_KN = mixture.deviations_K.square()[:, None] + self.level_N.square()
        distance_BK1 = (x_BD[:, None] - mixture.means_KD).square().sum(-1)[..., None]
        log_BKN = mixture.weights_K.log()[:, None] - 0.5 * (
            distance_BK1 / variance_KN + x_BD.shape[1] * variance_KN.log()
        )
        return log_BKN.logsumexp(1).log_softmax(1)
