"""What training engines do on GPUs, on CPUs that show themselves as such: devices, waits and the curve."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

Runner = Callable[..., list[dict[str, Any]]]

COMMON: Final = {"steps": 2, "micro_batch": 2, "batch": 8, "depth": 2, "clip": 0.3, "waits": "as it is"}
BF16: Final = {**COMMON, "precision": "bf16"}
TWO_PRODUCTS: Final = {"expert_parallel": {"gate_up_impl": "separate"}}
PLAIN_EXPERTS: Final = {
    "expert_parallel": {"async_split_plan": False, "combine_impl": "weighted_sum", "gate_up_impl": "separate"}
}
"""DeepSpeed's own defaults."""
ALONE: Final[dict[str, dict[str, Any]]] = {
    "ZeRO 0": {**COMMON, "zero": 0},
    "ZeRO 1, bf16": {**BF16, "zero": 1},
    "ZeRO 2, bf16, DDPM, recomputation": {**BF16, "zero": 2, "objective": "ddpm", "checkpointing": True},
    "ZeRO 3, bf16": {**BF16, "zero": 3},
    "offload": {**COMMON, "zero": 2, "offload": True},
}
TOGETHER: Final[dict[str, dict[str, Any]]] = {
    **{f"ZeRO {zero}, bf16": {**BF16, "zero": zero} for zero in (1, 2, 3)},
    **{f"ZeRO {zero}, expert 2, bf16": {**BF16, "zero": zero, "expert": 2} for zero in (1, 2, 3)},
    "expert 2, starved": {
        **BF16,
        "expert": 2,
        "experts": 8,
        "starved": True,
        "checkpointing": True,
    },
    "expert 2, two products": {**BF16, "expert": 2, "deepspeed": TWO_PRODUCTS},
    "expert 2, DeepSpeed's defaults": {**BF16, "expert": 2, "deepspeed": PLAIN_EXPERTS},
    "2 stages": {**COMMON, "pipe": 2, "micro_batch": 4},
    "2 tensor ranks, bf16": {**BF16, "tensor": 2},
}

KERNELS: Final = {
    "_fill_indices_kernel",
    "_gather_rows_kernel",
    "_invert_index_kernel",
    "_weighted_restore_forward_kernel",
    "_weighted_restore_backward_kernel",
    "_swiglu_packed_fwd_kernel",
    "_swiglu_packed_bwd_kernel",
}
"""What AutoEP's layers launch on Hopper."""
TOGETHER_IN_ONE: Final = {"_swiglu_packed_fwd_kernel", "_swiglu_packed_bwd_kernel"}
EACH_BY_ITSELF: Final = {"_swiglu_fwd_kernel", "_swiglu_bwd_kernel"}
"""Of the gate's and the up products."""
FUSED_SUM: Final = {
    "_invert_index_kernel",
    "_weighted_restore_forward_kernel",
    "_weighted_restore_backward_kernel",
}
OTHER_KERNELS: Final = {
    "expert 2, two products": KERNELS - TOGETHER_IN_ONE | EACH_BY_ITSELF,
    "expert 2, DeepSpeed's defaults": KERNELS - TOGETHER_IN_ONE - FUSED_SUM | EACH_BY_ITSELF,
}


def follow(run_cases: Runner, world: int, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Train on pretended GPUs, and the same on CPUs without what is for GPUs alone; the curves must agree."""
    whole = list(cases.values())
    plain = [{key: value for key, value in case.items() if key not in ("waits", "deepspeed")} for case in whole]
    found, expected = run_cases(world, whole, "pretended"), run_cases(world, plain)
    for name, case, one, other in zip(cases, whole, found, expected, strict=True):
        assert "error" not in one, (name, one)
        curves = np.array(one["curve"]), np.array(other["curve"])
        bound = 0.02 if case.get("precision") == "bf16" else 1e-4
        assert np.abs(curves[0] - curves[1]).max() <= bound * np.abs(curves[1]).max(), (name, curves)
    return dict(zip(cases, found, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_one_gpu(run_cases: Runner) -> None:
    for name, result in follow(run_cases, 1, ALONE).items():
        # With offload the host waits in any case, and ZeRO 3 of one rank for each weight that it need not gather.
        if name not in ("offload", "ZeRO 3, bf16"):
            assert not result["waits"], (name, result["waits"])


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_gpus(run_cases: Runner) -> None:
    for name, result in follow(run_cases, 2, TOGETHER).items():
        waits = result["waits"]
        if name == "ZeRO 3, expert 2, bf16":
            # Of weights that one rank has alone DeepSpeed waits for the stream, although it gathers nothing.
            waits = {place: count for place, count in waits.items() if "Stream" not in place}
        if name == "expert 2, DeepSpeed's defaults":
            # For the sizes of what is sent, in each layer.
            assert waits and all("auto_ep_layer.py" in place for place in waits), waits
            waits = {}
        assert not waits, (name, waits)
        assert set(result["kernels"]) == (OTHER_KERNELS.get(name, KERNELS) if "expert" in name else set()), name
