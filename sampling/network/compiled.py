"""A network for sampling whose blocks are computed by compiled code, beside the network itself.

The code is made for one number of rows, before the images that need it are drawn and in a single thread, as they
are drawn in on a CPU: threads then only run it.
"""

import copy
import sys

import torch
from torch import nn

from ditmoe.model.compiling.blocks import compiled_blocks
from ditmoe.model.compiling.tools import check_tools
from ditmoe.model.dit import DiT
from ditmoe.model.threads import one_thread
from ditmoe.parallel.expert_group import NetworkOfGroup
from ditmoe.sampling.settings.config import SamplerConfig


def with_compiled_blocks(network: nn.Module, images: int, config: SamplerConfig) -> nn.Module:
    """The network with compiled blocks, or itself where the configuration asks for none.

    It shares all with the network but how blocks are computed. If something is compiled, a line on standard error
    says how long that took.

    Args:
        network: a `DiT`, or a `NetworkOfGroup` for one.
        images: that are drawn at once; under guidance twice as many go through the network.
        config: of the sampler.

    Raises:
        UserError: this machine cannot compile.
    """
    if not config.compile:
        return network
    check_tools(next(network.parameters()).device.type, "--compile")
    blocks = compiled_blocks(with_gradients=False)
    twin = copy.copy(network)
    inner: nn.Module = twin
    if isinstance(twin, NetworkOfGroup):
        inner = copy.copy(twin.network)
        twin._modules = {**twin._modules, "network": inner}
    assert isinstance(inner, DiT)
    inner.compute_block = blocks
    with one_thread(), torch.inference_mode():
        seconds = sum(blocks.prepare(inner, rows) for rows in rows_of(images, config))
    if seconds:
        print(f"compiled a block in {seconds:.1f} s", file=sys.stderr, flush=True)
    return twin


def rows_of(images: int, config: SamplerConfig) -> list[int]:
    """How many rows go through the network at once, in all evaluations of so many images."""
    guided = config.cfg_scale != 1
    alone = not guided or config.guides_in_part
    return [images] * alone + [2 * images] * guided
