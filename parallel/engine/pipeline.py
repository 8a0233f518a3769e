"""Pipeline stages: DeepSpeed's 1F1B schedule over stretches of the network.

Each stage is one layer of a DeepSpeed `PipelineModule`: it takes what the stage before puts out and gives on
tokens and condition. DeepSpeed moves them, and their gradients back, and interleaves the micro-batches' passes
(PipeDream-Flush, Narayanan et al., arXiv 2006.09503). Its own `train_batch` would also step; here the passes and
the step are apart, so that the sums of the step are known before any weight is touched.

It calls private parts of DeepSpeed 0.19 (`_exec_…`, `_compute_loss`); tests/parallel covers them.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.model.dit import DiT
from ditmoe.model.objective import Draws, Objective
from ditmoe.parallel.engine.passes import MicroBatch, Passes
from ditmoe.parallel.engine.step_totals import StepTotals
from ditmoe.parallel.layout import Layout

Hidden = tuple[Tensor, Tensor]
"""Tokens `[B, T, D]` and condition `[B, D]`: what travels between stages."""


class Stage(nn.Module):
    """One stage as DeepSpeed's pipeline wants it: a tuple in, a tuple out (the last stage: the prediction)."""

    network: DiT
    """The stage's blocks."""

    def __init__(self, after_blocks: Callable[[], None]) -> None:
        """Take what is to be called when a micro-batch has been through the blocks, which come later."""
        super().__init__()
        self._after_blocks = after_blocks

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | Hidden:
        """Of noisy images, timesteps and labels on the first stage, of the hidden state on the others."""
        network = self.network
        hidden = network.transform(*(network.embed(*inputs) if network.has_first else inputs))
        self._after_blocks()
        if network.has_last:
            return network.predict(*hidden)
        x_BTD, condition_BD = hidden
        return x_BTD.contiguous(), condition_BD.contiguous()  # as they are sent


class PipelinePasses(Passes):
    """The passes of a step over all stages; on this rank, of one."""

    def __init__(self, network: DiT, objective: Objective, layout: Layout) -> None:
        """Put this rank's blocks into a `PipelineModule` on the grid of the layout; a collective call."""
        super().__init__(network, objective)
        self._totals: StepTotals | None = None
        stage = Stage(self._count_routing)
        self.module = _pipeline_module(stage, layout, self._loss_of)
        # Not before: a `PipelineModule` moves what it is given to the device, with the experts of all ranks.
        stage.network = network

    def forward_backward(self, micro_batches: Sequence[MicroBatch], totals: StepTotals) -> None:
        """Send all micro-batches through; only the first and the last stage look at theirs."""
        engine = self.engine
        engine.module.train()
        engine.total_loss, engine._compute_loss = None, True
        engine.set_dataiterator(self._inputs_and_targets(micro_batches))
        self._totals = totals
        engine._exec_schedule(_passes_only(engine))
        engine._exec_reduce_grads()
        self._totals = None

    def step(self) -> None:
        """The weights change here."""
        self.engine._exec_optimizer_step()

    def sampling_network(self) -> nn.Module:
        """All stages, one after the other."""
        return PipelineNetwork(self.network, self.engine.grid)

    def _inputs_and_targets(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Any, Any]]:
        """What the first stage is shown, and what the last one compares with."""
        for batch in micro_batches:
            draws = batch.draws
            inputs: tuple[Tensor, ...] = ()
            if self.network.has_first:
                inputs = (self.objective.noised(batch.x_BCHW, draws), draws.timestep_B, batch.label_B)
            yield inputs, (batch.x_BCHW, draws.noise_BCHW, draws.timestep_B, draws.drop_B)

    def _loss_of(self, prediction_BCHW: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """On the last stage: the loss of a micro-batch."""
        x_BCHW, *draws = targets
        loss_B = self.objective.loss_of(prediction_BCHW, x_BCHW, Draws(*draws))
        if self._totals is not None:
            self._totals.add_loss(loss_B)
        return loss_B.mean()

    def _count_routing(self) -> None:
        if self._totals is not None:
            self._totals.add_routing(self.layers.items())


def _pipeline_module(stage: Stage, layout: Layout, loss_of: Callable[..., Tensor]) -> nn.Module:
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    number = layout.stage(dist.get_rank())
    # Only this rank's layer is looked at; the others hold the places of the other stages.
    layers = [stage if place == number else nn.Identity() for place in range(layout.pipe)]
    with redirect_stdout(io.StringIO()):  # it prints its partition
        module: nn.Module = PipelineModule(
            layers,
            topology=PipeModelDataParallelTopology(num_pp=layout.pipe, num_dp=layout.data, num_mp=layout.tensor),
            loss_fn=loss_of,
            partition_method="uniform",
        )
    return module


def _passes_only(engine: Any) -> Any:
    """DeepSpeed's training schedule without what it does at the end of a step."""
    from deepspeed.runtime.pipe import schedule

    ends = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)

    class PassesOnly(schedule.TrainSchedule):  # type: ignore[misc]
        def steps(self) -> Iterator[list[Any]]:
            for instructions in super().steps():
                yield [instruction for instruction in instructions if not isinstance(instruction, ends)]

    return PassesOnly(engine.micro_batches, engine.num_stages, engine.stage_id)


class PipelineNetwork(nn.Module):
    """The whole network for sampling: every rank gives the same images, and every rank gets the prediction."""

    def __init__(self, network: DiT, grid: Any) -> None:
        """Take this rank's stretch of the network, and DeepSpeed's grid."""
        super().__init__()
        self.network = network
        self._group = grid.get_pipe_parallel_group()
        self._ranks: list[int] = list(grid.pp_group)
        self._stage = self._ranks.index(dist.get_rank())

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """As `DiT.forward`, one stage after the other; a collective call of the stages."""
        network, config = self.network, self.network.config
        if network.has_first:
            hidden = network.embed(x_BCHW, timestep_B, label_B)
        else:
            images = len(x_BCHW)
            hidden = (
                self._received((images, config.tokens, config.hidden)),
                self._received((images, config.hidden)),
            )
        hidden = network.transform(*hidden)
        if network.has_last:
            prediction_BCHW = network.predict(*hidden)
        else:
            for tensor in hidden:
                dist.send(tensor.contiguous(), self._ranks[self._stage + 1], group=self._group)
            shape = (len(x_BCHW), config.out_channels, *x_BCHW.shape[2:])
            prediction_BCHW = torch.empty(shape, device=x_BCHW.device)
        dist.broadcast(prediction_BCHW, self._ranks[-1], group=self._group)
        return prediction_BCHW

    def _received(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the weights' type from the stage before."""
        some = next(self.network.parameters())
        tensor = torch.empty(shape, dtype=some.dtype, device=some.device)
        dist.recv(tensor, self._ranks[self._stage - 1], group=self._group)
        return tensor
