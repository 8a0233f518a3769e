"""What one rank has to do in a step: FLOPs and bytes of each part, as an ideal program would.

T tokens of all images, A = T·K assignments, D hidden.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from ditmoe.launcher.profiling import parts
from ditmoe.model.config import ModelConfig
from ditmoe.model.count import TRAINING_PASSES, macs_by_module
from ditmoe.parallel.layout import Layout

_SHARED_OUT: Final = (parts.ATTENTION, parts.EXPERTS, parts.SHARED, parts.MLP)
"""What tensor ranks share; everything else each of them computes."""
_ADAMW_NUMBERS: Final = 7
"""fp32 numbers that AdamW reads or writes for each weight: gradient in; weight and two moments in and out."""
_EMA_NUMBERS: Final = 3
"""Weight in, average in and out."""
_NORM_ROWS: Final = 30
"""Rows of D that a block reads or writes for each token outside attention and experts: in the forward pass two
norms with their modulation (in, out) and two gated sums (two in, one out), and twice that in the backward pass."""


@dataclass
class Work:
    """By part."""

    flops: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


def work_of_rank(config: ModelConfig, layout: Layout, blocks: range, number_bytes: int, owned: int) -> Work:
    """What a rank of a stage has to do, on the mean of the expert ranks.

    Args:
        blocks: of the stage.
        number_bytes: of a number that is computed with.
        owned: weights whose optimiser state this rank has.
    """
    work = Work()
    images = layout.micro_batch * layout.accumulation
    for name, macs in macs_by_module(config).items():
        part = parts.part_of_module(name)
        if name.startswith("blocks."):
            times = len(blocks)
        else:
            times = blocks[0] == 0 if part == parts.EMBEDDERS else blocks[-1] == config.depth - 1
        shared_by = layout.tensor if part in _SHARED_OUT else 1
        work.flops[part] += 2 * TRAINING_PASSES * images * times * macs // shared_by
    row = config.hidden * number_bytes
    tokens = images * config.tokens
    work.bytes[parts.NORMS] = len(blocks) * _NORM_ROWS * tokens * row
    if config.experts:
        assignments = tokens * config.experts_per_token
        # There: T in, A out. Back: A in, T out. Their gradients: T and A in, A out; A in, T out.
        work.bytes[parts.DISPATCH] = len(blocks) * (4 * tokens + 5 * assignments) * row
    work.bytes[parts.OPTIMISER] = 4 * _ADAMW_NUMBERS * owned
    work.bytes[parts.EMA] = 4 * _EMA_NUMBERS * owned
    return work
