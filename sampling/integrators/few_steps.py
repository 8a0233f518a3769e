"""From how many steps on a sampler's images are free of noise, as measured.

Integrators whose last steps are long leave noise in images, some of many times their contrast: a long step down
to the smallest σ adds noise of the σ that it comes from, or takes its slope from there, and the denoiser at the
smallest σ takes little of it out. On a schedule whose last level is large, as a flow's own is where steps are few,
the step to 0 takes all noise out, and images are blurred.

The figures are from data in 768 dims whose denoiser is known (`tests/sampling/integrators/test_few_steps.py`):
what images vary by where the modes of the data do not differ, beyond their own deviation of 0.1.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from ditmoe.model.outside.text import counted
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import IntegratorName, ScheduleName

NOISE: Final = 0.1
"""Deviation of what is called noise, in images from −1 to 1: 13 of 255 grey levels."""


class Fewest(NamedTuple):
    """Steps from which on no more than `NOISE` was left; a single step always leaves none, but a blur."""

    from_pure_noise: int
    from_chains: int
    """From σ = 2, where published chains walk: their burn-in leads there."""


FEWEST: Final[Mapping[tuple[IntegratorName, ScheduleName], Fewest]] = {
    ("heun", "karras"): Fewest(10, 5),
    ("kar2", "karras"): Fewest(13, 7),
    ("reverse-diffusion", "karras"): Fewest(22, 11),
    ("reverse-diffusion", "own"): Fewest(4, 1),
    ("euler-maruyama", "karras"): Fewest(14, 7),
    ("euler-maruyama", "own"): Fewest(6, 1),
    ("sit-sde", "karras"): Fewest(13, 7),
    ("sit-sde", "own"): Fewest(10, 7),
}
"""Integrators by their first names, sit-sde with its default diffusion and last step; what is not here leaves none
at any number of steps."""
LARGEST_TOLERANCE: Final = 0.05
"""That of rk45 up to which no more than `NOISE` was left."""


def noise_warnings(config: SamplerConfig) -> tuple[str, ...]:
    """What is to be said of a resolved configuration whose images are likely to be noise: a line, or none."""
    assert config.sampler is not None and config.schedule is not None, "the configuration is not resolved"
    if config.integrator == "rk45":
        if config.tolerance <= LARGEST_TOLERANCE:
            return ()
        return (
            f"{config.sampler} with tolerance {config.tolerance:g} leaves noise in images: "
            f"expected at most {LARGEST_TOLERANCE:g}",
        )
    fewest = FEWEST.get((config.integrator, config.schedule))
    if fewest is None:
        return ()
    enough = fewest.from_chains if config.chains else fewest.from_pure_noise
    if config.steps == 1 or config.steps >= enough:
        return ()
    return (
        f"{config.sampler} with {counted(config.steps, 'step')} on the {config.schedule} schedule leaves "
        f"noise in images: "
        f"expected at least {counted(enough, 'step')}",
    )
