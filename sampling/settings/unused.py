"""Settings of a sampler that change nothing, because what they belong to was not chosen."""

from typing import NamedTuple

from ditmoe.model.outside.text import exact_number
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import OWN_SETTINGS


class _Owner(NamedTuple):
    """What settings belong to."""

    words: str
    chosen: bool


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
    owners = {
        key: _Owner(f"the sampler {sampler}", sampler in config.integrators)
        for sampler, keys in OWN_SETTINGS.items()
        for key in keys
    }
    if "sit-sde" in config.integrators and config.schedule != "own" and not config.chains:
        owners["last_step_size"] = _Owner("the schedule own", chosen=False)
    owners["corrector_snr"] = _Owner("corrector_steps above 0", config.corrector_steps > 0)
    guidance = _Owner("a cfg_scale other than 1", config.cfg_scale != 1)
    owners |= dict.fromkeys(("cfg_channels", "cfg_sigma_min", "cfg_sigma_max"), guidance)
    if "cache_order" in type(config).model_fields:
        owners["cache_order"] = _Owner("a cache_interval above 1", config.cache_interval > 1)
    return owners
