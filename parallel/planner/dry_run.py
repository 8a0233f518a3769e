"""One rank's step of any layout without its memory: the real network under fake tensors, in a fake process group.

The rank's stage of the network is built, with its experts and its share of the tensor ranks' widths, and makes
real forward and backward passes in the order of the 1F1B schedule. What is counted is what the tensors would hold
and what the collectives would send. ZeRO around it is `sharded_state.py`; DeepSpeed's expert-parallel layer,
`expert_layer.py`.
"""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT, balance_losses
from ditmoe.model.errors import UserError
from ditmoe.model.experts.moe import Experts, MoE
from ditmoe.model.objective import Draws, make_objective
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.expert_layer import PlannedExpertLayer, even_routing
from ditmoe.parallel.planner.ledger import Ledger
from ditmoe.parallel.planner.memory import RankMemory, Workload, in_flight
from ditmoe.parallel.planner.sharded_state import Replicated, ShardedState
from ditmoe.parallel.stages import stage_blocks


@dataclass(frozen=True)
class DryRun:
    """What one rank's step needed."""

    rank: int
    stage: int
    blocks: range
    """That the stage holds."""
    parameters: int
    """That the rank holds before ZeRO shards them."""
    memory: RankMemory
    """`activations` are those that the forward passes in flight leave for the backward pass."""
    sent: Counter[str]
    """Kind of collective → bytes of the payloads of one optimiser step."""
    seconds: float
    """That it took to run."""


def dry_run(
    config: ModelConfig, objective: ObjectiveConfig, layout: Layout, workload: Workload, rank: int
) -> DryRun:
    """Run a rank's step.

    Args:
        config: complete.
        rank: of the layout's processes.

    Raises:
        UserError: fp32 with experts that are dealt out, or tokens that travel by DeepEP.
    """
    if workload.deep_ep and layout.expert > 1:
        raise UserError(
            "deepspeed.expert_parallel.comm_backend = deepep: a dry run sends tokens in all-to-alls; expected comm"
        )
    if workload.precision == "fp32" and layout.expert > 1:
        raise UserError(
            "train.precision = fp32 with parallel.expert > 1: torch knows grouped products under fake tensors in"
            " bf16 alone; expected train.precision = bf16 for a dry run, or parallel.expert = 1"
        )
    begin = time.perf_counter()
    stage = layout.stage(rank)
    blocks = stage_blocks(config, layout.pipe)[stage]
    with ExitStack() as stack:
        stack.enter_context(_fake_ranks(layout.processes, rank))
        stack.enter_context(FakeTensorMode())
        groups = _groups(layout, rank)
        network = _network(config, blocks, layout, workload, rank, groups)
        state = ShardedState(
            _replicated(network, layout, rank, groups), layout.zero, workload.zero, layout.offload
        )
        run = _Passes(network, objective, layout, stage, state)
        return run.step(rank, blocks, begin)


@contextmanager
def _fake_ranks(world: int, rank: int) -> Iterator[None]:
    """A process group of which only this rank exists: its collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The collectives have the names that DeepSpeed 0.19 calls, which torch 2.13 is retiring.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Of the hooks that count: the first stage's input is an image, which needs no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    assert not dist.is_initialized(), "a dry run needs a process of its own"
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _groups(layout: Layout, rank: int) -> dict[str, Any]:
    """This rank's groups."""
    ranks = {"data": layout.group(rank, "data")}
    if layout.expert > 1:
        ranks |= {"expert": layout.expert_ranks(rank), "copies": layout.expert_copy_ranks(rank)}
    return {name: dist.new_group(members) for name, members in ranks.items()}


