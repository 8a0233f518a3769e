"""Our training engine on one process, and the same step without DeepSpeed."""

import torch
from torch import nn

from benchmarks.suite.networks import lively_value, our_network
from benchmarks.suite.settings import Settings
from ditmoe.model.config import EmaConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.ema import update_ema
from ditmoe.model.objective import RectifiedFlow, make_objective
from ditmoe.parallel.config import OptimConfig
from ditmoe.parallel.engine.initial import WholeValues
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.parallel.engine.training_engine import TrainingEngine
from ditmoe.parallel.layout import Layout


def make_engine(settings: Settings, precision: str) -> TrainingEngine:
    """With ZeRO 1, as runs have it by default."""
    network = DiT(settings.model)
    layout = Layout(pipe=1, data=1, expert=1, tensor=1, zero=1, micro_batch=settings.batch, accumulation=1)
    objective = make_objective(ObjectiveConfig())
    initial = WholeValues(lively_value)
    return TrainingEngine(
        network, objective, layout, OptimConfig(), EmaConfig(), precision, {}, settings.device, initial
    )


class BareStep:
    """The network's own step: no engine, no processes, the gradient's norm, fused AdamW on fp32 weights, the EMA.

    It begins from the weights of `make_engine`.
    """

    def __init__(self, settings: Settings, precision: str) -> None:
        self.network: nn.Module = our_network(settings.model).to(settings.device)
        self.objective = RectifiedFlow()
        self._weights = [parameter.detach() for parameter in self.network.parameters()]
        self.master = self._weights
        if precision == "bf16":
            self.master = [weight.clone() for weight in self._weights]
            self.network.to(torch.bfloat16)
            self._weights = [parameter.detach() for parameter in self.network.parameters()]
        self.ema = [weight.clone() for weight in self.master]
        self.optimizer = torch.optim.AdamW(self.master, lr=1e-5, weight_decay=0, fused=True)

    def __call__(self, batch: MicroBatch) -> float:
        """One step; its loss."""
        loss = self.objective.loss(self.network, batch.x_BCHW, batch.label_B, batch.draws).mean()
        loss.backward()
        for master, parameter in zip(self.master, self.network.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.norm = torch.nn.utils.get_total_norm(
            [master.grad for master in self.master if master.grad is not None]
        )
        self.optimizer.step()
        if self.master is not self._weights:
            torch._foreach_copy_(self._weights, self.master)
        update_ema(self.ema, self.master, 0.9999)
        return float(loss.detach())
