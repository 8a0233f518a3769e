"""Bytes that one rank hands to collectives in one optimiser step, by kind.

Counted are the payloads: the whole tensor that a rank puts into a collective or gets out of it, whichever is
larger, as `ditmoe.parallel.planner.ledger` counts them in a run. What DeepSpeed 0.19 sends was read in its source
and is compared with what real processes send in tests/parallel/planner/test_planner_proof.py.
"""

from collections import Counter

from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Group, Layout
from ditmoe.parallel.planner.anatomy import anatomy
from ditmoe.parallel.planner.links import copies_of_token
from ditmoe.parallel.planner.memory import Workload
from ditmoe.parallel.planner.zero import Shard, shards

Traffic = Counter[str]
"""Kind of collective → bytes."""


def step_traffic(config: ModelConfig, layout: Layout, blocks: range, workload: Workload) -> Traffic:
    """Of a rank of the stage with these blocks."""
    traffic: Traffic = Counter()
    for part in (
        expert_traffic(config, layout, blocks, workload),
        tensor_traffic(config, layout, blocks, workload),
        pipe_traffic(config, layout, blocks, workload),
        zero_traffic(config, layout, blocks, workload),
        control_traffic(config, layout, blocks, workload),
    ):
        traffic.update(part)
    return +traffic


def expert_traffic(config: ModelConfig, layout: Layout, blocks: range, workload: Workload) -> Traffic:
    """AutoEP: tokens to their experts and back, in the forward pass and as gradients; counts ahead of them.

    By DeepEP, a token goes once to each rank that has any of its experts.
    """
    if layout.expert == 1:
        return Counter()
    passes = 2 if workload.recompute else 1
    row = config.hidden * workload.number_bytes
    if workload.deep_ep:
        copies = copies_of_token(config.experts, config.experts_per_token, layout.expert)
        exchange = layout.micro_batch * config.tokens * copies * row * (1 + workload.imbalance) / 2
        return Counter({"DeepEP": round(layout.accumulation * len(blocks) * 2 * (passes + 1) * exchange)})
    assignments = layout.micro_batch * config.tokens * config.experts_per_token
    # There and back: the rows that leave, and the rows that arrived and leave again.
    there_and_back = round(assignments * row * (1 + workload.imbalance))
    forward = there_and_back + 4 * config.experts
    return Counter({"all-to-all": layout.accumulation * len(blocks) * (passes * forward + there_and_back)})


def tensor_traffic(config: ModelConfig, layout: Layout, blocks: range, workload: Workload) -> Traffic:
    """Sums over tensor ranks: after attention and after the feed-forward part, and of their inputs' gradients.

    Beside the tokens' gradients there are those of the scores, and of the norms of queries and keys.
    """
    if layout.tensor == 1:
        return Counter()
    tokens, size = layout.micro_batch * config.tokens, workload.number_bytes
    stream = 2 * tokens * config.hidden * size
    forward = stream * (2 if workload.recompute else 1)
    norms = 4 * config.hidden // config.heads * size if config.attention == "qk_norm" else 0
    backward = stream + 4 * tokens * config.experts_per_token + norms
    return Counter({"all-reduce": layout.accumulation * len(blocks) * (forward + backward)})


def pipe_traffic(config: ModelConfig, layout: Layout, blocks: range, workload: Workload) -> Traffic:
    """Between stages: tokens and condition to the next one, their gradients to the one before."""
    neighbours = (blocks[0] > 0) + (blocks[-1] < config.depth - 1)
    crossing = layout.micro_batch * (config.tokens + 1) * config.hidden * workload.number_bytes
    return Counter({"point-to-point": layout.accumulation * neighbours * crossing})


def zero_traffic(config: ModelConfig, layout: Layout, blocks: range, workload: Workload) -> Traffic:
    """Gradients averaged, and weights gathered, over the ranks that hold the same."""
    traffic: Traffic = Counter()
    for of_group in zero_traffic_by_group(config, layout, blocks, workload).values():
        traffic.update(of_group)
    return traffic


def zero_traffic_by_group(
    config: ModelConfig, layout: Layout, blocks: range, workload: Workload
) -> dict[Group, Traffic]:
    """The traffic of ZeRO, apart for each kind of group that it crosses: experts have replicas of their own."""
    size, sums, micro_steps = workload.number_bytes, workload.sum_bytes, layout.accumulation
    parts = [p for p in shards(anatomy(config).stage(blocks), layout, workload.zero) if p.replicas > 1]
    gathered = _gathered_weights(parts, workload)
    found: dict[Group, Traffic] = {}
    for part, gathered_elements in zip(parts, gathered, strict=True):
        traffic = found[part.group] = Counter()
        if layout.zero < 3:
            # DeepSpeed sums whole buckets also where a rank keeps a part of them; ZeRO 2 after each micro-step.
            traffic["all-reduce"] = sums * part.held * (micro_steps if layout.zero == 2 else 1)
            traffic["all-gather"] = size * part.padded if layout.zero else 0
        else:
            traffic["reduce-scatter"] = sums * part.padded * micro_steps
            traffic["all-gather"] = size * (part.persistent + micro_steps * gathered_elements)
    return found


def _gathered_weights(parts: list[Shard], workload: Workload) -> list[int]:
    """ZeRO 3: elements of each part that are gathered in one micro-step.

    They are gathered for the forward and again for the backward pass, but for those kept in between: the last ones
    of the forward pass, in which each part has its share.
    """
    sharded = [part.padded - part.persistent for part in parts]
    total = sum(sharded)
    kept = min(total, workload.zero.reuse_distance // 2)
    found, before = [], 0
    for elements in sharded:
        # Rounded so that the parts' shares add up to all that is kept.
        share = kept * (before + elements) // max(1, total) - kept * before // max(1, total)
        found.append(2 * elements - share)
        before += elements
    return found


def control_traffic(config: ModelConfig, layout: Layout, blocks: range, workload: Workload) -> Traffic:
    """Sums that a step needs to know of itself: the loss, the experts' load, the norm of the gradient."""
    ranks = layout.processes
    if ranks == 1:
        return Counter()
    layers = config.depth if config.experts else 0
    figures = 8 * (4 + layers * (1 + config.experts))
    spans = 0
    if config.experts and config.balance_group > layout.micro_batch:
        passes = 2 if workload.recompute else 1
        spans = 4 * config.experts * len(blocks) * passes * layout.accumulation
    return Counter({"all-reduce": figures + _norm_bytes(layout, workload) + spans})


def _norm_bytes(layout: Layout, workload: Workload) -> int:
    """Numbers that make up DeepSpeed's norm of the gradient, which is computed with offload alone: summed over the
    data ranks and over the parts of the network, for experts that are dealt out apart."""
    if not layout.offload:
        return 0
    shared, copies = layout.data > 1, layout.pipe * layout.tensor > 1
    numbers = shared + copies
    if layout.expert > 1:
        numbers += 1 + (layout.expert_copies > 1) + copies
    if layout.zero == 3:
        return 8 * numbers
    return 4 * numbers + (shared + copies) * (workload.precision == "bf16")  # whether any gradient is infinite
