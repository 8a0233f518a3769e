"""What is to be said of a sampler before it draws."""

from ditmoe.sampling.integrators.few_steps import noise_warnings
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.unused import unused_settings


def sampler_warnings(config: SamplerConfig) -> tuple[str, ...]:
    """Settings without effect, and noise that is likely to be left in images: a line each; the configuration is
    resolved."""
    return *unused_settings(config), *noise_warnings(config)
