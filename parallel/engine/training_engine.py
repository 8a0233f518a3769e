"""The training engine: DeepSpeed around a DiT, with what DeepSpeed leaves out for this network.

That is: the balance loss inside expert-parallel layers (which drop the source router's forward), exact clipping
without ZeRO, an fp32 EMA sharded like the optimiser, and a loss that is checked before the weights are touched.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.model.config import EmaConfig
from ditmoe.model.dit import DiT
from ditmoe.model.ema import ema_decay, update_ema
from ditmoe.model.objective import Objective
from ditmoe.parallel.config import OptimConfig
from ditmoe.parallel.engine.deepspeed_engine import attach_balance, share_out, start_deepspeed
from ditmoe.parallel.engine.deepspeed_settings import suspect_of
from ditmoe.parallel.engine.fragments import Fragment, find_fragments, refresh_weights, set_optimizer_step
from ditmoe.parallel.engine.gradient_check import CHECKED_STEPS, GradientCheck
from ditmoe.parallel.engine.initial import Initial
from ditmoe.parallel.engine.passes import MicroBatch, Passes, WholeNetworkPasses
from ditmoe.parallel.engine.pipeline import PipelinePasses
from ditmoe.parallel.engine.step_totals import StepTotals
from ditmoe.parallel.engine.weight_check import check_weights
from ditmoe.parallel.groups import check_groups, groups_of_engine
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.tensor.shards import shard_of


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step saw, over all ranks and micro-steps."""

    loss: float
    """Mean of the objective over the global batch, without the balance loss."""
    balance_loss: float
    """Mean over micro-steps of the layers' summed balance losses, α included."""
    load_LN: Tensor
    """Share of layer l's assignments that expert n got, float64 `[L, N]`; rows sum to 1."""
    grad_norm: float
    """Norm of the global gradient before clipping."""
    requests: int
    """Ranks that asked to stop."""


