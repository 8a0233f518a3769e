"""Fragments: which runs of which canonical parameters this rank's optimiser owns.

DeepSpeed keeps the fp32 weights and Adam's moments of ZeRO 1–3 in flat buffers cut over ranks. This module finds
each parameter's run in them, so that the EMA, checkpoints and loads work on one description for every stage:
a canonical name, a start within the flattened parameter, and views of the weight and its two moments.

It reads private parts of DeepSpeed 0.19 (named where they are used); tests/parallel covers each stage.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.model.canonical import split_experts
from ditmoe.parallel.boxes import Placement
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.tensor.shards import TensorShard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A run of one flattened canonical parameter, as views of this rank's fp32 state."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole canonical parameter."""
    start: int
    """Where the run begins in the flattened parameter, or in this rank's part of it (`placement`)."""
    weight: Tensor
    """fp32 `[length]`, a view of the weight that the optimiser steps."""
    moments: dict[str, Tensor]
    """Adam's `exp_avg` and `exp_avg_sq`, fp32 `[length]` views."""
    stepped: Tensor
    """The tensor that AdamW steps, of which `weight` is a view: a flat buffer, or the parameter (ZeRO 0)."""
    replica: int = 0
    """This rank's number among the ranks that hold the same run (ZeRO 0, and tensor ranks)."""
    replicas: int = 1
    placement: Placement | None = None
    """What this rank's tensor, within which `start` counts, is of the canonical one; None: all of it."""

    def gradient(self) -> Tensor | None:
        """The gradient that AdamW is about to step with, `[length]`; None where there is none at the moment."""
        if self.stepped.grad is None:
            return None
        return self.stepped.grad.reshape(-1).narrow(0, self.offset, self.weight.numel())

    @property
    def offset(self) -> int:
        """Where the run begins in `stepped`."""
        return int(self.weight.storage_offset() - self.stepped.storage_offset())


@dataclass(frozen=True)
class _Run:
    """A run of one tensor of the module tree, before it is cut into canonical parameters."""

    start: int
    stepped: Tensor
    """The tensor that AdamW steps."""
    offset: int
    """Where the run begins in it."""
    length: int
    moments: dict[str, Tensor]
    """Adam's moments of all of `stepped`, flat."""
    replica: int = 0
    replicas: int = 1


def find_fragments(engine: Any, network: nn.Module, layout: Layout) -> list[Fragment]:
    """All fragments of this rank, in the order of the module tree.

    Args:
        engine: a `DeepSpeedEngine` whose basic optimiser is torch's AdamW.
        network: what it trains: this rank's blocks, under their canonical names.
    """
    _create_moments(engine.basic_optimizer, engine.optimizer, layout.zero)
    find_run = {0: _whole_run, 1: _run_of_zero_1_2, 2: _run_of_zero_1_2, 3: _run_of_zero_3}[layout.zero]
    expert_rank = layout.expert_rank(dist.get_rank())
    fragments: list[Fragment] = []
    for name, parameter in network.named_parameters():
        run = find_run(engine, parameter)
        if run is not None and run.length:
            shape, shard = tuple(getattr(parameter, "ds_shape", parameter.shape)), shard_of(parameter)
            if shard is None:
                run = _among_tensor_ranks(run, layout)
            cut = _cut(published_name(name), shape, expert_rank, run)
            fragments.extend(cut if shard is None else (_within_whole(fragment, shard) for fragment in cut))
    return fragments


def _among_tensor_ranks(run: _Run, layout: Layout) -> _Run:
    """Count the tensor ranks, which hold the same run of whatever is not shared out over them."""
    tensor_rank = layout.tensor_rank(dist.get_rank())
    return replace(run, replica=run.replica * layout.tensor + tensor_rank, replicas=run.replicas * layout.tensor)


def _within_whole(fragment: Fragment, shard: TensorShard) -> Fragment:
    """A fragment of a tensor rank's part, as one of the whole canonical parameter."""
    shape = shard.whole_shape(fragment.shape)
    return replace(fragment, shape=shape, placement=shard.placement(shape))


_REPLACED = (
    (re.compile(r"\.moe\.router\.gate\."), ".moe.gate."),
    (re.compile(r"\.moe\.experts\.w1$"), ".moe.experts.gate_proj"),
    (re.compile(r"\.moe\.experts\.w2$"), ".moe.experts.down_proj"),
    (re.compile(r"\.moe\.experts\.w3$"), ".moe.experts.up_proj"),
)


def published_name(name: str) -> str:
    """Undo the renaming of DeepSpeed's expert-parallel layer."""
    for pattern, replacement in _REPLACED:
        name = pattern.sub(replacement, name)
    return name


def _cut(name: str, shape: tuple[int, ...], expert_rank: int, run: _Run) -> Iterator[Fragment]:
    """Cut a run of a tensor into its canonical parameters: one, or one per expert it touches."""
    experts = split_experts(name, expert_rank * shape[0], shape[0])
    if experts is None:
        yield _fragment(name, shape, run, run.start, 0, run.length)
        return
    size = torch.Size(shape[1:]).numel()
    end = run.start + run.length
    for number, expert in enumerate(experts):
        first, last = max(run.start, number * size), min(end, (number + 1) * size)
        if first < last:
            yield _fragment(expert, tuple(shape[1:]), run, first - number * size, first - run.start, last - first)


