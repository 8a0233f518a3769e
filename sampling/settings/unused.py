"""Settings of a sampler that change nothing, because what they belong to was not chosen."""

from typing import Final, NamedTuple

from ditmoe.model.outside.text import exact_number
from ditmoe.sampling.settings.config import SamplerConfig


class _Owner(NamedTuple):
    """What settings belong to."""

    words: str
    chosen: bool


_OF_SAMPLERS: Final = {
    "churn": "kar2",
    "churn_min": "kar2",
    "churn_max": "kar2",
    "churn_noise": "kar2",
    "ddim_eta": "ddim",
    "tolerance": "rk45",
    "diffusion_form": "sit-sde",
    "diffusion_norm": "sit-sde",
    "last_step": "sit-sde",
    "last_step_size": "sit-sde",
}


def unused_settings(config: SamplerConfig) -> tuple[str, ...]:
    """A line for each setting that is not at its default and has no effect on any image; the configuration is
    resolved.

    Steps and schedules are left out: a configuration that is resolved has them in any case.
    """
    found = []
    for key, owner in _owners(config).items():
        value = getattr(config, key)
        if value != type(config).model_fields[key].default and not owner.chosen:
            shown = exact_number(value) if isinstance(value, float) else value
            found.append(f"{key} = {shown} has no effect: it goes with {owner.words}")
    return tuple(found)


def _owners(config: SamplerConfig) -> dict[str, _Owner]:
    # The sampler of what chains start from takes the same settings.
    asked = {config.integrator, config.dlg.initial} if config.chains else {config.integrator}
    owners = {key: _Owner(f"the sampler {sampler}", sampler in asked) for key, sampler in _OF_SAMPLERS.items()}
    if "sit-sde" in asked and config.schedule != "own" and not config.chains:
        owners["last_step_size"] = _Owner("the schedule own", chosen=False)
    owners["corrector_snr"] = _Owner("corrector_steps above 0", config.corrector_steps > 0)
    guidance = _Owner("a cfg_scale other than 1", config.cfg_scale != 1)
    owners |= dict.fromkeys(("cfg_channels", "cfg_sigma_min", "cfg_sigma_max"), guidance)
    if "cache_order" in type(config).model_fields:
        owners["cache_order"] = _Owner("a cache_interval above 1", config.cache_interval > 1)
    return owners
