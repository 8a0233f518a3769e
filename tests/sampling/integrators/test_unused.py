"""Settings that change nothing are named, and those that are named change nothing."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.integrators.samplers import SAMPLERS, integrate, start_of
from ditmoe.sampling.settings.config import PreviewSampler, SamplerConfig
from ditmoe.sampling.settings.names import SamplerName
from ditmoe.sampling.settings.unused import unused_settings
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser

FLOW = ObjectiveConfig(kind="rectified_flow")
IMAGES = 4
DATA = GaussianMixture(
    0.5 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.full((3,), 0.1, dtype=torch.float64),
    torch.full((3,), 1 / 3, dtype=torch.float64),
)
OTHER = {
    "churn": 3.0,
    "churn_min": 1.0,
    "churn_max": 0.5,
    "churn_noise": 1.1,
    "ddim_eta": 0.5,
    "tolerance": 1e-2,
    "diffusion_form": "decreasing",
    "diffusion_norm": 0.5,
    "last_step": "tweedie",
    "last_step_size": 0.1,
    "corrector_snr": 0.3,
}
"""Values that are not the defaults."""


def drawn(**settings: object) -> Tensor:
    config = SamplerConfig.model_validate(settings).resolved(FLOW)
    denoiser = MixtureDenoiser(DATA)
    denoiser.sigma_prior = denoiser.prior_deviation = 80.0
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(IMAGES, 3, 2, 2, generator=random, dtype=torch.float64)
    start = start_of(denoiser, config)
    return integrate(
        denoiser,
        noise * start.deviation,
        torch.full((IMAGES,), start.sigma, dtype=torch.float64),
        torch.zeros(IMAGES, dtype=torch.int64),
        lambda step: torch.randn(noise.shape, generator=random, dtype=torch.float64),
        config,
    ).x_BCHW


def unused(**settings: object) -> tuple[str, ...]:
    return unused_settings(SamplerConfig.model_validate(settings).resolved(FLOW))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "kar1"])
def test_what_is_named_changes_no_image_and_all_else_does(sampler: str) -> None:
    steps = {"sampler": sampler, "steps": 8, "schedule": "own" if sampler == "sit-sde" else "karras"}
    usual = drawn(**steps)
    for key, value in OTHER.items():
        named = [line.split(" = ")[0] for line in unused(**steps, **{key: value})]
        assert named == [key] * torch.equal(drawn(**steps, **{key: value}), usual), key


def test_what_it_goes_with() -> None:
    assert unused(sampler="euler", churn=40) == ("churn = 40 has no effect: it goes with the sampler kar2",)
    assert unused(cache_order=2) == ("cache_order = 2 has no effect: it goes with a cache_interval above 1",)
    assert unused(cfg_sigma_max=2.5, cfg_channels=3) == (
        "cfg_channels = 3 has no effect: it goes with a cfg_scale other than 1",
        "cfg_sigma_max = 2.5 has no effect: it goes with a cfg_scale other than 1",
    )
    assert unused(sampler="sit-sde", schedule="karras", last_step_size=0.1) == (
        "last_step_size = 0.1 has no effect: it goes with the schedule own",
    )
    for settings in (
        {"cache_order": 2, "cache_interval": 2},
        {"cfg_sigma_max": 2.5, "cfg_channels": 3, "cfg_scale": 2},
        {"sampler": "dlg:euler", "churn": 40},  # its chains start with kar2
        {"sampler": "rk45", "steps": 9, "schedule": "karras"},
    ):
        assert unused(**settings) == (), settings
    assert unused(sampler="dlg:euler", churn=40, dlg={"initial": "heun"}) != ()


def test_defaults_are_never_named() -> None:
    for sampler in get_args(SamplerName):
        assert unused(sampler=sampler) == ()
    assert unused_settings(PreviewSampler().resolved(FLOW)) == ()
    previews = PreviewSampler(sampler="heun", churn=40).resolved(FLOW)
    assert unused_settings(previews) == ("churn = 40 has no effect: it goes with the sampler kar2",)