def _fragment(name: str, shape: tuple[int, ...], run: _Run, start: int, skipped: int, length: int) -> Fragment:
    """The fragment of so many elements that begins after the first `skipped` of a run."""

    def view(flat: Tensor) -> Tensor:
        return flat.narrow(0, run.offset + skipped, length)

    moments = {key: view(moment) for key, moment in run.moments.items()}
    weight = view(run.stepped.detach().view(-1))
    return Fragment(name, shape, start, weight, moments, run.stepped, run.replica, run.replicas)


def _create_moments(adam: torch.optim.Optimizer, optimizer: Any, zero: int) -> None:
    """Create AdamW's state before the first step, so that its views can be taken and loaded into."""
    for tensor in _stepped_tensors(adam, optimizer, zero):
        adam.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            **{key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS},
        }


def _stepped_tensors(adam: torch.optim.Optimizer, optimizer: Any, zero: int) -> list[Tensor]:
    """The tensors that AdamW steps: parameters (ZeRO 0) or this rank's flat fp32 partitions."""
    if zero == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in adam.param_groups for tensor in group["params"]]


def set_optimizer_step(engine: Any, step: int) -> None:
    """Tell AdamW how many steps its moments have seen (its bias correction needs it)."""
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(step)


def _whole_run(engine: Any, parameter: Tensor) -> _Run:
    """ZeRO 0: every rank of the parameter's group holds all of it."""
    group = _replica_group(engine, parameter)
    state = engine.basic_optimizer.state[parameter]
    moments = {key: state[key].view(-1) for key in MOMENTS}
    return _Run(0, parameter, 0, parameter.numel(), moments, dist.get_rank(group), dist.get_world_size(group))


def _replica_group(engine: Any, parameter: Tensor) -> Any:
    if getattr(parameter, "allreduce", True):
        return engine.data_parallel_group
    return engine.expert_data_parallel_group[parameter.group_name]  # type: ignore[attr-defined]


def _run_of_zero_1_2(engine: Any, parameter: Tensor) -> _Run | None:
    """ZeRO 1 and 2: the overlap of the parameter and this rank's partition, both views of one flat buffer. AdamW
    steps the partition, or its parameters one by one (`step_own_weights`).

    Where the parameter lies in the buffer is read off its own address: DeepSpeed lays parameters out in another
    order than that of its lists (`round_robin_gradients`), and its `_hp_mapping` does not know of that.
    """
    optimizer = engine.optimizer
    group = next(
        number for number, flat in enumerate(optimizer.bit16_groups_flat) if _lies_within(parameter, flat)
    )
    size = optimizer.partition_size[group]
    partition = dist.get_rank(optimizer.real_dp_process_group[group]) * size
    address = parameter.storage_offset() - optimizer.bit16_groups_flat[group].storage_offset()
    first, last = max(address, partition), min(address + parameter.numel(), partition + size)
    if last <= first:
        return None
    place = optimizer.single_partition_of_fp32_groups[group].storage_offset() + first - partition
    stepped = _containing(place, engine.basic_optimizer.param_groups[group]["params"])
    return _run_of_flat(engine, stepped, first - address, place - stepped.storage_offset(), last - first)


def _containing(place: int, tensors: Sequence[Tensor]) -> Tensor:
    """That of tensors of one storage, in the order in which they lie there, which contains a place of it."""
    return tensors[bisect_right(tensors, place, key=lambda tensor: int(tensor.storage_offset())) - 1]


def _lies_within(tensor: Tensor, flat: Tensor) -> bool:
    """Whether a tensor is a view of a flat buffer."""
    return tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def _run_of_zero_3(engine: Any, parameter: Any) -> _Run | None:
    """ZeRO 3: every parameter is cut evenly over its group, the last piece padded."""
    optimizer = engine.optimizer
    subgroup, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    piece = parameter.partition_numel()
    start = optimizer._get_param_partition_rank(parameter) * piece
    length = min(piece, parameter.ds_numel - start)
    if length <= 0:
        return None
    return _run_of_flat(engine, optimizer.fp32_partitioned_groups_flat[subgroup], start, offset, length)


def _run_of_flat(engine: Any, flat: Tensor, start: int, offset: int, length: int) -> _Run:
    """A run that lies in a flat buffer which AdamW steps as one tensor."""
    state = engine.basic_optimizer.state[flat]
    return _Run(start, flat, offset, length, {key: state[key] for key in MOMENTS})


@torch.no_grad()
def refresh_weights(engine: Any, zero: int) -> None:
    """Bring the weights that the network computes with up to the fp32 ones, after those were written to."""
    if zero in (1, 2):
        engine.optimizer.update_lp_params()
    elif zero == 3:
        # Small parameters stay gathered between steps: they are let go first and gathered anew at the end.
        engine.optimizer._partition_all_parameters()
        for subgroup in range(len(engine.optimizer.fp16_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(subgroup)
        persistent = engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
