"""All samplers by name: how each is called, where it starts, and what it costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.integrators.adaptive import rk45
from ditmoe.sampling.integrators.ddpm import ancestral, ddim
from ditmoe.sampling.integrators.flow import SCHEDULES, Drawn, NoiseSource, Schedule, euler, heun
from ditmoe.sampling.integrators.interpolant import interpolant_schedule_of, interpolant_sde
from ditmoe.sampling.integrators.multistep import dpm_solver
from ditmoe.sampling.integrators.stochastic import euler_maruyama, heun_with_churn, reverse_diffusion
from ditmoe.sampling.network.denoiser import DdpmDenoiser, Denoiser, FlowDenoiser
from ditmoe.sampling.network.pace import Pace, Passes, full_steps
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig, default_schedule
from ditmoe.sampling.settings.names import IntegratorName


def _one_per_step(config: SamplerConfig) -> int:
    return config.steps


def _two_per_step(config: SamplerConfig) -> int:
    return 2 * config.steps - 1


def _one_per_step_and_correction(config: SamplerConfig) -> int:
    return config.steps + config.corrector_steps * (config.steps - 1)


@dataclass(frozen=True)
class Sampler:
    """An integrator, and what it takes from the configuration."""

    integrator: Callable[..., Drawn]
    """(denoiser, x_BCHW, sigma_B, label_B, and by name what is below) → samples."""
    nfe: Callable[[SamplerConfig], int] | None = _one_per_step
    """Evaluations per image, for plans; None: only the denoiser can tell."""
    stages: Callable[[SamplerConfig], int] = lambda config: 1
    """Evaluations of a step that are not the last."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Its own settings: argument → field of the configuration."""
    on_schedule: bool = True
    """It takes `steps` and `schedule`."""
    noisy: bool = False
    """It takes `noise`."""
    ends_by_tweedie: bool = False
    """It goes to the smallest σ, and its last step is Tweedie's formula there."""
    own_schedule: Callable[[SamplerConfig], Schedule] | None = None
    """What `own` stands for; None: the objective's schedule."""
    from_prior: bool = False
    """On the objective's own schedule it starts at pure noise. The others start at `sigma_max` on either: at
    t = 1 of a flow, σ has no bound, and neither have the slope in σ and the noise of a step."""


def _two_stages(config: SamplerConfig) -> int:
    return 2


def _corrected(config: SamplerConfig) -> int:
    return 1 + config.corrector_steps


_CORRECTOR: Final = {"corrector_steps": "corrector_steps", "corrector_snr": "corrector_snr"}
_CHURN: Final = {name: name for name in ("churn", "churn_min", "churn_max", "churn_noise")}
_DIFFUSION: Final = {"form": "diffusion_form", "norm": "diffusion_norm", "last_step": "last_step"}

SAMPLERS: Final[dict[IntegratorName, Sampler]] = {
    "ddpm": Sampler(ancestral, noisy=True, from_prior=True),
    "ddim": Sampler(ddim, settings={"eta": "ddim_eta"}, noisy=True, from_prior=True),
    "euler": Sampler(euler, from_prior=True),
    "heun": Sampler(heun, _two_per_step, _two_stages),
    "kar1": Sampler(heun, _two_per_step, _two_stages),
    "kar2": Sampler(heun_with_churn, _two_per_step, _two_stages, _CHURN, noisy=True),
    "rk45": Sampler(rk45, None, settings={"tolerance": "tolerance"}, on_schedule=False, ends_by_tweedie=True),
    "reverse-diffusion": Sampler(
        reverse_diffusion, _one_per_step_and_correction, _corrected, _CORRECTOR, noisy=True
    ),
    "euler-maruyama": Sampler(euler_maruyama, _one_per_step_and_correction, _corrected, _CORRECTOR, noisy=True),
    "sit-sde": Sampler(
        interpolant_sde,
        settings=_DIFFUSION,
        noisy=True,
        own_schedule=lambda config: interpolant_schedule_of(config.last_step_size),
        from_prior=True,
    ),
    "dpm-solver++": Sampler(dpm_solver, from_prior=True),
}


def integrate(
    denoiser: Denoiser,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    label_B: Tensor,
    noise: NoiseSource,
    config: SamplerConfig,
) -> Drawn:
    """From noisy images, each at a σ of its own, to samples at σ = 0, by the sampler of a resolved configuration.

    Args:
        x_BCHW: noisy images in the variance-exploding view, float32.
        sigma_B: their noise levels, float64, > 0; see `start_of`.
        label_B: classes, int64.
        noise: fresh noise by number, for the samplers that add some.
    """
    assert config.sampler is not None and config.schedule is not None, "the configuration is not resolved"
    sampler = SAMPLERS[config.integrator]
    arguments: dict[str, Any] = {name: getattr(config, key) for name, key in sampler.settings.items()}
    if sampler.on_schedule:
        arguments |= {"steps": config.steps, "schedule": schedule_of(config)}
    if sampler.noisy:
        arguments["noise"] = noise
    drawn = sampler.integrator(denoiser, x_BCHW, sigma_B, label_B, **arguments)
    return tweedie(denoiser, drawn, sigma_B, label_B) if _adds_tweedie(config) else drawn


