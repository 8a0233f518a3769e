"""Handing a network over to DeepSpeed: shared out over the ranks, with torch's AdamW."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from ditmoe.model.errors import UserError
from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.parallel.config import OptimConfig
from ditmoe.parallel.engine.deepspeed_settings import deepspeed_settings
from ditmoe.parallel.engine.initial import cut_for_zero_3, give_memory, give_zeros
from ditmoe.parallel.engine.passes import Passes
from ditmoe.parallel.layout import Layout


def share_out(network: nn.Module, layout: Layout) -> Any:
    """Leave this rank its part of the network; the groups of megatron-core's that it computes over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Apex and Transformer Engine are absent, from each of its modules
        from ditmoe.parallel.tensor import layers as tensor
        from ditmoe.parallel.tensor.megatron_grid import make_megatron_grid

    # Its hint on how kernels are best launched on GPUs is in docs/tensor-parallelism.md.
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    grid = make_megatron_grid(layout)
    tensor.share_out(network)
    return grid


def start_deepspeed(
    passes: Passes,
    layout: Layout,
    optim: OptimConfig,
    precision: str,
    extra: dict[str, Any],
    grid: Any,
    device: torch.device,
) -> Any:
    """The DeepSpeed engine that trains what the passes go through, with torch's AdamW; all weights are zeros.

    Args:
        grid: what `share_out` returned, or None.
    """
    import deepspeed
    from deepspeed.moe.utils import configure_moe_param_groups

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    network = passes.network
    give_memory(network, torch.bfloat16 if precision == "bf16" else torch.float32, device)
    largest = max(p.numel() // (layout.expert if ".experts." in n else 1) for n, p in network.named_parameters())
    settings = deepspeed_settings(layout, network.config, precision, optim.clip, extra, device, largest)
    with blaming_settings(extra):
        cut = cut_for_zero_3(network, layout, settings, grid) if layout.zero == 3 else None

    def make_optimizer(_: Any) -> torch.optim.Optimizer:
        # Called after the experts were dealt out, so that these are the parameters that are trained, and before
        # any copy of their values is made.
        if cut is not None:
            cut(network.parameters())
        give_zeros(network)
        parameters: Any = list(network.parameters())
        if layout.expert > 1:
            parameters = configure_moe_param_groups(parameters)
        return torch.optim.AdamW(
            parameters,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,  # without a temporary as large as a partition
        )

    with blaming_settings(extra):
        engine, *_ = deepspeed.initialize(
            model=passes.module,
            optimizer=make_optimizer,
            model_parameters=list(network.parameters()),
            config=settings,
            mpu=grid if layout.pipe == 1 else None,  # a pipeline module brings its own
            dist_init_required=False,
        )
    if precision == "fp32" and layout.zero in (1, 2) and not layout.offload:
        step_own_weights(engine.optimizer, engine.basic_optimizer)
    place_buffers(network, device)
    return engine


def step_own_weights(optimizer: Any, adam: torch.optim.Optimizer) -> None:
    """In fp32, let AdamW step this rank's part of the network's own weights, each parameter by itself.

    ZeRO 1 and 2 would step a copy of them, as exact as they are, with a copy of the gradients, and then copy
    the result to the weights. (DeepSpeed still does the last, but torch leaves out what is in its place.)
    """
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[number])
        flat.data = optimizer.parallel_partitioned_bit16_groups[number][rank]
        begin = flat.storage_offset()
        runs = []
        for parameter in optimizer.bit16_groups[number]:
            first = max(parameter.storage_offset() - begin, 0)
            last = min(parameter.storage_offset() + parameter.numel() - begin, flat.numel())
            if first < last:
                runs.append((first, last - first))
        pieces = [nn.Parameter(flat.detach().narrow(0, *run)) for run in sorted(runs)]
        adam.param_groups[number]["params"] = pieces
    # DeepSpeed's own access to the optimiser's state, by views, would keep the copies in memory.
    optimizer._link_all_hp_params()
    optimizer._hp_optimizer_states_linked = True


def place_buffers(network: nn.Module, device: torch.device) -> None:
    """Bring fixed tensors to the device: of a network that ZeRO 3 has cut DeepSpeed leaves them where they are,
    those of its own expert layers too."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


@contextmanager
def blaming_settings(extra: dict[str, Any]) -> Iterator[None]:
    """Where DeepSpeed rejects settings, and a user has added some, say so; note them on every other failure.

    A failure that is not about settings (memory, a device, a fault of a program) stays what it is.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (DeepSpeedConfigError, ValidationError) as error:
        if not extra:
            raise
        raise UserError(
            f"deepspeed = {extra}: DeepSpeed rejects these settings ({type(error).__name__}: {error})"
        ) from error
    except Exception as error:
        if extra:
            error.add_note(f"The configuration adds to DeepSpeed's settings: deepspeed = {extra}")
        raise


def attach_balance(module: nn.Module, balances: Sequence[BalanceLoss]) -> None:
    """Give DeepSpeed's expert-parallel layers back the balance loss that its router has no place for."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    layers = [layer for layer in module.modules() if isinstance(layer, AutoEPMoELayer)]
    assert len(layers) == len(balances), f"{len(layers)} expert-parallel layers, expected {len(balances)}"
    for layer, balance in zip(layers, balances, strict=True):
        _RouterHooks(balance).attach(layer.router)


class _RouterHooks:
    """Catches a router's logits and sends its scores through the balance loss."""

    def __init__(self, balance: BalanceLoss) -> None:
        self._balance = balance
        self._logits_TN: Tensor | None = None

    def attach(self, router: Any) -> None:
        router.gate.register_forward_hook(self._keep_logits)
        router.register_forward_hook(self._send_through)

    def _keep_logits(self, _module: nn.Module, _inputs: Any, logits_TN: Tensor) -> None:
        self._logits_TN = logits_TN

    def _send_through(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        scores_TK, selected_TK, counts_N = output
        logits_TN, self._logits_TN = self._logits_TN, None
        assert logits_TN is not None
        return self._balance(scores_TK, logits_TN.float().softmax(1), selected_TK), selected_TK, counts_N