class NonFiniteLossError(Exception):
    """The loss of a step is NaN or infinite; the weights were not touched."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss


class TrainingEngine:
    """Trains a network over all ranks of the process group."""

    def __init__(
        self,
        network: DiT,
        objective: Objective,
        layout: Layout,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
        extra: dict[str, Any],
        device: torch.device,
        initial: Initial,
    ) -> None:
        """Share a network out over the ranks, give it its initial weights and hand it over to DeepSpeed.

        Args:
            network: the blocks of this rank's pipeline stage, without values.
            initial: the value of each parameter.
            precision: `fp32` or `bf16` (then with fp32 master weights).
            extra: the configuration's `deepspeed` section.
        """
        self.layout = layout
        self.load_LN: Tensor | None = None
        """Share of layer l's assignments that expert n got in the last update, float64 `[L, N]`; first None."""
        self.device = device
        self.step = 0
        self._network = network
        self._optim = optim
        self._ema_config = ema
        grid = share_out(network, layout) if layout.tensor > 1 else None
        self._passes: Passes = (
            PipelinePasses(network, objective, layout)
            if layout.pipe > 1
            else WholeNetworkPasses(network, objective)
        )
        self._engine = start_deepspeed(self._passes, layout, optim, precision, extra, initial, grid)
        self._passes.engine = self._engine
        self.fragments: list[Fragment] = find_fragments(self._engine, network, layout)
        check_groups(groups_of_engine(self._engine, layout))
        if layout.expert > 1:
            attach_balance(network, list(self._passes.layers.values()))
        self._set_up_balance()
        self._weights = [fragment.weight for fragment in self.fragments]
        self.ema = [weight.clone() for weight in self._weights]
        """fp32 average of each fragment's weight."""
        self._suspect = suspect_of(extra)
        check_weights(self._engine, network, layout, self.fragments, self.ema, self._suspect)
        self._own_grad_norm = 0.0
        if layout.zero == 0:
            self._engine.basic_optimizer.register_step_pre_hook(lambda *_: self._clip())
        self._steps_to_check = CHECKED_STEPS

    def _set_up_balance(self) -> None:
        """Scale the injected gradient like the loss, and take the balance means over the configured set."""
        group = self._engine.data_parallel_group

        def sum_over_ranks(tensor: Tensor) -> Tensor:
            total = tensor.clone()
            dist.all_reduce(total, group=group)
            return total

        for balance in self._passes.layers.values():
            balance.gradient_scale = 1.0 / self.layout.accumulation
            if balance.group > self.layout.micro_batch:  # never 0, the global batch
                balance.ranks = self.layout.data
                balance.sum_over_ranks = sum_over_ranks

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, stop_requested: bool) -> StepResult:
        """One optimiser step over the layout's `accumulation` micro-batches.

        Args:
            micro_batches: of this rank's place on the data axis; stages between the first and the last take none.

        Raises:
            NonFiniteLossError: on every rank, before the weights are touched.
            GradientMismatchError: on every rank, in the first steps: the weights are no longer those of the run.
        """
        config = self._network.config
        totals = StepTotals(config.depth if config.experts else 0, config.experts, self.device)
        check = self._start_check()
        self._passes.forward_backward(micro_batches, totals)
        seen = totals.over_ranks(stop_requested)
        if not math.isfinite(seen.loss):
            raise NonFiniteLossError(seen.loss)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self.keep_load(seen.load_LN)
        self._passes.step()
        if check is not None:
            check.finish(self._grad_norm(), self._optim.clip)
        self.step += 1
        update_ema(self.ema, self._weights, ema_decay(self._ema_config, self.step))
        return StepResult(
            loss=seen.loss,
            # Tensor ranks compute the same, and each has added it.
            balance_loss=seen.balance_loss / (self.layout.accumulation * self.layout.data * self.layout.tensor),
            load_LN=seen.load_LN,
            grad_norm=self._grad_norm(),
            requests=seen.requests,
        )

    def keep_load(self, load_LN: Tensor) -> None:
        """Balance the next step by what the experts got in this one, where that is over the global batch."""
        self.load_LN = load_LN
        load_on_device_LN = load_LN.to(self.device, torch.float32)
        for number, balance in self._passes.layers.items():
            balance.batch_share_N = load_on_device_LN[number]

    def skip_step(self, stop_requested: bool) -> int:
        """Let a step pass without an update: weights, moments and EMA stay as they are; a collective call.

        Returns:
            Ranks that asked to stop.
        """
        requests = torch.tensor(float(stop_requested), device=self.device)
        dist.all_reduce(requests)
        self.step += 1
        set_optimizer_step(self._engine, self.step)  # as a resume from here does
        return int(requests)

    def _start_check(self) -> GradientCheck | None:
        if not self._steps_to_check:
            return None
        self._steps_to_check -= 1
        return GradientCheck(self._engine, self._network, self.layout, self.fragments, self._suspect)

    def _grad_norm(self) -> float:
        return self._own_grad_norm if self.layout.zero == 0 else float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def _clip(self) -> None:
        """ZeRO 0: the exact global norm, every parameter counted once, and clipping by it."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        gradients = []
        for parameter in self._network.parameters():
            if parameter.grad is not None:
                is_expert = not getattr(parameter, "allreduce", True)
                copies = self.layout.expert_copies if is_expert else self.layout.data
                if shard_of(parameter) is None:
                    copies *= self.layout.tensor
                square += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) ** 2 / copies
                gradients.append(parameter.grad)
        dist.all_reduce(square)
        norm = float(square.sqrt())
        if self._optim.clip is not None and norm > self._optim.clip:
            torch._foreach_mul_(gradients, self._optim.clip / norm)
        self._own_grad_norm = norm

    def resume_at(self, step: int) -> None:
        """Continue after `step`, with weights, moments and EMA already written into the fragments."""
        self.step = step
        set_optimizer_step(self._engine, step)
        refresh_weights(self._engine, self.layout.zero)

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Compute with the EMA in place of the weights; a collective call."""
        kept = [weight.clone() for weight in self._weights]
        self._write(self.ema)
        self._engine.eval()
        try:
            yield self._passes.sampling_network()
        finally:
            self._write(kept)
            self._engine.train()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the gradients; otherwise they keep an engine, and the threads of its process
        groups, for as long as the program runs."""
        self._engine.destroy()

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)
        refresh_weights(self._engine, self.layout.zero)
