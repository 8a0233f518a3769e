"""Host memory of a run's processes, and the size of its checkpoints."""

from dataclasses import dataclass
from typing import Final

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.anatomy import anatomy
from ditmoe.parallel.planner.memory import RankMemory, Workload, start_of_stage
from ditmoe.parallel.planner.zero import shards
from ditmoe.parallel.stages import stage_blocks

STATE_BYTES: Final = 16
"""Of each parameter in a checkpoint: weight, EMA and two moments, all fp32."""
OFFLOADED_BYTES: Final = 20
"""Of each parameter whose optimiser is offloaded: the same state, and an fp32 gradient."""
PROCESS_BYTES: Final = 2**29
"""Of a process with torch and DeepSpeed loaded, and all that a run needs beside its network."""
LIBRARY_BYTES: Final = round(0.09 * 2**30)
"""Of that, pages of libraries, which the processes of a machine share."""
STARTING_BYTES: Final = round(0.36 * 2**30)
"""Of such a process on a CPU before its first step, with threads that have made initial values."""
BUFFERS_HELD: Final = 3
"""Times that a step's buffers are held on a CPU, unless activations take as much: the C library keeps what a step
frees, and others have taken a part of it before the next buffer is made."""
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
    start: int
    """All of it at most before the first step, the process and its readers included."""
    processes: int
    """The process itself, and those that read its data."""

    @property
    def total(self) -> int:
        """The most at any time."""
        return max(self.start, self.copy + self.offload + self.training + self.processes)


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
    stages = stage_blocks(config, layout.pipe)
    owned = max(
        sum(part.held // part.replicas for part in shards(anatomy(config).stage(blocks), layout, workload.zero))
        for blocks in stages
    )
    # Stages of equal tensors start alike.
    distinct = {(len(blocks), blocks[0] == 0, blocks[-1] == config.depth - 1): blocks for blocks in stages}
    starts = [start_of_stage(config, layout, blocks, workload, on_cpu=on_cpu) for blocks in distinct.values()]
    start = max(starts, key=lambda found: found.host)
    offload = OFFLOADED_BYTES * owned if layout.offload else 0
    copy = STATE_BYTES * owned if asynchronous else 0
    training = 0
    if on_cpu:
        # Of a bucket only what is written to counts: the gradients that the rank has.
        held = max(
            sum(part.held for part in shards(anatomy(config).stage(b), layout, workload.zero)) for b in stages
        )
        buffers = round(memory.buffers * min(1.0, held / count(config).total))
        moving = max(memory.activations, BUFFERS_HELD * buffers)
        training = start.kept + memory.gradients + start.gathered + moving
    return HostMemory(
        copy=copy,
        offload=offload,
        training=training,
        start=start.host + offload + (STARTING_BYTES if on_cpu else PROCESS_BYTES) + workers * WORKER_BYTES,
        processes=PROCESS_BYTES + workers * WORKER_BYTES,
    )


def checkpoint_bytes(config: ModelConfig) -> int:
    """Size of a checkpoint on disk, whatever the layout."""
    return STATE_BYTES * count(config).total