def schedule_of(config: SamplerConfig) -> Schedule:
    """The noise levels of a resolved configuration's steps."""
    assert config.schedule is not None, "the configuration is not resolved"
    own = SAMPLERS[config.integrator].own_schedule
    return SCHEDULES[config.schedule] if own is None or config.schedule != "own" else own(config)


def _adds_tweedie(config: SamplerConfig) -> bool:
    """Whether a last step of Tweedie's formula follows the integrator."""
    of_chains = config.chains and config.dlg.tweedie and not SAMPLERS[config.integrator].ends_by_tweedie
    return config.tweedie or of_chains


def tweedie(denoiser: Denoiser, drawn: Drawn, sigma_B: Tensor, label_B: Tensor) -> Drawn:
    """x ← D(x, σ) = x + σ²·s(x, σ) at `sigma_min`, or at the σ that an image began with if lower; one evaluation.

    It is Tweedie's formula for what is left of the noise, the last step of DMCMC (arXiv 2209.14593).
    """
    before = denoiser.nfe
    x_BCHW = denoiser(drawn.x_BCHW, sigma_B.clamp(max=denoiser.sigma_min), label_B)
    spent = denoiser.nfe - before
    return Drawn(x_BCHW, drawn.nfe + spent, None if drawn.nfe_B is None else drawn.nfe_B + spent)


class Start(NamedTuple):
    """Where an integrator starts: at the level `sigma`, with noise of this deviation and nothing else."""

    sigma: float
    deviation: float


def start_of(denoiser: Denoiser, config: SamplerConfig) -> Start:
    """Where a resolved configuration starts."""
    if config.schedule == "own" and SAMPLERS[config.integrator].from_prior:
        return Start(denoiser.sigma_prior, denoiser.prior_deviation)
    return Start(denoiser.sigma_max, denoiser.sigma_max)


def pace_of(denoiser: Denoiser, config: SamplerConfig) -> Pace | None:
    """What each evaluation of a resolved configuration does; None: each is full, and guided if any is."""
    if not config.paced:
        return None
    sampler = SAMPLERS[config.integrator]
    assert sampler.nfe is not None and not config.chains
    sigma_B = torch.tensor([start_of(denoiser, config).sigma], dtype=torch.float64)
    levels = schedule_of(config)(denoiser, sigma_B, config.steps)[0, :-1].tolist()
    guided = [config.guides_at(level) for level in (*levels, denoiser.sigma_min)]
    full = full_steps(guided, config.cache_interval, config.cache_order)
    caches = config.cache_interval > 1
    return Pace(sampler.nfe(config), sampler.stages(config), guided, full, config.cache_order, caches)


def planned_passes(config: SamplerConfig, objective: ObjectiveConfig) -> Passes | None:
    """Passes of an image through the network; None: each image takes as many as it needs."""
    nfe = planned_nfe(config)
    if nfe is None:
        return None
    if not config.paced:
        return Passes(nfe * (1 if config.cfg_scale == 1 else 2), 0)
    kind = DdpmDenoiser if objective.kind == "ddpm" else FlowDenoiser
    pace = pace_of(kind(_no_network, 0), config)
    assert pace is not None
    return pace.passes(after=1 if _adds_tweedie(config) else 0)


def _no_network(input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
    raise AssertionError("a plan asks no network")


def planned_nfe(config: SamplerConfig) -> float | None:
    """Evaluations of the denoiser per image, for whole chains; None: each image takes as many as it needs."""
    count = SAMPLERS[config.integrator].nfe
    if count is None:
        return None
    finish, dlg = count(config) + _adds_tweedie(config), config.dlg
    if not config.chains:
        return finish
    start = planned_nfe(initial_config(config))
    if start is None:
        return None
    start += dlg.burn_in_first + dlg.burn_in
    samples = dlg.samples_per_chain
    starts = -(-samples // (dlg.restart_every or samples))
    return finish + dlg.skip * dlg.thin + starts * start / samples


def initial_config(config: SamplerConfig) -> SamplerConfig:
    """The sampler of what a chain starts from: `dlg.initial` with the other settings of a configuration."""
    sampler = config.dlg.initial
    return config.model_copy(
        update={
            "sampler": sampler,
            "steps": config.dlg.initial_steps,
            "schedule": default_schedule(sampler),
            "corrector_steps": 0,
            "tweedie": False,
            "dlg": DlgConfig(),
        }
    )
