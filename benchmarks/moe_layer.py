"""Time of the mixture-of-experts layer against a dense SwiGLU of equal activated FLOPs, and a loop over experts.

    python benchmarks/moe_layer.py [--hidden 384] [--tokens 4096] [--rounds 15]

The three are timed in turn within each round and compared by the median of the rounds' ratios, so that a busy
machine slows all of them alike. Ratios below 1 mean that the layer is the faster one.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.model.experts.moe import MoE, route
from ditmoe.model.layers import SwiGlu


def loop_over_experts(layer: MoE, x_BTD: Tensor) -> Tensor:
    """The plain reference: each expert picks its tokens, one after the other."""
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    scores_TK, selected_TK, _ = route(layer.gate(x_TD), layer.experts_per_token)
    out_TD = torch.zeros_like(x_TD)
    for expert in range(layer.experts.gate_proj.shape[0]):
        token, slot = torch.where(selected_TK == expert)
        picked = x_TD[token]
        hidden = F.silu(F.linear(picked, layer.experts.gate_proj[expert]))
        hidden = hidden * F.linear(picked, layer.experts.up_proj[expert])
        result = F.linear(hidden, layer.experts.down_proj[expert])
        out_TD = out_TD.index_add(0, token, result * scores_TK[token, slot].unsqueeze(1).to(result.dtype))
    if layer.shared_experts is not None:
        out_TD = out_TD + layer.shared_experts(x_TD)
    return out_TD.view_as(x_BTD)


def timed(run: Callable[[Tensor], Tensor], module: nn.Module, x_BTD: Tensor, backward: bool) -> float:
    """Seconds of one forward pass, with its backward pass if asked."""
    module.zero_grad()
    x_BTD.grad = None
    start = time.perf_counter()
    if backward:
        run(x_BTD).square().mean().backward()
    else:
        with torch.no_grad():
            run(x_BTD)
    if x_BTD.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Case(NamedTuple):
    """What is measured."""

    hidden: int
    tokens: int
    experts: int
    experts_per_token: int
    shared: int
    dtype: torch.dtype
    device: torch.device


def rounds(case: Case, backward: bool, count: int, warm_up: int = 3) -> list[list[float]]:
    """Seconds of the layer, the dense SwiGLU and the loop, in each round."""
    balance = BalanceLoss(case.experts, 0.005, case.tokens // 4, group=1)
    layer = MoE(case.hidden, case.experts, case.experts_per_token, case.shared, balance)
    layer.to(case.device, case.dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    width = (4 * case.experts_per_token + case.shared) * case.hidden
    dense = SwiGlu(case.hidden, width).to(case.device, case.dtype)
    x_BTD = torch.randn(4, case.tokens // 4, case.hidden, device=case.device).to(case.dtype).requires_grad_()

    def loop(x: Tensor) -> Tensor:
        return loop_over_experts(layer, x)

    runs: list[tuple[Callable[[Tensor], Tensor], nn.Module]] = [(layer, layer), (dense, dense), (loop, layer)]
    taken = [[timed(*run, x_BTD, backward) for run in runs] for _ in range(count + warm_up)][warm_up:]
    return [list(column) for column in zip(*taken, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, shared = torch.device(arguments.device), 2
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {arguments.threads} threads, torch {torch.__version__}: hidden {arguments.hidden}, "
        f"{arguments.tokens} tokens, {arguments.experts} experts, top-{arguments.experts_per_token}, "
        f"{shared} shared"
    )
    print(
        f"{'dtype':<10}{'pass':<9}{'layer (ms)':>11}{'dense':>9}{'loop':>9}{'layer/dense':>13}{'layer/loop':>12}"
    )
    sizes = (arguments.hidden, arguments.tokens, arguments.experts, arguments.experts_per_token, shared)
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            layer, dense, loop = rounds(Case(*sizes, dtype, device), backward, arguments.rounds)
            times = [1000 * statistics.median(column) for column in (layer, dense, loop)]
            to_dense = statistics.median(a / b for a, b in zip(layer, dense, strict=True))
            to_loop = statistics.median(a / b for a, b in zip(layer, loop, strict=True))
            label = "fwd+bwd" if backward else "forward"
            print(
                f"{str(dtype)[6:]:<10}{label:<9}{times[0]:>11.1f}{times[1]:>9.1f}{times[2]:>9.1f}"
                f"{to_dense:>13.3f}{to_loop:>12.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
