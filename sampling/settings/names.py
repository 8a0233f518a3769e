"""Names that a user may give, apart from what imports torch, so that the command's help answers at once."""

from collections.abc import Mapping
from typing import Final, Literal, cast

IntegratorName = Literal[
    "ddpm",
    "ddim",
    "euler",
    "heun",
    "kar1",
    "kar2",
    "rk45",
    "reverse-diffusion",
    "euler-maruyama",
    "sit-sde",
    "dpm-solver++",
]
"""From pure noise, or from any noisy image, to an image."""
ChainName = Literal[
    "dlg:ddpm",
    "dlg:ddim",
    "dlg:euler",
    "dlg:heun",
    "dlg:kar1",
    "dlg:kar2",
    "dlg:rk45",
    "dlg:reverse-diffusion",
    "dlg:euler-maruyama",
    "dlg:sit-sde",
    "dlg:dpm-solver++",
]
"""Denoising Langevin Gibbs chains, whose states the integrator finishes."""
SamplerName = Literal[IntegratorName, ChainName]
ScheduleName = Literal["own", "karras"]
DiffusionForm = Literal["sigma", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "tweedie"]
ChainPreset = Literal["published", "velocity"]
LevelRule = Literal["argmax", "sample"]
StepRule = Literal["constant", "proportional", "exponential", "underdamped"]

CHAIN_PREFIX: Final = "dlg:"

SAMPLE_STEPS: Final[Mapping[IntegratorName, int]] = {
    "ddpm": 100,
    "ddim": 25,
    "euler": 25,
    "heun": 25,
    "kar1": 25,
    "kar2": 50,
    "rk45": 25,
    "reverse-diffusion": 100,
    "euler-maruyama": 100,
    "sit-sde": 25,
    "dpm-solver++": 25,
}
"""Steps of `ditmoe sample`, `Model.sample` and the service's images, where none are given: of 25, 50 and 100 the
fewest of which twice as many did not improve FID beyond its noise, or 100 (docs/sample.md). Evaluations take the
250 of papers. rk45 chooses its own."""


def sample_steps(sampler: SamplerName) -> int:
    """Steps of `SAMPLE_STEPS`; half as many finish the states of chains, which have less noise."""
    steps = SAMPLE_STEPS[cast(IntegratorName, sampler.removeprefix(CHAIN_PREFIX))]
    return -(-steps // 2) if sampler.startswith(CHAIN_PREFIX) else steps


OWN_SETTINGS: Final[Mapping[IntegratorName, tuple[str, ...]]] = {
    "kar2": ("churn", "churn_min", "churn_max", "churn_noise"),
    "ddim": ("ddim_eta",),
    "rk45": ("tolerance",),
    "sit-sde": ("diffusion_form", "diffusion_norm", "last_step", "last_step_size"),
}
"""Settings that one sampler alone takes."""

FeatureName = Literal["classifier", "inception", "dinov2"]
"""The network whose features images are compared by."""
ResizeName = Literal["pytorch-fid", "tensorflow"]
"""How images come to the size of Inception-v3."""
StatedNetwork = Literal["inception-tensorflow", "inception-pytorch-fid", "dinov2"]
"""What the user says that statistics in an npz file are of: the network, and how it got its images."""

NOT_FINITE: Final = (
    "guidance, or the weights, are beyond what the precision holds; try a smaller cfg_scale, or fp32"
)
"""Why images have NaN or infinity in them, and what helps."""
