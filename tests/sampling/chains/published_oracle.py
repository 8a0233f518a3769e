"""The published chain (DMCMC, arXiv 2209.14593) written out from its equations, in its own units.

Images lie in 0…1, not in −1…1: so everything here is half as wide as in the chains that are compared with it. One
chain at a time, one number after the other, nothing shared with them but the random numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from tests.sampling.mixture import GaussianMixture

SIGMA_MIN, SIGMA_MAX = 0.01, 50.0
LEVELS = [SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** (i / 59) for i in range(60)]
ETA, N_SKIP = 0.05, 4
INITIAL_LEVELS, INITIAL_NOISE = 20, 0.5
BURN_IN = [0.5] * 10 + [ETA] * 10
RHO, S_CHURN, S_TMIN, S_TMAX, S_NOISE = 7, 80, 0.05, 1.0, 1.007

Noise = Callable[[str], Tensor]
"""Name of a draw → standard normal, as an image."""
Finish = Callable[["PublishedChain", Tensor, float, str], Tensor]


@dataclass
class PublishedChain:
    """One chain on a mixture in 0…1, of which the score and the likeliest level are known."""

    mixture: GaussianMixture
    noise: Noise
    steps: int = 0

    def score(self, x: Tensor, sigma: float) -> Tensor:
        return self.mixture.score(x.view(1, -1), torch.tensor([sigma], dtype=torch.float64)).view(x.shape)

    def likeliest(self, x: Tensor) -> float:
        """argmax of p(σ | x) ∝ p_σ(x), all levels being equally likely beforehand."""
        every = torch.tensor(LEVELS, dtype=torch.float64)
        return LEVELS[int(self.mixture.log_density(x.view(1, -1).expand(len(LEVELS), -1), every).argmax())]

    def step(self, x: Tensor, sigma: float, eta: float) -> tuple[Tensor, float]:
        """x given σ by Langevin dynamics, then σ given x."""
        z = self.noise(f"chain/noise at {self.steps}")
        x = x + 0.5 * eta * self.score(x, sigma) + math.sqrt(eta) * z
        self.steps += 1
        return x, self.likeliest(x)

    def start(self) -> tuple[Tensor, float]:
        # Around the middle of the range, as here. Published noise is centred at black, a hundredth of σ_max off.
        x = 0.5 + SIGMA_MAX * self.noise("chain/start 0 at 0")
        x = kar2(self, x, SIGMA_MAX, "chain/initial", levels=INITIAL_LEVELS)
        x = x + INITIAL_NOISE * self.noise("chain/start 1 at 0")
        sigma = self.likeliest(x)
        for eta in BURN_IN:
            x, sigma = self.step(x, sigma, eta)
        return x, sigma

    def stretch(self, x: Tensor, sigma: float) -> tuple[Tensor, float, Tensor, float, list[float]]:
        """(x, σ) after n_skip steps; the (x, σ) to denoise; σ after each step."""
        x_min, sigma_min, trace = x, sigma, []
        for _ in range(N_SKIP):
            x, sigma = self.step(x, sigma, ETA)
            trace.append(sigma)
            if sigma < sigma_min:
                x_min, sigma_min = x, sigma
        return x, sigma, x_min, sigma_min, trace

    def tweedie(self, x: Tensor) -> Tensor:
        return x + SIGMA_MIN**2 * self.score(x, SIGMA_MIN)


def karras(sigma: float, levels: int) -> list[float]:
    """N levels with 0 among them (EDM, eq. 5)."""
    first, last = sigma ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(first + i / (levels - 2) * (last - first)) ** RHO for i in range(levels - 1)] + [0.0]


def kar2(
    chain: PublishedChain, x: Tensor, sigma: float, purpose: str, levels: int = 6, churn: float = S_CHURN
) -> Tensor:
    """EDM, Algorithm 2, with S_churn divided by the number of levels."""
    t = karras(sigma, levels)
    step = chain.steps
    for i in range(levels - 1):
        growth = min(churn / levels, math.sqrt(2) - 1) if S_TMIN <= t[i] <= S_TMAX else 0.0
        grown = t[i] * (1 + growth)
        if growth:
            x = x + math.sqrt(grown**2 - t[i] ** 2) * S_NOISE * chain.noise(f"{purpose} {i} at {step}")
        slope = -grown * chain.score(x, grown)
        ahead = x + (t[i + 1] - grown) * slope
        if t[i + 1] > 0:
            slope_ahead = -t[i + 1] * chain.score(ahead, t[i + 1])
            ahead = x + (t[i + 1] - grown) * 0.5 * (slope + slope_ahead)
        x = ahead
    return x


def kar1(chain: PublishedChain, x: Tensor, sigma: float, purpose: str) -> Tensor:
    """The same without fresh noise."""
    return kar2(chain, x, sigma, purpose, churn=0.0)


def rk45(chain: PublishedChain, x: Tensor, sigma: float, purpose: str) -> Tensor:
    """The probability flow from t = 1 to 0 with σ(t) = σ_min·(σ/σ_min)^t, to σ_min and no farther."""
    if sigma <= SIGMA_MIN:
        return x
    span = math.log(sigma / SIGMA_MIN)

    def slope(t: float, flat: Tensor) -> Tensor:
        at = SIGMA_MIN * math.exp(t * span)  # dx/dt = −½·d(σ²)/dt·s = −σ²·span·s
        return -(at**2) * span * chain.score(torch.as_tensor(flat), at).numpy()

    solved = solve_ivp(slope, (1, 0), x.flatten().numpy(), method="RK45", rtol=1e-8, atol=1e-8)
    return torch.from_numpy(solved.y[:, -1]).view(x.shape)
