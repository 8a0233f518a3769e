"""Configuration of a sampler, and of the preview grid drawn while training (`sample`)."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import expected_name
from ditmoe.model.settings import LARGEST_SEED, MOST_STEPS, NO_UNIT, Settings, Unit, message_of
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.names import (
    CHAIN_PREFIX,
    DiffusionForm,
    IntegratorName,
    LastStep,
    SamplerName,
    ScheduleName,
    sample_steps,
)

SAMPLER_RULES: Final = 3
"""Raised when samplers draw other images from the same settings: what was begun before is not continued."""


def default_schedule(sampler: IntegratorName) -> ScheduleName:
    """The schedule of a sampler that none was chosen for."""
    return "own" if sampler in ("ddpm", "ddim", "euler", "sit-sde") else "karras"


class SamplerConfig(Settings):
    """How an image is drawn from a network."""

    sampler: SamplerName | None = None
    """`ddpm` (ancestral), `ddim`, `euler` (the probability flow), `heun` or `kar1` (the same), `kar2` (Heun with
    churn), `rk45` (adaptive), `reverse-diffusion`, `euler-maruyama`, `sit-sde`, `dpm-solver++` (2M); null: `ddpm`
    for DDPM runs, `euler` for flow runs. With `dlg:` before its name it finishes the states of Denoising Langevin
    Gibbs chains, which need the run's noise-level classifier."""
    steps: Annotated[int, Unit("integrator steps")] = Field(default=250, ge=1, le=10**6)
    """Steps of the integrator. Each costs one evaluation of the network, except that heun and kar2 take
    2·steps − 1 in all. Not used by rk45."""
    schedule: ScheduleName | None = None
    """The noise levels that the steps go through. `own`: the objective's (flow: t uniform from 1 to 0; DDPM:
    the 1000 timesteps, respaced). `karras`: EDM's, ρ = 7, from the largest to the smallest σ of the range.
    Null: `own` for ddpm, ddim, euler and sit-sde, `karras` for the others. `own` of sit-sde is t in equal steps
    from 0, as SiT counts it, to 1 − last_step_size. Not used by rk45."""
    ddim_eta: Annotated[float, Unit("share")] = Field(default=0.0, ge=0, le=1)
    """Fresh noise in each DDIM step: 0 none, 1 as much as the ancestral sampler (with its smaller
    variance)."""
    churn: Annotated[float, NO_UNIT] = Field(default=80.0, ge=0)
    """S_churn of kar2: in each step σ first grows, with fresh noise, by a factor of 1 + churn/(steps + 1), at
    most √2."""
    churn_min: Annotated[float, Unit("σ")] = Field(default=0.1, ge=0)
    """S_tmin of kar2: a smaller σ does not grow."""
    churn_max: Annotated[float, Unit("σ")] = Field(default=2.0, ge=0)
    """S_tmax of kar2: a larger σ does not grow."""
    churn_noise: Annotated[float, NO_UNIT] = Field(default=1.007, ge=0)
    """S_noise of kar2: the standard deviation of its fresh noise."""
    tolerance: Annotated[float, Unit("relative error")] = Field(default=1e-5, gt=0, lt=1)
    """The error that rk45 allows in a step, relative to 1 + |x|, as the root mean square over the image."""
    corrector_steps: Annotated[int, Unit("Langevin steps")] = Field(default=0, ge=0, le=10**6)
    """Langevin steps that reverse-diffusion and euler-maruyama take at each level between the first and 0; 0:
    none."""
    corrector_snr: Annotated[float, Unit("ratio")] = Field(default=0.16, gt=0, lt=1)
    """Signal-to-noise ratio of a Langevin step, whose length grows with its square. A larger ratio corrects
    more, but leaves the variance too large by a share of about snr²."""
    diffusion_form: DiffusionForm = "sigma"
    """The diffusion of sit-sde at SiT's time t, from 0 for noise to 1 for data. `sigma`: norm·(1 − t);
    `decreasing`: ¼·(norm·cos πt + 1)²; `increasing-decreasing`: norm·sin² πt. The larger it is, the more noise a
    step adds and takes out."""
    diffusion_norm: Annotated[float, NO_UNIT] = Field(default=1.0, ge=0, le=1e6)
    """The size of that diffusion; 0 with `sigma`: none, which leaves the flow's ODE."""
    last_step: LastStep = "mean"
    """How sit-sde ends. `mean`: a step without its noise; `tweedie`: x ← D, which SiT's `Euler` is too."""
    last_step_size: Annotated[float, Unit("SiT's time")] = Field(default=0.04, gt=0, lt=1)
    """How far from t = 1 sit-sde takes its last step; on the `own` schedule only."""
    tweedie: bool = False
    """End with x ← D(x, smallest σ), which removes remaining noise of that size. It costs one more
    evaluation. The step to σ = 0 that ends each integrator already does this. Chains have their own
    setting for it."""
    cfg_scale: Annotated[float, NO_UNIT] = Field(default=1.0, ge=0, le=1e38)
    """Scale of classifier-free guidance; 1: no guidance."""
    cfg_channels: Annotated[int | None, Unit("channels")] = Field(default=None, ge=1, le=1024)
    """Guide only this many channels, from the first; null: all. The published samplers of DiT and SiT guide 3,
    and so does DiT-MoE's for DDPM."""
    cfg_sigma_min: Annotated[float, Unit("σ")] = Field(default=0.0, ge=0)
    """Guide only steps that start above this σ; the others cost half. A flow's t is σ/(1 + σ)."""
    cfg_sigma_max: Annotated[float | None, Unit("σ")] = Field(default=None, gt=0)
    """Guide only steps that start at this σ or below; null: no limit."""
    cache_interval: Annotated[int, Unit("integrator steps")] = Field(default=1, ge=1, le=1000)
    """Run the network's blocks only at every N-th step; in between, their output is extrapolated from the last
    full steps, which costs next to nothing. 1: every step is full. Not for rk45 and chains."""
    cache_order: Annotated[int, NO_UNIT] = Field(default=1, ge=0, le=8)
    """Degree of that extrapolation, in the number of the step; 0 repeats the output of the last full step. The
    first cache_order + 1 steps are always full."""
    ddpm_timestep: Literal["interpolate", "nearest"] = "interpolate"
    """The timestep that a DDPM network gets for a σ between two of its 1000 levels. `interpolate`: between
    their timesteps, linearly in log σ. `nearest`: that of the nearer level. It makes no difference on the
    `own` schedule, which uses the levels themselves."""
    dlg: DlgConfig = DlgConfig()
    """How chains move; with a sampler of chains only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's weights and arithmetic; the image between its evaluations is fp32 either way."""
    compile: bool = False
    """Let torch compile one block of the network; all blocks use its code. An image then differs by rounding
    (docs/sample.md)."""
    seed: Annotated[int, NO_UNIT] = Field(default=0, ge=0, le=LARGEST_SEED)
    """Image i is a function of (seed, i) alone; of chains, chain i div S is one of (seed, its number)."""

    @property
    def chains(self) -> bool:
        """Whether images are those of chains."""
        return self.sampler is not None and self.sampler.startswith(CHAIN_PREFIX)

    @property
    def integrator(self) -> IntegratorName:
        """The sampler, of chains the one that finishes their states; the configuration is resolved."""
        assert self.sampler is not None
        return cast(IntegratorName, self.sampler.removeprefix(CHAIN_PREFIX))

    @property
    def integrators(self) -> frozenset[IntegratorName]:
        """The integrators that draw: of chains also the one that they start with, which takes the same settings;
        the configuration is resolved."""
        return frozenset({self.integrator, self.dlg.initial} if self.chains else {self.integrator})

    @property
    def images_per_unit(self) -> int:
        """Images that are drawn from one start and have one class: the samples of a chain, or 1."""
        return self.dlg.samples_per_chain if self.chains else 1

    @property
    def guides_in_part(self) -> bool:
        """Whether guidance acts at some noise levels alone."""
        return self.cfg_scale != 1 and (self.cfg_sigma_min > 0 or self.cfg_sigma_max is not None)

    @property
    def paced(self) -> bool:
        """Whether evaluations of one image differ in what they ask of the network."""
        return self.cache_interval > 1 or self.guides_in_part

    @property
    def _of_interpolant(self) -> bool:
        """Whether SiT's SDE draws images, or what chains start from."""
        return (self.sampler or "").endswith("sit-sde") or (self.chains and self.dlg.initial == "sit-sde")

    def guides_at(self, sigma: float) -> bool:
        """Whether a step from this σ is guided."""
        below = self.cfg_sigma_max is None or sigma <= self.cfg_sigma_max
        return self.cfg_scale != 1 and below and sigma > self.cfg_sigma_min

    def plain(self) -> dict[str, Any]:
        """All settings that matter to the images, as plain data.

        What came later is left out where it changes nothing, so that what was begun before stays the same.
        """
        without = set() if self.chains else {"dlg"}
        without |= {"cache_interval", "cache_order"} if self.cache_interval == 1 else set()
        without |= set() if self.guides_in_part else {"cfg_sigma_min", "cfg_sigma_max"}
        without |= set() if self._of_interpolant else {"diffusion_form", "diffusion_norm"}
        without |= set() if self._of_interpolant else {"last_step", "last_step_size"}
        without |= set() if self.compile else {"compile"}
        return self.model_dump(mode="json", exclude=without)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """A corrector is for the samplers that have one, and a range is not empty."""
        if self.corrector_steps and not (self.sampler or "").endswith(("reverse-diffusion", "euler-maruyama")):
            raise ValueError(
                f"corrector_steps = {self.corrector_steps} with sampler = {self.sampler}: expected the sampler "
                "reverse-diffusion or euler-maruyama"
            )
        if not self.chains and self.dlg != DlgConfig():
            raise ValueError(
                f"dlg is given with sampler = {self.sampler}: expected a sampler of chains, such as "
                f"{CHAIN_PREFIX}{self.sampler or 'kar2'}"
            )
        if self.churn_min > self.churn_max:
            raise ValueError(f"churn_min = {self.churn_min:g} is above churn_max = {self.churn_max:g}")
        if self.cfg_sigma_max is not None and self.cfg_sigma_min >= self.cfg_sigma_max:
            raise ValueError(
                f"cfg_sigma_min = {self.cfg_sigma_min:g} is not below cfg_sigma_max = {self.cfg_sigma_max:g}"
            )
        if self.paced and (self.chains or self.sampler == "rk45"):
            key = "cache_interval" if self.cache_interval > 1 else "cfg_sigma_min, cfg_sigma_max"
            reason = "a chain has no sequence of steps" if self.chains else "each image takes steps of its own"
            raise ValueError(f"{key} with sampler = {self.sampler}: {reason}; expected another, such as heun")
        return self

    def resolved(self, objective: ObjectiveConfig) -> "SamplerConfig":
        """The same with the sampler and the schedule that the nulls stand for, under the sampler's first name."""
        sampler = self.sampler or ("ddpm" if objective.kind == "ddpm" else "euler")
        named = self.model_copy(update={"sampler": sampler.replace("kar1", "heun")})
        return named.model_copy(update={"schedule": self.schedule or default_schedule(named.integrator)})

    def for_a_look(self, objective: ObjectiveConfig) -> "SamplerConfig":
        """`resolved`, with the few steps of `SAMPLE_STEPS` where none were given."""
        resolved = self.resolved(objective)
        if "steps" in self.model_fields_set:
            return resolved
        assert resolved.sampler is not None
        return resolved.model_copy(update={"steps": sample_steps(resolved.sampler)})


