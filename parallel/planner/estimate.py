"""How long one optimiser step of a layout takes: an estimate from peaks, bandwidths and a few stated assumptions.

Compute runs at `efficiency` of the GPU's peak, beside it the element-wise work at its memory's bandwidth; or at
the pace at which the host starts kernels, where that is slower.
Collectives take what `ditmoe.parallel.planner.links` says, each over the ranks of its own group, and are not
overlapped with compute; of ZeRO 3's, half the compute's time is. Stages run 1F1B at the pace of the slowest.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import TRAINING_PASSES, PartMacs, macs_of_parts
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.activations import activations
from ditmoe.parallel.planner.anatomy import anatomy
from ditmoe.parallel.planner.gpus import Gpu
from ditmoe.parallel.planner.links import COLLECTIVE_SECONDS, deep_ep_seconds, link_seconds
from ditmoe.parallel.planner.memory import RankMemory, Workload, rank_memory
from ditmoe.parallel.planner.traffic import (
    Traffic,
    control_traffic,
    expert_traffic,
    pipe_traffic,
    step_traffic,
    tensor_traffic,
    zero_traffic_by_group,
)
from ditmoe.parallel.planner.zero import shards
from ditmoe.parallel.stages import stage_blocks

ELEMENT_PASSES: Final = 5
"""Times that a saved activation goes through memory: written, read, and its gradient likewise."""
KERNELS_PER_BLOCK: Final = 150
"""Kernels of a block's forward and backward pass, each at least KERNEL_SECONDS on the host."""
KERNEL_SECONDS: Final = 5e-6
ZERO_3_SECONDS: Final = 1e-4
"""Host time of fetching and releasing one tensor for one pass with ZeRO 3, in Python hooks."""
ZERO_3_OVERLAP: Final = 0.5
"""Share of the compute's time in which ZeRO 3 can gather and reduce."""
HOST_BANDWIDTH: Final = 10e9
"""Bytes per second that one rank's part of an optimiser step moves in host memory."""


@dataclass(frozen=True)
class Machine:
    """The GPUs that a run is planned for."""

    gpu: Gpu
    efficiency: float = 0.4
    """Share of the peak that matrix products reach."""

    USABLE: ClassVar[float] = 0.92
    """Share of a GPU's memory that is for a run: the rest is the CUDA context's, NCCL's, and lost in fragments."""

    def fits(self, memory: RankMemory) -> bool:
        """Whether a rank's memory is there."""
        return memory.most <= self.USABLE * self.gpu.memory_gib * 2**30


@dataclass(frozen=True)
class Plan:
    """One layout, what it needs and how fast it should be."""

    layout: Layout
    workload: Workload
    memory: RankMemory
    """Of the stage that needs most."""
    stage: int
    """That stage."""
    traffic: Traffic
    """Of the stage that sends most."""
    bubble: float
    """Share of the pipeline's time in which a stage waits: (p − 1) / (m + p − 1)."""
    seconds: dict[str, float]
    """Of one step, by part."""
    images_per_second: float
    mfu: float
    """3 × forward FLOPs of the batch / (step × peak of all GPUs)."""
    pace: str
    """What the compute waits for: matrix products, the GPU's memory, or the host that starts kernels."""

    @cached_property
    def step_seconds(self) -> float:
        """Of one optimiser step."""
        return sum(self.seconds.values())

    @property
    def least_seconds(self) -> float:
        """The step if compute hid all that it could of the experts' exchange; it hides nothing of it."""
        return self.step_seconds - min(self.seconds["compute"], self.seconds["all-to-all"])

    @property
    def limit(self) -> tuple[str, float]:
        """The part that takes longest, and its share of the step."""
        part = max(self.seconds, key=lambda name: self.seconds[name])
        return part, self.seconds[part] / self.step_seconds

    def overrides(self) -> list[str]:
        """The layout as keys of a configuration."""
        layout = self.layout
        return [
            f"parallel.pipe={layout.pipe}",
            f"parallel.tensor={layout.tensor}",
            f"parallel.expert={layout.expert}",
            f"parallel.data={layout.data}",
            f"parallel.zero={layout.zero}",
            f"parallel.activation_checkpointing={str(self.workload.recompute).lower()}",
            f"train.micro_batch={layout.micro_batch}",
            *(["parallel.offload=true"] if layout.offload else []),
        ]


