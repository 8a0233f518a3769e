"""Bytes that one micro-batch leaves on a rank for its backward pass, tensor by tensor.

Counted are the tensors that autograd saves in `ditmoe.model.dit.Block`, attention by a flash kernel and experts
by grouped products. Widths are in multiples of the hidden size D; K experts per token, S shared experts, N
experts.
"""

from dataclasses import dataclass

from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    block: int
    """What a block saves for its backward pass, its input included."""
    block_input: int
    """All that is saved of a block that is computed again in the backward pass."""
    final_layer: int
    """What the final layer and the loss save."""
    backward: int
    """What one block's backward pass holds beside what was saved."""
    stream: int
    """The token stream `[B, T, D]`, which travels between stages."""


def activations(config: ModelConfig, layout: Layout, number_bytes: int, imbalance: float = 1.0) -> Activations:
    """Of a micro-batch.

    Args:
        number_bytes: size of a number of the computation, 2 or 4.
        imbalance: the fullest expert rank gets this many times the mean.
    """
    images, tokens = layout.micro_batch, layout.micro_batch * config.tokens
    unit = tokens * config.hidden * number_bytes
    heads = config.heads // layout.tensor
    qk_norm = config.attention == "qk_norm"

    # The inputs of the two norms, their outputs, both modulated, and both results that are gated.
    whole = 2 + 2 + 2 + 2
    attention = 3 + 1 + (3 if qk_norm else 0)
    statistics = tokens * (2 * 8 + heads * (4 + (2 * 8 if qk_norm else 0)))
    if config.experts:
        feed_forward, received = _mixture(config, layout, imbalance)
        whole_ff, split_ff = feed_forward
        statistics += tokens * _routing_bytes(config, layout, number_bytes)
        wide = 4 * received
    else:
        whole_ff, split_ff, wide = 0.0, 8.0, 4.0
    block = unit * (whole + whole_ff) + unit * (attention + split_ff) / layout.tensor + statistics
    # The condition of each image: its SiLU and the six modulations, three of them with 1 added.
    block += images * config.hidden * number_bytes * 10
    patches = tokens * config.patch**2 * config.out_channels
    return Activations(
        block=round(block),
        block_input=unit,
        final_layer=3 * unit + patches * 4 * 3,
        backward=round(unit * wide / layout.tensor),
        stream=unit,
    )


def _mixture(config: ModelConfig, layout: Layout, imbalance: float) -> tuple[tuple[float, float], float]:
    """Widths that a mixture saves: (whole, shared out over tensor ranks), and those that arrive for each token."""
    k, shared = config.experts_per_token, 4 * config.shared_experts if config.shared_mlp == "swiglu" else 8
    if layout.expert == 1:
        # The rows of the experts, their results; gate, SiLU, up and the product, all of width 4.
        return (2.0 * k, 16.0 * k + shared), k
    # DeepSpeed's fused SwiGLU keeps gate and up, and the product is the input of the third matrix.
    received = k * imbalance
    return (received + k, 12.0 * received + shared), received


def _routing_bytes(config: ModelConfig, layout: Layout, number_bytes: int) -> int:
    """Bytes of a token's routing: two softmaxes over the experts, and the orders of its assignments."""
    orders = 4 if layout.expert == 1 else 7
    return 8 * config.experts + 8 * config.experts_per_token * orders
