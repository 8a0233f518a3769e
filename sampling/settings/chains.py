"""Settings of Denoising Langevin Gibbs chains."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ditmoe.model.settings import Settings, Unit
from ditmoe.sampling.settings.names import ChainPreset, IntegratorName, LevelRule, StepRule

PRESETS: Final[Mapping[ChainPreset, Mapping[str, Any]]] = {
    "published": {},
    "velocity": {
        "tweedie": False,
        "initial_noise": 0.5,
        "step_size": 1.5,
        "step_rule": "underdamped",
        "momentum": 0.98,
        "skip": 3,
        "level_rule": "sample",
        "select": "last",
        "samples_per_chain": 5,
        "initial": "dpm-solver++",
        "initial_steps": 8,
        "burn_in_first": 0,
        "burn_in": 2,
    },
}
"""What a preset says of other settings; the rest have their defaults."""


def _as_tuple(given: Any) -> Any:
    """JSON and YAML have lists, also where types are strict."""
    return tuple(given) if isinstance(given, list) else given


class DlgConfig(Settings):
    """How chains move through images and noise levels, and which of their states are denoised."""

    preset: ChainPreset = Field(default="published", exclude=True)
    """Where settings that are not given come from: `published`, or `velocity`, the best that was found on
    images of 32×32 (docs/dmcmc.md)."""
    step_size: Annotated[float, Unit("σ², or share of it")] = Field(default=0.2, gt=0)
    """η. With `constant` in units of σ², for images from −1 to 1 (published: 0.05, for images from 0 to 1); with
    the other rules a share of σ², for `exponential` at most 1."""
    step_rule: StepRule = "constant"
    """`constant`: x + ½η·s + √η·z (published). `proportional`: the same with η·σ² for η. `exponential`:
    D + √(1 − η)·(x − D) + √η·σ·z, whose noise of the current level keeps its size exactly. `underdamped`: with a
    velocity that goes on from step to step, which also keeps it."""
    momentum: Annotated[float, Unit("share")] = Field(default=0.9, ge=0, lt=1)
    """For `underdamped`: the share of its velocity that a chain keeps from one step to the next."""
    class_scales: Annotated[tuple[float, ...] | None, BeforeValidator(_as_tuple), Unit("ratio")] = None
    """A factor of η for each class; null: 1 for all."""
    skip: Annotated[int, Unit("chain steps")] = Field(default=20, ge=1, le=10**9)
    """Langevin–Gibbs steps from one sample to the next (n_skip)."""
    thin: Annotated[int, Unit("stretches")] = Field(default=1, ge=1, le=10**9)
    """Only the last of this many stretches of `skip` steps gives a sample."""
    level_rule: LevelRule = "argmax"
    """How σ is chosen for an image: `argmax` (published) takes the likeliest; `sample` draws it (exact)."""
    sigma_min: Annotated[float | None, Unit("σ")] = Field(default=None, gt=0)
    """Smallest σ that a chain may take; null: that of the classifier."""
    sigma_max: Annotated[float | None, Unit("σ")] = Field(default=None, gt=0)
    """Largest σ that a chain may take; null: that of the classifier."""
    select: Literal["smallest", "last"] = "smallest"
    """Which state of a stretch is denoised: the first of smallest σ, beginning with the one before the stretch
    (published), or the last (exact)."""
    tweedie: bool = True
    """End each sample with x ← D(x, smallest σ) (published), also after an integrator that steps to σ = 0 by
    itself; one evaluation more. rk45 ends by this very step, and takes no second one."""
    samples_per_chain: Annotated[int, Unit("samples")] = Field(default=50, ge=1, le=10**9)
    """Samples S of a chain: image i is sample i mod S of chain i div S. Samples of short chains resemble each
    other less, but each bears more of the cost of the start."""
    initial: IntegratorName = "kar2"
    """The integrator that draws, from pure noise, what a chain starts from."""
    initial_steps: Annotated[int, Unit("integrator steps")] = Field(default=19, ge=1, le=10**9)
    """Its steps; 19 are the paper's N = 20 levels."""
    initial_noise: Annotated[float, Unit("σ")] = Field(default=1.0, ge=0)
    """Standard deviation of the noise that is added to that start, for images from −1 to 1."""
    burn_in_step_size: Annotated[float, Unit("σ²")] = Field(default=2.0, gt=0)
    """η of the first burn-in, which follows the rule `constant`; for images from −1 to 1."""
    burn_in_first: Annotated[int, Unit("chain steps")] = Field(default=10, ge=0, le=10**9)
    """Steps of it."""
    burn_in: Annotated[int, Unit("chain steps")] = Field(default=10, ge=0, le=10**9)
    """Steps with the chain's own rule and η before the first stretch."""
    restart_every: Annotated[int | None, Unit("samples")] = Field(default=None, ge=1, le=10**9)
    """Samples after which a chain starts anew from pure noise; null: never."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        """Take what is not given from the preset; an unknown one is left to its own field's check."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "published")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}  # type: ignore[call-overload]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min:g} is above sigma_max = {self.sigma_max:g}")
        scales = self.class_scales or (1.0,)
        if not all(0 < scale < float("inf") for scale in scales):
            raise ValueError(f"class_scales = {list(scales)}: expected numbers above 0")
        if self.step_rule == "exponential" and self.step_size * max(scales) > 1:
            raise ValueError(
                f"step_size = {self.step_size:g} (times the largest of class_scales): expected at most 1 "
                "with step_rule = exponential"
            )
        return self
