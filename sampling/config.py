"""Configuration of a sampler, and of the preview grid drawn while training (`sample`)."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.settings import Settings

SamplerName = Literal["ddpm", "ddim", "euler", "heun"]
GridName = Literal["own", "karras"]


class SamplerConfig(Settings):
    """How an image is drawn from a network."""

    sampler: SamplerName | None = None
    """`ddpm` (ancestral), `ddim`, `euler`, `heun` (KAR1); null: `ddpm` for DDPM runs, `euler` for flow runs."""
    steps: int = Field(default=250, ge=1)
    """Steps of the integrator. One evaluation each, but heun takes 2·steps − 1."""
    grid: GridName | None = None
    """Noise levels that the steps go through. `own`: the objective's (flow: t uniform from 1 to 0; DDPM: the
    1000 timesteps, respaced). `karras`: the EDM grid, ρ = 7, from the largest to the smallest σ of the range.
    Null: `karras` for heun, `own` for the others."""
    ddim_eta: float = Field(default=0.0, ge=0, le=1)
    """Fresh noise of each DDIM step: 0 none, 1 as much as the ancestral sampler (with its smaller variance)."""
    cfg_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1: none."""
    cfg_channels: int | None = Field(default=None, ge=1)
    """Channels that guidance acts on; null: all. The published DDPM sampler guides only the first 3."""
    ddpm_timestep: Literal["interpolate", "nearest"] = "interpolate"
    """The timestep that a DDPM network gets at a σ between two of its 1000 levels: in between as log σ is, or
    that of the nearer level. No matter on the `own` grid, which uses the levels themselves."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's weights and arithmetic; the image between its evaluations is fp32 either way."""
    seed: int = Field(default=0, ge=0)
    """Image i is a function of (seed, i) alone."""

    def resolved(self, objective: ObjectiveConfig) -> "SamplerConfig":
        """The same with the sampler and the grid that the nulls stand for."""
        sampler = self.sampler or ("ddpm" if objective.kind == "ddpm" else "euler")
        grid = self.grid or ("karras" if sampler == "heun" else "own")
        return self.model_copy(update={"sampler": sampler, "grid": grid})


def sampler_from_options(**options: Any) -> SamplerConfig:
    """A sampler from a command's options, which are named as the fields are.

    Raises:
        UserError: naming every option that is out of range.
    """
    try:
        return SamplerConfig.model_validate(options)
    except ValidationError as error:
        problems = [
            f"--{str(problem['loc'][0]).replace('_', '-')} {problem['input']}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise UserError("\n".join(problems)) from error


class PreviewConfig(Settings):
    """The grid of fixed seeds and classes that training draws from the EMA."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two grids; null: none."""
    images: int = Field(default=16, ge=1)
    """Images of a grid; their classes go round all classes."""
    sampler: SamplerConfig = SamplerConfig(steps=50)
    """How they are drawn."""
