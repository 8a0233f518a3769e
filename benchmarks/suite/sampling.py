"""Drawing a batch with Euler's method and guidance, against the plain baseline's."""

from collections.abc import Iterator

import torch

from benchmarks import plain
from benchmarks.suite.figure import Figure, in_turns, rate
from benchmarks.suite.machine import DTYPES
from benchmarks.suite.networks import our_network, plain_network
from benchmarks.suite.settings import Settings
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.count import count
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.settings.config import SamplerConfig

STEPS = 2
SCALE = 1.5


def measure(settings: Settings) -> Iterator[Figure]:
    """In fp32 and in bf16."""
    config, objective = settings.model, ObjectiveConfig()
    assert config.channels and config.image_size and config.num_classes
    sampler = SamplerConfig(sampler="euler", steps=STEPS, cfg_scale=SCALE).resolved(objective)
    label_B = (torch.arange(settings.batch) % config.num_classes).to(settings.device)
    shape = (config.channels, config.image_size, config.image_size)
    noise = ImageNoise(0, range(settings.batch), shape, settings.device)
    start_BCHW = noise.initial()
    theirs = plain_network(config).to(settings.device)
    networks = {precision: our_network(config).to(settings.device, dtype) for precision, dtype in DTYPES.items()}

    def ours(precision: str) -> None:
        with torch.inference_mode():
            denoiser = make_denoiser(networks[precision].eval(), config, objective, sampler)
            draw(denoiser, label_B, start_BCHW, noise, sampler)

    contenders = {
        "plain": lambda: plain.sample(theirs, start_BCHW, label_B, STEPS, SCALE),
        **{precision: lambda precision=precision: ours(precision) for precision in DTYPES},
    }
    seconds = in_turns(contenders, settings.rounds_of(5), settings.device)
    passes = settings.batch * STEPS
    for precision in DTYPES:
        limit = settings.limits.seconds(precision, 2 * passes * count(config).flops)
        name = f"guided Euler steps {settings.model_name}, batch {settings.batch}, {precision}"
        yield rate(
            name, "images/s", passes, seconds[precision], seconds["plain"], limit=limit, against="plain, fp32"
        )
