"""Comparing the process groups of DeepSpeed, and of megatron-core where it is used, with the rank grid.

The libraries number the ranks and make groups of them by rules of their own. Where one differs, training runs on
without an error and computes something else; so every group is compared before the first step.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from ditmoe.parallel.layout import Layout

Pair = tuple[str, Any, list[int]]
"""Name of a process group, the group, and the ranks that the layout expects in it, in this order."""


def check_groups(pairs: Iterable[Pair]) -> None:
    """Compare process groups with the layout's.

    Raises:
        AssertionError: one joins other ranks, or in another order; names each, its ranks and the layout's.
    """
    differing = [
        f"{name} joins ranks {found}, expected {expected}"
        for name, group, expected in pairs
        if (found := dist.get_process_group_ranks(group)) != expected
    ]
    assert not differing, f"process groups differ from the rank grid on rank {dist.get_rank()}: {differing}"


def groups_of_engine(engine: Any, layout: Layout) -> Iterator[Pair]:
    """Every group that a DeepSpeed engine communicates over."""
    rank = dist.get_rank()
    data = layout.group(rank, "data")
    yield "DeepSpeed's data group", engine.data_parallel_group, data
    if layout.zero:
        yield "ZeRO's data group", engine.optimizer.dp_process_group, data
    if layout.expert > 1:
        name = f"ep_size_{layout.expert}"
        yield "DeepSpeed's expert group", engine.expert_parallel_group[name], layout.expert_ranks(rank)
        copies = layout.expert_copy_ranks(rank)
        yield "DeepSpeed's group of an expert's copies", engine.expert_data_parallel_group[name], copies
    if engine.mpu is not None:
        yield from groups_of_unit(engine.mpu, layout, "the engine's")
        if layout.zero:
            model = engine.optimizer.model_parallel_group
            yield "ZeRO's model-parallel group", model, layout.group(rank, "pipe", "tensor")


def groups_of_unit(unit: Any, layout: Layout, whose: str) -> Iterator[Pair]:
    """Every group of a model-parallel unit (`mpu`): DeepSpeed's pipeline grid, or megatron-core's groups."""
    from deepspeed.utils import bwc

    rank = dist.get_rank()
    yield f"{whose} tensor group", bwc.bwc_tensor_model_parallel_group(unit), layout.group(rank, "tensor")
    yield f"{whose} data group", unit.get_data_parallel_group(), layout.group(rank, "data")
    yield f"{whose} pipe group", bwc.bwc_pipeline_parallel_group(unit), layout.group(rank, "pipe")
    model = layout.group(rank, "pipe", "tensor")
    yield f"{whose} model-parallel group", unit.get_model_parallel_group(), model
