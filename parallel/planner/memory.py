"""Memory of one rank by part: the training state by the rules of ZeRO, activations, and buffers.

ZeRO: arXiv 1910.02054, section 3. What DeepSpeed 0.19 holds beside it (buckets, gathered weights) was read in
`deepspeed/runtime/zero/stage_1_and_2.py` and `stage3.py`; tests/parallel/planner/test_planner_proof.py holds it.
"""

from dataclasses import dataclass

from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.activations import activations
from ditmoe.parallel.planner.anatomy import anatomy, canonical_parameters
from ditmoe.parallel.planner.start import StartMemory, start_memory
from ditmoe.parallel.planner.zero import DEFAULTS, Shard, ZeroSettings, optimizer_bytes, shards, steps_own_weights


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    weights: int
    """In the type of the computation."""
    gradients: int
    """In the same type. ZeRO 2 keeps whole tensors of which a rank has a part."""
    optimizer: int
    """AdamW's fp32 moments, and fp32 weights where it has its own; none where they are offloaded."""
    ema: int
    """fp32."""
    activations: int = 0
    """Of all micro-batches in flight, and what one block's backward pass needs on top."""
    buffers: int = 0
    """Fixed tensors, buckets that gradients are reduced in, and with ZeRO 3 gathered weights."""
    peak: int = 0
    """The most at once in a step: buckets of ZeRO 1 come after the activations are gone."""
    start: int = 0
    """The most at once before the first step."""

    @property
    def state(self) -> int:
        """Weights, gradients, optimiser and EMA."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def most(self) -> int:
        """The most at any time, which must be there."""
        return max(self.peak, self.start)


@dataclass(frozen=True)
class Workload:
    """What decides memory and traffic beside the layout's axes."""

    precision: str
    """`fp32` or `bf16`."""
    recompute: bool
    """Blocks are computed again in the backward pass."""
    imbalance: float = 1.0
    """The fullest expert rank gets this many times the mean."""
    zero: ZeroSettings = DEFAULTS
    deep_ep: bool = False
    """Tokens travel by DeepEP, rather than in all-to-alls of NCCL."""
    stops_for_sizes: bool = False
    """The host stops in each mixture layer whose experts are dealt out, until the device has the sizes."""

    @property
    def number_bytes(self) -> int:
        """Size of a number of the computation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def sum_bytes(self) -> int:
        """Size of a number in which gradients are averaged."""
        return 2 if self.precision == "bf16" and self.zero.sums_in_bf16 else 4


def in_flight(layout: Layout, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B (arXiv 2006.09503)."""
    return min(layout.pipe - stage, layout.accumulation)


def state_memory(parts: list[Shard], layout: Layout, number_bytes: int) -> RankMemory:
    """The training state of a rank, from the tensors of its stage."""
    held = sum(part.held for part in parts)
    partition = sum(part.partition for part in parts)
    persistent = sum(part.persistent for part in parts)
    stepped = 0 if layout.offload else partition if layout.zero else held
    return RankMemory(
        weights=number_bytes * (partition + persistent if layout.zero == 3 else held),
        gradients=number_bytes * {2: sum(part.touched for part in parts), 3: partition}.get(layout.zero, held),
        optimizer=optimizer_bytes(layout.zero, number_bytes) * stepped,
        ema=4 * stepped,
    )


def rank_memory(config: ModelConfig, layout: Layout, blocks: range, stage: int, workload: Workload) -> RankMemory:
    """Everything on a rank of a pipeline stage.

    Args:
        blocks: the stage's blocks.
        stage: its number.
    """
    size = workload.number_bytes
    parts = shards(anatomy(config).stage(blocks), layout, workload.zero)
    state = state_memory(parts, layout, size)
    last = blocks[-1] == config.depth - 1
    kept = activations(config, layout, size, workload.imbalance)
    per_micro_batch = len(blocks) * (kept.block_input if workload.recompute else kept.block)
    per_micro_batch += kept.final_layer if last else 0
    largest = size * max(part.largest for part in parts)
    working = kept.backward + (kept.block if workload.recompute else 0) + largest
    if layout.pipe > 1:
        working += 2 * kept.stream  # a gradient that has arrived, and one that leaves
    at_once = in_flight(layout, stage) * per_micro_batch + working

    fixed = size * config.tokens * config.hidden if blocks[0] == 0 else 0
    bucket = size * workload.zero.reduce_bucket
    # What is in the bucket, in the number type of the sum: during the backward pass only if it is ever full.
    held = sum(part.held for part in parts)
    summed = workload.sum_bytes * min(workload.zero.reduce_bucket, held) if workload.sum_bytes > size else 0
    when_full = summed if held > workload.zero.reduce_bucket else 0
    partition = sum(part.partition for part in parts)
    own = steps_own_weights(layout.zero, size, offload=layout.offload)
    if layout.zero == 0:
        in_backward, in_step = 0, size * min(workload.zero.reduce_bucket, sum(part.held for part in parts))
    elif layout.zero == 1:
        in_backward, in_step = 0, bucket + summed
    elif layout.zero == 2:
        in_backward, in_step = bucket + when_full, max(0 if own else 4 * partition, bucket + summed)
    else:
        gathered = size * _gathered(parts, workload)
        in_backward, in_step = bucket + gathered + when_full, bucket + max(4 * partition, summed)
    before = state.weights + state.optimizer + state.ema + fixed
    whole_gradients = layout.zero >= 2 or layout.accumulation > 1
    backward = at_once + state.gradients if whole_gradients else max(at_once, state.gradients)
    peak = before + max(backward + in_backward, state.gradients + in_step)
    return RankMemory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        ema=state.ema,
        activations=at_once,
        buffers=fixed + max(in_backward, in_step),
        peak=peak,
        start=fixed + _start(config, parts, layout, workload, on_cpu=False).device,
    )


def start_of_stage(
    config: ModelConfig, layout: Layout, blocks: range, workload: Workload, *, on_cpu: bool
) -> StartMemory:
    """Memory of a rank of a pipeline stage while it starts."""
    return _start(config, shards(anatomy(config).stage(blocks), layout, workload.zero), layout, workload, on_cpu)


def _start(
    config: ModelConfig, parts: list[Shard], layout: Layout, workload: Workload, on_cpu: bool
) -> StartMemory:
    return start_memory(parts, layout, workload.number_bytes, canonical_parameters(config), on_cpu=on_cpu)


def _gathered(parts: list[Shard], workload: Workload) -> int:
    """ZeRO 3: elements of gathered weights that are there at once.

    At the turn from the forward to the backward pass, all those are kept that are used again within the distance,
    in which each weight is passed twice.
    """
    shared = sum(part.padded - part.persistent for part in parts)
    return min(shared, workload.zero.reuse_distance // 2 + workload.zero.prefetch_bucket)
