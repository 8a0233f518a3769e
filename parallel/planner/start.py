"""Memory of a rank while it starts: its network built and filled, DeepSpeed's copies made, a checkpoint loaded.

A start ends before the first step. What DeepSpeed 0.19 holds meanwhile was read in `deepspeed/runtime/zero` and
seen in the phases of real starts; tests/parallel/planner/test_start_memory.py compares these figures with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.zero import Shard, optimizer_bytes, steps_own_weights

FILLING_BYTES: Final = 4 * 2**20
"""Of values on their way to their place: initial ones, which are drawn in blocks, or those that are read."""
BOX_BYTES: Final = 350
"""Of a box of a checkpoint on every rank, while it is found out what is stored where."""
BOXES_PER_RUN: Final = 2
"""Boxes that a rank's run of a parameter is, in the mean."""
KEPT_BY_ALLOCATOR: Final = 0.4
"""Share of the weights that the C library does not give back when DeepSpeed has copied them; all of them where
experts are dealt out, as DeepSpeed copies those twice. Moments of single parameters find room in it: those of an
AdamW that steps the network's own weights."""


@dataclass(frozen=True)
class StartMemory:
    """Bytes of one rank, without the process itself."""

    device: int
    """The most at once, where the rank computes."""
    host: int
    """The most at once in host memory; of a rank that computes on a CPU, what `device` is and all else."""
    kept: int
    """Of that, what a rank that computes on a CPU still holds at its first step."""
    gathered: int
    """ZeRO 1 and 2 on a CPU: what gloo holds besides whenever weights are gathered."""


def start_memory(
    parts: Sequence[Shard], layout: Layout, size: int, tensors: tuple[int, int], *, on_cpu: bool
) -> StartMemory:
    """Of a rank of a pipeline stage.

    Args:
        parts: the stage's state by the groups that hold the same, each priced by its own ranks.
        size: bytes of a number of the computation.
        tensors: parameters of a checkpoint: those of routed experts, and the others.
        on_cpu: whether the rank computes on a CPU.
    """
    partition = sum(part.partition for part in parts)
    held = sum(part.held for part in parts)
    padded = sum(part.padded for part in parts)
    largest = size * max(part.largest for part in parts)
    ours = (optimizer_bytes(layout.zero, size) + 4) * (partition if layout.zero else held)  # 4: the EMA's
    state = 0 if layout.offload else ours
    own = steps_own_weights(layout.zero, size, offload=layout.offload)
    gathered = 0
    tables = BOX_BYTES * _boxes(layout, tensors)
    if layout.zero == 0:
        kept = most = size * held + state
    elif layout.zero == 3:
        weights = size * (partition + sum(part.persistent for part in parts))
        kept = weights + size * partition + state
        # Cut, and joined to one buffer; a CPU gives back neither the pieces nor what they were joined from.
        kept += 2 * size * partition if on_cpu else 0
        most = kept + largest
    else:
        weights, masters = size * padded, 0 if layout.offload else 4 * partition
        copied = max(size * part.padded for part in parts)
        gathered = sum(size * part.padded for part in parts if part.replicas > 1) if on_cpu else 0
        again = weights * (1 if layout.expert > 1 else KEPT_BY_ALLOCATOR) if on_cpu and not own else 0
        kept = round(weights + again + state)
        most = max(size * held + copied + 2 * masters, kept + gathered)
    beside = max(tables, FILLING_BYTES, size * partition if layout.zero == 3 else 0)
    host = most + max(tables, FILLING_BYTES) if on_cpu else beside
    return StartMemory(device=most, host=host, kept=kept if on_cpu else 0, gathered=gathered)


def _boxes(layout: Layout, tensors: tuple[int, int]) -> int:
    """Boxes of one part of a checkpoint that the layout wrote, of which each rank gets to know all."""
    routed, others = tensors
    if layout.zero == 3:  # each parameter is cut over the ranks that hold it
        return BOXES_PER_RUN * layout.tensor * (routed * layout.expert_copies + others * layout.data)
    return BOXES_PER_RUN * (layout.tensor * (routed + others) + layout.processes)
