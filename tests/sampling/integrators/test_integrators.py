"""Integrators on data with a known denoiser: order of convergence, what they reach, what they cost."""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ditmoe.model.schedule import DdpmSchedule
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.integrators.ddpm import ancestral, ddim
from ditmoe.sampling.integrators.flow import Drawn, NoiseSource, euler, heun, karras_schedule, own_schedule
from ditmoe.sampling.integrators.multistep import dpm_solver
from ditmoe.sampling.network.denoiser import DdpmDenoiser, FlowDenoiser
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import IntegratorName
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, StreamNoise

ONE_GAUSSIAN = GaussianMixture.of([[0.7]], [0.5], [1])
TWO_DIMS = GaussianMixture.of([[-1, 0], [1, 0.5], [0, -1]], [0.3, 0.2, 0.4], [1, 2, 3])
STANDARD_NORMAL = GaussianMixture.of([[0.0]], [1.0], [1])

Run = Callable[[MixtureDenoiser, Tensor, Tensor, int], Drawn]


def labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


def many_ancestral(denoiser: MixtureDenoiser, x: Tensor, sigma: Tensor, steps: int) -> Tensor:
    """The ancestral sampler with noise from one generator, which is quicker for thousands of samples."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda step: torch.randn(x.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return ancestral(denoiser, x, sigma, labels(x), steps, randn).x_BCHW


def noise_for(x: Tensor) -> StreamNoise:
    return StreamNoise(range(len(x)), x.shape[1:])


RUNS: dict[str, Run] = {
    "euler": lambda d, x, s, n: euler(d, x, s, labels(x), n),
    "euler on the EDM schedule": lambda d, x, s, n: euler(d, x, s, labels(x), n, schedule=karras_schedule),
    "heun": lambda d, x, s, n: heun(d, x, s, labels(x), n),
    "heun on the own schedule": lambda d, x, s, n: heun(d, x, s, labels(x), n, schedule=own_schedule),
    "dpm-solver++": lambda d, x, s, n: dpm_solver(d, x, s, labels(x), n),
    "ddim": lambda d, x, s, n: ddim(d, x, s, labels(x), n, noise_for(x)),
    "ddim η=½": lambda d, x, s, n: ddim(d, x, s, labels(x), n, noise_for(x), eta=0.5),
    "ancestral": lambda d, x, s, n: ancestral(d, x, s, labels(x), n, noise_for(x)),
}
DETERMINISTIC = [name for name in RUNS if name not in ("ancestral", "ddim η=½")]


def start(dims: int, count: int = 8, sigma: float = 20.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, dims, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * sigma
    return x, torch.full((count,), sigma, dtype=torch.float64)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_on_a_gaussian(name):
    # The flow of N(μ, s²) is known: x − μ shrinks with the deviation of p_σ.
    x, sigma = start(1)
    exact = 0.7 + (x - 0.7) * 0.5 / math.sqrt(0.25 + 20.0**2)
    denoiser = MixtureDenoiser(ONE_GAUSSIAN, sigma_min=1e-4)
    errors = [(RUNS[name](denoiser, x, sigma, n).x_BCHW - exact).abs().max().item() for n in (64, 128, 256)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(2 if "heun" in name or "solver" in name else 1, abs=0.15), (errors, orders)


@cache
def mixture_exact() -> Tensor:
    x, sigma = start(2)
    return heun(MixtureDenoiser(TWO_DIMS, sigma_min=1e-4), x, sigma, labels(x), 4096).x_BCHW


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_on_a_mixture(name):
    x, sigma = start(2)
    denoiser = MixtureDenoiser(TWO_DIMS, sigma_min=1e-4)
    errors = [
        (RUNS[name](denoiser, x, sigma, n).x_BCHW - mixture_exact()).abs().mean().item() for n in (128, 256, 512)
    ]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(2 if "heun" in name or "solver" in name else 1, abs=0.3), (errors, orders)


def test_edm_schedule():
    sigma = torch.tensor([80.0, 3.0], dtype=torch.float64)
    levels = karras_schedule(MixtureDenoiser(TWO_DIMS), sigma, 18)
    assert levels.shape == (2, 19)
    assert levels[:, 0].tolist() == [80.0, 3.0] and levels[:, -1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(levels[:, -2], torch.full((2,), 0.002, dtype=torch.float64))
    assert (levels.diff(dim=1) < 0).all()
    assert levels[0, 1].item() == pytest.approx((80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7)


def test_ddim_is_euler_and_at_eta_1_ancestral():
    x, sigma = start(2)
    denoiser = MixtureDenoiser(TWO_DIMS)
    euler_x = euler(denoiser, x, sigma, labels(x), 9).x_BCHW
    torch.testing.assert_close(RUNS["ddim"](denoiser, x, sigma, 9).x_BCHW, euler_x)
    full = ddim(denoiser, x, sigma, labels(x), 9, noise_for(x), eta=1.0).x_BCHW
    torch.testing.assert_close(full, RUNS["ancestral"](denoiser, x, sigma, 9).x_BCHW)


def chain_variance(deviation: float, sigma: float, steps: int) -> float:
    """Variance of the ancestral sampler with β̃ on N(0, s²) data, which is linear in x, started exactly."""
    levels = own_schedule(MixtureDenoiser(STANDARD_NORMAL), torch.tensor([sigma]), steps)[0].tolist()
    variance = deviation**2 + sigma**2
    for now, after in pairwise(levels):
        gain = deviation**2 / (deviation**2 + now**2)
        ratio = (after / now) ** 2
        variance = variance * (gain + ratio * (1 - gain)) ** 2 + after**2 * (1 - ratio)
    return variance


def test_ancestral_reaches_the_gaussian():
    count, steps = 20_000, 100
    x = ONE_GAUSSIAN.sample(count, sigma=20.0).view(-1, 1, 1, 1)
    sigma = torch.full((count,), 20.0, dtype=torch.float64)
    drawn = many_ancestral(MixtureDenoiser(ONE_GAUSSIAN), x, sigma, steps).flatten()
    expected = chain_variance(0.5, 20.0, steps)
    assert drawn.mean().item() == pytest.approx(0.7, abs=4 * 0.5 / math.sqrt(count))
    assert drawn.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / count))
    # The discretisation's own bias falls with the steps, and that of a missing ½ would not hide in it.
    assert abs(chain_variance(0.5, 20.0, 1000) - 0.25) < 0.2 * abs(expected - 0.25) < 0.02 * 0.25


def test_ancestral_reaches_the_mixture():
    count = 10_000
    x = TWO_DIMS.sample(count, sigma=20.0).view(-1, 2, 1, 1)
    sigma = torch.full((count,), 20.0, dtype=torch.float64)
    drawn = many_ancestral(MixtureDenoiser(TWO_DIMS), x, sigma, 200).flatten(1)
    nearest = (drawn[:, None] - TWO_DIMS.means_KD).norm(dim=-1).argmin(1)
    truth = TWO_DIMS.sample(200_000, seed=1)
    expected = (truth[:, None] - TWO_DIMS.means_KD).norm(dim=-1).argmin(1).bincount() / 200_000
    assert torch.allclose(nearest.bincount() / count, expected, atol=4 * 0.5 / math.sqrt(count))
    assert torch.allclose(drawn.mean(0), truth.mean(0), atol=4 * 0.8 / math.sqrt(count))
    assert torch.allclose(drawn.T.cov(), truth.T.cov(), atol=0.03)


def test_the_larger_variance_is_exact_for_standard_normal_data():
    # β is the reverse step's variance for N(0, 1) data, so even few steps keep it: only the last, D(x), narrows.
    count, steps = 20_000, 6
    x = STANDARD_NORMAL.sample(count, sigma=20.0).view(-1, 1, 1, 1)
    sigma = torch.full((count,), 20.0, dtype=torch.float64)
    denoiser = MixtureDenoiser(STANDARD_NORMAL, variance_share=1.0)
    drawn = many_ancestral(denoiser, x, sigma, steps)
    last = own_schedule(denoiser, sigma[:1], steps)[0, -2].item()
    assert drawn.var().item() == pytest.approx(1 / (1 + last**2), rel=4 * math.sqrt(2 / count))


def predictor(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Some smooth network with 2 input channels and 4 output channels."""
    wave = torch.sin(2 * x + t.view(-1, 1, 1, 1) + label.view(-1, 1, 1, 1))
    return torch.cat((0.5 * x + 0.3 * wave, torch.cos(3 * wave)), dim=1)


