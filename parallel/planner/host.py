"""Host memory of a run's processes, and the size of its checkpoints."""

from dataclasses import dataclass
from typing import Final

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.anatomy import anatomy
from ditmoe.parallel.planner.memory import RankMemory, Workload
from ditmoe.parallel.planner.zero import shards
from ditmoe.parallel.stages import stage_blocks

STATE_BYTES: Final = 16
"""Of each parameter in a checkpoint: weight, EMA and two moments, all fp32."""
OFFLOADED_BYTES: Final = 20
"""Of each parameter whose optimiser is offloaded: the same state, and an fp32 gradient."""
PROCESS_BYTES: Final = 2**29
"""Of a process with torch and DeepSpeed loaded, before it has a network."""
WORKER_BYTES: Final = 2**28
"""Of a process that reads data."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory of one rank."""

    copy: int
    """The saver's copy of the state that the rank writes; 0 where training waits for the disk instead."""
    offload: int
    """The optimiser's state and the EMA, where they are kept there."""
    training: int
    """Weights, gradients, optimiser, EMA and activations, where the rank computes on a CPU."""
    processes: int
    """The process itself, and those that read its data."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.copy + self.offload + self.training + self.processes


def host_memory(
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    memory: RankMemory,
    *,
    on_cpu: bool,
    asynchronous: bool,
    workers: int,
) -> HostMemory:
    """Of the rank that needs most.

    Args:
        memory: of that rank, where it computes.
        on_cpu: whether it computes on a CPU.
        asynchronous: whether checkpoints are written while training goes on.
        workers: processes of a rank that read data.
    """
    owned = max(
        sum(part.held // part.replicas for part in shards(anatomy(config).stage(blocks), layout, workload.zero))
        for blocks in stage_blocks(config, layout.pipe)
    )
    return HostMemory(
        copy=STATE_BYTES * owned if asynchronous else 0,
        offload=OFFLOADED_BYTES * owned if layout.offload else 0,
        training=memory.peak if on_cpu else 0,
        processes=PROCESS_BYTES + workers * WORKER_BYTES,
    )


def checkpoint_bytes(config: ModelConfig) -> int:
    """Size of a checkpoint on disk, whatever the layout."""
    return STATE_BYTES * count(config).total
