"""Every sampler by its name: what it reaches, what it costs, and that an image depends on nothing but itself."""

import math
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.sampling.integrators.flow import Drawn, NoiseSource
from ditmoe.sampling.integrators.samplers import SAMPLERS, integrate, planned_nfe, start_of
from ditmoe.sampling.settings.config import SamplerConfig, sampler_from_options
from ditmoe.sampling.settings.names import IntegratorName, SamplerName
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, StreamNoise

FLOW = ObjectiveConfig(kind="rectified_flow")
FOUR_MODES = GaussianMixture.of([[3, 3], [-3, 3], [-3, -3], [3, -3]], [0.3, 0.4, 0.5, 0.6], [1, 2, 3, 4])
"""Modes so far apart that each sample's own is the nearest: their shares, means and variances are known."""
WORST = 4.5
"""Largest of the 20 standardised deviations that is taken for chance: 1 in 7000 runs exceeds it."""

CONFIGS: dict[str, SamplerConfig] = {name: SamplerConfig(sampler=name) for name in get_args(IntegratorName)} | {
    "ddim η=½": SamplerConfig(sampler="ddim", ddim_eta=0.5),
    "euler on EDM's schedule": SamplerConfig(sampler="euler", schedule="karras"),
    "dpm-solver++ on the own schedule": SamplerConfig(sampler="dpm-solver++", schedule="own"),
    "reverse-diffusion, corrected": SamplerConfig(sampler="reverse-diffusion", corrector_steps=1),
    "euler-maruyama, corrected twice": SamplerConfig(sampler="euler-maruyama", corrector_steps=2),
    "sit-sde, decreasing": SamplerConfig(sampler="sit-sde", diffusion_form="decreasing", last_step="tweedie"),
    "kar2 and Tweedie": SamplerConfig(sampler="kar2", tweedie=True),
    "rk45 and Tweedie": SamplerConfig(sampler="rk45", tweedie=True),
}
CONFIGS = {name: config.resolved(FLOW) for name, config in CONFIGS.items()}


def run(
    config: SamplerConfig, denoiser: MixtureDenoiser, x: Tensor, sigma: Tensor, noise: NoiseSource, steps: int
) -> Drawn:
    label = torch.zeros(len(x), dtype=torch.int64)
    return integrate(denoiser, x, sigma, label, noise, config.model_copy(update={"steps": steps}))


def quick_noise(x: Tensor, scale: float = 1.0) -> NoiseSource:
    """Noise from one generator, which is quicker for thousands of samples."""
    generator = torch.Generator().manual_seed(5)
    return lambda step: torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale


def deviations(drawn: Tensor) -> Tensor:
    """How far the share, mean and variance of each mode of `FOUR_MODES` are off, in standard errors, `[20]`."""
    x_BD = drawn.flatten(1)
    nearest_B = (x_BD[:, None] - FOUR_MODES.means_KD).norm(dim=-1).argmin(1)
    off = []
    for mode, (mean_D, deviation, weight) in enumerate(
        zip(FOUR_MODES.means_KD, FOUR_MODES.deviations_K, FOUR_MODES.weights_K, strict=True)
    ):
        own_BD = x_BD[nearest_B == mode]
        share = len(own_BD) / len(x_BD)
        off.append(((share - weight) / (weight * (1 - weight) / len(x_BD)).sqrt())[None])
        off.append((own_BD.mean(0) - mean_D) / (deviation / math.sqrt(len(own_BD))))
        off.append((own_BD.var(0) / deviation.square() - 1) / math.sqrt(2 / len(own_BD)))
    return torch.cat(off)


def worst_deviation(config: SamplerConfig, start: str, noise_scale: float = 1.0) -> float:
    """The largest deviation of 4000 images from the largest σ, or each from a σ of its own."""
    count = 4000
    if start == "the largest sigma":
        sigma = torch.full((count,), 40.0, dtype=torch.float64)
    else:
        random = torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        sigma = 0.001 * 40_000**random  # log-uniform, also below the smallest level
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = (FOUR_MODES.sample(count, seed=4) + sigma[:, None] * noise).view(count, 2, 1, 1)
    denoiser = MixtureDenoiser(FOUR_MODES, sigma_max=40.0)
    return deviations(run(config, denoiser, x, sigma, quick_noise(x, noise_scale), 300).x_BCHW).abs().max().item()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("start", ["the largest sigma", "a sigma of its own"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "correct" not in name and name != "kar1"])
def test_every_sampler_reaches_the_mixture(name, start):
    assert worst_deviation(CONFIGS[name], start) < WORST


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["reverse-diffusion", "euler-maruyama", "sit-sde", "kar2", "ddpm"])
def test_noise_that_is_a_sixth_too_small_is_noticed(name):
    """The power of the test above: with a deviation of 5/6 of the right one, the modes are too narrow."""
    assert worst_deviation(CONFIGS[name], "the largest sigma", noise_scale=5 / 6) > 1.2 * WORST


