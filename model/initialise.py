"""Initial weights, each a function of (seed, canonical name) alone, so that any rank can make any of them."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ditmoe.model.canonical import canonical_state

Draw = Callable[[Tensor], Tensor]
"""Fills memory with the next numbers of a parameter, in the order of its elements, and returns it."""


def initialise(network: nn.Module, seed: int) -> None:
    """Fill a network's weights (arXiv 2212.09748, §3.2, and the published DiT-MoE settings)."""
    with torch.no_grad():
        for name, tensor in canonical_state(network).items():
            if name != "pos_embed":
                tensor.copy_(initial_value(name, tuple(tensor.shape), seed))


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial value of one canonical parameter, float32 of the given shape."""
    how = initial_rule(name, shape, seed)
    return torch.full(shape, how) if isinstance(how, float) else how(torch.empty(shape))


def initial_rule(name: str, shape: tuple[int, ...], seed: int) -> float | Draw:
    """What one canonical parameter of a shape starts as: the number that all of it is, or how it is drawn.

    Xavier-uniform for every linear map (the patch convolution counts as one), Kaiming-uniform with a = √5 for
    routers, N(0, 0.02) for the label table and the timestep MLP, zero for adaLN, the output layer and biases.
    """
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.0
    if name.endswith(".bias") or "adaLN_modulation" in name or name.startswith("final_layer."):
        return 0.0
    generator = _generator(name, seed)
    if name.startswith(("y_embedder.", "t_embedder.")):
        return lambda memory: memory.normal_(0.0, 0.02, generator=generator)
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = 1 / math.sqrt(fan_in) if name.endswith(".gate.weight") else math.sqrt(6 / (fan_in + fan_out))
    return lambda memory: memory.uniform_(-bound, bound, generator=generator)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/initial/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