def plan(config: ModelConfig, layout: Layout, workload: Workload, machine: Machine) -> Plan:
    """Memory, traffic and time of a layout of a complete configuration."""
    stages = stage_blocks(config, layout.pipe)
    macs = macs_of_parts(config)
    distinct = _distinct(config, stages)
    fullest, memory = fullest_stage(config, layout, workload)
    busiest = max((step_traffic(config, layout, blocks, workload) for _, blocks in distinct), key=_total)
    slowest = max((blocks for _, blocks in distinct), key=lambda found: _stage_macs(macs, config, found))
    compute = _compute(config, layout, slowest, workload, machine)
    every = [blocks for _, blocks in distinct]
    seconds = _seconds(config, layout, every, slowest, memory, max(compute.values()), workload, machine)
    step = sum(seconds.values())
    flops = 2 * TRAINING_PASSES * _stage_macs(macs, config, range(config.depth)) * layout.batch
    peak = machine.gpu.tflops(workload.precision) * 1e12 * layout.processes
    return Plan(
        layout=layout,
        workload=workload,
        memory=memory,
        stage=fullest,
        traffic=busiest,
        bubble=(layout.pipe - 1) / (layout.accumulation + layout.pipe - 1),
        seconds=seconds,
        images_per_second=layout.batch / step,
        mfu=flops / (step * peak),
        pace=max(compute, key=lambda name: compute[name]),
    )


def fullest_stage(config: ModelConfig, layout: Layout, workload: Workload) -> tuple[int, RankMemory]:
    """The pipeline stage that needs most memory, and what a rank of it needs."""
    memories = {
        number: rank_memory(config, layout, blocks, number, workload)
        for number, blocks in _distinct(config, stage_blocks(config, layout.pipe))
    }
    fullest = max(memories, key=lambda number: memories[number].most)
    return fullest, memories[fullest]


def _distinct(config: ModelConfig, stages: tuple[range, ...]) -> list[tuple[int, range]]:
    """The stages that can need most, or send most: of those with equal tensors the first, with most in flight."""
    most: dict[tuple[int, bool, bool], tuple[int, range]] = {}
    for number, blocks in enumerate(stages):
        most.setdefault((len(blocks), blocks[0] == 0, blocks[-1] == config.depth - 1), (number, blocks))
    return list(most.values())


def _stage_macs(macs: PartMacs, config: ModelConfig, blocks: range) -> int:
    ends = (macs.embedders if blocks[0] == 0 else 0) + (macs.final_layer if blocks[-1] == config.depth - 1 else 0)
    return len(blocks) * macs.block + ends


def _total(traffic: Traffic) -> int:
    return sum(traffic.values())


def _compute(
    config: ModelConfig, layout: Layout, blocks: range, workload: Workload, machine: Machine
) -> dict[str, float]:
    """Seconds of one micro-step on a stage, by what they might be waiting for; the longest is what it takes."""
    gpu, macs = machine.gpu, macs_of_parts(config)
    passes = TRAINING_PASSES + workload.recompute
    flops = 2 * passes * _stage_macs(macs, config, blocks) * layout.micro_batch / layout.tensor
    # The fullest expert rank computes its share of the routed experts while the others wait.
    flops *= 1 + (workload.imbalance - 1) * macs.routed / macs.block
    saved = len(blocks) * activations(config, layout, workload.number_bytes, workload.imbalance).block
    products = flops / (gpu.tflops(workload.precision) * 1e12 * machine.efficiency)
    moved = saved * ELEMENT_PASSES / (gpu.memory_bandwidth * 1e9)
    on_host = len(blocks) * KERNELS_PER_BLOCK * KERNEL_SECONDS * passes / TRAINING_PASSES
    if layout.zero == 3:
        on_host += len(list(anatomy(config).stage(blocks))) * (passes - 1) * ZERO_3_SECONDS
    device = "matrix products" if products >= moved else "memory bandwidth"
    return {device: products + moved, "starting kernels on the host": on_host}


