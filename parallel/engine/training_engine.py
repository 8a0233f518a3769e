"""The training engine: DeepSpeed around a DiT, with what DeepSpeed leaves out for this network.

That is: the balance loss inside expert-parallel layers (which drop the source router's forward), an fp32 EMA
sharded like the optimiser, and norm, clipping and a check of the loss that the host does not wait for.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from ditmoe.model.config import EmaConfig
from ditmoe.model.dit import DiT
from ditmoe.model.ema import ema_decay
from ditmoe.model.objective import Objective
from ditmoe.parallel.config import OptimConfig
from ditmoe.parallel.engine.averages import Averages
from ditmoe.parallel.engine.deepspeed_engine import attach_balance, share_out, start_deepspeed
from ditmoe.parallel.engine.deepspeed_settings import suspect_of
from ditmoe.parallel.engine.fragments import Fragment, find_fragments, refresh_weights, set_optimizer_step
from ditmoe.parallel.engine.gradient_check import CHECKED_STEPS, GradientCheck
from ditmoe.parallel.engine.initial import Initial, fill
from ditmoe.parallel.engine.passes import MicroBatch, Passes, WholeNetworkPasses
from ditmoe.parallel.engine.pipeline import PipelinePasses
from ditmoe.parallel.engine.step_totals import DeviceTotals, StepTotals, TotalsOverRanks
from ditmoe.parallel.engine.update import Update
from ditmoe.parallel.engine.weight_check import check_weights
from ditmoe.parallel.groups import check_groups, groups_of_engine
from ditmoe.parallel.layout import Layout


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
    """The loss of a step is NaN or infinite; the weights are as before."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss


def runs_ahead(device: torch.device) -> bool:
    """Whether the host may start a step while the device computes the one before; a CPU is the host itself."""
    return device.type == "cuda"


class StepUnderWay:
    """A step that was started; what it saw is there when the device has come so far."""

    def __init__(self, engine: "TrainingEngine", number: int, totals: DeviceTotals) -> None:
        self._engine, self._number, self._totals = engine, number, totals
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Wait for it; first for those of the steps before.

        Raises:
            NonFiniteLossError: as `TrainingEngine.train_step`; the engine is where it was before this step.
        """
        if self._result is None:
            self._result = self._engine.finish(self._number, self._totals.read())
        return self._result


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
        initial: Initial | None,
    ) -> None:
        """Share a network out over the ranks, hand it over to DeepSpeed and give it its initial weights.

        Args:
            network: the blocks of this rank's pipeline stage, without values: best on the meta device.
            initial: the values of its parameters; None: a checkpoint's will be written (`resume_at`).
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
        self._engine = start_deepspeed(self._passes, layout, optim, precision, extra, grid, device)
        self._passes.engine = self._engine
        self.fragments: list[Fragment] = find_fragments(self._engine, network, layout)
        check_groups(groups_of_engine(self._engine, layout))
        if layout.expert > 1:
            attach_balance(network, list(self._passes.layers.values()))
        self._set_up_balance()
        if initial is not None:
            fill(self.fragments, initial)
        self._weights = [fragment.weight for fragment in self.fragments]
        self._averages = Averages(self.fragments)
        self.ema = self._averages.of_fragments
        """fp32 average of each fragment's weight."""
        self._suspect = suspect_of(extra)
        # It ends with the values in place, which the network then computes with.
        check_weights(self._engine, network, layout, self.fragments, self.ema, self._suspect)
        self._update = Update(self._passes, network, layout, optim.clip, device)
        shares = (network.config.depth, max(network.config.experts, 1))
        self._load_on_device_LN = torch.full(shares, 1 / shares[1], device=device)
        """The shares that the next step is balanced by; first all alike."""
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
        """One optimiser step, and what it saw.

        Raises:
            NonFiniteLossError: on every rank; weights, moments and EMA are as before the step.
            GradientMismatchError: on every rank, in the first steps: the weights are no longer those of the run.
        """
        return self.start_step(micro_batches, lr, stop_requested).result()

    def start_step(self, micro_batches: Sequence[MicroBatch], lr: float, stop_requested: bool) -> "StepUnderWay":
        """One optimiser step over the layout's `accumulation` micro-batches, without waiting for the device.

        Steps follow each other as they are started. A step whose loss or gradient is not finite leaves weights,
        moments and EMA as they are, and so do those after it, until its result is asked for.

        Args:
            micro_batches: of this rank's place on the data axis; stages between the first and the last take none.

        Raises:
            NonFiniteLossError: as `train_step`, where the optimiser is in host memory.
            GradientMismatchError: as `train_step`.
        """
        config = self._network.config
        totals = StepTotals(config.depth if config.experts else 0, config.experts, self.device)
        check = self._start_check()
        self._passes.forward_backward(micro_batches, totals)
        sums = totals.over_ranks(stop_requested, self._update.square())
        sums.start_reading()
        if not self._update.on_device and not math.isfinite(loss := sums.read().loss):
            raise NonFiniteLossError(loss)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with record_function("ditmoe: optimiser"):
            self._update.step(sums)
        if self._passes.layers:
            self._balance_by(self._update.keep(sums.load_LN().float(), self._load_on_device_LN))
        self.step += 1
        with record_function("ditmoe: EMA"):
            self._averages.update(self._update, ema_decay(self._ema_config, self.step))
        under_way = StepUnderWay(self, self.step, sums)
        if check is not None:
            check.finish(under_way.result().grad_norm, self._optim.clip)
        return under_way

    def finish(self, number: int, totals: TotalsOverRanks) -> StepResult:
        """What a step saw, once its sums are on the host."""
        if not math.isfinite(totals.loss):
            self.step = number - 1
            self._update.forget()
            raise NonFiniteLossError(totals.loss)
        grad_norm = totals.grad_norm if self._update.on_device else self._update.norm_of_host()
        if math.isfinite(grad_norm):
            self.load_LN = totals.load_LN
        else:
            self._update.forget()
        return StepResult(
            loss=totals.loss,
            # Tensor ranks compute the same, and each has added it.
            balance_loss=totals.balance_loss / (self.layout.accumulation * self.layout.data * self.layout.tensor),
            load_LN=totals.load_LN,
            grad_norm=grad_norm,
            requests=totals.requests,
        )

    def keep_load(self, load_LN: Tensor) -> None:
        """Balance the next step by what the experts got in this one, where that is over the global batch."""
        self.load_LN = load_LN
        self._balance_by(load_LN.to(self.device, torch.float32))

    def _balance_by(self, load_LN: Tensor) -> None:
        self._load_on_device_LN = load_LN
        for number, balance in self._passes.layers.items():
            balance.batch_share_N = load_LN[number]

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