def one_of_each_sigma() -> tuple[Tensor, Tensor]:
    sigma = torch.tensor([30.0, 4.0, 0.5, 0.03, 0.001], dtype=torch.float64)  # the last lies below sigma_min
    x = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * (1 + sigma.view(-1, 1, 1, 1)), sigma


@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_is_the_same_alone_and_in_any_batch(name):
    x, sigma = one_of_each_sigma()
    together = run(CONFIGS[name], MixtureDenoiser(FOUR_MODES), x, sigma, StreamNoise(range(5), (2, 1, 1)), 12)
    assert together.x_BCHW.isfinite().all()
    for rows in ([0], [4], [3, 1], [2, 2, 4]):
        some = run(
            CONFIGS[name], MixtureDenoiser(FOUR_MODES), x[rows], sigma[rows], StreamNoise(rows, (2, 1, 1)), 12
        )
        torch.testing.assert_close(some.x_BCHW, together.x_BCHW[rows], rtol=1e-12, atol=1e-12)
        if together.nfe_B is not None:
            assert torch.equal(some.nfe_B, together.nfe_B[rows])


PER_IMAGE = {"heun": (2, -1), "kar1": (2, -1), "kar2": (2, -1), "kar2 and Tweedie": (2, 0)} | {
    "reverse-diffusion, corrected": (2, -1),
    "euler-maruyama, corrected twice": (3, -2),
}
"""Sampler → (a, b) of a·steps + b evaluations, as the papers have it; the others take one per step."""


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "rk45" not in name])
def test_evaluations_are_those_of_the_papers(name, steps):
    x, sigma = one_of_each_sigma()
    denoiser = MixtureDenoiser(FOUR_MODES)
    denoiser(x, sigma, torch.zeros(5, dtype=torch.int64))  # what was asked before does not count
    drawn = run(CONFIGS[name], denoiser, x, sigma, StreamNoise(range(5), (2, 1, 1)), steps)
    each, once = PER_IMAGE.get(name, (1, 0))
    assert drawn.nfe == denoiser.nfe - 1 == each * steps + once
    assert drawn.nfe_B is None
    assert planned_nfe(CONFIGS[name].model_copy(update={"steps": steps})) == drawn.nfe


def test_levels_of_kar1_as_its_paper_counts_them():
    # 2(N − 1) − 1 evaluations for N levels with zero among them: 20 levels are 19 steps and 37 evaluations.
    assert planned_nfe(SamplerConfig(sampler="kar1", steps=19)) == 2 * (20 - 1) - 1


def test_the_last_tweedie_step_is_the_denoiser_at_the_smallest_sigma():
    x, sigma = one_of_each_sigma()
    label = torch.zeros(5, dtype=torch.int64)
    plain = run(CONFIGS["kar2"], MixtureDenoiser(FOUR_MODES), x, sigma, StreamNoise(range(5), (2, 1, 1)), 6)
    after = run(
        CONFIGS["kar2 and Tweedie"], MixtureDenoiser(FOUR_MODES), x, sigma, StreamNoise(range(5), (2, 1, 1)), 6
    )
    smallest = torch.tensor([0.002, 0.002, 0.002, 0.002, 0.001], dtype=torch.float64)
    assert torch.equal(after.x_BCHW, MixtureDenoiser(FOUR_MODES)(plain.x_BCHW, smallest, label))
    assert after.nfe == plain.nfe + 1


def test_names_schedules_and_where_they_start():
    assert set(SAMPLERS) == set(get_args(IntegratorName))
    assert set(get_args(SamplerName)) == set(SAMPLERS) | {f"dlg:{name}" for name in SAMPLERS}
    kar1, heun = (SamplerConfig(sampler=name, steps=9).resolved(FLOW) for name in ("kar1", "heun"))
    assert kar1 == heun  # one sampler under two names: the same images, in the same folder
    denoiser = MixtureDenoiser(FOUR_MODES)
    denoiser.sigma_prior, denoiser.prior_deviation = 1e6, 2e6
    own = {name for name, config in CONFIGS.items() if config.schedule == "own"}
    of_sit = {"sit-sde", "sit-sde, decreasing"}
    assert own == {"ddpm", "ddim", "ddim η=½", "euler", "dpm-solver++ on the own schedule"} | of_sit
    for name, config in CONFIGS.items():
        assert start_of(denoiser, config) == ((1e6, 2e6) if name in own else (80.0, 80.0))
    assert start_of(denoiser, SamplerConfig(sampler="kar2", schedule="own")) == (80.0, 80.0)


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match=r"^corrector_steps = 1 with sampler = heun: expected .*euler-maruyama$"):
        sampler_from_options(sampler="heun", corrector_steps=1)
    with pytest.raises(UserError, match=r"^churn_min = 3 is above churn_max = 2$"):
        sampler_from_options(sampler="kar2", churn_min=3)
    with pytest.raises(UserError, match=r"--tolerance 0: "):
        sampler_from_options(sampler="rk45", tolerance=0)
    for wrong in ({"corrector_snr": 0}, {"churn": -1}, {"churn": math.inf}, {"churn_noise": math.nan}):
        with pytest.raises(ValidationError):
            SamplerConfig(**wrong)