def _seconds(
    config: ModelConfig,
    layout: Layout,
    stages: list[range],
    blocks: range,
    memory: RankMemory,
    compute: float,
    workload: Workload,
    machine: Machine,
) -> dict[str, float]:
    """One step's time by part, each at the pace of the stage that it takes longest on.

    Args:
        blocks: of the stage that computes longest.
        compute: its seconds for a micro-step.
    """
    gpu, micro_steps = machine.gpu, layout.accumulation
    exchange = _exchange_seconds(config, layout, blocks, workload, gpu)
    tensor = tensor_traffic(config, layout, blocks, workload)["all-reduce"] / micro_steps
    ring = link_seconds("all-reduce", tensor, layout, "tensor", gpu)
    ring += len(blocks) * 2 * (2 + workload.recompute) * COLLECTIVE_SECONDS if layout.tensor > 1 else 0
    sent = max(pipe_traffic(config, layout, found, workload)["point-to-point"] for found in stages)
    hop = link_seconds("point-to-point", sent / micro_steps, layout, "pipe", gpu)
    hop += 4 * COLLECTIVE_SECONDS if layout.pipe > 1 else 0

    turns = micro_steps + layout.pipe - 1
    averaging = max(_averaging_seconds(config, layout, found, workload, machine) for found in stages)
    if layout.zero == 3:
        averaging = max(0.0, averaging - ZERO_3_OVERLAP * micro_steps * compute)
    stepping = (memory.optimizer * 2 + memory.ema * 2 + memory.gradients * 2) / (gpu.memory_bandwidth * 1e9)
    if layout.offload:
        parts = shards(anatomy(config).stage(blocks), layout, workload.zero)
        stepping += (
            40 * sum(part.partition for part in parts) / HOST_BANDWIDTH
        )  # 16 bytes of state, twice, and EMA
    return {
        "compute": micro_steps * compute,
        "all-to-all": micro_steps * exchange,
        "tensor sums": micro_steps * ring,
        "between stages": micro_steps * hop,
        "bubble": (turns - micro_steps) * (compute + exchange + ring + hop),
        "ZeRO and gradients": averaging,
        "optimiser": stepping,
    }


def _exchange_seconds(config: ModelConfig, layout: Layout, blocks: range, workload: Workload, gpu: Gpu) -> float:
    """Of one micro-step: tokens to their experts and back, and what each exchange takes to start.

    Nothing of it is beside compute: AutoEP waits for each exchange before it starts the next kernel, in the same
    stream. Where the host stops for sizes, the device has nothing to do for about as long as a collective takes to
    start; DeepEP stops for them in every pass forward.
    """
    if layout.expert == 1:
        return 0.0
    passes = 1 + workload.recompute
    stops = passes if workload.deep_ep or workload.stops_for_sizes else 0
    if workload.deep_ep:
        row = (
            layout.micro_batch
            * config.tokens
            * config.hidden
            * workload.number_bytes
            * (1 + workload.imbalance)
            / 2
        )
        seconds = deep_ep_seconds(row, config.experts, config.experts_per_token, layout, gpu)
        return len(blocks) * (2 * (passes + 1) * (seconds + COLLECTIVE_SECONDS) + stops * COLLECTIVE_SECONDS)
    payload = expert_traffic(config, layout, blocks, workload)["all-to-all"] / layout.accumulation
    starts = len(blocks) * (3 * passes + 2 + stops)
    return link_seconds("all-to-all", payload, layout, "expert", gpu) + starts * COLLECTIVE_SECONDS


def _averaging_seconds(
    config: ModelConfig, layout: Layout, blocks: range, workload: Workload, machine: Machine
) -> float:
    """Gradients averaged, weights gathered, each over the ranks that hold the same; and the sums of each step."""
    total = 2 * COLLECTIVE_SECONDS * bool(control_traffic(config, layout, blocks, workload))
    for group, traffic in zero_traffic_by_group(config, layout, blocks, workload).items():
        for kind, payload in traffic.items():
            total += link_seconds(kind, payload, layout, group, machine.gpu) + COLLECTIVE_SECONDS
    return total
