"""Our network and the plain one with the same weights, batches for both, and what is drawn with them."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.plain import PlainDiT
from benchmarks.suite.settings import Settings
from ditmoe.model import randomness
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initial_value
from ditmoe.model.objective import Draws, RectifiedFlow
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.settings.config import SamplerConfig

SEED = 0
STEPS = 2
"""Euler's, of a drawing."""
SCALE = 1.5
"""Of its guidance."""


def lively_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Initial weights, but for those that begin as zeros, with which the network would put out nothing."""
    value = initial_value(name, shape, SEED)
    if name.endswith(".weight") and ("adaLN_modulation" in name or name.startswith("final_layer.")):
        value = partial(torch.normal, 0.0, 0.02)(shape, generator=torch.Generator().manual_seed(len(name)))
    return value


def our_network(config: ModelConfig) -> DiT:
    """On the CPU, in fp32."""
    network = DiT(config)
    shapes = {name: tuple(value.shape) for name, value in canonical_state(network).items() if name != "pos_embed"}
    load_canonical(network, {name: lively_value(name, shape) for name, shape in shapes.items()}, "benchmark")
    return network


def plain_network(config: ModelConfig) -> PlainDiT:
    """With the weights of `our_network`."""
    network = PlainDiT(config)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.copy_(lively_value(name, tuple(value.shape)))
    return network


def batch_of(settings: Settings) -> MicroBatch:
    """Random latents, labels and draws, the same each time."""
    return batch_for(settings.model, settings.batch, settings.device)


def batch_for(config: ModelConfig, images: int, device: torch.device) -> MicroBatch:
    """As `batch_of`, of any network."""
    assert config.channels and config.image_size and config.num_classes
    shape, positions = (config.channels, config.image_size, config.image_size), range(images)
    draws: Draws = RectifiedFlow().draw(SEED, positions, shape, label_dropout=0.1)
    label_B = torch.arange(images) % config.num_classes
    label_B = torch.where(draws.drop_B, config.num_classes, label_B)
    x_BCHW = randomness.normal(SEED, "benchmark", positions, shape)
    return MicroBatch(x_BCHW.to(device), label_B.to(device), draws.to(device))


class Drawing:
    """Guided steps of Euler's method: a batch that is drawn from the same noise each time."""

    def __init__(self, settings: Settings) -> None:
        config = settings.model
        assert config.channels and config.image_size and config.num_classes
        self._config, self._objective = config, ObjectiveConfig()
        sampler = SamplerConfig(sampler="euler", steps=STEPS, cfg_scale=SCALE)
        self._sampler = sampler.resolved(self._objective)
        shape = (config.channels, config.image_size, config.image_size)
        self._noise = ImageNoise(SEED, range(settings.batch), shape, settings.device)
        self.start_BCHW = self._noise.initial()
        self.label_B = (torch.arange(settings.batch) % config.num_classes).to(settings.device)
        self.passes = settings.batch * STEPS
        """Evaluations of one image, each of which is two passes, for its guidance."""

    def __call__(self, network: DiT) -> None:
        """Draw the batch."""
        with torch.inference_mode():
            denoiser = make_denoiser(network, self._config, self._objective, self._sampler)
            draw(denoiser, self.label_B, self.start_BCHW, self._noise, self._sampler)
