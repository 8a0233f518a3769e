"""The stochastic integrators on a Gaussian, where their distribution is known without drawing, and their parts."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ditmoe.sampling.integrators.flow import Drawn, NoiseSource, heun, karras_schedule, own_schedule
from ditmoe.sampling.integrators.stochastic import (
    euler_maruyama,
    heun_with_churn,
    langevin_step,
    reverse_diffusion,
)
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, StreamNoise

DEVIATION, SIGMA = 0.5, 20.0
CENTRED = GaussianMixture.of([[0.0]], [DEVIATION], [1])
WIDE = GaussianMixture.of([[0.0] * 64, [1.0] * 64], [0.5, 1.0], [1, 2])

Run = Callable[[MixtureDenoiser, Tensor, Tensor, Tensor, int, NoiseSource], Drawn]


def labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


def with_churn(
    denoiser: MixtureDenoiser, x: Tensor, sigma: Tensor, label: Tensor, steps: int, noise: NoiseSource
) -> Drawn:
    return heun_with_churn(denoiser, x, sigma, label, steps, noise, churn_noise=1.0)


RUNS: dict[str, Run] = {
    "reverse diffusion": reverse_diffusion,
    "Euler–Maruyama": euler_maruyama,
    "churn": with_churn,
}


def variance(run: Run, steps: int, fault: float = 1.0) -> float:
    """The exact variance of what an integrator makes of N(0, s² + σ²).

    On this data it is linear in what it starts from and in the noise of each step, all independent: the variance
    is the sum of the squares of their factors. Image 0 has the start alone, image k the noise of step k − 1 alone;
    `fault` is a wrong factor on the noise.
    """
    x = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = math.sqrt(DEVIATION**2 + SIGMA**2)

    def one_each(step: int) -> Tensor:
        noise = torch.zeros_like(x)
        noise[step + 1] = fault
        return noise

    sigma = torch.full((len(x),), SIGMA, dtype=torch.float64)
    denoiser = MixtureDenoiser(CENTRED, sigma_min=1e-3)
    return run(denoiser, x, sigma, labels(x), steps, one_each).x_BCHW.square().sum().item()


@pytest.mark.parametrize("name", ["reverse diffusion", "Euler–Maruyama"])
def test_weak_order_is_1(name):
    errors = [abs(variance(RUNS[name], steps) - DEVIATION**2) for steps in (200, 400, 800)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(1, abs=0.15), (errors, orders)


@pytest.mark.parametrize("name", RUNS)
def test_variance_is_reached_and_wrong_noise_is_not_forgiven(name):
    assert variance(RUNS[name], 800) == pytest.approx(DEVIATION**2, rel=0.02)
    for fault in (0.95, 1.05, math.sqrt(0.5), math.sqrt(2)):
        assert variance(RUNS[name], 800, fault) != pytest.approx(DEVIATION**2, rel=0.04)


@pytest.mark.parametrize("schedule", [karras_schedule, own_schedule])
def test_one_step_is_the_equation(schedule):
    x, sigma = (
        torch.full((3, 1, 1, 1), 2.0, dtype=torch.float64),
        torch.tensor([9.0, 3.0, 0.5], dtype=torch.float64),
    )
    noise, denoiser = StreamNoise(range(3), (1, 1, 1)), MixtureDenoiser(CENTRED)
    levels = schedule(denoiser, sigma, 2)
    now, after = (level.view(3, 1, 1, 1) for level in (levels[:, 0], levels[:, 1]))
    score = CENTRED.score(x.flatten(1), sigma).view(3, 1, 1, 1)
    steps = {  # variance of the forward process over the step, and what it is with the start's slope of σ²
        reverse_diffusion: now**2 - after**2,
        euler_maruyama: 2 * now * (now - after),
    }
    for integrator, added in steps.items():
        expected = x + added * score + added.sqrt() * noise(0)
        expected = denoiser(expected, levels[:, 1], labels(x))
        drawn = integrator(denoiser, x, sigma, labels(x), 2, noise, schedule=schedule).x_BCHW
        torch.testing.assert_close(drawn, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("integrator", [reverse_diffusion, euler_maruyama])
def test_no_noise_is_used_twice(integrator):
    x, asked = torch.ones(1, 1, 8, 8, dtype=torch.float64), []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return StreamNoise([0], (1, 8, 8))(step)

    integrator(MixtureDenoiser(WIDE), x, torch.tensor([9.0]).double(), labels(x), 5, noise, corrector_steps=2)
    assert asked == list(range(4 * 3))


def test_without_churn_it_is_heun():
    x, sigma = (
        torch.ones(4, 1, 1, 1, dtype=torch.float64),
        torch.tensor([9.0, 3.0, 0.5, 0.06], dtype=torch.float64),
    )
    never: NoiseSource = lambda step: pytest.fail("noise was asked for")  # noqa: E731
    expected = heun(MixtureDenoiser(CENTRED), x, sigma, labels(x), 12).x_BCHW
    for settings in ({"churn": 0.0}, {"churn_min": 10.0, "churn_max": 20.0}):
        drawn = heun_with_churn(MixtureDenoiser(CENTRED), x, sigma, labels(x), 12, never, **settings)
        assert torch.equal(drawn.x_BCHW, expected)


class Recorded(MixtureDenoiser):
    """Remembers the noise levels that it was asked for."""

    def denoise(self, x_BCHW, sigma_B, label_B):
        self.asked = [*getattr(self, "asked", []), sigma_B.tolist()]
        return super().denoise(x_BCHW, sigma_B, label_B)


@pytest.mark.parametrize(("steps", "growth"), [(18, math.sqrt(2) - 1), (1000, 80 / 1001)])
def test_churn_raises_sigma_between_its_bounds_only(steps, growth):
    x, sigma = torch.ones(2, 1, 1, 1, dtype=torch.float64), torch.tensor([30.0, 0.7], dtype=torch.float64)
    denoiser = Recorded(CENTRED)
    heun_with_churn(denoiser, x, sigma, labels(x), steps, StreamNoise(range(2), (1, 1, 1)))
    levels = karras_schedule(denoiser, sigma, steps)[:, :-1]
    inside = (levels >= 0.1) & (levels <= 2.0)
    assert inside.any(1).all() and not inside.all(1).any()
    expected = torch.where(inside, levels * (1 + growth), levels)
    torch.testing.assert_close(torch.tensor(denoiser.asked[::2], dtype=torch.float64).T, expected)


def test_langevin_step_is_the_published_one():
    x = WIDE.sample(5, sigma=2.0).view(5, 1, 8, 8)
    sigma, noise = (
        torch.tensor([2.0, 1.0, 0.1, 3.0, 2.0], dtype=torch.float64),
        StreamNoise(range(5), (1, 8, 8))(0),
    )
    moved = langevin_step(MixtureDenoiser(WIDE), x, sigma, labels(x), noise, snr=0.16)
    for image in range(5):
        score = WIDE.score(x[image : image + 1].flatten(1), sigma[image : image + 1]).view(1, 8, 8)
        length = 2 * (0.16 * math.sqrt(64) / score.norm()) ** 2
        expected = x[image] + length * score + (2 * length).sqrt() * noise[image]
        torch.testing.assert_close(moved[image], expected)


def many_dims(count: int, sigma: float, side: int = 8) -> tuple[GaussianMixture, Tensor, Tensor, NoiseSource]:
    """Gaussian data of side² dims, some of it noised, its noise levels, and fresh noise."""
    data = GaussianMixture.of([[0.7] * side**2], [DEVIATION], [1])
    x = data.sample(count, sigma=sigma).view(count, 1, side, side)
    random = torch.Generator().manual_seed(0)
    noise: NoiseSource = lambda step: torch.randn(x.shape, generator=random, dtype=torch.float64)  # noqa: E731
    return data, x, torch.full((count,), sigma, dtype=torch.float64), noise


@pytest.mark.timeout(60)
@pytest.mark.parametrize("snr", [0.16, 0.3])
def test_langevin_steps_settle_at_a_variance_that_is_known(snr):
    count, side = 50, 64
    data, x, sigma, noise = many_dims(count, sigma=0.5, side=side)
    x = 0.7 + 0.9 * (x - 0.7)  # too narrow at first
    for step in range(150):
        x = langevin_step(MixtureDenoiser(data), x, sigma, labels(x), noise(step), snr)
    error = math.sqrt(2 / (count * side**2))
    assert x.var().item() == pytest.approx((DEVIATION**2 + 0.5**2) * (1 + snr**2), rel=4 * error)
    assert snr**2 > 3 * error  # so that this is told from the variance itself


@pytest.mark.timeout(60)
@pytest.mark.parametrize("predictor", [reverse_diffusion, euler_maruyama])
def test_corrector_brings_too_few_steps_nearer_to_the_distribution(predictor):
    data, x, sigma, noise = many_dims(500, SIGMA)
    off = []
    for corrector_steps in (0, 1, 4):
        settings = {"corrector_steps": corrector_steps, "corrector_snr": 0.16}
        drawn = predictor(MixtureDenoiser(data), x, sigma, labels(x), 20, noise, **settings).x_BCHW
        assert drawn.mean().item() == pytest.approx(0.7, abs=0.02)
        off.append(abs(drawn.var().item() / DEVIATION**2 - 1))
    assert off[2] < 0.6 * off[0] and off[2] < off[1] < off[0], off
