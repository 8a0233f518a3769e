"""The DDPM noise schedule: 1000 linear steps, and its respacing (Nichol & Dhariwal, arXiv 2102.09672)."""

from dataclasses import dataclass

import torch
from torch import Tensor

DDPM_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 2e-2


def evenly_spaced(last: Tensor, count: int) -> Tensor:
    """0, …, `last` in `count` equal strides as the published respacing takes them, float64 `[..., count]`.

    It adds the stride up, step by step; a product i·stride would round to another timestep in 278 of 999 counts.
    A single one is 0.
    """
    stride = last.double() / max(count - 1, 1)
    at = torch.zeros_like(stride)
    found = [at]
    for _ in range(count - 1):
        at = at + stride
        found.append(at)
    return torch.stack(found, -1)


@dataclass(frozen=True)
class DdpmSchedule:
    """The tables of a chain of `len(betas)` steps, float64, one entry per step (Ho et al., arXiv 2006.11239)."""

    betas: Tensor
    """β of each step."""
    timesteps: Tensor
    """The network's timestep (0…999) of each step, int64."""

    @classmethod
    def linear(cls, steps: int = DDPM_STEPS) -> "DdpmSchedule":
        """β from 1e-4 to 2e-2 in equal steps."""
        betas = torch.linspace(BETA_FIRST, BETA_LAST, steps, dtype=torch.float64)
        return cls(betas, torch.arange(steps))

    def respaced(self, count: int) -> "DdpmSchedule":
        """A chain of `count` of these steps, the published choice of them, with the same ᾱ at each.

        Raises:
            ValueError: `count` is not between 1 and the number of steps.
        """
        steps = len(self.betas)
        if not 1 <= count <= steps:
            raise ValueError(f"a chain of {steps} steps cannot be respaced to {count}")
        kept = evenly_spaced(torch.tensor(steps - 1.0, dtype=torch.float64), count).round().long()
        alphas_bar = self.alphas_bar[kept]
        previous = torch.cat((torch.ones(1, dtype=torch.float64), alphas_bar[:-1]))
        return DdpmSchedule(1 - alphas_bar / previous, self.timesteps[kept])

    @property
    def alphas_bar(self) -> Tensor:
        """ᾱ_t = Π (1 − β)."""
        return (1 - self.betas).cumprod(0)

    @property
    def alphas_bar_previous(self) -> Tensor:
        """ᾱ_{t−1}, with 1 before the first step."""
        return torch.cat((torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]))

    @property
    def posterior_variance(self) -> Tensor:
        """β̃_t, the variance of q(x_{t−1} | x_t, x_0); zero at the first step."""
        return self.betas * (1 - self.alphas_bar_previous) / (1 - self.alphas_bar)

    @property
    def posterior_log_variance_clipped(self) -> Tensor:
        """log β̃_t, with the first entry (log 0) replaced by the second, or by log β for one step."""
        variance = self.posterior_variance
        first = variance[1:2] if len(variance) > 1 else self.betas[:1]
        return torch.cat((first, variance[1:])).log()

    @property
    def posterior_mean_x0(self) -> Tensor:
        """Coefficient of x_0 in the mean of q(x_{t−1} | x_t, x_0)."""
        return self.betas * self.alphas_bar_previous.sqrt() / (1 - self.alphas_bar)

    @property
    def posterior_mean_xt(self) -> Tensor:
        """Coefficient of x_t in the mean of q(x_{t−1} | x_t, x_0)."""
        return (1 - self.alphas_bar_previous) * (1 - self.betas).sqrt() / (1 - self.alphas_bar)