def sampler_from_options(*, dlg: Sequence[str] = (), **options: Any) -> SamplerConfig:
    """A sampler from a command's options, which are named as the fields are.

    Args:
        dlg: KEY=VALUE for each setting of chains that is given.

    Raises:
        UserError: naming every option that is out of range.
    """
    settings, problems = _chain_settings(dlg)
    try:
        config = SamplerConfig.model_validate({**options, "dlg": settings})
    except ValidationError as error:
        for problem in error.errors():
            message, where = message_of(problem), problem["loc"]
            if where[:1] == ("dlg",) and len(where) > 1:
                problems.append(f"--dlg {where[1]}={problem['input']}: {message}")
            elif where and where != ("dlg",):
                problems.append(f"--{str(where[0]).replace('_', '-')} {problem['input']}: {message}")
            else:  # of several options, which it names
                problems.append(message)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _chain_settings(given: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """KEY=VALUE of chains → values by key, and what is wrong with them."""
    settings: dict[str, Any] = {}
    problems = []
    for text in given:
        key, equals, value = text.partition("=")
        key = key.replace("-", "_")
        if not equals:
            problems.append(f"--dlg {text}: expected KEY=VALUE, such as skip=10")
        elif key not in DlgConfig.model_fields:
            problems.append(f"--dlg {text}: no such setting; {expected_name(key, DlgConfig.model_fields)}")
        elif key in settings:
            problems.append(f"--dlg {text}: {key} is given twice")
        elif value == "null":
            settings[key] = None
        elif value.startswith("[") and value.endswith("]"):
            settings[key] = [part.strip() for part in value[1:-1].split(",")]
        else:
            settings[key] = value
    return settings, problems


class PreviewSampler(SamplerConfig):
    """How a preview is drawn: by an integrator alone, without chains."""

    sampler: IntegratorName | None = None
    """`ddpm` (ancestral), `ddim`, `euler` (the probability flow), `heun` or `kar1` (the same), `kar2` (Heun with
    churn), `rk45` (adaptive), `reverse-diffusion`, `euler-maruyama`, `sit-sde`, `dpm-solver++` (2M); null: `ddpm`
    for DDPM runs, `euler` for flow runs."""
    steps: Annotated[int, Unit("integrator steps")] = Field(default=50, ge=1, le=10**6)
    """Steps of the integrator. Each costs one evaluation of the network, except that heun and kar2 take
    2·steps − 1 in all. Not used by rk45."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Leave this out: the network that trains draws its previews, in `train.precision`."""
    seed: Annotated[int, NO_UNIT] = Field(default=0, ge=0, le=LARGEST_SEED)
    """Image i is a function of (seed, i) alone."""
    dlg: ClassVar[DlgConfig] = DlgConfig()  # type: ignore[misc]
    cache_interval: ClassVar[int] = 1  # type: ignore[misc]  # the network that trains may be in several processes
    cache_order: ClassVar[int] = 1  # type: ignore[misc]
    compile: ClassVar[bool] = False  # type: ignore[misc]  # nor would so few images repay the time

    @field_validator("sampler", mode="before")
    @classmethod
    def _check_sampler(cls, sampler: Any) -> Any:
        if isinstance(sampler, str) and sampler.startswith(CHAIN_PREFIX):
            raise ValueError(
                "chains need a noise-level classifier, which is trained after the run;"
                f" expected {sampler.removeprefix(CHAIN_PREFIX)}"
            )
        return sampler


class PreviewConfig(Settings):
    """The grid of fixed seeds and classes that training draws from the EMA."""

    every: Annotated[int | None, Unit("optimiser steps")] = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps between two grids; null: none."""
    images: Annotated[int, Unit("images")] = Field(default=16, ge=1, le=10_000)
    """Images of a grid; their classes cycle through all classes."""
    sampler: PreviewSampler = PreviewSampler()
    """How they are drawn."""

    @model_validator(mode="before")
    @classmethod
    def _check_vae(cls, values: Any) -> Any:
        """Runs of before have the key in their config.yaml, as a rule without a value."""
        if not isinstance(values, dict) or "vae" not in values:
            return values
        if values["vae"] is not None:
            raise ValueError("vae has another place: write data.vae, which all commands read")
        return {key: value for key, value in values.items() if key != "vae"}