def own_steps(name: IntegratorName, steps: int) -> SamplerConfig:
    return SamplerConfig(sampler=name, steps=steps, schedule="own")


def test_euler_is_the_published_flow_sampler():
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 2])
    z = noise
    for i in range(10, 0, -1):
        t = torch.full((3,), i / 10)
        z = z - 0.1 * predictor(z, t, label)[:, :2]
    drawn = draw(FlowDenoiser(predictor, 3), label, noise, lambda step: noise, own_steps("euler", 10)).x_BCHW
    torch.testing.assert_close(drawn, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 250])
def test_ancestral_is_the_published_ddpm_sampler(steps):
    noise, label = StreamNoise(range(3), (2, 4, 4)), torch.tensor([0, 1, 2])
    schedule = DdpmSchedule.linear().respaced(steps)
    initial = noise(-1)
    x = initial
    for i in range(steps - 1, -1, -1):
        prediction = predictor(x, schedule.timesteps[i].expand(3), label)
        epsilon, share = prediction[:, :2], (prediction[:, 2:] + 1) / 2
        alpha_bar = schedule.alphas_bar[i]
        x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        log_variance = share * schedule.betas[i].log() + (1 - share) * schedule.posterior_log_variance_clipped[i]
        x = schedule.posterior_mean_x0[i] * x0 + schedule.posterior_mean_xt[i] * x
        if i > 0:
            x = x + (0.5 * log_variance).exp() * noise(steps - 1 - i)
    drawn = draw(DdpmDenoiser(predictor, 3), label, initial, noise, own_steps("ddpm", steps)).x_BCHW
    torch.testing.assert_close(drawn, x, rtol=1e-6, atol=1e-6)


def test_ddim_is_the_published_one():
    steps, label = 20, torch.tensor([0, 1, 2])
    initial = StreamNoise(range(3), (2, 4, 4))(-1)
    schedule = DdpmSchedule.linear().respaced(steps)
    x = initial
    for i in range(steps - 1, -1, -1):
        epsilon = predictor(x, schedule.timesteps[i].expand(3), label)[:, :2]
        alpha_bar, previous = schedule.alphas_bar[i], schedule.alphas_bar_previous[i]
        x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        x = previous.sqrt() * x0 + (1 - previous).sqrt() * epsilon
    noise: NoiseSource = lambda step: pytest.fail("noise was asked for")  # noqa: E731
    for name in ("ddim", "euler"):
        drawn = draw(DdpmDenoiser(predictor, 3), label, initial, noise, own_steps(name, steps)).x_BCHW
        torch.testing.assert_close(drawn, x, rtol=1e-6, atol=1e-6)
