"""Names that a user may give, apart from what imports torch, so that the command's help answers at once."""

from typing import Final, Literal

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
SAMPLE_STEPS: Final = 50
"""Of `ditmoe sample` and `Model.sample`; evaluations take the 250 of papers."""

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
