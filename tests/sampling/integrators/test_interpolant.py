"""SiT's SDE against a plain program of its equations, and what it tends to as its steps grow."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.integrators.flow import euler, levels
from ditmoe.sampling.integrators.interpolant import interpolant_schedule, interpolant_sde
from ditmoe.sampling.integrators.samplers import integrate, schedule_of, start_of
from ditmoe.sampling.network.denoiser import FlowDenoiser
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, StreamNoise

MEAN, DEVIATION = 0.7, 0.3
SHAPE = (3, 2, 2, 2)
FORMS: dict[str, Callable[[float, float], float]] = {
    "sigma": lambda t, norm: norm * (1 - t),
    "decreasing": lambda t, norm: (norm * math.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t, norm: norm * math.sin(math.pi * t) ** 2,
}


def velocity(z: Tensor, t: float) -> Tensor:
    """E[x − ε | z] with z = t·x + (1 − t)·ε for data of N(m, s²)."""
    slope = (t * DEVIATION**2 - (1 - t)) / (t**2 * DEVIATION**2 + (1 - t) ** 2)
    return MEAN + slope * (z - t * MEAN)


def plain(z: Tensor, noise: StreamNoise, steps: int, form: str, norm: float, mean: bool, last: float) -> Tensor:
    """SiT's SDE as its paper has it, in z and t from 0 to 1: drift v + w·s, noise √(2w), its own last step."""

    def drift(z: Tensor, t: float) -> Tensor:
        score = (t * velocity(z, t) - z) / (1 - t)  # eq. 9 on the linear path
        return velocity(z, t) + FORMS[form](t, norm) * score

    times = [step * (1 - last) / (steps - 1) for step in range(steps)]
    for number, (t, t_next) in enumerate(pairwise(times)):
        moved = z + drift(z, t) * (t_next - t)
        z = moved + math.sqrt(2 * FORMS[form](t, norm) * (t_next - t)) * noise(number)
    t = times[-1]
    return z + (drift(z, t) if mean else velocity(z, t)) * last


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("norm", "last_step", "last"), [(1.0, "mean", 0.04), (0.5, "tweedie", 0.1)])
@pytest.mark.parametrize("steps", [2, 7, 250])
def test_it_is_the_published_sampler(form: str, norm: float, last_step: str, last: float, steps: int) -> None:
    def ours(z: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        each = [-velocity(image.double(), 1 - float(t)) for image, t in zip(z, t_B, strict=True)]
        return torch.stack(each).to(z.dtype)

    config = SamplerConfig.model_validate(
        {
            "sampler": "sit-sde",
            "steps": steps,
            "diffusion_form": form,
            "diffusion_norm": norm,
            "last_step": last_step,
            "last_step_size": last,
        }
    ).resolved(ObjectiveConfig())
    denoiser = FlowDenoiser(ours, null_label=1)
    start = start_of(denoiser, config)
    assert start.sigma == denoiser.sigma_prior
    noise = StreamNoise(range(SHAPE[0]), SHAPE[1:])
    begin = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma_B = torch.full((SHAPE[0],), start.sigma, dtype=torch.float64)
    label_B = torch.zeros(SHAPE[0], dtype=torch.int64)
    drawn = integrate(denoiser, (begin * start.deviation).float(), sigma_B, label_B, noise, config)
    expected = plain(begin, noise, steps, form, norm, last_step == "mean", last)
    torch.testing.assert_close(drawn.x_BCHW.double(), expected, rtol=1e-5, atol=1e-5)
    assert drawn.nfe == steps


def test_its_times_are_sits() -> None:
    sigma_B = torch.tensor([2.0**26, 0.5, 0.02], dtype=torch.float64)
    sigma_BN = interpolant_schedule(MixtureDenoiser(GaussianMixture.of([[0.0]], [1.0], [1])), sigma_B, 5)
    t_BN = 1 / (1 + sigma_BN)
    assert torch.equal(sigma_BN[:, 0], sigma_B) and torch.equal(sigma_BN[:, -1], torch.zeros(3).double())
    expected = torch.tensor([0, 0.24, 0.48, 0.72, 0.96, 1.0], dtype=torch.float64)
    torch.testing.assert_close(t_BN[0], expected, rtol=0, atol=2e-8)
    torch.testing.assert_close(t_BN[1, 1:-1].diff(), torch.full((3,), (0.96 - 2 / 3) / 4).double())
    # An image that starts within the last step takes five equal ones.
    torch.testing.assert_close(t_BN[2].diff(), torch.full((5,), (0.02 / 1.02) / 5).double())


def test_without_diffusion_it_is_the_ode() -> None:
    data = GaussianMixture.of([[0.0] * 4, [1.0] * 4], [0.5, 1.0], [1, 2])
    sigma_B = torch.tensor([50.0, 3.0, 0.01], dtype=torch.float64)
    x = torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 40
    arguments = (MixtureDenoiser(data), x, sigma_B, torch.zeros(3, dtype=torch.int64), 9)
    for last_step in ("mean", "tweedie"):
        found = interpolant_sde(*arguments, StreamNoise(range(3), (4, 1, 1)), norm=0.0, last_step=last_step)
        expected = euler(*arguments, schedule=interpolant_schedule)
        torch.testing.assert_close(found.x_BCHW, expected.x_BCHW, rtol=1e-12, atol=1e-12)


def variance(steps: int, form: str, fault: float = 1.0) -> float:
    """The exact variance of what is made of N(0, s²), by the factors of the start and of each noise."""
    x = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = math.hypot(DEVIATION, 80)

    def one_each(step: int) -> Tensor:
        noise = torch.zeros_like(x)
        noise[step + 1] = fault
        return noise

    denoiser = MixtureDenoiser(GaussianMixture.of([[0.0]], [DEVIATION], [1]), sigma_min=1e-3)
    sigma_B = torch.full((len(x),), 80.0, dtype=torch.float64)
    schedule = partial(interpolant_schedule, last_step_size=1e-3)
    label_B = torch.zeros(len(x), dtype=torch.int64)
    drawn = interpolant_sde(
        denoiser, x, sigma_B, label_B, steps, one_each, form=form, last_step="tweedie", schedule=schedule
    )
    return drawn.x_BCHW.square().sum().item()


@pytest.mark.parametrize("form", FORMS)
def test_weak_order_is_1_and_wrong_noise_is_not_forgiven(form: str) -> None:
    errors = [abs(variance(steps, form) - DEVIATION**2) for steps in (400, 800, 1600)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.2), errors
    assert variance(1600, form) == pytest.approx(DEVIATION**2, rel=0.02)
    for fault in (0.95, 1.05, math.sqrt(0.5), math.sqrt(2)):
        assert variance(1600, form, fault) != pytest.approx(DEVIATION**2, rel=0.04)


def test_its_settings_are_those_of_its_images_alone() -> None:
    plain_settings = SamplerConfig(sampler="euler").plain()
    assert not plain_settings.keys() & {"diffusion_form", "diffusion_norm", "last_step", "last_step_size"}
    assert SamplerConfig(sampler="euler", diffusion_norm=3.0, last_step="tweedie").plain() == plain_settings
    assert SamplerConfig(sampler="sit-sde").plain()["diffusion_form"] == "sigma"
    assert SamplerConfig(sampler="dlg:sit-sde").plain()["last_step_size"] == 0.04
    started = SamplerConfig.model_validate({"sampler": "dlg:heun", "dlg": {"initial": "sit-sde"}})
    assert started.plain()["last_step"] == "mean"


@pytest.mark.parametrize("schedule", ["own", "karras"])
def test_guidance_goes_by_its_own_levels(schedule: str) -> None:
    config = SamplerConfig.model_validate({"sampler": "sit-sde", "schedule": schedule}).resolved(ObjectiveConfig())
    denoiser = MixtureDenoiser(GaussianMixture.of([[0.0]], [1.0], [1]))
    found = schedule_of(config)(denoiser, torch.tensor([80.0], dtype=torch.float64), 4)
    assert (float(found[0, -2]) == pytest.approx(0.04 / 0.96)) == (schedule == "own")
    assert len(levels(found)) == 4
