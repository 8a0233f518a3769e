"""Megatron-core's process groups for tensor layouts, as DeepSpeed takes them."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from ditmoe.parallel.alone import TIMEOUT
from ditmoe.parallel.groups import Pair, check_groups, groups_of_unit
from ditmoe.parallel.layout import Layout


class MegatronGrid:
    """Megatron-core's groups under the names by which DeepSpeed asks a model-parallel unit (`mpu`) for them.

    megatron-core itself has no `get_model_parallel_world_size`, `get_model_parallel_rank` and
    `get_data_parallel_group_ranks`. A model-parallel group is a whole copy of the network: all its stages and
    tensor ranks.
    """

    def get_model_parallel_group(self) -> Any:
        """The ranks that hold one copy of the network."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """This rank's number among them."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> Any:
        """The ranks that share out the parameters of each layer."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Their number."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's number among them."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_pipe_parallel_group(self) -> Any:
        """The stages that one data and tensor rank's activations go through."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipe_parallel_world_size(self) -> int:
        """Their number."""
        return int(parallel_state.get_pipeline_model_parallel_world_size())

    def get_data_parallel_group(self) -> Any:
        """The ranks that hold the same parameters, and average their gradients."""
        return parallel_state.get_data_parallel_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers among all ranks."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return int(parallel_state.get_data_parallel_world_size())

    def get_data_parallel_rank(self) -> int:
        """This rank's number among them."""
        return int(parallel_state.get_data_parallel_rank())


def make_megatron_grid(layout: Layout) -> MegatronGrid:
    """Make megatron-core's groups for a layout, in place of those of an earlier one; a collective call.

    Raises:
        AssertionError: one of them is not the layout's.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipe,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds()) // 60,
        order="tp-cp-ep-dp-pp",  # counts along tensor first, then data, then pipe, as `Layout` does
        create_gloo_process_groups=False,
    )
    grid = MegatronGrid()
    check_groups(_groups_of_megatron(grid, layout))
    return grid


def _groups_of_megatron(grid: MegatronGrid, layout: Layout) -> Iterator[Pair]:
    """Every group of megatron-core's that its linears can communicate over; its expert axis is not used."""
    rank = dist.get_rank()
    yield from groups_of_unit(grid, layout, "megatron-core's")
    tensor, data = layout.group(rank, "tensor"), layout.group(rank, "data")
    yield "megatron-core's tensor group of experts", parallel_state.get_expert_tensor_parallel_group(), tensor
    yield "megatron-core's data group of experts", parallel_state.get_expert_data_parallel_group(), data
    yield "megatron-core's expert group", parallel_state.get_expert_model_parallel_group(), [rank]