def _network(
    config: ModelConfig, blocks: range, layout: Layout, workload: Workload, rank: int, groups: dict[str, Any]
) -> DiT:
    """The rank's part of the network, as the training engine makes it on a GPU."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if workload.precision == "bf16" else torch.float32)
    try:
        network = DiT(config, blocks)
        network.checkpoint_blocks = workload.recompute
        for balance in balance_losses(network):
            if balance.group > layout.micro_batch:
                balance.ranks, balance.sum_over_ranks = layout.data, _sum_over(groups["data"])
        if layout.expert > 1:
            assignments = layout.micro_batch * config.tokens * config.experts_per_token
            planned = even_routing(assignments, layout.expert, layout.expert_rank(rank), workload.imbalance)
            for block in network.blocks.values():
                assert isinstance(block.moe, MoE)
                block.moe = PlannedExpertLayer(block.moe, layout.expert, planned, groups["expert"])
        if layout.tensor > 1:
            _share_out(network, layout)
        for module in network.modules():
            if isinstance(module, Experts):
                module.forward = partial(_grouped if workload.precision == "bf16" else _in_turn, module)  # type: ignore[method-assign]
    finally:
        torch.set_default_dtype(kept)
    return network


def _grouped(experts: Experts, x_AD: Tensor, counts_N: Tensor, _block: int | None = None) -> Tensor:
    """As on a GPU in bf16."""
    return experts.grouped(x_AD, counts_N)


def _in_turn(experts: Experts, x_AD: Tensor, _counts_N: Tensor, _block: int | None = None) -> Tensor:
    """As on a GPU in fp32, for which grouped products do not exist: each expert by itself, with an equal share."""
    runs = x_AD.tensor_split(len(experts.gate_proj))
    weights = zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
    return torch.cat(
        [
            F.linear(F.silu(F.linear(run, gate)) * F.linear(run, up), down)
            for run, (gate, up, down) in zip(runs, weights, strict=True)
        ]
    )


def _sum_over(group: Any) -> Any:
    def total(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        dist.all_reduce(copy, group=group)
        return copy

    return total


def _share_out(network: nn.Module, layout: Layout) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Apex and Transformer Engine are absent
        from ditmoe.parallel.tensor.layers import share_out
        from ditmoe.parallel.tensor.megatron_grid import make_megatron_grid

        make_megatron_grid(layout)
        share_out(network)
    # megatron-core makes fp32 parameters, and fake ones cannot be cast in place.
    dtype = torch.get_default_dtype()
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != dtype:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype)))


def _replicated(network: DiT, layout: Layout, rank: int, groups: dict[str, Any]) -> list[Replicated]:
    """The parameters by the ranks that hold the same."""
    routed = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, PlannedExpertLayer)
        for parameter in module.experts.parameters()
    }
    common = [p for p in network.parameters() if id(p) not in routed]
    experts = [p for p in network.parameters() if id(p) in routed]
    data = layout.coordinates(rank)[1]
    parts = [Replicated(common, layout.data, data, groups["data"])]
    if experts:
        parts.append(Replicated(experts, layout.expert_copies, data // layout.expert, groups["copies"]))
    return parts


class _Passes:
    """A rank's passes in the order of its stage's schedule."""

    def __init__(
        self, network: DiT, objective: ObjectiveConfig, layout: Layout, stage: int, state: ShardedState
    ) -> None:
        self._network, self._layout, self._stage, self._state = network, layout, stage, state
        self._objective = make_objective(objective)
        self._dtype = next(network.parameters()).dtype
        self._before, self._behind = _neighbours(layout, stage)

    def step(self, rank: int, blocks: range, begin: float) -> DryRun:
        """As many micro-batches as the schedule has in flight and one more, then the optimiser's step."""
        network, state, layout = self._network, self._state, self._layout
        parameters, buffers = list(network.parameters()), list(network.buffers())
        weights = [p for p in parameters if layout.zero < 3] + [
            p for part in state.parts for p in part.parameters if layout.zero == 3 and state.stays_whole(p, part)
        ]
        bucket = [] if state.bucket is None else [state.bucket]
        ledger = Ledger([*weights, *state.partition, *state.optimizer, *state.ema, *state.kept, *buffers, *bucket])
        state.watch(network, ledger)
        flying = in_flight(layout, self._stage)
        count = min(layout.accumulation, flying + 1)
        with ledger:
            before = ledger.held
            waiting = [self._forward() for _ in range(flying)]
            saved = ledger.held - before
            for number in range(count):
                self._backward(waiting.pop(0))
                state.end_micro_step()
                if flying + number < count:
                    waiting.append(self._forward())
            passes = Counter(ledger.sent)
            gradients = _bytes([*state.kept, *(p.grad for p in parameters if p.grad is not None)])
            state.step()
        sent = Counter({kind: size * (layout.accumulation - count) // count for kind, size in passes.items()})
        sent.update(ledger.sent)
        memory = RankMemory(
            weights=_bytes([*weights, *state.partition]),
            gradients=gradients,
            optimizer=_bytes(state.optimizer),
            ema=_bytes(state.ema),
            activations=saved,
            buffers=_bytes([*buffers, *bucket]),
            peak=ledger.peak,
        )
        held = sum(part.elements for part in state.parts)
        return DryRun(rank, self._stage, blocks, held, memory, +sent, time.perf_counter() - begin)

    def _forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """A micro-batch's forward pass: what came from the stage before, and what goes on or the loss."""
        config, images = self._network.config, self._layout.micro_batch
        assert config.image_size and config.channels
        shape = (images, config.channels, config.image_size, config.image_size)
        x_BCHW, noise_BCHW, timestep_B = torch.empty(shape), torch.empty(shape), torch.empty(images)
        draws = Draws(noise_BCHW, timestep_B, torch.empty(images, dtype=torch.bool))
        received: list[Tensor] = []
        if self._network.has_first:
            label_B = torch.zeros(images, dtype=torch.int64)
            hidden = self._network.embed(self._objective.noised(x_BCHW, draws), timestep_B, label_B)
        else:
            received = [self._receive(shape, self._before).requires_grad_() for shape in self._hidden_shapes()]
            hidden = (received[0], received[1])
        x_BTD, condition_BD = self._network.transform(*hidden)
        if self._network.has_last:
            prediction_BCHW = self._network.predict(x_BTD, condition_BD)
            loss = self._objective.loss_of(prediction_BCHW, x_BCHW, draws).mean()
            return received, [loss / self._layout.accumulation]
        for tensor in (x_BTD, condition_BD):
            dist.send(tensor, self._behind)
        return received, [x_BTD, condition_BD]

    def _backward(self, passed: tuple[list[Tensor], list[Tensor]]) -> None:
        received, results = passed
        if self._network.has_last:
            results[0].backward()  # type: ignore[no-untyped-call]
        else:
            gradients = [self._receive(shape, self._behind) for shape in self._hidden_shapes()]
            torch.autograd.backward(results, gradients)
        for tensor in received:
            assert tensor.grad is not None
            dist.send(tensor.grad, self._before)

    def _hidden_shapes(self) -> tuple[tuple[int, ...], ...]:
        config, images = self._network.config, self._layout.micro_batch
        return (images, config.tokens, config.hidden), (images, config.hidden)

    def _receive(self, shape: tuple[int, ...], source: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype)
        dist.recv(tensor, source)
        return tensor


def _neighbours(layout: Layout, stage: int) -> tuple[int, int]:
    """A rank of the stage before and one of the stage behind; themselves at the ends."""
    size = layout.data * layout.tensor
    return max(stage - 1, 0) * size, min(stage + 1, layout.pipe - 1) * size


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
