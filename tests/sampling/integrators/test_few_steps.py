"""Noise that few steps leave in images, on data whose denoiser is known, and the warnings that tell of it."""

import pytest
import torch

from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.integrators.few_steps import FEWEST, LARGEST_TOLERANCE, NOISE, noise_warnings
from ditmoe.sampling.integrators.samplers import SAMPLERS, integrate, start_of
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import IntegratorName, ScheduleName
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser

FLOW = ObjectiveConfig(kind="rectified_flow")
DIMS, MODES, OWN, IMAGES = 768, 10, 0.1, 16
MEANS = 0.5 * torch.randn(MODES, DIMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = GaussianMixture(
    MEANS, torch.full((MODES,), OWN, dtype=torch.float64), torch.full((MODES,), 1 / MODES, dtype=torch.float64)
)
WITHIN = torch.linalg.qr((MEANS - MEANS.mean(0)).T)[0]
"""An orthonormal basis of where the modes differ."""


def noise_left(config: SamplerConfig, from_chains: bool = False) -> float:
    """Deviation of what is in images beside the modes and the data's own deviation."""
    denoiser = MixtureDenoiser(DATA)
    denoiser.sigma_prior = denoiser.prior_deviation = 2.0**26  # a flow's, for its own schedule
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(IMAGES, 3, 16, 16, generator=random, dtype=torch.float64)
    start = start_of(denoiser, config)
    sigma, x = start.sigma, noise * start.deviation
    if from_chains:
        sigma, x = 2.0, DATA.sample(IMAGES, seed=2).view_as(noise) + 2 * noise
    drawn = integrate(
        denoiser,
        x,
        torch.full((IMAGES,), sigma, dtype=torch.float64),
        torch.zeros(IMAGES, dtype=torch.int64),
        lambda step: torch.randn(x.shape, generator=random, dtype=torch.float64),
        config,
    ).x_BCHW
    beside_BD = drawn.flatten(1) - MEANS.mean(0)
    beside_BD = beside_BD - beside_BD @ WITHIN @ WITHIN.T
    variance = beside_BD.square().sum(1).mean().item() / (DIMS - MODES + 1)
    return max(0.0, variance - OWN**2) ** 0.5


def config_of(name: IntegratorName, schedule: ScheduleName, steps: int) -> SamplerConfig:
    return SamplerConfig(sampler=name, steps=steps, schedule=schedule)


@pytest.mark.parametrize("from_chains", [False, True], ids=["pure noise", "chains"])
@pytest.mark.parametrize("cell", FEWEST, ids=" ".join)
def test_noise_ends_at_the_steps_that_are_named(cell, from_chains):
    fewest = FEWEST[cell][from_chains]
    for steps in (fewest, fewest + 1, fewest + 3, 2 * fewest):
        assert noise_left(config_of(*cell, steps), from_chains) <= NOISE, steps
    if fewest > 1:
        assert noise_left(config_of(*cell, fewest - 1), from_chains) > NOISE
    assert noise_left(config_of(*cell, 1), from_chains) <= NOISE


@pytest.mark.parametrize("schedule", ["own", "karras"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("kar1", "rk45")])
def test_the_others_leave_none_at_any_number_of_steps(name, schedule):
    if (name, schedule) in FEWEST:
        return
    for steps in (1, 2, 3, 4, 6, 9):
        assert noise_left(config_of(name, schedule, steps)) <= NOISE, steps


def test_noise_of_a_large_tolerance():
    at = {
        tolerance: noise_left(SamplerConfig(sampler="rk45", schedule="karras", tolerance=tolerance))
        for tolerance in (0.9, 2 * LARGEST_TOLERANCE, LARGEST_TOLERANCE)
    }
    assert at[0.9] > 1 and at[2 * LARGEST_TOLERANCE] > NOISE >= at[LARGEST_TOLERANCE]


def said(**settings: object) -> tuple[str, ...]:
    return noise_warnings(SamplerConfig.model_validate(settings).resolved(FLOW))


def test_warnings():
    assert said(sampler="kar1", steps=3) == (
        "heun with 3 steps on the karras schedule leaves noise in images: expected at least 10 steps",
    )
    assert "dlg:euler-maruyama with 2 steps" in said(sampler="dlg:euler-maruyama", steps=2)[0]
    assert said(sampler="rk45", tolerance=0.1) == (
        "rk45 with tolerance 0.1 leaves noise in images: expected at most 0.05",
    )
    quiet = [{"sampler": "heun", "steps": 10}, {"sampler": "dlg:heun", "steps": 5}, {"sampler": "rk45"}]
    quiet += [{"sampler": name, "steps": 2} for name in ("euler", "ddim", "ddpm", "dpm-solver++")]
    # One step takes the mean of what an image may be: a blur, which a chain's state is near enough for.
    quiet += [{"sampler": name, "steps": 1} for name in ("heun", "dlg:heun", "dlg:reverse-diffusion")]
    for settings in quiet:
        assert said(**settings) == (), settings
