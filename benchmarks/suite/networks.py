"""Our network and the plain one with the same weights, and batches for both."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.plain import PlainDiT
from benchmarks.suite.settings import Settings
from ditmoe.model import randomness
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initial_value
from ditmoe.model.objective import Draws, RectifiedFlow
from ditmoe.parallel.engine.passes import MicroBatch

SEED = 0


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
