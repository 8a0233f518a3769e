"""The names of files of drawn images, and what is written in them of how they came about."""

from typing import TYPE_CHECKING, Any, Final

from ditmoe.launcher.commands.pictures.choice import ranges
from ditmoe.model.outside.text import exact_number

if TYPE_CHECKING:
    from ditmoe.sampling.network.load import LoadedModel
    from ditmoe.sampling.settings.config import SamplerConfig

LONGEST_LIST: Final = 60
"""Characters of a file's name that may list classes, seeds, or settings of chains."""
LONGEST_CLASS: Final = 40
"""Those that the name of a class may take."""
_BY_KEY: Final = ("kar2", "sit-sde")
"""Samplers whose own settings are named by their keys."""


def picture_name(
    step: int,
    weights: str,
    classes: list[int] | None,
    count: int | None,
    config: "SamplerConfig",
    seeds: list[int] | None = None,
    extension: str = "png",
) -> str:
    """A file name that states how the picture came about; classes, count and seeds where they were asked for."""
    parts = [f"step-{step:08d}", *sampler_words(config)]
    parts.append(f"cfg{exact_number(config.cfg_scale)}")
    if config.cfg_channels is not None and config.cfg_scale != 1:
        parts.append(f"on{config.cfg_channels}channels")
    if config.guides_in_part:
        most = "" if config.cfg_sigma_max is None else exact_number(config.cfg_sigma_max)
        parts.append(f"sigma{exact_number(config.cfg_sigma_min)}-{most}")
    parts.append(f"seed{config.seed}" if seeds is None else f"seeds-{_shortened(ranges(seeds), str(len(seeds)))}")
    if weights != "ema":
        parts.append(weights)
    if config.precision != "fp32":
        parts.append(config.precision)
    if classes is not None:
        parts.append(f"classes-{_shortened('-'.join(map(str, classes)), str(len(classes)))}")
    if count is not None:
        parts.append(f"{count}images")
    return "_".join(parts) + f".{extension}"


def _shortened(text: str, stead: str) -> str:
    """A part of a file's name, or where it is long, what stands for it with a hash."""
    import hashlib

    if len(text) <= LONGEST_LIST:
        return text
    return f"{stead}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sampler_words(config: "SamplerConfig") -> list[str]:
    """The sampler, its steps, and those of its settings that depart from their defaults."""
    from ditmoe.sampling.settings.config import SamplerConfig, default_schedule
    from ditmoe.sampling.settings.names import OWN_SETTINGS

    assert config.sampler is not None
    words: list[str] = [config.sampler.replace(":", "-")]
    if config.integrator == "rk45":
        words.append(f"tolerance{exact_number(config.tolerance)}")
    else:
        words.append(f"{config.steps}steps")
        if config.schedule != default_schedule(config.integrator):
            words.append(f"schedule-{config.schedule}")
        if "rk45" in config.integrators:
            words.append(f"tolerance{exact_number(config.tolerance)}")
    if "ddim" in config.integrators and config.ddim_eta:
        words.append(f"eta{exact_number(config.ddim_eta)}")
    for sampler in _BY_KEY:
        for key in OWN_SETTINGS[sampler] if sampler in config.integrators else ():
            value = getattr(config, key)
            if value != SamplerConfig.model_fields[key].default:
                joint = "-" if sampler == "sit-sde" else ""
                shown = value if isinstance(value, str) else exact_number(value)
                words.append(f"{key.replace('_', '-')}{joint}{shown}")
    if config.corrector_steps:
        words.append(f"{config.corrector_steps}corrections-snr{exact_number(config.corrector_snr)}")
    if config.cache_interval > 1:
        words.append(f"cache{config.cache_interval}-order{config.cache_order}")
    if config.tweedie:
        words.append("tweedie")
    if config.compile:
        words.append("compiled")
    if config.chains:
        fields = type(config.dlg).model_fields
        chosen = {key: value for key, value in config.dlg if key != "preset" and value != fields[key].default}
        chain_words = "_".join(f"{key.replace('_', '-')}-{value}" for key, value in chosen.items())
        words += [_shortened(chain_words, "dlg")] if chain_words else []
    return words


def image_name(label: int, class_name: str, seed: int, number: int, extension: str) -> str:
    """The name of the file of one image: class and seed, and its number where it is not the first of its seed.

    Of the class's name, which a stranger may have chosen, plain letters and digits alone get in.
    """
    import re

    plain = re.sub(r"[^a-z0-9]+", "-", class_name.lower()).strip("-")[:LONGEST_CLASS].rstrip("-")
    of_class = f"class-{label}" + (f"-{plain}" if plain and plain != str(label) else "")
    return f"{of_class}_seed-{seed}" + (f"_image-{number}" if number else "") + f".{extension}"


def facts_of(
    model: "LoadedModel", weights: str, config: "SamplerConfig", labels: list[int], seeds: list[int], nfe: float
) -> dict[str, Any]:
    """What a file says of its images. The run goes by its folder's name: where it lies is nobody's business."""
    from ditmoe.sampling.network.load import home_of

    assert model.info is not None
    shown = list(dict.fromkeys(labels))
    settings = {key: value for key, value in config.plain().items() if key != "seed"}
    steps = {} if config.integrator == "rk45" else {"steps": config.steps, "schedule": config.schedule}
    return {
        "Software": "ditmoe",
        "run": home_of(model.info.path).resolve().name,
        "step": model.info.step,
        "weights": weights,
        "checkpoint": model.fingerprint,
        "class": ", ".join(model.class_names[label] for label in shown),
        "label": ",".join(map(str, shown)),
        "seed": ranges(seeds),
        "sampler": config.sampler,
        **steps,
        "guidance": config.cfg_scale,
        "nfe": nfe,
        "settings": _json(settings),
    }


def _json(settings: dict[str, Any]) -> str:
    import json

    return json.dumps(settings)
